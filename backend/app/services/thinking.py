"""Splits `<think>…</think>` out of a reply that arrives in pieces, wherever they are cut."""

from __future__ import annotations

from typing import Literal

OPEN, CLOSE = "<think>", "</think>"

Kind = Literal["text", "thinking"]


class ThinkSplitter:
    """Reads the pieces of one reply.

    A block of thought is recognised at the beginning of the reply, or right after another block, so
    a reply may still speak of `<think>`. White space between a block and what follows belongs to
    neither.
    """

    def __init__(self) -> None:
        self._held = ""
        self._state: Literal["start", "thinking", "text"] = "start"
        self._after_block = False

    def feed(self, piece: str) -> list[tuple[Kind, str]]:
        """The parts that are certain after this piece, in order, none of them empty."""
        parts: list[tuple[Kind, str]] = []
        self._held += piece
        while self._held:
            before = (self._state, len(self._held))
            if self._state == "start":
                self._read_start()
            elif self._state == "thinking":
                self._read_thinking(parts)
            else:
                parts.append(("text", self._held))
                self._held = ""
            if (self._state, len(self._held)) == before:
                break
        return parts

    def flush(self) -> list[tuple[Kind, str]]:
        """What was held back, once no more comes."""
        held, self._held = self._held, ""
        if self._state == "start" and self._after_block:
            held = held.lstrip()
        if not held:
            return []
        return [("thinking" if self._state == "thinking" else "text", held)]

    def _read_start(self) -> None:
        body = self._held.lstrip()
        if body.startswith(OPEN):
            self._state, self._held = "thinking", body[len(OPEN) :]
        elif not OPEN.startswith(body):
            self._state = "text"
            self._held = body if self._after_block else self._held

    def _read_thinking(self, parts: list[tuple[Kind, str]]) -> None:
        thought, mark, rest = self._held.partition(CLOSE)
        if mark:
            self._state, self._held, self._after_block = "start", rest, True
        else:
            kept = _overlap(thought)
            thought, self._held = thought[: len(thought) - kept], thought[len(thought) - kept :]
        if thought:
            parts.append(("thinking", thought))


def _overlap(text: str) -> int:
    """How many characters at the end of `text` may be the beginning of the closing mark."""
    for length in range(min(len(CLOSE) - 1, len(text)), 0, -1):
        if CLOSE.startswith(text[-length:]):
            return length
    return 0
