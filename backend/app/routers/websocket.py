"""`/ws/chat`: a session over a WebSocket, with all that happens in it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import Annotated, Any
from weakref import WeakSet

import msgspec
from fastapi import APIRouter, WebSocket
from pydantic import BaseModel, Field, ValidationError
from starlette.websockets import WebSocketDisconnect

from app.access import Identity
from app.errors import Internal, InvalidRequest, NotFound, PortalError
from app.events import ID_PATTERN, Accepted, Final, Restarted, Token, TurnRequest
from app.hardening import parse_json
from app.logs import get_logger
from app.options import invalid
from app.routers.llm import Regeneration, SessionChat
from app.routers.times import moment
from app.services.session_manager import SessionManager
from app.services.turns import Numbered, Position, Turn, parse_position
from app.sockets import Closing, Opened, open_socket, refusal

MOST_BEHIND = 64
"""Turns that a socket may be behind with. Whoever reads so slowly is asked to come back and `resume`: events
are kept in the database, and not for one reader in memory."""

TOO_SLOW = Closing(1013, "too slow: connect again and resume")
"""The code says to come back later (IANA's registry of WebSocket close codes)."""

router = APIRouter(tags=["chat"])
log = get_logger(__name__)


class SendMessage(SessionChat):
    """`send_message`: a message, with all that it may have over HTTP."""

    session_id: str = ""


class Stop(BaseModel):
    """`stop`: ends the running turn, or that of a request, also while it waits."""

    request_id: Annotated[str | None, Field(pattern=ID_PATTERN)] = None


class Resume(BaseModel):
    """`resume`: the events of a turn that come `after` the one with this id."""

    turn_id: Annotated[str, Field(min_length=1, max_length=64)]
    after: str | None = None


class Decision(BaseModel):
    """`approve`, `deny`: whether a tool may run."""

    call_id: Annotated[str, Field(min_length=1, max_length=200)]


class Presence(BaseModel):
    """`typing`, `stop_typing`, `ping`: there is nothing more to say."""


@router.websocket("/ws/chat/{session_id}")
async def chat(socket: WebSocket, session_id: str) -> None:
    """One session: `send_message`, `stop`, `regenerate`, `resume`, `typing`, `stop_typing` and `ping` come
    in; the events of all of its turns go out, whichever door they came by."""
    sessions: SessionManager = socket.app.state.container.sessions
    opened = await open_socket(socket, lambda user: sessions.may_watch(user, session_id))
    if opened is not None:
        await ChatSocket(opened, sessions, session_id).serve()


class ChatSocket:
    """One socket on a session. Each turn is sent from where the socket is in it; what is sent waits for the
    reader, and nothing is kept for a slow one."""

    def __init__(self, opened: Opened, sessions: SessionManager, session_id: str) -> None:
        self._opened = opened
        self._socket = opened.socket
        self._sessions = sessions
        self._session_id = session_id
        self._told: WeakSet[Turn] = WeakSet()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._sending = asyncio.Lock()

    @property
    def _user(self) -> Identity:
        return self._opened.user

    async def serve(self) -> None:
        """Serves until the socket is closed."""
        with self._sessions.watch(self._user, self._session_id, self):
            try:
                await self._opened.serve(self._begin())
            finally:
                for task in self._tasks.values():
                    task.cancel()
                await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _begin(self) -> None:
        running = self._sessions.live_turns(self._user, self._session_id)
        await self.send({"type": "connection_established", "session_id": self._session_id})
        for turn in running:
            self.began(turn)
        while True:
            await self._take(await self._received())

    async def _received(self) -> bytes:
        try:
            return (await self._socket.receive_text()).encode()
        except KeyError:
            return b""  # bytes, which mean nothing here

    # --- what comes in ---

    async def _take(self, text: bytes) -> None:
        request_id: str | None = None
        try:
            said = _object(text)
            given = said.get("request_id")
            request_id = given if isinstance(given, str) else None
            form, carry_out = COMMANDS.get(str(said.pop("type", "")), (None, None))
            if form is None or carry_out is None:
                raise InvalidRequest(f"type: one of {', '.join(COMMANDS)} is needed")
            await carry_out(self, form.model_validate(said))
        except ValidationError as error:
            await self.send(refusal(invalid(error), request_id))
        except PortalError as error:
            await self.send(refusal(error, request_id))
        except WebSocketDisconnect:
            raise
        except Exception:
            log.exception("a message over a WebSocket failed")
            await self.send(refusal(Internal("The portal failed at this message."), request_id))

    async def _send_message(self, body: SendMessage) -> None:
        if body.session_id not in {"", self._session_id}:
            raise InvalidRequest("session_id: this socket is for another session; leave it out")
        await self._submit(body.said_in(self._session_id, self._user, outlives=True))

    async def _regenerate(self, body: Regeneration) -> None:
        await self._submit(body.request(self._user, self._session_id, outlives=True, regenerate=True))

    async def _submit(self, request: TurnRequest) -> None:
        turn = await self._sessions.submit(request)
        if turn not in self._told:  # it was there before: whoever asks again is answered again
            self._follow(turn, self._send_events(turn, None))

    async def _stop(self, body: Stop) -> None:
        with suppress(NotFound):  # nothing runs in a session that is not there
            await self._sessions.stop(self._user, self._session_id, body.request_id)

    async def _resume(self, body: Resume) -> None:
        turn = await self._sessions.find(self._user, body.turn_id)
        if turn.session.session_id != self._session_id:
            raise NotFound("There is no such turn in this session.")
        after = parse_position(body.after) if body.after else None
        self._follow(turn, self._send_rest(turn, body.after, after))

    async def _decide(self, body: Decision) -> None:
        raise NotFound(f"call_id: no call {body.call_id} waits for a decision")

    async def _typing(self, _body: Presence) -> None:
        self._tell_others("typing")

    async def _stop_typing(self, _body: Presence) -> None:
        self._tell_others("stop_typing")

    def _tell_others(self, what: str) -> None:
        self._sessions.notice(self._user, self._session_id, self, what)

    async def _pong(self, _body: Presence) -> None:
        await self.send({"type": "pong"})

    # --- what goes out ---

    def began(self, turn: Turn) -> None:
        """See `Watcher`."""
        if turn in self._told or self._user.only_project not in {None, turn.session.project}:
            return
        self._told.add(turn)
        self._follow(turn, self._send_events(turn, None))

    def ended(self, turn: Turn) -> None:
        """See `Watcher`: who follows a turn sees its end."""

    def _follow(self, turn: Turn, sending: Coroutine[Any, Any, None]) -> None:
        earlier = self._tasks.pop(turn.id, None)
        if earlier is not None:
            earlier.cancel()
        if len(self._tasks) >= MOST_BEHIND:
            sending.close()
            self._opened.end(TOO_SLOW)
            return
        self._run(turn.id, sending)

    def _run(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = self._tasks[name] = asyncio.create_task(work, name=f"socket: {name}")

        def done(_: object) -> None:
            if self._tasks.get(name) is task:
                del self._tasks[name]
            if not task.cancelled() and task.exception() is not None:
                log.error("something could not be sent over a WebSocket", exc_info=task.exception())

        task.add_done_callback(done)

    async def _send_rest(self, turn: Turn, given: str | None, after: Position | None) -> None:
        """What comes after the place that was `given`. A turn that runs was being sent from its beginning:
        `resumed` tells what has come of that from what comes now."""
        await self._send_if_there({"type": "resumed", "turn_id": turn.id, "after": given})
        await self._send_events(turn, after)

    async def _send_events(self, turn: Turn, after: Position | None) -> None:
        with suppress(WebSocketDisconnect, RuntimeError):  # it has gone, or is being closed
            async with aclosing(turn.follow(after)) as batches:
                async for batch in batches:
                    await self.send(*[await self._shown(turn, item) for item in _joined(batch)])
                    if turn.ending is None and isinstance(batch[-1].event, Accepted | Restarted):
                        await self.send({"type": "ai_typing", "turn_id": turn.id})

    async def _shown(self, turn: Turn, item: Numbered) -> dict[str, Any]:
        """An event as clients of WebSockets know it, with its place, to `resume` after."""
        event: dict[str, Any] = {**msgspec.to_builtins(item.event), "id": item.id}
        if isinstance(item.event, Accepted):
            question, asked_at = await self._sessions.question_of(turn)
            message = _message(item.event.message_id, "user", question, asked_at)
            return {**event, "type": "user_message", "message": message}
        if isinstance(item.event, Token):
            return {**event, "type": "ai_message_chunk"}
        if isinstance(item.event, Final):
            at = turn.row.created_at + item.event.elapsed_ms / 1000
            answer = _message(item.event.message_id, "assistant", item.event.response, at)
            return {**event, "type": "ai_message_complete", "message": answer}
        return event

    def noticed(self, what: str, who: str) -> None:
        """See `Watcher`. It is of use only now: whoever is slow to read misses it."""
        if not self._sending.locked():
            said = {"type": what, "session_id": self._session_id, "user": who}
            self._run(f"presence {what}", self._send_if_there(said))

    async def _send_if_there(self, message: dict[str, Any]) -> None:
        with suppress(WebSocketDisconnect, RuntimeError):  # it has gone, or is being closed
            await self.send(message)

    async def send(self, *messages: dict[str, Any]) -> None:
        """Sends messages, one after the other. Raises `WebSocketDisconnect` once the client has gone."""
        async with self._sending:
            for message in messages:
                await self._socket.send_text(msgspec.json.encode(message).decode())


COMMANDS: dict[str, tuple[type[BaseModel], Callable[[ChatSocket, Any], Awaitable[None]]]] = {
    "send_message": (SendMessage, ChatSocket._send_message),
    "regenerate": (Regeneration, ChatSocket._regenerate),
    "stop": (Stop, ChatSocket._stop),
    "resume": (Resume, ChatSocket._resume),
    "approve": (Decision, ChatSocket._decide),
    "deny": (Decision, ChatSocket._decide),
    "typing": (Presence, ChatSocket._typing),
    "stop_typing": (Presence, ChatSocket._stop_typing),
    "ping": (Presence, ChatSocket._pong),
}
"""What may be sent, in which form, and what carries it out."""


def _object(text: bytes) -> dict[str, Any]:
    try:
        said = parse_json(text)
    except ValueError as error:
        raise InvalidRequest(f"This is not JSON: {error}", status=400) from None
    if not isinstance(said, dict):
        raise InvalidRequest("A JSON object with a `type` is needed.")
    return said


def _joined(batch: Sequence[Numbered]) -> list[Numbered]:
    """The events, of pieces of the reply that have come together only one."""
    joined: list[Numbered] = []
    for item in batch:
        last = joined[-1].event if joined else None
        if isinstance(item.event, Token) and isinstance(last, Token):
            both = Token(item.event.turn_id, last.content + item.event.content)
            joined[-1] = Numbered(item.attempt, item.n, both, b"")
        else:
            joined.append(item)
    return joined


def _message(message_id: str | None, role: str, content: str, at: float) -> dict[str, Any]:
    return {"id": message_id, "role": role, "content": content, "created_at": moment(at).isoformat()}
