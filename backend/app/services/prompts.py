"""What is sent to the model: prompts that are kept as they go over the wire, and system prompts in which
several have a say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, overload

import msgspec

Messages = Sequence[Mapping[str, Any]]
"""Chat messages in OpenAI's form."""

MESSAGE_OVERHEAD = 16
"""Most tokens that a chat template adds to a message."""

BYTES_A_TOKEN = 3
"""How many bytes a token has, where nobody counts: rather too few, so that a text counts for too many."""


def estimate_tokens(text: str) -> int:
    """Roughly how many tokens a text has, rather too many than too few: used only where the server
    does not tell."""
    return len(text.encode()) // BYTES_A_TOKEN + 1


class Prompt(Sequence[Mapping[str, Any]]):
    """The messages of a request in OpenAI's form, encoded already: a long history is joined to its newest
    message, and not encoded anew at each turn. Whoever looks at the messages themselves pays for it."""

    def __init__(self, past: bytes | bytearray, newest: bytes, count: int) -> None:
        self.json = b"".join((b"[", past, b",", newest, b"]") if past else (b"[", newest, b"]"))
        self._count = count
        self._messages: list[dict[str, Any]] | None = None

    @property
    def _decoded(self) -> list[dict[str, Any]]:
        if self._messages is None:
            self._messages = msgspec.json.decode(self.json, type=list[dict[str, Any]])
        return self._messages

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[Mapping[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self._decoded[index]

    def __len__(self) -> int:
        return self._count

    @property
    def estimate(self) -> int:
        """Roughly how many tokens it has."""
        return len(self.json) // BYTES_A_TOKEN


def estimate_prompt(messages: Messages) -> int:
    """Roughly how many tokens the messages have, with what a chat template adds."""
    if isinstance(messages, Prompt):
        return messages.estimate
    return sum(estimate_tokens(str(m.get("content", ""))) + MESSAGE_OVERHEAD // 2 for m in messages)


def _raw(value: Any) -> msgspec.Raw:
    if isinstance(value, Prompt):
        return msgspec.Raw(value.json)
    raise NotImplementedError(f"{type(value).__name__} cannot be encoded")


encode_body = msgspec.json.Encoder(enc_hook=_raw).encode
"""The body of a request, in which messages may be a `Prompt`."""


def with_system(messages: Messages, *, before: str = "", after: str = "") -> Messages:
    """The messages with more text in their system prompt. In one message with theirs: many chat templates
    take no second one."""
    first = messages[0]
    has_one = first.get("role") == "system" and isinstance(first.get("content"), str)
    text = "\n\n".join(filter(None, (before, first["content"] if has_one else "", after)))
    if not text:
        return messages
    return [{"role": "system", "content": text}, *(messages[1:] if has_one else messages)]
