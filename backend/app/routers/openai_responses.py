"""`/v1/responses`: OpenAI's Responses API. What it stores is a session, and a response is a turn of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from app.access import Identity
from app.dependencies import CurrentUser, KeptDep, LLMDep, SessionsDep
from app.errors import InvalidRequest
from app.events import GenerationOptions, TurnRequest, new_id
from app.hardening import StrictRoute
from app.options import Object, Objects
from app.routers.openai import (
    STREAMED,
    KeyHeader,
    OpenAIErrorBody,
    SessionHeader,
    check_served,
    headers_of,
    request_id_of,
    submit,
)
from app.routers.streaming import FormedStream, json_response, whole_answer
from app.services.kept_responses import KeptResponses
from app.services.openai_messages import (
    NOT_STORED,
    input_messages,
    input_options,
    is_new_message,
    new_message,
)
from app.services.openai_responses import Frame, ResponseEvents

router = APIRouter(
    prefix="/v1/responses",
    tags=["openai"],
    route_class=StrictRoute,
    responses={"default": {"model": OpenAIErrorBody, "description": "An error"}},
)


class Conversation(BaseModel):
    """A session, by its id."""

    id: str


class ResponseRequest(BaseModel):
    """OpenAI's request for a response. Fields that are not named here are ignored."""

    input: Annotated[str, Field(min_length=1)] | Annotated[Objects, Field(min_length=1)]
    instructions: Annotated[
        str | None, Field(max_length=1_000_000, description="Counts when the session is new")
    ] = None
    model: Annotated[str | None, Field(max_length=256)] = None
    previous_response_id: Annotated[
        str | None, Field(max_length=256, description="Goes on from that response, in its session")
    ] = None
    conversation: Annotated[str | Conversation | None, Field(description="Goes on in this session")] = None
    store: Annotated[bool | None, Field(description="False: nothing is kept")] = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_output_tokens: int | None = None
    tools: Objects | None = None
    tool_choice: str | Object | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Object | None = None
    text: Object | None = None
    background: Literal[False] | None = None


class ResponseBody(BaseModel):
    """A response; the fields that are not named here are OpenAI's too."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
    model: str
    output: list[dict[str, Any]]
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    previous_response_id: str | None
    conversation: Conversation | None
    usage: dict[str, Any] | None


class Deleted(BaseModel):
    """It was deleted."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


@router.post("", response_model=ResponseBody, responses=STREAMED)
async def create_response(
    body: ResponseRequest,
    request: Request,
    user: CurrentUser,
    sessions: SessionsDep,
    kept: KeptDep,
    llm: LLMDep,
    session_id: SessionHeader = None,
    idempotency_key: KeyHeader = None,
) -> Response:
    """A response. It is a turn of a session: of a new one, or of the one that is named in one of three ways.
    With `store: false`, or where the input brings earlier messages along, nothing is kept."""
    await check_served(llm, body.model)
    options = GenerationOptions.of(input_options(body.model_dump(exclude_none=True)))
    messages = input_messages(body.input, body.instructions)
    session, follows = await _place(kept, user, body, session_id)
    if _is_kept(body, session, messages):
        prompt, message = new_message(messages, "input", NOT_STORED)
        name = session or _new_session(idempotency_key)
        asked = TurnRequest(
            user,
            name,
            message,
            system_prompt=prompt,
            options=options,
            follows=follows,
            previous=body.previous_response_id,
        )
        turn = await submit(sessions, asked, idempotency_key)
    else:
        turn = await sessions.chat(user, messages, options)
    model = llm.known_model(sessions.model_for(user, body.model))
    frame = Frame(turn, options.given(), model, body.instructions, body.previous_response_id)
    if body.stream:
        return FormedStream(request, turn, ResponseEvents(frame), headers_of(turn))
    await whole_answer(request, turn)
    return json_response(frame.now(), headers_of(turn))


@router.get("/{response_id}", response_model=ResponseBody, responses=STREAMED)
async def get_response(
    response_id: str,
    request: Request,
    user: CurrentUser,
    kept: KeptDep,
    sessions: SessionsDep,
    llm: LLMDep,
    stream: Annotated[bool, Query(description="As events, from the first one")] = False,
) -> Response:
    """A response that is kept, as it is now."""
    turn = await kept.find(user, response_id)
    options = turn.row.options
    model = llm.known_model(sessions.model_for(user, options.get("model")))
    frame = Frame(turn, options, model, turn.session.system_prompt or None)
    if stream:
        return FormedStream(request, turn, ResponseEvents(frame), headers_of(turn))
    return json_response(frame.now(), headers_of(turn))


@router.delete("/{response_id}")
async def delete_response(response_id: str, user: CurrentUser, kept: KeptDep) -> Deleted:
    """Deletes a response with its session, which must have no others."""
    await kept.delete(user, response_id)
    return Deleted(id=response_id)


def _is_kept(body: ResponseRequest, session: str | None, messages: Sequence[dict[str, Any]]) -> bool:
    """Whether it is to be a turn of a session. Raises `InvalidRequest` for a session and `store: false`."""
    if body.store is False and session is not None:
        raise InvalidRequest("store: a session keeps what is said in it; name none, or leave this out")
    if body.store is False:
        return False
    if session is not None or is_new_message(messages):
        return True
    if body.store:
        raise InvalidRequest(
            "input: what is stored is one new message of the user; to send earlier ones too, leave store out"
        )
    return False


def _new_session(key: str | None) -> str:
    """The id of a new session. Request ids are a session's own, so what comes again with its idempotency key
    must come to the session that was made for it; other owners have another one of that id."""
    if key is None:
        return new_id()
    return f"r-{hashlib.sha256(request_id_of(key).encode()).hexdigest()[:28]}"


async def _place(
    kept: KeptResponses, user: Identity, body: ResponseRequest, header: str | None
) -> tuple[str | None, str | None]:
    """The session that is named, if one is, and the message there that this one follows, if it does not come
    to the end. Raises `InvalidRequest` where it is named twice, and `NotFound` for a response that is not
    there."""
    talk, previous = body.conversation, body.previous_response_id
    named = talk.id if isinstance(talk, Conversation) else talk
    given = [name for name in (named, header, previous) if name is not None]
    if len(given) > 1:
        raise InvalidRequest("previous_response_id: name the session in one way only")
    if previous is not None:
        return await kept.place(user, previous)
    return given[0] if given else None, None
