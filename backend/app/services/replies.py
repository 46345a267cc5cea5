"""A reply as it comes from an LLM server: its bytes, and the pieces that they are turned into.

One read of the socket gives at most one piece of each kind, however many chunks the server packed into it.
"""

from __future__ import annotations

import re
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec

from app.errors import LLMError
from app.events import Usage
from app.logs import get_logger
from app.services.overflows import overflow_of
from app.services.thinking import Kind, ThinkSplitter
from app.services.tools import ConstrainedReply

log = get_logger(__name__)

LONGEST_LINE = 4 << 20
"""Bytes of one event, or of all of an answer that is not streamed: whatever sends more is out of order."""

LONGEST_CALLS = 1 << 20
"""Characters of all tool calls of a reply."""

SHORTEST_S = 0.01
"""A reply that takes less time has come at once: it tells nothing of a speed."""

NO_JSON = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding raises for bytes that are not the JSON that is expected."""


class Fault(LLMError):
    """The server says that it failed. That may be the request's fault, or its own."""


class InQueue(msgspec.Struct, frozen=True):
    """The request waits for a place: `position` from 1, `eta_s` in seconds."""

    position: int
    eta_s: float


class Piece(msgspec.Struct, frozen=True):
    """A piece of the reply (`text`) or of the reasoning before it (`thinking`)."""

    kind: Kind
    content: str


class Done(msgspec.Struct, frozen=True):
    """The end of the reply. `usage` is None where the server did not report it."""

    finish_reason: str
    usage: Usage | None
    tool_calls: list[dict[str, Any]]


Update = InQueue | Piece | Done
"""What a generation yields; `Done` is the last, exactly once."""


@dataclass(slots=True)
class Completion:
    """A whole reply."""

    response: str = ""
    thinking: str = ""
    finish_reason: str = "stop"
    usage: Usage = field(default_factory=Usage)
    tool_calls: list[dict[str, Any]] = field(default_factory=list)

    def add(self, update: Update) -> None:
        """Folds one more update in."""
        if isinstance(update, Piece):
            if update.kind == "text":
                self.response += update.content
            else:
                self.thinking += update.content
        elif isinstance(update, Done):
            self.finish_reason, self.tool_calls = update.finish_reason, update.tool_calls
            self.usage = update.usage or self.usage


# --- what the server says; none of it refers back, so the search for garbage need not know of it ---


class _FunctionDelta(msgspec.Struct, gc=False):
    name: str | None = None
    arguments: str | None = None


class _ToolCallDelta(msgspec.Struct, gc=False):
    index: int | None = None
    id: str | None = None
    function: _FunctionDelta | None = None


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_ToolCallDelta] | None = None


class _Choice(msgspec.Struct, gc=False):
    delta: _Delta | None = None
    message: _Delta | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class _CompletionDetails(msgspec.Struct, gc=False):
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


class _Timings(msgspec.Struct, gc=False):
    """What llama.cpp adds to the last chunk: tokens of the prompt that were in its cache and that were read,
    tokens that were written, and how fast."""

    cache_n: int = 0
    prompt_n: int = 0
    predicted_n: int = 0
    predicted_per_second: float | None = None


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    timings: _Timings | None = None
    error: Any = None


_NOTHING = _Delta()

_EVENTS = re.compile(rb"^data:([^\n]*)", re.MULTILINE)
"""What server-sent events say."""

_SILENT = re.compile(rb"\r?$|:|event:|id:|retry:")
"""Lines that say nothing of the reply."""

_decode_chunks = msgspec.json.Decoder(list[_Chunk]).decode


class ReplyReader:
    """Turns the bytes of a streamed chat completion into pieces. `tools` takes a constrained reply apart."""

    def __init__(self, skip_thinking: bool, tools: ConstrainedReply | None = None) -> None:
        self._skip_thinking = skip_thinking
        self._tools = tools
        self._buffer = b""
        self._body = b""
        self._splitter = ThinkSplitter()
        self._tool_calls: dict[int, dict[str, Any]] = {}
        self._call_chars = 0
        self._finish_reason: str | None = None
        self._usage: _Usage | None = None
        self._timings: _Timings | None = None
        self._began = 0.0
        self._chars = {"text": 0, "thinking": 0}
        self.has_begun = False
        self.complete = False
        self.broken: LLMError | None = None

    def feed(self, data: bytes) -> list[Piece]:
        """The pieces in what was read, neighbours of one kind joined: those before the fault where it is
        `broken`."""
        whole, newline, self._buffer = (self._buffer + data).rpartition(b"\n")
        events = _EVENTS.findall(whole)
        if newline and not events:
            lines = whole.split(b"\n")
            self._body += b"".join(line for line in lines if not _SILENT.match(line))
        if len(self._buffer) + len(self._body) > LONGEST_LINE:
            self.broken = LLMError(f"The LLM server sent more than {LONGEST_LINE >> 20} MiB in one piece.")
        while events and events[-1].strip() == b"[DONE]":
            events.pop()
            self.complete = True
        return self._pieces(self._read(events)) if events else []

    def finish(self, content_type: str) -> list[Piece]:
        """The last pieces, after the last byte.

        Raises `LLMError` when the reply is not whole.
        """
        parts: list[tuple[Kind, str]] = []
        if content_type == "application/json":  # a server that does not stream
            parts += self._read([self._body + self._buffer])
        if self.broken is not None:
            raise self.broken
        if self._finish_reason is None and not self.complete:
            raise LLMError("The LLM server broke off its answer.", retryable=True)
        parts += self._splitter.flush()
        pieces = self._pieces(parts)
        rest = self._tools.flush() if self._tools is not None else ""
        return [*pieces, Piece("text", rest)] if rest else pieces

    def done(self) -> Done:
        """What the reply ends with."""
        calls = [*self._tool_calls.values(), *(self._tools.tool_calls if self._tools else ())]
        reason = self._finish_reason or "stop"
        if self._tools and calls and reason == "stop":
            reason = "tool_calls"
        return Done(reason, self._read_usage(), calls)

    def _read(self, events: list[bytes]) -> list[tuple[Kind, str]]:
        """The parts in some events, up to the first fault."""
        parts: list[tuple[Kind, str]] = []
        text: list[str] = []
        try:
            for chunk in self._decoded(events):
                if chunk.usage is not None or chunk.timings is not None or chunk.error is not None:
                    self._note(chunk)
                if not chunk.choices:
                    continue
                if not self.has_begun:
                    self.has_begun, self._began = True, time.monotonic()
                choice = chunk.choices[0]
                if choice.finish_reason:
                    self._finish_reason = choice.finish_reason
                delta = choice.delta or choice.message or _NOTHING
                if thought := delta.reasoning_content or delta.reasoning:
                    parts += self._splitter.feed("".join(text))
                    parts.append(("thinking", thought))
                    text = []
                if delta.content:
                    text.append(delta.content)
                for call in delta.tool_calls or ():
                    self._read_tool_call(call)
        except LLMError as error:
            self.broken = error
        return parts + self._splitter.feed("".join(text))

    def _decoded(self, events: list[bytes]) -> list[_Chunk]:
        """The chunks of some events. All are decoded at once, which costs less than one by one; where one of
        them is none, those before it still count, and the reply is `broken`."""
        with suppress(*NO_JSON):
            return _decode_chunks(b"[%b]" % b",".join(events))
        chunks: list[_Chunk] = []
        for event in events:
            try:
                (chunk,) = _decode_chunks(b"[%b]" % event)
            except (ValueError, *NO_JSON):
                self.broken = LLMError("The LLM server sent something that is no chat completion.")
                break
            chunks.append(chunk)
        return chunks

    def _note(self, chunk: _Chunk) -> None:
        """Keeps what a chunk says beside the reply. Raises what it means that the server failed."""
        if chunk.error is not None:
            log.debug("LLM server failed in its reply", said=message_in(chunk.error))
            if not self.has_begun and (overflow := overflow_of(chunk.error)) is not None:
                raise overflow
            raise Fault("The LLM server failed in its reply.", retryable=True)
        self._usage = chunk.usage or self._usage
        self._timings = chunk.timings or self._timings

    def _read_tool_call(self, delta: _ToolCallDelta) -> None:
        empty = {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
        index = len(self._tool_calls) if delta.index is None else delta.index
        call = self._tool_calls.setdefault(index, empty)
        call["id"] = delta.id or call["id"]
        if delta.function is not None:
            call["function"]["name"] += delta.function.name or ""
            call["function"]["arguments"] += delta.function.arguments or ""
            self._call_chars += len(delta.function.name or "") + len(delta.function.arguments or "")
        if self._call_chars + len(self._tool_calls) > LONGEST_CALLS:
            raise LLMError("The LLM server did not end its tool calls.")

    def _pieces(self, parts: list[tuple[Kind, str]]) -> list[Piece]:
        joined: list[tuple[Kind, list[str]]] = []
        for kind, content in parts:
            self._chars[kind] += len(content)
            if kind == "thinking" and self._skip_thinking:
                continue
            if joined and joined[-1][0] == kind:
                joined[-1][1].append(content)
            else:
                joined.append((kind, [content]))
        pieces = [self._piece(kind, "".join(contents)) for kind, contents in joined]
        return [piece for piece in pieces if piece.content]

    def _piece(self, kind: Kind, content: str) -> Piece:
        if kind == "text" and self._tools is not None:
            content = self._tools.feed(content)
        return Piece(kind, content.replace("\0", ""))  # PostgreSQL stores no NUL, and no reader wants one

    def _read_usage(self) -> Usage | None:
        timings = self._timings or _Timings()
        usage = self._usage
        if usage is None:
            if self._timings is None:
                return None
            usage = _Usage(timings.cache_n + timings.prompt_n, timings.predicted_n)
        cached = (usage.prompt_tokens_details or _PromptDetails()).cached_tokens
        reasoning = (usage.completion_tokens_details or _CompletionDetails()).reasoning_tokens
        if reasoning is None:  # its share of the text
            chars = sum(self._chars.values())
            reasoning = round(usage.completion_tokens * self._chars["thinking"] / chars) if chars else 0
        return Usage(
            usage.prompt_tokens,
            usage.completion_tokens,
            timings.cache_n if cached is None else cached,
            reasoning,
            tokens_per_second=_rounded(timings.predicted_per_second)
            or speed(usage.completion_tokens, time.monotonic() - self._began),
        )


def speed(tokens: int, seconds: float) -> float | None:
    """Tokens a second, from the moment at which the first one came; None where that is too short to tell."""
    return _rounded((tokens - 1) / seconds) if tokens > 1 and seconds >= SHORTEST_S else None


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 2)


def error_text(body: bytes) -> str:
    """The message in the body of an error answer."""
    try:
        return message_in(msgspec.json.decode(body))
    except NO_JSON:
        return ""


def message_in(found: Any) -> str:
    """The message in an error object, in any of the forms that servers use."""
    while isinstance(found, dict):
        found = found.get("error") or found.get("message") or found.get("detail")
    return found[:500] if isinstance(found, str) else ""
