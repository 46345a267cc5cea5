"""How LLM servers say that a prompt is longer than their context."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from app.errors import ContextExceeded

_CODES = {"exceed_context_size_error", "context_length_exceeded"}
"""llama.cpp's `type` and OpenAI's `code`."""

_WORDS = re.compile(
    r"maximum context length|exceeds? the (available |model's )?context|context (length|window|size) exceeded"
    r"|prompt is too long|larger than the context",
    re.IGNORECASE,
)
"""What vLLM, and others that have only words, write."""

_LIMITS = (
    re.compile(r"maximum context length (?:is|of) (\d+)", re.IGNORECASE),
    re.compile(r"context (?:size|length|window) (?:is |of )?\(?(\d+)", re.IGNORECASE),
)
_SIZES = (
    re.compile(r"\((\d+) in the messages"),
    re.compile(r"messages resulted in (\d+)"),
    re.compile(r"request \((\d+) tokens\)"),
    re.compile(r"contains (?:at least )?(\d+) input tokens"),
)


def overflow_in(body: bytes) -> ContextExceeded | None:
    """The error that the body of a refusal tells of, if it is this one."""
    try:
        return overflow_of(msgspec.json.decode(body))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def overflow_of(answer: Any) -> ContextExceeded | None:
    """The same of the body, or of the error in it, decoded."""
    error = answer
    while isinstance(error, dict) and isinstance(error.get("error"), dict | str):
        error = error["error"]
    fields = error if isinstance(error, dict) else {"message": error}
    said = fields.get("message")
    text = said if isinstance(said, str) else ""
    if _CODES.isdisjoint(map(str, (fields.get("type"), fields.get("code")))) and not _WORDS.search(text):
        return None
    limit = _positive(fields.get("n_ctx") or _number(_LIMITS, text))
    size = _positive(fields.get("n_prompt_tokens") or _number(_SIZES, text))
    # A size within the limit is none to reckon with: it was the reply that was to be too long.
    return ContextExceeded(limit=limit, size=None if size is None or size < (limit or 0) else size)


def _number(patterns: tuple[re.Pattern[str], ...], text: str) -> int | None:
    found = next((match for pattern in patterns if (match := pattern.search(text))), None)
    return None if found is None else int(found[1])


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
