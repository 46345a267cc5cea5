"""`/ws/sessions`: what happens in the list of somebody's sessions, over a WebSocket."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any, ClassVar

from fastapi import APIRouter, WebSocket
from starlette.websockets import WebSocketDisconnect

from app.database import insist
from app.routers.sessions import shown
from app.services.memory import Memory
from app.services.session_feed import News, SessionFeed
from app.services.templates import Templates
from app.sockets import Nothing, Opened, Talk, open_socket, until_one_ends

CHANGES = {"session_created", "session_updated"}

router = APIRouter(tags=["sessions"])


@router.websocket("/ws/sessions")
async def follow_sessions(socket: WebSocket) -> None:
    """The list of my sessions: `session_created`, `session_updated` and `session_deleted` go out, and
    `turn_started` and `turn_ended` of all of them; `ping` comes in."""
    container = socket.app.state.container
    opened = await open_socket(socket, container.sessions.may_watch_list)
    if opened is not None:
        await ListSocket(opened, container.feed, container.templates, container.memory).run()


class ListSocket(Talk):
    """One socket on a list of sessions. What happens faster than it is read comes as it is in the end."""

    commands: ClassVar = {"ping": (Nothing, Talk.pong)}

    def __init__(self, opened: Opened, feed: SessionFeed, templates: Templates, memory: Memory) -> None:
        super().__init__(opened)
        self._feed = feed
        self._templates = templates
        self._memory = memory

    async def run(self) -> None:
        """Serves until the socket is closed."""
        await self.opened.serve(until_one_ends(self._tell(), self.listen()))

    async def _tell(self) -> None:
        with suppress(WebSocketDisconnect, RuntimeError):  # it has gone, or is being closed
            async with aclosing(self._feed.follow(self.user, self.fall_behind)) as batches:
                await anext(batches)  # what comes after this moment is told
                await self.send({"type": "connection_established"})
                async for news in batches:
                    await self.send(*await self._shown(news))

    async def _shown(self, batch: Sequence[News]) -> list[dict[str, Any]]:
        changed = [news.session for news in batch if news.type in CHANGES]
        bodies = await insist(lambda: shown(changed, self._templates, self._memory))
        by_id = {row.id: body.model_dump(mode="json") for row, body in zip(changed, bodies, strict=True)}
        return [_message(news, by_id) for news in batch]


def _message(news: News, shown_as: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    named = {"session_id": news.session.session_id}
    if news.turn is not None:
        return {"type": news.type, **named, "turn_id": news.turn}
    return {"type": news.type, "session": shown_as[news.session.id] if news.type in CHANGES else named}
