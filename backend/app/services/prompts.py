"""The system prompt of a request, where several have a say in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Messages = Sequence[Mapping[str, Any]]
"""Chat messages in OpenAI's form."""


def with_system(messages: Messages, *, before: str = "", after: str = "") -> Messages:
    """The messages with more text in their system prompt. In one message with theirs: many chat templates
    take no second one."""
    first = messages[0]
    has_one = first.get("role") == "system" and isinstance(first.get("content"), str)
    text = "\n\n".join(filter(None, (before, first["content"] if has_one else "", after)))
    if not text:
        return messages
    return [{"role": "system", "content": text}, *(messages[1:] if has_one else messages)]
