"""The state of a game as the model reads it: short, with positions and maps in a form that it can follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

CELLS = {0: ".", 1: "#"}
"""Cells of maps that are numbers: by custom 1 is a wall and 0 is free."""


def compact(state: Mapping[str, Any]) -> str:
    """The state, a line for each of its keys in the order they came: points as `(x,y)`, lists of points
    on one line, maps as rows of characters, and everything else as JSON."""
    return "\n".join(_line(key, value) for key, value in state.items())


def _line(key: str, value: Any) -> str:
    rows = _map_rows(value)
    if rows is not None:
        return "\n".join([f"{key}:", *rows])
    if isinstance(value, list) and value and all(_point(item) is not None for item in value):
        return f"{key}: {' '.join(str(_point(item)) for item in value)}"
    return f"{key}: {_point(value) or _json(value)}"


def _point(value: Any) -> str | None:
    """`(x,y)` of a pair of numbers or an object with x and y, with what else that object has."""
    if isinstance(value, list):
        return f"({value[0]},{value[1]})" if len(value) == 2 and all(map(_is_number, value)) else None
    if isinstance(value, dict) and _is_number(value.get("x")) and _is_number(value.get("y")):
        rest = {key: found for key, found in value.items() if key not in {"x", "y"}}
        return f"({value['x']},{value['y']})" + (_json(rest) if rest else "")
    return None


def _map_rows(value: Any) -> list[str] | None:
    """The rows of a map: a list of at least two lists of cells, or of lines of text, of one length."""
    if not isinstance(value, list) or len(value) < 2:
        return None
    rows = [_row(row) for row in value]
    lengths = {len(row) for row in rows if row is not None}
    return (
        [row for row in rows if row] if None not in rows and len(lengths) == 1 and max(lengths) > 2 else None
    )


def _row(row: Any) -> str | None:
    if isinstance(row, str):
        return row
    if not isinstance(row, list) or not all(map(_is_cell, row)):
        return None
    return "".join(CELLS.get(cell, str(cell)) for cell in row)


def _is_cell(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) == 1
    return isinstance(value, int) and 0 <= value <= 9


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
