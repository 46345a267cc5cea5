"""What protects every HTTP door alike: bounds on what comes in, and headers on what goes out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import InvalidRequest, PayloadTooLarge, PortalError
from app.events import is_id, new_id
from app.logs import bind
from app.trace_parent import note_trace

LINGER_S = 2.0
"""How long the rest of a refused body is read and thrown away. A connection that is closed with bytes
unread is reset, and the client may then never see the answer."""

MOST_LEVELS = 100
"""Levels of objects and lists in a JSON body."""

LARGE_BODY = 65536
"""Bytes of JSON from which on parsing it leaves the event loop."""

Render = Callable[[Request, PortalError], Response]
"""Makes the answer for an error."""


# --- what comes in -------------------------------------------------------------------------------


class BoundedBodies:
    """ASGI: lets no body in that is larger than `most` bytes, or that would have to be unpacked first.

    A length that is announced is believed before a byte is read; what comes without one is counted while
    it is read.
    """

    def __init__(self, app: ASGIApp, most: int, render: Render) -> None:
        self._app = app
        self._most = most
        self._render = render

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(receive, send, self._most)
        headers = Headers(scope=scope)
        problem = self._problem(headers)
        if problem is None:
            await self._app(scope, body.receive, body.send)
            return
        body.is_refused = True
        body.is_ended = headers.get("expect", "").lower() == "100-continue"  # it waits to be asked for
        await self._render(Request(scope), problem)(scope, receive, body.send)

    def _problem(self, headers: Headers) -> PortalError | None:
        encoding = headers.get("content-encoding", "").strip().lower()
        if encoding not in {"", "identity"}:
            return InvalidRequest("Content-Encoding: send the body as it is, not packed.", status=415)
        length = headers.get("content-length", "")
        if length.isdecimal() and (len(length) > 18 or int(length) > self._most):
            return PayloadTooLarge(_too_large(self._most))
        return None


def _too_large(most: int) -> str:
    return f"The body is larger than {most} bytes."


class _Body:
    """The body of one request while it is read, and the end of its connection when it is refused."""

    def __init__(self, receive: Receive, send: Send, most: int) -> None:
        self._receive = receive
        self._send = send
        self._most = most
        self._size = 0
        self._has_answer = False
        self.is_refused = False
        self.is_ended = False

    async def receive(self) -> Message:
        """The next message of the request. Raises Starlette's `HTTPException`, which FastAPI lets through
        when it reads a body, as the app's own errors it does not."""
        message = await self._receive()
        if message["type"] != "http.request":
            return message
        self.is_ended = not message.get("more_body", False)
        self._size += len(message.get("body", b""))
        if self._size > self._most:
            if self._has_answer:  # nobody needs the body any more: as good as gone
                return {"type": "http.disconnect"}
            self.is_refused = True
            raise HTTPException(413, _too_large(self._most))
        return message

    async def send(self, message: Message) -> None:
        """Sends a message; after the last one of a refusal, the rest of the body is thrown away."""
        if message["type"] == "http.response.start":
            self._has_answer = True
            if self.is_refused:
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
        elif self.is_refused and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            with suppress(TimeoutError):
                async with asyncio.timeout(LINGER_S):
                    await self._discard()
            message = {"type": "http.response.body"}
        await self._send(message)

    async def _discard(self) -> None:
        while not self.is_ended:
            message = await self._receive()
            self.is_ended = message["type"] == "http.disconnect" or not message.get("more_body", False)


# --- JSON ----------------------------------------------------------------------------------------


def parse_json(body: bytes) -> Any:
    """The value of a JSON text (RFC 8259), in UTF-8, each name at most once in an object.

    Raises `json.JSONDecodeError`: also for `NaN`, numbers beyond every range, half a surrogate pair, more
    than `MOST_LEVELS` levels, and names that come twice, of which two readers could take another one each.
    """
    try:
        value = msgspec.json.decode(body)
    except RecursionError:
        raise _not_json(f"more than {MOST_LEVELS} levels") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _not_json(str(error)) from None
    if body.count(b"[") + body.count(b"{") > MOST_LEVELS and _is_deep(value):
        raise _not_json(f"more than {MOST_LEVELS} levels")
    json.loads(body, object_pairs_hook=_unique)
    return value


def _not_json(problem: str) -> json.JSONDecodeError:
    return json.JSONDecodeError(problem, "", 0)


def _unique(pairs: list[tuple[str, Any]]) -> None:
    if len({name for name, _ in pairs}) < len(pairs):
        raise _not_json("a name comes twice in an object")


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MOST_LEVELS):
        level = [inner for outer in level for inner in _parts(outer) if isinstance(inner, dict | list)]
        if not level:
            return False
    return True


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


class StrictRequest(Request):
    """A request whose JSON is read strictly."""

    async def json(self) -> Any:
        """The body. Raises `json.JSONDecodeError`."""
        if not hasattr(self, "_parsed"):
            body = await self.body()
            is_large = len(body) >= LARGE_BODY
            self._parsed = await asyncio.to_thread(parse_json, body) if is_large else parse_json(body)
        return self._parsed


class ErrorDetail(BaseModel):
    """What went wrong; `details` names the fields of an invalid request."""

    code: str
    message: str
    request_id: str
    details: Any = None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetail
    detail: str


_ERRORS: dict[int | str, dict[str, Any]] = {"default": {"model": ErrorBody, "description": "An error"}}


class StrictRoute(APIRoute):
    """A route that reads its body as `StrictRequest`. Its operation has the name of its handler, and answers
    errors with `ErrorBody` where it does not say otherwise."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **rest: Any) -> None:
        rest["responses"] = {**_ERRORS, **(rest.get("responses") or {})}
        super().__init__(path, endpoint, **{**rest, "operation_id": endpoint.__name__})

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What FastAPI calls for a request."""
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return handle_strictly


# --- what goes out -------------------------------------------------------------------------------

POLICY = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"

UNUSED_FEATURES = (
    "accelerometer",
    "browsing-topics",
    "camera",
    "display-capture",
    "geolocation",
    "gyroscope",
    "magnetometer",
    "microphone",
    "midi",
    "payment",
    "serial",
    "usb",
)

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    # For what other pages embed, without asking by CORS: CORS_ORIGINS work all the same.
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": ", ".join(f"{name}=()" for name in UNUSED_FEATURES),
}
"""On every answer that does not say otherwise itself."""

YEAR_OF_HTTPS = "max-age=31536000"
"""For this host alone: what else runs below its name is not ours to decide."""


def _raw(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode()) for name, value in headers.items()]


def _request_id(scope: Scope) -> str:
    """The id of a request; the trace that it belongs to is noted."""
    given = {name: value.decode("latin-1") for name, value in scope["headers"] if name in _IDS}
    if not given:
        return new_id()
    note_trace(given.get(b"traceparent"), given.get(b"tracestate"))
    request_id = given.get(b"x-request-id", "")
    return request_id if is_id(request_id) else new_id()


_IDS = frozenset({b"x-request-id", b"traceparent", b"tracestate"})


class SecurityHeaders:
    """ASGI: puts the headers on answers, errors too, with the request's id: the client's `X-Request-ID`, or a
    new one. The log of what is done for the request has it too. Chunks pass as they are."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._always = _raw(HEADERS)
        self._of_api = _raw({"Cache-Control": "no-store"})
        self._of_https = _raw({"Strict-Transport-Security": YEAR_OF_HTTPS})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request (ASGI)."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        request_id = scope["request_id"] = _request_id(scope)
        bind(request_id=request_id)
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        wanted = [*self._always, (b"x-request-id", request_id.encode())]
        if scope["path"].startswith(("/api/", "/v1/")):
            wanted += self._of_api
        if scope["scheme"] == "https":
            wanted += self._of_https

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = message.get("headers", [])
                names = {name.lower() for name, _ in own}
                headers = [*own, *(header for header in wanted if header[0] not in names)]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, send_with_headers)
