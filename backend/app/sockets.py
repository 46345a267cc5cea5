"""WebSockets: their sign-in, since browsers cannot give them a header and any page may try to open one; and
how long they stay open."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn
from urllib.parse import urlsplit

import msgspec
from pydantic import BaseModel, ValidationError
from starlette.responses import JSONResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from app.access import Identity, bearer_token
from app.errors import Forbidden, Internal, InvalidRequest, PortalError, Unauthenticated, http_body
from app.events import new_id
from app.hardening import parse_json
from app.logs import get_logger
from app.options import invalid
from app.services.accounts import Accounts
from app.services.tickets import Tickets
from app.services.token_watch import TokenWatch

SUBPROTOCOL = "bearer"

VIOLATION = 1008
"""Close code: what was sent, or who has sent it, is not let in (RFC 6455, 7.4.1)."""

CLOSE_S = 1.0
"""How long a client may take to read why its socket is closed."""

May = Callable[[Identity], Awaitable[None]]
"""Returns when somebody may do something; raises why not."""

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Closing:
    """Why a socket is closed without an error being told."""

    code: int
    reason: str


TOO_SLOW = Closing(1013, "too slow: connect again and resume")
"""The code says to come back later (IANA's registry of WebSocket close codes)."""


class Opened:
    """A socket that is open, and who has opened it."""

    def __init__(self, socket: WebSocket, watch: TokenWatch, token: str, user: Identity, may: May) -> None:
        self.socket = socket
        self.user = user
        self._watch = watch
        self._may = may
        self._token = token
        self._serving: asyncio.Task[Any] | None = None
        self._why: PortalError | Closing | None = None

    async def serve(self, work: Coroutine[Any, Any, None]) -> None:
        """Does the work until it has ended, the client has gone, its token is not good any more, its user may
        not open the socket any more, or somebody calls `end`; then the socket is closed."""
        self._serving = asyncio.current_task()
        try:
            with self._watch.watch(self._token, self):
                await work
        except WebSocketDisconnect:
            return
        except PortalError as error:
            await self._close(error)
        except asyncio.CancelledError:
            if self._why is None or self._serving is None or self._serving.uncancel():
                raise
            await self._close(self._why)
        finally:
            self._serving = None

    async def is_now(self, identity: Identity) -> None:
        """See `Connected`."""
        if identity != self.user:
            await self._may(identity)
            self.user = identity

    def end(self, why: PortalError | Closing) -> None:
        """Ends what is served. Who is told an error is not let in any more."""
        if self._serving is not None and self._why is None:
            self._why = why
            self._serving.cancel()

    async def _close(self, why: PortalError | Closing) -> None:
        with suppress(WebSocketDisconnect, RuntimeError, TimeoutError):  # it has gone, or does not read
            async with asyncio.timeout(CLOSE_S):
                if isinstance(why, Closing):
                    await self.socket.close(why.code, why.reason)
                else:
                    await self.socket.send_json(refusal(why))
                    await self.socket.close(VIOLATION)


async def until_one_ends(*work: Coroutine[Any, Any, None]) -> None:
    """Does all of the work at once, until a part of it has ended; raises what that has raised."""
    tasks = [asyncio.create_task(part, name="socket") for part in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


class Nothing(BaseModel):
    """What is said with its `type` alone, as `ping`."""


class Talk:
    """What is said over an open socket: JSON objects with a `type`. What is sent waits for the reader."""

    commands: ClassVar[Mapping[str, tuple[type[BaseModel], Callable[[Any, Any], Awaitable[None]]]]]
    """What a client may say, in which form, and what carries it out."""

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        self.sending = asyncio.Lock()
        self._socket = opened.socket

    @property
    def user(self) -> Identity:
        """Who has opened it."""
        return self.opened.user

    def fall_behind(self) -> None:
        """The client reads too slowly: nothing is kept for it, so it has to come back."""
        self.opened.end(TOO_SLOW)

    async def listen(self) -> NoReturn:
        """Carries out what the client says. Raises `WebSocketDisconnect` once it has gone."""
        while True:
            await self._take(await self._received())

    async def send(self, *messages: Mapping[str, Any]) -> None:
        """Sends messages, one after the other. Raises `WebSocketDisconnect` once the client has gone."""
        async with self.sending:
            for message in messages:
                await self._socket.send_text(msgspec.json.encode(message).decode())

    async def pong(self, _body: Nothing) -> None:
        """Answers a `ping`."""
        await self.send({"type": "pong"})

    async def _received(self) -> bytes:
        try:
            return (await self._socket.receive_text()).encode()
        except KeyError:
            return b""  # bytes, which mean nothing here

    async def _take(self, text: bytes) -> None:
        request_id: str | None = None
        try:
            said = _object(text)
            given = said.get("request_id")
            request_id = given if isinstance(given, str) else None
            form, carry_out = self.commands.get(str(said.pop("type", "")), (None, None))
            if form is None or carry_out is None:
                raise InvalidRequest(f"type: one of {', '.join(self.commands)} is needed")
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


def _object(text: bytes) -> dict[str, Any]:
    try:
        said = parse_json(text)
    except ValueError as error:
        raise InvalidRequest(f"This is not JSON: {error}", status=400) from None
    if not isinstance(said, dict):
        raise InvalidRequest("A JSON object with a `type` is needed.")
    return said


def refusal(error: PortalError, request_id: str | None = None) -> dict[str, Any]:
    """What tells the client that something which it asked for is not done."""
    return {"type": "error", "request_id": request_id, "error": msgspec.to_builtins(error.info)}


async def open_socket(socket: WebSocket, may: May) -> Opened | None:
    """Accepts the socket of somebody who `may` open it; None when it was refused, with an HTTP answer. The
    socket is closed when they may not any more."""
    container = socket.app.state.container
    accounts: Accounts = container.accounts
    try:
        token = await _token(socket)
        user = await accounts.identify(token)
        await may(user)
    except PortalError as error:
        await socket.send_denial_response(JSONResponse(http_body(error, new_id()), error.status))
        return None
    chosen = SUBPROTOCOL if SUBPROTOCOL in socket.scope.get("subprotocols", ()) else None
    await socket.accept(subprotocol=chosen)
    return Opened(socket, container.token_watch, token, user, may)


async def _token(socket: WebSocket) -> str:
    """The token of who opens a socket: by `Authorization`, by the subprotocols `bearer, TOKEN`, or by the
    ticket that was given for it. Raises `Forbidden` for a page of another origin than the portal's own or
    those of CORS_ORIGINS, `Unauthenticated`."""
    container = socket.app.state.container
    origins: Sequence[str] = container.settings.cors_origins
    tickets: Tickets = container.tickets
    origin = socket.headers.get("origin")
    if origin is not None and not _is_own(socket, origin) and origin not in origins:
        raise Forbidden("Origin: this page is not the portal's; CORS_ORIGINS names others that may connect.")
    if token := bearer_token(socket.headers.get("authorization")):
        return token
    protocols = list(socket.scope.get("subprotocols", ()))
    if len(protocols) == 2 and protocols[0] == SUBPROTOCOL:
        return str(protocols[1])
    if ticket := socket.query_params.get("ticket"):
        return await tickets.redeem(ticket)
    raise Unauthenticated(
        "Sign in: by `Authorization: Bearer`, by the subprotocols `bearer, TOKEN`, or by `?ticket=`."
    )


def _is_own(socket: WebSocket, origin: str) -> bool:
    """Whether a page of this origin came from where the socket goes to."""
    return urlsplit(origin).netloc == socket.headers.get("host")
