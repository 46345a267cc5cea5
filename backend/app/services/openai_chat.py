"""The answers of a turn as OpenAI's chat completions: whole, and in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from app.errors import Internal, PortalError, openai_body
from app.events import Cancelled, Ending, Final, Restarted, Thinking, Token, TurnEvent, Usage
from app.services.turns import Numbered, Turn, answer_of

_encode = msgspec.json.Encoder().encode

REASONS = ("stop", "length", "tool_calls", "content_filter")
"""The finish reasons that OpenAI's clients know."""

BEGUN_AGAIN = Internal("The reply has begun again: what came before is void. Send the request again.")


def finish_reason(answer: Final | Cancelled) -> str:
    """Why the reply ended, in OpenAI's words. A reply that somebody stopped has stopped."""
    reason = answer.finish_reason if isinstance(answer, Final) else "stop"
    return reason if reason in REASONS else "stop"


def usage_of(usage: Usage | None) -> dict[str, Any]:
    """The usage in OpenAI's form."""
    usage = usage or Usage()
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def completion_id(turn: Turn) -> str:
    """The id of the completion that the turn makes."""
    return f"chatcmpl-{turn.id}"


def chat_completion(turn: Turn, answer: Final | Cancelled, model: str) -> dict[str, Any]:
    """The whole answer. `model` is named where it is not known which one answered."""
    calls = answer.tool_calls if isinstance(answer, Final) else []
    message: dict[str, Any] = {"role": "assistant", "content": answer.response or (None if calls else "")}
    message["refusal"] = None
    if turn.reasoning:
        message["reasoning_content"] = turn.reasoning
    if calls:
        message["tool_calls"] = calls
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason(answer)}
    return {
        "id": completion_id(turn),
        "object": "chat.completion",
        "created": int(turn.row.created_at),
        "model": turn.model or model,
        "choices": [choice],
        "usage": usage_of(answer.usage),
    }


class ChatChunks:
    """The events of a turn as chunks. With `include_usage` the last one tells the usage."""

    def __init__(self, turn: Turn, model: str, *, include_usage: bool) -> None:
        self._turn = turn
        self._model = model
        self._include_usage = include_usage
        self._head = b""
        self._is_over = False

    def encode(self, batch: Sequence[Numbered]) -> bytes:
        """The chunks for these events."""
        return b"".join(self._one(item.event) for item in batch)

    def _one(self, event: TurnEvent) -> bytes:
        if self._is_over:
            return b""
        if isinstance(event, Token):
            return self._delta(b'{"content":' + _encode(event.content) + b"}")
        if isinstance(event, Thinking):
            return self._delta(b'{"reasoning_content":' + _encode(event.content) + b"}")
        if isinstance(event, Ending):
            self._is_over = True
            return self._end(event)
        if isinstance(event, Restarted) and self._head:
            self._is_over = True
            return sse(openai_body(BEGUN_AGAIN))
        return b""

    def _delta(self, delta: bytes, reason: bytes = b"null") -> bytes:
        first = b"" if self._head else self._begin()
        rest = b',"logprobs":null,"finish_reason":' + reason + b"}]}\n\n"
        return first + self._head + b'"choices":[{"index":0,"delta":' + delta + rest

    def _begin(self) -> bytes:
        turn = self._turn
        head = {
            "id": completion_id(turn),
            "object": "chat.completion.chunk",
            "created": int(turn.row.created_at),
            "model": turn.model or self._model,
        }
        self._head = b"data: " + _encode(head)[:-1] + b","
        return self._delta(b'{"role":"assistant","content":""}')

    def _end(self, ending: Ending) -> bytes:
        try:
            answer = answer_of(ending)
        except PortalError as error:
            return sse(openai_body(error))
        said = b""
        if isinstance(answer, Final) and answer.tool_calls:
            calls = [{"index": index, **call} for index, call in enumerate(answer.tool_calls)]
            said = self._delta(_encode({"tool_calls": calls}))
        said += self._delta(b"{}", _encode(finish_reason(answer)))
        if self._include_usage:
            said += self._head + b'"choices":[],"usage":' + _encode(usage_of(answer.usage)) + b"}\n\n"
        return said + b"data: [DONE]\n\n"


def sse(body: dict[str, Any]) -> bytes:
    """A server-sent event without a name."""
    return b"data: " + _encode(body) + b"\n\n"
