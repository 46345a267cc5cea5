"""Payloads of the MQTT door: what a message asks for."""

from __future__ import annotations

import base64
import hashlib
import time
from typing import Annotated, Any, Literal

import msgspec
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from app.errors import InvalidRequest, PortalError
from app.events import GenerationOptions, Mark, ReplyTarget, check_id, is_id, new_id
from app.mqtt.connection import Incoming
from app.mqtt.topics import (
    ASSISTANT_RESPONSE,
    EVERY_SESSION,
    HINT,
    NEW_SESSION,
    STREAM,
    Address,
    Verb,
    parse,
)
from app.options import invalid
from app.services.states import compact

LONGEST_TEXT = 1_000_000
SMALLEST_CHUNK = 128
"""Below this a packet of a stream has no room for a piece beside its ids."""

Prompt = Annotated[str, Field(max_length=LONGEST_TEXT)]


class ForeignReplyTopic(InvalidRequest):
    """The answer was to go to a topic that is not the asker's."""


class PromptTemplate(BaseModel):
    """A prompt as older clients send it."""

    content: Prompt | None = None


class Request(BaseModel):
    """The keys that every request may have. Numbers may be strings; unknown keys are ignored."""

    model_config = ConfigDict(alias_generator=to_camel, validate_by_name=True, validate_by_alias=True)

    session_id: Annotated[str | None, Field(description="The session; else that of the topic")] = None
    request_id: Annotated[
        str | None, Field(description="Comes back with the answer; the same one makes one turn")
    ] = None
    client_id: Annotated[str | None, Field(description="Names the session where nothing else does")] = None
    token: Annotated[str | None, Field(description="An access token, or an API key for a device")] = None


class Ask(Request, GenerationOptions):
    """The keys of `user_input`, and beside the state in `state`."""

    message: Annotated[Prompt | None, Field(description="What the player says")] = None
    reply_topic: Annotated[
        str | None, Field(description="Where the answer goes: the session's own topic or below it")
    ] = None
    system_prompt: Annotated[Prompt | None, Field(description="For a session that is new")] = None
    prompt_template: Annotated[PromptTemplate | None, Field(alias="prompt_template")] = None
    format: Annotated[Literal["text", "json"], Field(description="`json`: the event that ends the turn")] = (
        "text"
    )
    stream: Annotated[bool, Field(description="Publish the turn's events as they come")] = False
    max_chunk_bytes: Annotated[
        int | None, Field(ge=SMALLEST_CHUNK, le=LONGEST_TEXT, description="Largest packet of the stream")
    ] = None
    deadline_s: Annotated[
        float | None, Field(alias="deadline_s", gt=0, le=86400, description="Longest wait for a place, in s")
    ] = None

    @property
    def prompt(self) -> str | None:
        """The system prompt for a session that is new."""
        if self.system_prompt is not None:
            return self.system_prompt
        return self.prompt_template.content if self.prompt_template else None


class TemplateBody(Request):
    """The payload of `template`: another system prompt, for a session or for the project."""

    template: Annotated[
        Prompt | None, Field(validation_alias=AliasChoices("template", "system_prompt", "systemPrompt"))
    ] = None
    prompt_template: Annotated[PromptTemplate | Prompt | None, Field(alias="prompt_template")] = None
    reset: Annotated[bool, Field(description="Whether sessions begin anew")] = True

    @property
    def prompt(self) -> str:
        """The new prompt. Raises `InvalidRequest` when there is none."""
        nested = self.prompt_template
        found = nested.content if isinstance(nested, PromptTemplate) else nested
        if self.template is None and found is None:
            raise InvalidRequest("template: the new system prompt is needed")
        return self.template if self.template is not None else found or ""


class TargetBody(Request):
    """The payload of `clear_history` and `delete_session`."""

    target: Annotated[str | None, Field(description="The session, or `all`")] = None


class Command(msgspec.Struct, frozen=True):
    """A request that can be carried out: what is asked for (`body`), of which session (None: of none), by
    whom, and where the answer goes. `session_id` is the client's name for the session; a state is in
    `text`, in the model's form."""

    address: Address
    verb: Verb
    body: Request
    session_id: str | None
    target: ReplyTarget
    request_id: str | None
    token: str | None
    message: Incoming
    text: str = ""
    deadline: float | None = None
    is_plain: bool = False

    @property
    def key(self) -> str | None:
        """The session's name in the portal: a device's are its own."""
        return _key(self.address, self.session_id)

    @property
    def mark(self) -> Mark:
        """By what this very message is known when the broker sends it again."""
        return Mark(_hash(self.message), self.message.again, self.message.since)

    @property
    def is_for_all(self) -> bool:
        """Whether it is about no single session."""
        by_name = self.session_id == EVERY_SESSION and self.address.session is None
        return self.session_id is None or by_name


class Refusal(msgspec.Struct, frozen=True):
    """A request for nothing that can be done; `target` is None where nobody can be told."""

    address: Address
    error: PortalError
    target: ReplyTarget | None
    request_id: str | None = None


def read(project: str, message: Incoming) -> Command | Refusal | None:
    """What a message asks for; None when it is no request. Raises nothing, whatever the bytes."""
    address = parse(project, message.topic)
    if address is None:
        return None
    draft = _Draft(address, message)
    try:
        return draft.command()
    except ValidationError as error:
        return draft.refusal(invalid(error))
    except PortalError as error:
        return draft.refusal(error)


class _Draft:
    """A request while it is read: what is known so far tells where an error goes."""

    def __init__(self, address: Address, message: Incoming) -> None:
        self._address = address
        self._message = message
        self._body: dict[str, Any] = {}
        self._is_plain = False
        self._session: str | None = None
        self._request_id: str | None = None
        self._target: ReplyTarget | None = None

    def command(self) -> Command:
        """Reads the message. Raises `InvalidRequest`, or pydantic's `ValidationError`."""
        address, message = self._address, self._message
        self._body, self._is_plain = _object(address, message.payload)
        self._session = self._find_session()
        self._target = self._default_target()
        self._request_id = self._find_request_id()
        text = ""
        if address.verb == "state":
            text = self._take_state()
        self._take_properties()
        # With a session in its topic, an empty message clears it.
        clears = address.verb == "user_input" and not message.payload and address.session is not None
        verb: Verb = "clear_history" if clears else address.verb
        body = _FORMS[verb].model_validate(self._body)
        if isinstance(body, Ask):
            text = self._question(body, text)
        self._target = self._find_target(body)
        return Command(
            address,
            verb,
            body,
            self._session,
            self._target,
            self._request_id,
            body.token,
            message,
            text,
            self._deadline(body),
            self._is_plain,
        )

    def refusal(self, error: PortalError) -> Refusal:
        """The answer to a message that is wrong, as far as it can be told where it goes."""
        if self._target is None:
            self._find_ids()
        return Refusal(self._address, error, self._target, self._request_id)

    def _find_ids(self) -> None:
        """What an error needs to find its way, as far as it is right, where reading came not so far."""
        given = self._given_request_id
        self._request_id = given if isinstance(given, str) and is_id(given) else None
        session = self._address.session
        if session is not None and is_id(session):
            self._session = session
        if self._session is not None or self._address.verb == "session":
            self._target = self._default_target()

    @property
    def _given_request_id(self) -> Any:
        return self._body.get("requestId", self._body.get("request_id"))

    @property
    def _given_reply_topic(self) -> str | None:
        """What the body says in `replyTopic`, where it may; the body need not be right."""
        given = self._body.get("replyTopic", self._body.get("reply_topic"))
        takes_it = self._address.verb in {"user_input", "state"}
        return given if takes_it and isinstance(given, str) else None

    def _find_session(self) -> str | None:
        """The session's name. Raises `InvalidRequest`."""
        address, body = self._address, self._body
        if address.verb == "session":
            return None
        named = [body.get("sessionId"), body.get("session_id"), body.get("target"), address.session]
        if address.verb in {"user_input", "state"}:
            named = [*named[:2], address.session, body.get("clientId"), body.get("client_id")]
        for value in named:
            if value not in {None, ""} if isinstance(value, str | None) else True:
                text = value if isinstance(value, str) else ""
                check_id("sessionId", text)
                check_id("sessionId", _key(address, text) or "")
                return text
        if address.verb in {"user_input", "state"}:
            return new_id()
        if address.verb == "cancel":
            raise InvalidRequest("sessionId: it is needed")
        return None

    def _find_request_id(self) -> str | None:
        """The client's id for the request, or one made of its correlation data. Raises `InvalidRequest`."""
        given = self._given_request_id
        if given is not None:
            check_id("requestId", given if isinstance(given, str) else "")
            return str(given)
        if self._message.correlation is None:
            return None
        digest = hashlib.sha256(self._message.correlation).digest()
        return f"c-{base64.urlsafe_b64encode(digest).decode().rstrip('=')}"

    def _take_state(self) -> str:
        """Takes the state out of the payload: what is under `state`, or all keys that mean nothing else."""
        if isinstance(self._body.get("state"), dict):
            state = self._body.pop("state")
        else:
            state = {key: value for key, value in self._body.items() if key not in BESIDE_STATE}
            self._body = {key: value for key, value in self._body.items() if key in BESIDE_STATE}
        if not state:
            raise InvalidRequest("state: a JSON object with the state of the game is needed")
        return compact(state)

    def _take_properties(self) -> None:
        """What MQTT 5 clients may say in user properties."""
        for name in ("token", "maxChunkBytes"):
            if name in self._message.user and name not in self._body:
                self._body[name] = self._message.user[name]

    def _question(self, body: Ask, state: str) -> str:
        if self._address.verb == "state":
            return f"{state}\n\nThe player says: {body.message}" if body.message else state
        if not body.message:
            raise InvalidRequest("message: it is needed")
        return body.message

    def _default_target(self) -> ReplyTarget:
        """Where answers and errors go when nothing else was, or could be, asked for."""
        address, message = self._address, self._message
        if address.verb == "session":
            topic = f"{address.base}/{NEW_SESSION}"
        elif address.verb == "user_input":
            topic = address.at(ASSISTANT_RESPONSE, self._session or EVERY_SESSION)
        else:
            topic = address.at(HINT, self._session or EVERY_SESSION)
        wants_json = self._body.get("format") == "json"
        if address.verb == "session":
            wants_json = bool(message.payload) and not self._is_plain
        form: Literal["text", "json", "hint"] = "json" if wants_json else "text"
        if address.verb not in {"user_input", "session"} and not wants_json:
            form = "hint"
        # An error, too, is waited for where the answer was to come.
        wanted = message.response_topic or self._given_reply_topic
        return ReplyTarget(
            address.project,
            wanted if wanted is not None and self._may_answer_at(wanted) else topic,
            self._session or "",
            form=form,
            json_errors=message.response_topic is not None,
            correlation=message.correlation,
            expiry=message.expiry,
        )

    def _find_target(self, body: Request) -> ReplyTarget:
        """Where the answer goes. Raises `ForeignReplyTopic`."""
        assert self._target is not None
        address, default = self._address, self._target
        wanted = self._message.response_topic or (body.reply_topic if isinstance(body, Ask) else None)
        if wanted and not self._may_answer_at(wanted):
            field = "replyTopic" if self._message.response_topic is None else "Response Topic"
            raise ForeignReplyTopic(f"{field}: it must be {default.topic} or below it")
        changes: dict[str, Any] = {"topic": wanted or default.topic}
        if isinstance(body, Ask) and body.stream:
            assert self._session is not None
            changes |= {"stream": address.at(STREAM, self._session), "chunk": body.max_chunk_bytes}
        return msgspec.structs.replace(default, **changes)

    def _may_answer_at(self, topic: str) -> bool:
        if self._address.verb == "session":
            return self._address.may_answer_at(topic, (NEW_SESSION,), None)
        # On `hint` there is always JSON, so that is no place for the reply to a message.
        kinds = (ASSISTANT_RESPONSE,) if self._address.verb == "user_input" else (HINT, ASSISTANT_RESPONSE)
        return self._address.may_answer_at(topic, kinds, self._session or EVERY_SESSION)

    def _deadline(self, body: Request) -> float | None:
        """Until when the request may wait (Unix time): its own deadline or the message's expiry."""
        given = body.deadline_s if isinstance(body, Ask) else None
        limits = [limit for limit in (given, self._message.expiry) if limit is not None]
        return time.time() + min(limits) if limits else None


_FORMS: dict[str, type[Request]] = {
    "user_input": Ask,
    "state": Ask,
    "template": TemplateBody,
    "clear_history": TargetBody,
    "delete_session": TargetBody,
    "session": Request,
    "cancel": Request,
}


BESIDE_STATE = frozenset(
    {
        *("message", "sessionId", "session_id", "requestId", "request_id", "clientId", "client_id"),
        *("replyTopic", "reply_topic", "temperature", "topP", "maxTokens", "systemPrompt", "prompt_template"),
        *("stream", "format", "deadline_s", "maxChunkBytes", "token"),
    }
)
"""The keys that are no part of a state which is not under `state`."""


def _key(address: Address, session: str | None) -> str | None:
    return f"{address.device}:{session}" if address.device and session else session


def _hash(message: Incoming) -> str:
    """What a message is told from others by: its packet id and everything that its sender has said. The
    expiry is left out: a broker counts it down."""
    said = [
        message.mid,
        message.topic,
        message.payload,
        message.response_topic,
        message.correlation,
        message.user,
    ]
    return hashlib.sha256(msgspec.msgpack.encode(said, order="deterministic")).hexdigest()


def _object(address: Address, payload: bytes) -> tuple[dict[str, Any], bool]:
    """The JSON object, or the plain text as one; and whether it was plain. Raises `InvalidRequest`."""
    try:
        text = payload.decode()
    except UnicodeDecodeError:
        raise InvalidRequest("payload: it is no UTF-8 text") from None
    if not text.lstrip().startswith("{"):
        if address.verb == "state":
            raise InvalidRequest("payload: a JSON object with the state of the game is needed")
        plain = {"user_input": "message", "template": "template", "cancel": "requestId"}
        name = plain.get(address.verb, "target" if address.verb != "session" else "")
        return ({name: text} if name and text else {}), True
    try:
        body = msgspec.json.decode(payload)
    except (msgspec.DecodeError, RecursionError):
        raise InvalidRequest("payload: it begins like a JSON object but is none") from None
    assert isinstance(body, dict)
    return body, False
