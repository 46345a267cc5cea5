"""Reads the head of GGUF model files: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

MAGIC = b"GGUF"

_STRING, _ARRAY = 8, 9
_FORMATS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))

_LONGEST_STRING = 1 << 24


class NotGguf(ValueError):
    """The file is no GGUF model."""


def trained_context(model: Path) -> int | None:
    """The longest context that the model was trained for, in tokens; None when it does not say.

    Raises `NotGguf`, or `OSError` when the file cannot be read.
    """
    with model.open("rb") as file:
        if file.read(4) != MAGIC:
            raise NotGguf(f"{model} is no GGUF model file.")
        try:
            _version, _tensors, entries = _number(file, "I"), _number(file, "Q"), _number(file, "Q")
            return _find_context(file, entries)
        except (struct.error, KeyError, UnicodeDecodeError, OverflowError):
            raise NotGguf(f"{model} is a GGUF file with a broken head.") from None


def _find_context(file: BinaryIO, entries: int) -> int | None:
    for _ in range(entries):
        key = _string(file)
        value = _value(file, _number(file, "I"))
        if key.endswith(".context_length") and isinstance(value, int):
            return value
    return None


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind == _ARRAY:
        element, length = _number(file, "I"), _number(file, "Q")
        for _ in range(length):
            _value(file, element)
        return None
    return _number(file, _FORMATS[kind])


def _number(file: BinaryIO, form: str) -> Any:
    (value,) = struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))
    return value


def _string(file: BinaryIO) -> str:
    length = _number(file, "Q")
    if length > _LONGEST_STRING:
        raise OverflowError
    return file.read(length).decode()
