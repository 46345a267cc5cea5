"""Turns over HTTP: as server-sent events or NDJSON, and as one answer for whoever stays."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any, Protocol, TypeVar

import msgspec
from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from app.events import Cancelled, Ending, Final, type_of
from app.services.turns import Numbered, Position, Turn, answer_of

T = TypeVar("T")

SSE = "text/event-stream"
NDJSON = "application/x-ndjson"

LOOK_AFTER_S = 0.05
"""What is answered sooner is answered without looking whether the client has gone: that costs a task."""

KEEP_ALIVE_S = 15.0
"""Silence after which an event stream gets a comment line, so that proxies keep it open."""

_EVENT = {"$ref": "#/components/schemas/TurnEvent"}

STREAM_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The events of the turn, up to the one that ends it.",
        "content": {
            SSE: {
                "schema": {
                    "type": "object",
                    "properties": {
                        "id": {"type": "string"},
                        "event": {"type": "string"},
                        "data": {
                            "type": "string",
                            "contentMediaType": "application/json",
                            "contentSchema": _EVENT,
                        },
                    },
                    "required": ["id", "event", "data"],
                }
            },
            NDJSON: {"schema": _EVENT},
        },
    }
}


ANSWER_OR_STREAM_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The whole answer, or, as `Accept` wants it, the events of the turn.",
        "content": STREAM_RESPONSES[200]["content"],
    }
}


def wants_stream(request: Request) -> bool:
    """Whether `Accept` names a form of streams."""
    accepted = request.headers.get("accept", "")
    return SSE in accepted or NDJSON in accepted


class TurnStream(Response):
    """The events of a turn, as `Accept` wants them. Events that are there together leave together.
    It ends with the turn, or when the client goes."""

    speaks_ndjson = True

    def __init__(
        self,
        request: Request,
        turn: Turn,
        after: Position | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._turn = turn
        self._after = after
        self._ndjson = self.speaks_ndjson and NDJSON in request.headers.get("accept", "")
        self._sent_at = asyncio.get_running_loop().time()
        self._has_begun = self._is_sending = False
        self.background = None
        self.status_code = 200
        self.media_type = NDJSON if self._ndjson else SSE
        always = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        self.init_headers({**always, **turn.ticket.headers, **(headers or {})})

    def init_headers(self, headers: dict[str, str] | None = None) -> None:  # type: ignore[override]
        """A stream has no length to announce."""
        super().init_headers(headers)
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Sends the events (ASGI)."""
        leaving = asyncio.create_task(_gone(receive), name="stream: client leaves")
        sending = asyncio.create_task(self._send(send), name="stream: events")
        try:
            await self._keep_alive((leaving, sending), send)
        finally:
            for task in (leaving, sending):
                if not task.done():
                    task.cancel()
                    with suppress(asyncio.CancelledError):
                        await task
        if not sending.cancelled():
            sending.result()

    async def _keep_alive(self, tasks: Iterable[asyncio.Task[None]], send: Send) -> None:
        """Sends something after every long silence, until one of the tasks is done."""
        now = asyncio.get_running_loop().time
        while True:
            patience = max(0.0, self._sent_at + KEEP_ALIVE_S - now())
            done, _ = await asyncio.wait(tasks, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if done:
                return
            if now() < self._sent_at + KEEP_ALIVE_S:
                continue
            self._sent_at = now()
            if not self._is_sending and not self._ndjson:
                await self._begin(send)
                await send({"type": "http.response.body", "body": b": still here\n\n", "more_body": True})

    async def _begin(self, send: Send) -> None:
        if not self._has_begun:
            self._has_begun = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

    async def _send(self, send: Send) -> None:
        await self._begin(send)
        await self._send_events(send)

    async def _send_events(self, send: Send) -> None:
        now = asyncio.get_running_loop().time
        async with aclosing(self._turn.follow(self._after)) as batches:
            async for batch in batches:
                data = self._encode(batch)
                if not data:
                    continue
                self._is_sending = True
                await self._begin(send)
                await send({"type": "http.response.body", "body": data, "more_body": True})
                self._is_sending = False
                self._sent_at = now()
        self._is_sending = True
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _encode(self, batch: Sequence[Numbered]) -> bytes:
        if self._ndjson:
            return b"".join(b"%b\n" % item.json for item in batch)
        return b"".join(_sse(item) for item in batch)


class Form(Protocol):
    """Another form for the events of a turn."""

    def encode(self, batch: Sequence[Numbered]) -> bytes:
        """Server-sent events for these; nothing where there is nothing to say."""


class FormedStream(TurnStream):
    """The events of a turn in another form. Its status waits for the first piece or the end, for as long as
    proxies bear silence: what fails before that is answered with its error's status. Not where the turn is
    only looked at: that it has failed is what is told then, and to look again is of no use."""

    speaks_ndjson = False

    def __init__(self, request: Request, turn: Turn, form: Form, headers: Mapping[str, str]) -> None:
        super().__init__(request, turn, headers=headers)
        self._form = form
        self._is_looked_at = request.method == "GET"

    async def _send(self, send: Send) -> None:
        await self._send_events(send)

    def _encode(self, batch: Sequence[Numbered]) -> bytes:
        last = batch[-1].event
        if not self._has_begun and not self._is_looked_at and isinstance(last, Ending):
            answer_of(last)
        return self._form.encode(batch)


def _sse(item: Numbered) -> bytes:
    return b"id: %b\nevent: %b\ndata: %b\n\n" % (item.id.encode(), type_of(item.event).encode(), item.json)


async def _gone(receive: Receive) -> None:
    """Returns when the client has gone."""
    message: Message = {"type": ""}
    while message["type"] != "http.disconnect":
        message = await receive()


def json_response(body: Mapping[str, Any], headers: Mapping[str, str]) -> Response:
    """A body that was made here, so nobody need check it as a body from outside is checked."""
    return Response(msgspec.json.encode(body), media_type="application/json", headers=headers)


async def whole_answer(request: Request, turn: Turn) -> Final | Cancelled:
    """The answer that the turn ends with. Raises the error that it ended with, and `ClientDisconnect`."""
    return answer_of(await while_connected(request, turn.ended()))


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`. Raises `ClientDisconnect` when the client goes before it is there, since nobody
    reads what would be answered; `work` is cancelled then. FastAPI does not cancel a handler whose client
    has left."""
    task = asyncio.current_task()
    assert task is not None
    has_left, leaving = False, None

    def left(_leaving: object) -> None:
        nonlocal has_left
        has_left = True
        task.cancel()

    def look() -> None:
        nonlocal leaving
        leaving = asyncio.create_task(_gone(request.receive), name="answer: client leaves")
        leaving.add_done_callback(left)

    timer = asyncio.get_running_loop().call_later(LOOK_AFTER_S, look)
    try:
        return await work
    except asyncio.CancelledError:
        if has_left and task.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        timer.cancel()
        if leaving is not None:
            leaving.remove_done_callback(left)
            leaving.cancel()
