"""Exchanges: a user message and all that answered it. The model is sent an exchange whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from app.events import Kind
from app.services.rows import MessageRow

ANSWERED = ("final", "cancelled")
"""How turns have ended whose answer is sent again: wholly, or stopped by somebody."""

_encode = msgspec.json.Encoder().encode


@dataclass(slots=True)
class Exchange:
    """One exchange as it is sent. `json` is its `count` messages, encoded and joined by commas; `tokens`
    their size as the server counted it, None where it did not."""

    first_message: str
    json: bytes
    count: int
    kind: Kind = "message"
    pinned: bool = False
    tokens: int | None = None

    @classmethod
    def of(
        cls,
        first_message: str,
        messages: Sequence[dict[str, Any]],
        kind: Kind = "message",
        pinned: bool = False,
    ) -> Exchange:
        """The exchange that begins with the stored message `first_message`."""
        return cls(first_message, b",".join(map(_encode, messages)), len(messages), kind, pinned)


def said_by(role: str, content: str) -> bytes:
    """One message, encoded."""
    return _encode({"role": role, "content": content})


def asked(question: str, kind: Kind) -> str:
    """What the user message says: a state comes with a word about what it is."""
    return f"The state of the game:\n{question}" if kind == "state" else question


def exchanges_in(rows: Sequence[MessageRow]) -> Iterator[tuple[MessageRow, MessageRow, Exchange]]:
    """Question, answer and exchange of each answered turn on a stored path, oldest first. Turns that
    failed or never ran are not sent."""
    group: list[MessageRow] = []
    for row in [*rows, None]:
        if row is None or row.role == "user":
            if group and _is_answered(group):
                yield group[0], group[-1], _exchange(group)
            group = []
        if row is not None and (group or row.role == "user"):
            group.append(row)


def _is_answered(group: Sequence[MessageRow]) -> bool:
    last = group[-1]
    return last.role == "assistant" and last.turn_state in ANSWERED


def _exchange(group: Sequence[MessageRow]) -> Exchange:
    """Calls of tools are sent only with all of their results, and results only with their calls: servers
    refuse the one without the other."""
    results = {call for row in group for call in _answered_calls(row)}
    made: set[str] = set()
    messages: list[dict[str, Any]] = []
    for row in group:
        if row.role == "user":
            messages.append({"role": "user", "content": asked(row.content, row.kind)})
        elif row.role == "tool":
            messages += [
                {"role": "tool", "tool_call_id": call, "content": row.content}
                for call in _answered_calls(row)
                if call in made
            ]
        else:
            calls = [str(call.get("id")) for call in row.tool_calls or ()]
            are_sent = bool(calls) and results.issuperset(calls)
            if are_sent:
                made.update(calls)
                messages.append({"role": "assistant", "content": row.content, "tool_calls": row.tool_calls})
            elif row.content or row is group[-1]:
                messages.append({"role": "assistant", "content": row.content})
    pinned = any(row.pinned for row in group)
    return Exchange.of(group[0].id, messages, group[0].kind, pinned)


def _answered_calls(row: MessageRow) -> list[str]:
    """The call that a tool's message answers: its `tool_calls` name it."""
    return [str(call.get("id")) for call in row.tool_calls or ()] if row.role == "tool" else []
