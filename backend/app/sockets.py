"""WebSockets: their sign-in, since browsers cannot give them a header and any page may try to open one; and
how long they stay open."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, NoReturn
from urllib.parse import urlsplit

import msgspec
from starlette.responses import JSONResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from app.access import Identity
from app.errors import Forbidden, PortalError, StorageUnavailable, Unauthenticated, http_body
from app.events import new_id
from app.services.accounts import Accounts
from app.services.tickets import Tickets

SUBPROTOCOL = "bearer"

LOOK_S = 15.0
"""How often it is looked whether who has opened a socket may still sign in."""

VIOLATION = 1008
"""Close code: what was sent, or who has sent it, is not let in (RFC 6455, 7.4.1)."""


class Opened:
    """A socket that is open, and who has opened it."""

    def __init__(self, socket: WebSocket, accounts: Accounts, token: str, user: Identity) -> None:
        self.socket = socket
        self.user = user
        self._accounts = accounts
        self._token = token

    async def serve(self, *work: Coroutine[Any, Any, None]) -> None:
        """Does the work until a part of it has ended, the client has gone, or its token is not good any more;
        then the socket is closed."""
        tasks = [asyncio.create_task(part, name="socket") for part in (*work, self._until_signed_out())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except WebSocketDisconnect:
            return
        except PortalError as error:
            with suppress(WebSocketDisconnect, RuntimeError):  # it has gone in the meantime
                await self.socket.send_json(refusal(error))
                await self.socket.close(VIOLATION)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _until_signed_out(self) -> NoReturn:
        while True:
            await asyncio.sleep(LOOK_S)
            with suppress(StorageUnavailable):
                await self._accounts.identify(self._token)


def refusal(error: PortalError, request_id: str | None = None) -> dict[str, Any]:
    """What tells the client that something which it asked for is not done."""
    return {"type": "error", "request_id": request_id, "error": msgspec.to_builtins(error.info)}


async def open_socket(socket: WebSocket, may: Callable[[Identity], Awaitable[None]]) -> Opened | None:
    """Accepts the socket of somebody who `may` open it; None when it was refused, with an HTTP answer."""
    accounts: Accounts = socket.app.state.container.accounts
    try:
        token = await _token(socket)
        user = await accounts.identify(token)
        await may(user)
    except PortalError as error:
        await socket.send_denial_response(JSONResponse(http_body(error, new_id()), error.status))
        return None
    chosen = SUBPROTOCOL if SUBPROTOCOL in socket.scope.get("subprotocols", ()) else None
    await socket.accept(subprotocol=chosen)
    return Opened(socket, accounts, token, user)


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
    scheme, _, token = socket.headers.get("authorization", "").partition(" ")
    if scheme.lower() == SUBPROTOCOL and token:
        return token.strip()
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
