"""`/api/llm`: chat, with and without a session."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Header, Path, Query, Request, Response
from pydantic import BaseModel, Field

from app.access import Identity
from app.dependencies import CurrentUser, LLMDep, SessionsDep
from app.events import ID_PATTERN, Cancelled, Final, GenerationOptions, TurnRequest
from app.options import Objects
from app.routers.direct import DirectRoute
from app.routers.streaming import (
    ANSWER_OR_STREAM_RESPONSES,
    STREAM_RESPONSES,
    TurnStream,
    json_response,
    wants_stream,
    whole_answer,
)
from app.routers.times import deadline_in, moment
from app.services.llm_client import Health
from app.services.rows import MessageRow
from app.services.session_manager import HistoryPage, SessionManager
from app.services.turns import Turn, parse_position

router = APIRouter(prefix="/api/llm", tags=["chat"], route_class=DirectRoute)

Id = Annotated[str, Field(pattern=ID_PATTERN)]


# --- bodies --------------------------------------------------------------------------------------


class Chat(GenerationOptions):
    """Messages for the model, which remembers none of them."""

    messages: Annotated[Objects, Field(min_length=1, description="Messages in OpenAI's form")]


class Asked(GenerationOptions):
    """What goes with every turn that is asked for."""

    request_id: Annotated[
        Id | None, Field(description="Makes the request safe to repeat, and lets it outlive the connection")
    ] = None
    deadline_s: Annotated[
        float | None, Field(gt=0, le=86400, description="Longest wait for a place at the LLM server, seconds")
    ] = None

    def request(
        self, who: Identity, session_id: str, message: str = "", *, outlives: bool = False, **rest: Any
    ) -> TurnRequest:
        """The request for a turn. Its turn outlives the connection by its id, or as the door has it."""
        return TurnRequest(
            who=who,
            session_id=session_id,
            message=message,
            request_id=self.request_id,
            options=self,
            deadline=deadline_in(self.deadline_s),
            detached=outlives or self.request_id is not None,
            **rest,
        )


class Regeneration(Asked):
    """Another answer to the last message, perhaps with other options."""


class SessionChat(Asked):
    """A message for a session. `system_prompt`, or `template_id` with its `variables`, and `project`
    count only when the session is new."""

    session_id: Id
    message: Annotated[str, Field(min_length=1, max_length=1_000_000)]
    system_prompt: Annotated[str | None, Field(max_length=1_000_000)] = None
    template_id: Annotated[
        str | None, Field(description="A template of mine; its newest version is used")
    ] = None
    variables: Annotated[dict[str, Any], Field(default_factory=dict, description="What the template needs")]
    edits: Annotated[
        Id | None,
        Field(description="A message of mine: this one takes its place, and the history goes on from there"),
    ] = None
    project: Annotated[
        str, Field(max_length=64, description="`prompt_portal`, or that of the API key, when left out")
    ] = ""

    def said_in(self, session_id: str, who: Identity, *, outlives: bool = False) -> TurnRequest:
        """The request to say this in a session."""
        return self.request(
            who,
            session_id,
            self.message,
            outlives=outlives,
            system_prompt=self.system_prompt,
            template_id=self.template_id,
            variables=self.variables,
            project=self.project,
            edits=self.edits,
        )


class UsageBody(BaseModel):
    """Tokens of one turn; `estimated` where nobody has counted them. `ttft_ms` from acceptance to the first
    piece of the reply."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    estimated: bool = False
    ttft_ms: int | None = None
    tokens_per_second: float | None = None
    cache_hit: bool = False
    model: Annotated[str | None, Field(description="The one that answered")] = None


class ChatAnswer(BaseModel):
    """A whole reply. `finish_reason` is `cancelled` for a reply that was stopped."""

    response: str
    tool_calls: list[dict[str, Any]] | None = None
    finish_reason: str
    usage: UsageBody | None = None


class SessionAnswer(ChatAnswer):
    """A whole reply in a session."""

    session_id: str
    turn_id: str
    message_id: str | None
    request_id: str | None


class HistoryMessage(BaseModel):
    """A message of a session."""

    id: str
    parent_id: str | None
    turn_id: Annotated[str | None, Field(description="To follow it while it is pending")]
    role: Literal["system", "user", "assistant"]
    content: str
    created_at: datetime
    status: Literal["complete", "pending", "failed", "cancelled", "expired", "superseded"]
    tool_calls: list[dict[str, Any]] | None = None
    finish_reason: Annotated[
        str | None, Field(description="`length`: the reply was cut at `max_tokens`; null where it broke off")
    ] = None
    usage: UsageBody | None = None
    pinned: Annotated[bool, Field(description="Sent to the model however often the history is cut")] = False


class HistoryAnswer(BaseModel):
    """Messages, oldest first; the system prompt before the first."""

    session_id: str
    messages: list[HistoryMessage]


class Done(BaseModel):
    """It was done."""

    ok: Literal[True] = True
    message: str


class Stopped(Done):
    """`turn_id` is the turn that was stopped, if one ran."""

    turn_id: str | None


# --- chat in a session ---------------------------------------------------------------------------


@router.post("/chat/session", response_model=SessionAnswer)
async def session_chat(body: SessionChat, request: Request, user: CurrentUser) -> Response:
    """Answers a message with the session's history, which remembers both. Makes the session if it
    is new."""
    turn = await _submit(request, user, body)
    return _whole_in(turn, await whole_answer(request, turn))


@router.post("/chat/session/stream", response_class=Response, responses=STREAM_RESPONSES)
async def session_chat_stream(body: SessionChat, request: Request, user: CurrentUser) -> Response:
    """`/chat/session` as a stream of events."""
    return TurnStream(request, await _submit(request, user, body))


@router.post(
    "/chat/session/{session_id}/regenerate",
    response_model=SessionAnswer,
    responses=ANSWER_OR_STREAM_RESPONSES,
)
async def regenerate(
    session_id: Annotated[str, Path(pattern=ID_PATTERN)],
    request: Request,
    user: CurrentUser,
    body: Regeneration | None = None,
) -> Response:
    """Answers the last message again; the old answer stays as a sibling of the new one, out of the history.
    As one answer, or as a stream of events where `Accept` asks for one."""
    asked = (body or Regeneration()).request(user, session_id, regenerate=True)
    turn = await _sessions(request).submit(asked)
    if wants_stream(request):
        return TurnStream(request, turn)
    return _whole_in(turn, await whole_answer(request, turn))


# --- chat without a session ----------------------------------------------------------------------


@router.post("/chat", response_model=ChatAnswer)
async def chat(body: Chat, request: Request, user: CurrentUser, sessions: SessionsDep) -> Response:
    """Answers messages; nothing of it is kept."""
    turn = await sessions.chat(user, body.messages, body)
    answer = await whole_answer(request, turn)
    return _whole(turn, answer)


@router.post("/chat/stream", response_class=Response, responses=STREAM_RESPONSES)
async def chat_stream(body: Chat, request: Request, user: CurrentUser, sessions: SessionsDep) -> Response:
    """`/chat` as a stream of events: SSE, or NDJSON with `Accept: application/x-ndjson`."""
    return TurnStream(request, await sessions.chat(user, body.messages, body))


@router.get("/turns/{turn_id}/events", response_class=Response, responses=STREAM_RESPONSES)
async def follow_turn(
    turn_id: str,
    request: Request,
    user: CurrentUser,
    sessions: SessionsDep,
    after: Annotated[str | None, Query(description="The id of the last event seen")] = None,
    last_event_id: Annotated[str | None, Header(description="The same, as browsers send it")] = None,
) -> Response:
    """Follows a running or ended turn, from the event after the last one seen."""
    turn = await sessions.find(user, turn_id)
    seen = after or last_event_id
    return TurnStream(request, turn, parse_position(seen) if seen else None)


@router.get("/chat/session/{session_id}/history")
async def history(
    session_id: str,
    user: CurrentUser,
    sessions: SessionsDep,
    limit: Annotated[int | None, Query(ge=1, le=10_000, description="At most so many, the newest")] = None,
    before: Annotated[str | None, Query(description="Only messages older than this one")] = None,
) -> HistoryAnswer:
    """The messages of a session."""
    page = await sessions.page(user, session_id, limit=limit, before=before)
    return HistoryAnswer(session_id=session_id, messages=_messages(page))


@router.delete("/chat/session/{session_id}")
async def clear(session_id: str, user: CurrentUser, sessions: SessionsDep) -> Done:
    """Deletes the messages of a session. Its system prompt stays."""
    await sessions.clear(user, session_id)
    return Done(message="Session cleared")


@router.post("/chat/session/{session_id}/stop")
async def stop(session_id: str, user: CurrentUser, sessions: SessionsDep) -> Stopped:
    """Stops the running turn; what there is of its reply is kept."""
    turn_id = await sessions.stop(user, session_id)
    return Stopped(message="Stopped" if turn_id else "Nothing was running", turn_id=turn_id)


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(llm: LLMDep) -> Health:
    """How the LLM server is. Needs no sign-in, and answers 200 also when it is down."""
    return await llm.ahealth()


# --- between bodies and turns --------------------------------------------------------------------


def _sessions(request: Request) -> SessionManager:
    # Asked for as a dependency, it would cost as much as the whole sign-in does.
    sessions: SessionManager = request.app.state.container.sessions
    return sessions


async def _submit(request: Request, user: Identity, body: SessionChat) -> Turn:
    return await _sessions(request).submit(body.said_in(body.session_id, user))


def _whole_in(turn: Turn, answer: Final | Cancelled) -> Response:
    """A `SessionAnswer`."""
    return _whole(
        turn,
        answer,
        session_id=turn.session.session_id,
        turn_id=turn.id,
        message_id=answer.message_id,
        request_id=turn.row.request_id,
    )


def _whole(turn: Turn, answer: Final | Cancelled, **ids: str | None) -> Response:
    """A `ChatAnswer`, or with `ids` a `SessionAnswer`, without what is null."""
    shown: dict[str, Any] = {"response": answer.response, "usage": answer.usage, **ids}
    if isinstance(answer, Final):
        shown |= {"finish_reason": answer.finish_reason, "tool_calls": answer.tool_calls or None}
    else:
        shown["finish_reason"] = "cancelled"
    body = {name: value for name, value in shown.items() if value is not None}
    return json_response(body, turn.ticket.headers)


def _messages(page: HistoryPage) -> list[HistoryMessage]:
    shown = [_message(message) for message in page.messages]
    session = page.session
    if page.is_first and session.system_prompt:
        system = HistoryMessage(
            id=f"{session.id}-system",
            parent_id=None,
            turn_id=None,
            role="system",
            content=session.system_prompt,
            created_at=moment(session.created_at),
            status="complete",
        )
        shown.insert(0, system)
    return shown


def _message(message: MessageRow) -> HistoryMessage:
    return HistoryMessage.model_validate(
        {
            "id": message.id,
            "parent_id": message.parent_id,
            "turn_id": message.turn_id,
            "role": message.role,
            "content": message.content,
            "created_at": moment(message.created_at),
            "status": message.status,
            "tool_calls": message.tool_calls,
            "finish_reason": message.finish_reason,
            "usage": None if message.usage is None else msgspec.to_builtins(message.usage),
            "pinned": message.pinned,
        }
    )
