"""The vocabulary that every door shares: what a turn is asked for, and the events it answers with.

The events are section "Turns and their events" of `docs/protocol.md`. They are encoded once, by
`encode`, and carried unchanged over SSE, NDJSON, WebSocket and MQTT.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections import deque
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.access import Identity
from app.errors import ErrorInfo, InvalidRequest
from app.options import Extra, Format, LogitBias, Stop, ToolChoice, Tools, invalid

ID_PATTERN = r"^[A-Za-z0-9_.:-]{1,128}$"
"""Session ids and request ids: 1 to 128 characters of this alphabet."""

_ID = re.compile(ID_PATTERN)

T = TypeVar("T")


def check_id(field: str, text: str) -> None:
    """Raises `InvalidRequest`, naming `field`, when `text` may be no session id or request id."""
    if not is_id(text):
        raise InvalidRequest(f"{field}: 1 to 128 characters of A-Z a-z 0-9 _ . : - are needed")


DRAWN = 256
_random_parts: deque[str] = deque()


def is_id(text: str) -> bool:
    """Whether `text` may be a session id or a request id."""
    return _ID.fullmatch(text) is not None


def new_id() -> str:
    """A new identifier: 28 hex characters, 48 bits of milliseconds before 64 random ones, so that
    ids made later sort later."""
    try:
        part = _random_parts.popleft()
    except IndexError:
        # Many at once: asking the system costs more than everything else here.
        drawn = secrets.token_hex(8 * DRAWN)
        _random_parts.extend(drawn[at : at + 16] for at in range(16, len(drawn), 16))
        part = drawn[:16]
    return f"{time.time_ns() // 1_000_000:012x}{part}"


# --- what is asked for ---------------------------------------------------------------------------


class GenerationOptions(BaseModel):
    """How to generate, as OpenAI-compatible servers take it. What is absent is the server's choice
    or, where the portal has a setting for it, the setting's."""

    model_config = ConfigDict(extra="ignore")

    temperature: Annotated[float | None, Field(ge=0, le=2, description="0 is greedy")] = None
    top_p: Annotated[float | None, Field(gt=0, le=1, description="Nucleus sampling")] = None
    max_tokens: Annotated[int | None, Field(ge=1, le=1_000_000, description="Longest reply, in tokens")] = (
        None
    )
    model: Annotated[str | None, Field(max_length=256, description="A model of the LLM server")] = None
    stop: Annotated[Stop | None, Field(description="Texts that end the reply, at most four")] = None
    seed: Annotated[int | None, Field(ge=0, lt=2**63, description="For a repeatable reply")] = None
    frequency_penalty: Annotated[
        float | None, Field(ge=-2, le=2, description="Above 0: what came often comes less")
    ] = None
    presence_penalty: Annotated[
        float | None, Field(ge=-2, le=2, description="Above 0: what came once comes less")
    ] = None
    logit_bias: Annotated[
        LogitBias | None, Field(description="By the number of a token: -100 (never) to 100 (only this)")
    ] = None
    tools: Annotated[Tools | None, Field(description="Tools in OpenAI's form")] = None
    tool_choice: Annotated[ToolChoice | None, Field(description="OpenAI's tool_choice")] = None
    parallel_tool_calls: Annotated[
        bool | None, Field(description="Whether a reply may have several tool calls")
    ] = None
    response_format: Annotated[Format | None, Field(description="OpenAI's response_format")] = None
    reasoning_effort: Annotated[
        Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None,
        Field(description="How much a model thinks; goes before LLM_SKIP_THINKING, which still hides it"),
    ] = None
    extra: Annotated[
        Extra | None,
        Field(description="What only some servers take, as they call it: top_k, min_p, grammar, …"),
    ] = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> GenerationOptions:
        """These options, as a program gives them. Raises `InvalidRequest`, which names the field."""
        try:
            return GenerationOptions(**options)
        except ValidationError as error:
            raise invalid(error) from None

    def given(self) -> dict[str, Any]:
        """Only the options that were given."""
        return {
            name: value
            for name in self.model_fields_set
            if name in _OPTIONS and (value := getattr(self, name)) is not None
        }


_OPTIONS = frozenset(GenerationOptions.model_fields)

Kind = Literal["message", "state"]
"""What a turn answers: a message, or the state of a game."""


class ReplyTarget(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where an MQTT client wants the end of a turn: published by the outbox, whatever happens to the
    process in between.

    `session_id` is the client's name for its session. `form` is `text`, `json` (the ending event) or
    `hint`; with `json_errors` a failure is JSON even where the reply is text. `correlation` and `expiry`
    (seconds) are MQTT 5's. The turn's events go to `stream`, if there is one, in packets of at most `chunk`
    bytes.
    """

    project: str
    topic: str
    session_id: str
    form: Literal["text", "json", "hint"] = "text"
    json_errors: bool = False
    correlation: bytes | None = None
    expiry: int | None = None
    stream: str | None = None
    chunk: int | None = None


class Mark(msgspec.Struct, frozen=True):
    """What a broker's message without a request id is known by. `again` when it may have been taken before:
    not before `since` (Unix time), then."""

    hash: str
    again: bool
    since: float = 0.0


class TurnRequest(msgspec.Struct, frozen=True):
    """One message, or state of a game, for a session, as a door hands it to `SessionManager.submit`.

    `deadline` is a Unix time in seconds that bounds the wait for a place at the LLM server.
    `detached` turns run on when their last follower leaves. `system_prompt`, or the template with its
    `variables`, and `project` (empty: the default one) count only when the session is new;
    `template_version` is the version that the prompt was rendered from. A state takes the place of one that
    waits in the same session. With `regenerate` the last user message of the session is answered again, and
    `message` is empty; with `edits` the message takes the place of that one, and with `follows` it comes
    behind that one: the history goes on from there. `previous` is the response that was named for that.
    """

    who: Identity
    session_id: str
    message: str
    kind: Kind = "message"
    request_id: str | None = None
    system_prompt: str | None = None
    template_id: str | None = None
    variables: Mapping[str, Any] = msgspec.field(default_factory=dict)
    template_version: str | None = None
    project: str = ""
    options: GenerationOptions = msgspec.field(default_factory=GenerationOptions)
    deadline: float | None = None
    detached: bool = True
    reply_to: ReplyTarget | None = None
    mark: Mark | None = None
    regenerate: bool = False
    edits: str | None = None
    follows: str | None = None
    previous: str | None = None

    @property
    def needs_session(self) -> bool:
        """Whether it is about what was said before."""
        return self.regenerate or self.edits is not None or self.follows is not None

    def fingerprint(self) -> str:
        """A hash of message and parameters: the same request id with another one is a conflict."""
        given: list[Any] = [self.message, self.options.given()]
        if self.kind == "state":
            given.append(self.kind)
        if self.regenerate:
            given.append("regenerate")
        if self.edits is not None:
            given.append(["edits", self.edits])
        if self.previous is not None:  # which message that is, and whether there is one yet, changes
            given.append(["previous", self.previous])
        return hashlib.sha256(msgspec.json.encode(given, order="deterministic")).hexdigest()


# --- what is answered ----------------------------------------------------------------------------


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one turn. `cached_tokens` of the prompt came from the server's prefix cache;
    `reasoning_tokens` are part of `completion_tokens`. `estimated` marks counts that are neither the
    server's report nor made with its tokenizer. `ttft_ms` are the milliseconds from acceptance to the first
    piece of the reply, `tokens_per_second` the speed at which it was written, where these are known. With
    `cache_hit` the answer was kept from an earlier time and nothing was asked of a model: the tokens are
    those of that time. `model` is the one that answered, which need not be the one that was asked for."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    estimated: bool = False
    ttft_ms: int | None = None
    tokens_per_second: float | None = None
    cache_hit: bool = False
    model: str | None = None


class Event(msgspec.Struct, frozen=True, tag_field="type"):
    """What all events carry: `type` and `turn_id`."""

    turn_id: str


class Accepted(Event, frozen=True, tag="accepted"):
    """The user message is committed. Ids are null for a chat without a session."""

    session_id: str | None
    request_id: str | None
    message_id: str | None


class Queued(Event, frozen=True, tag="queued"):
    """The turn waits for a place at the LLM server: `position` from 1, `eta_s` in seconds."""

    position: int
    eta_s: float


class Restarted(Event, frozen=True, tag="restarted"):
    """What came before is void; the reply begins again."""

    attempt: int


class Thinking(Event, frozen=True, tag="thinking"):
    """A piece of reasoning."""

    content: str


class Token(Event, frozen=True, tag="token"):
    """A piece of the reply."""

    content: str


class Final(Event, frozen=True, tag="final"):
    """The reply is stored. Times in milliseconds from acceptance."""

    response: str
    finish_reason: str
    usage: Usage
    tool_calls: list[dict[str, Any]]
    elapsed_ms: int
    ttft_ms: int | None
    message_id: str | None


class Cancelled(Event, frozen=True, tag="cancelled"):
    """A stop was asked for; `response` is what there was, `usage` what it took, as far as it came to that."""

    response: str
    message_id: str | None
    usage: Usage | None = None


class SupersededBy(Event, frozen=True, tag="superseded"):
    """A newer state of the session, with the request id `by`, took its place before it ran."""

    by: str


class ExpiredEvent(Event, frozen=True, tag="expired"):
    """The deadline passed before the turn ran."""


class Failed(Event, frozen=True, tag="error"):
    """The turn failed."""

    error: ErrorInfo


Ending = Final | Cancelled | SupersededBy | ExpiredEvent | Failed
"""Exactly one of these ends a turn."""

TurnEvent = Accepted | Queued | Restarted | Thinking | Token | Ending

encode = msgspec.json.Encoder().encode
"""An event as one JSON object, UTF-8."""

decode_ending = msgspec.json.Decoder(Ending).decode
"""A stored ending."""


def type_of(event: TurnEvent) -> str:
    """The event's `type`."""
    return str(event.__struct_config__.tag)
