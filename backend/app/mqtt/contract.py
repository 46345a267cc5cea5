"""Topics and payloads of the MQTT door: what a message asks for, and what an answer looks like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from app.errors import InvalidRequest, PortalError
from app.events import Ending, GenerationOptions, ReplyTarget, is_id, new_id
from app.services.turns import answer_of

USER_INPUT = "user_input"
ASSISTANT_RESPONSE = "assistant_response"
STATUS = "status"

CLEARED = b"Session cleared"


def request_filters(project: str) -> list[str]:
    """The topic filters that the bridge subscribes for a project."""
    return [f"{project}/{USER_INPUT}", f"{project}/{USER_INPUT}/+"]


def status_topic(project: str) -> str:
    """Where the bridge says, retained, how it is."""
    return f"{project}/{STATUS}"


def reply_topic(project: str, session_id: str) -> str:
    """Where replies of a session go by default."""
    return f"{project}/{ASSISTANT_RESPONSE}/{session_id}"


def session_of_topic(topic: str) -> str | None:
    """The session in a request topic."""
    levels = topic.split("/", 2)
    return levels[2] if len(levels) == 3 else None


class ForeignReplyTopic(InvalidRequest):
    """The answer was to go to a topic that is not the asker's."""


class PromptTemplate(BaseModel):
    """A prompt as older clients send it."""

    content: Annotated[str | None, Field(max_length=1_000_000)] = None


class UserInput(GenerationOptions):
    """The payload of `user_input`. Numbers may be strings; unknown keys are ignored."""

    model_config = ConfigDict(alias_generator=to_camel, validate_by_name=True, validate_by_alias=True)

    message: Annotated[str, Field(min_length=1, max_length=1_000_000)]
    session_id: str | None = None
    request_id: str | None = None
    client_id: str | None = None
    reply_topic: str | None = None
    system_prompt: Annotated[str | None, Field(max_length=1_000_000)] = None
    prompt_template: Annotated[PromptTemplate | None, Field(alias="prompt_template")] = None
    format: Literal["text", "json"] = "text"
    deadline_s: Annotated[float | None, Field(alias="deadline_s", gt=0, le=86400)] = None
    token: str | None = None

    @property
    def prompt(self) -> str | None:
        """The system prompt for a session that is new."""
        if self.system_prompt is not None:
            return self.system_prompt
        return self.prompt_template.content if self.prompt_template else None


@dataclass(frozen=True, slots=True)
class Request:
    """A message that asks for a turn, and where its answer goes."""

    input: UserInput
    session_id: str
    target: ReplyTarget


@dataclass(frozen=True, slots=True)
class Refusal:
    """A message that asks for nothing that can be done; `target` is None where nobody can be told."""

    error: PortalError
    target: ReplyTarget | None
    request_id: str | None = None


def read_request(project: str, topic: str, payload: bytes) -> Request | Refusal:
    """What a `user_input` message asks for. Raises nothing, whatever the bytes."""
    topic_session = session_of_topic(topic)
    session_id = topic_session or ""
    body: dict[str, Any] = {}
    try:
        body = _body(payload)
        session_id = _session_id(body, topic_session)
        return _request(project, session_id, UserInput.model_validate(body))
    except (ValidationError, InvalidRequest) as error:
        problem = _invalid(error) if isinstance(error, ValidationError) else error
        given = body.get("requestId")
        request_id = given if isinstance(given, str) and is_id(given) else None
        return Refusal(problem, _error_target(project, session_id, body), request_id)


def _body(payload: bytes) -> dict[str, Any]:
    """The JSON object, or the plain text as one."""
    try:
        text = payload.decode()
    except UnicodeDecodeError:
        raise InvalidRequest("payload: it is no UTF-8 text") from None
    if not text.lstrip().startswith("{"):
        return {"message": text}
    try:
        body = msgspec.json.decode(payload)
    except (msgspec.DecodeError, RecursionError):
        raise InvalidRequest("payload: it begins like a JSON object but is none") from None
    assert isinstance(body, dict)
    return body


def _session_id(body: dict[str, Any], topic_session: str | None) -> str:
    given = body.get("sessionId") or body.get("session_id")
    for value in (given, topic_session, body.get("clientId")):
        if value not in {None, ""} if isinstance(value, str | None) else True:
            if not isinstance(value, str) or not is_id(value):
                raise InvalidRequest("sessionId: 1 to 128 characters of A-Z a-z 0-9 _ . : - are needed")
            return value
    return new_id()


def _request(project: str, session_id: str, body: UserInput) -> Request:
    default = reply_topic(project, session_id)
    topic = body.reply_topic or default
    if body.request_id is not None and not is_id(body.request_id):
        raise InvalidRequest("requestId: 1 to 128 characters of A-Z a-z 0-9 _ . : - are needed")
    # Anything else would let one client make the bridge write to another's topic.
    if topic != default and not topic.startswith(f"{default}/"):
        raise ForeignReplyTopic(f"replyTopic: it must be {default} or below it")
    if any(mark in topic for mark in "+#\0") or len(topic.encode()) > 1024:
        raise InvalidRequest("replyTopic: it cannot be published to")
    return Request(body, session_id, ReplyTarget(project, topic, body.format))


def _error_target(project: str, session_id: str, body: dict[str, Any]) -> ReplyTarget | None:
    if not is_id(session_id):
        return None
    form: Literal["text", "json"] = "json" if body.get("format") == "json" else "text"
    return ReplyTarget(project, reply_topic(project, session_id), form)


def _invalid(error: ValidationError) -> InvalidRequest:
    problems = [
        {"field": ".".join(str(part) for part in found["loc"]), "problem": found["msg"]}
        for found in error.errors(include_url=False, include_input=False)
    ]
    message = "; ".join(f"{problem['field']}: {problem['problem']}" for problem in problems[:5])
    return InvalidRequest(message, details=problems)


# --- answers -------------------------------------------------------------------------------------


def answer(form: str, ending: Ending, session_id: str, request_id: str | None) -> bytes:
    """The payload that tells how a turn ended: its text, or the ending event with the ids."""
    if form == "json":
        event = msgspec.to_builtins(ending)
        return msgspec.json.encode({**event, "sessionId": session_id, "requestId": request_id})
    try:
        return answer_of(ending).response.encode()
    except PortalError as error:
        return _error_text(error.message)


def refusal(form: str, error: PortalError, session_id: str, request_id: str | None) -> bytes:
    """The payload for a request that made no turn."""
    if form == "json":
        return msgspec.json.encode({"error": error.info, "sessionId": session_id, "requestId": request_id})
    return _error_text(error.message)


def _error_text(message: str) -> bytes:
    return f"Error: {message}".encode()


def status(
    state: Literal["online", "offline", "degraded"],
    birth: str,
    *,
    since: str,
    version: str,
    model: str | None = None,
    queue: int = 0,
    eta_s: float = 0,
) -> bytes:
    """The retained payload of `P/status`. `birth` names the connection, in the will as in the rest,
    so that a late will is not taken for the end of a newer one."""
    return msgspec.json.encode(
        {
            "state": state,
            "birth": birth,
            "model": model,
            "since": since,
            "version": version,
            "queue": queue,
            "eta_s": eta_s,
        }
    )
