"""`/ws/chat`: a session over a WebSocket, with all that happens in it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import Annotated, Any, ClassVar
from weakref import WeakSet

import msgspec
from fastapi import APIRouter, WebSocket
from pydantic import BaseModel, Field
from starlette.websockets import WebSocketDisconnect

from app.errors import InvalidRequest, NotFound
from app.events import ID_PATTERN, Accepted, Final, Restarted, Token, TurnRequest
from app.routers.llm import Regeneration, SessionChat
from app.routers.times import moment
from app.services.session_manager import SessionManager
from app.services.turns import Numbered, Position, Turn, parse_position
from app.sockets import Nothing, Opened, Talk, open_socket
from app.tasks import Tasks

MOST_BEHIND = 64
"""Turns that a socket may be behind with. Whoever reads so slowly is asked to come back and `resume`: events
are kept in the database, and not for one reader in memory."""

router = APIRouter(tags=["chat"])


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


@router.websocket("/ws/chat/{session_id}")
async def chat(socket: WebSocket, session_id: str) -> None:
    """One session: `send_message`, `stop`, `regenerate`, `resume`, `typing`, `stop_typing` and `ping` come
    in; the events of all of its turns go out, whichever door they came by."""
    sessions: SessionManager = socket.app.state.container.sessions
    opened = await open_socket(socket, lambda user: sessions.may_watch(user, session_id))
    if opened is not None:
        await ChatSocket(opened, sessions, session_id).serve()


class ChatSocket(Talk):
    """One socket on a session. Each turn is sent from where the socket is in it; what is sent waits for the
    reader, and nothing is kept for a slow one."""

    def __init__(self, opened: Opened, sessions: SessionManager, session_id: str) -> None:
        super().__init__(opened)
        self._sessions = sessions
        self._session_id = session_id
        self._told: WeakSet[Turn] = WeakSet()
        self._tasks = Tasks("socket")
        self._followed: dict[str, asyncio.Task[None]] = {}

    async def serve(self) -> None:
        """Serves until the socket is closed."""
        with self._sessions.watch(self.user, self._session_id, self):
            try:
                await self.opened.serve(self._begin())
            finally:
                await self._tasks.close()

    async def _begin(self) -> None:
        running = self._sessions.live_turns(self.user, self._session_id)
        await self.send({"type": "connection_established", "session_id": self._session_id})
        for turn in running:
            self.began(turn)
        await self.listen()

    # --- what comes in ---

    async def _send_message(self, body: SendMessage) -> None:
        if body.session_id not in {"", self._session_id}:
            raise InvalidRequest("session_id: this socket is for another session; leave it out")
        await self._submit(body.said_in(self._session_id, self.user, outlives=True))

    async def _regenerate(self, body: Regeneration) -> None:
        await self._submit(body.request(self.user, self._session_id, outlives=True, regenerate=True))

    async def _submit(self, request: TurnRequest) -> None:
        turn = await self._sessions.submit(request)
        if turn not in self._told:  # it was there before: whoever asks again is answered again
            self._follow(turn, self._send_events(turn, None))

    async def _stop(self, body: Stop) -> None:
        with suppress(NotFound):  # nothing runs in a session that is not there
            await self._sessions.stop(self.user, self._session_id, body.request_id)

    async def _resume(self, body: Resume) -> None:
        turn = await self._sessions.find(self.user, body.turn_id)
        if turn.session.session_id != self._session_id:
            raise NotFound("There is no such turn in this session.")
        after = parse_position(body.after) if body.after else None
        self._follow(turn, self._send_rest(turn, body.after, after))

    async def _decide(self, body: Decision) -> None:
        raise NotFound(f"call_id: no call {body.call_id} waits for a decision")

    async def _typing(self, _body: Nothing) -> None:
        self._tell_others("typing")

    async def _stop_typing(self, _body: Nothing) -> None:
        self._tell_others("stop_typing")

    def _tell_others(self, what: str) -> None:
        self._sessions.notice(self.user, self._session_id, self, what)

    # --- what goes out ---

    def began(self, turn: Turn) -> None:
        """See `Watcher`."""
        if turn in self._told or self.user.only_project not in {None, turn.session.project}:
            return
        self._told.add(turn)
        self._follow(turn, self._send_events(turn, None))

    def ended(self, turn: Turn) -> None:
        """See `Watcher`: who follows a turn sees its end."""

    def _follow(self, turn: Turn, sending: Coroutine[Any, Any, None]) -> None:
        earlier = self._followed.pop(turn.id, None)
        if earlier is not None:
            earlier.cancel()
        if len(self._followed) >= MOST_BEHIND:
            sending.close()
            self.fall_behind()
            return
        task = self._followed[turn.id] = self._tasks.start(sending, turn.id)

        def ended(_: object) -> None:
            if self._followed.get(turn.id) is task:
                del self._followed[turn.id]

        task.add_done_callback(ended)

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
        if not self.sending.locked():
            said = {"type": what, "session_id": self._session_id, "user": who}
            self._tasks.start(self._send_if_there(said), what)

    async def _send_if_there(self, message: dict[str, Any]) -> None:
        with suppress(WebSocketDisconnect, RuntimeError):  # it has gone, or is being closed
            await self.send(message)

    commands: ClassVar = {
        "send_message": (SendMessage, _send_message),
        "regenerate": (Regeneration, _regenerate),
        "stop": (Stop, _stop),
        "resume": (Resume, _resume),
        "approve": (Decision, _decide),
        "deny": (Decision, _decide),
        "typing": (Nothing, _typing),
        "stop_typing": (Nothing, _stop_typing),
        "ping": (Nothing, Talk.pong),
    }


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
