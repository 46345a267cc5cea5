"""Sign-in of WebSockets, which browsers cannot give a header, and which any page may try to open."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.websockets import WebSocket

from app.access import Identity
from app.errors import Forbidden, Unauthenticated
from app.services.accounts import Accounts

SUBPROTOCOL = "bearer"


async def socket_user(socket: WebSocket, accounts: Accounts, origins: Sequence[str]) -> Identity:
    """Who opens the socket: by `Authorization`, or by the subprotocols `bearer, TOKEN`. Raises
    `Forbidden` for a page of another origin than the portal's own or `origins`, `Unauthenticated`."""
    origin = socket.headers.get("origin")
    if origin is not None and not _is_own(socket, origin) and origin not in origins:
        raise Forbidden("Origin: this page is not the portal's; CORS_ORIGINS names others that may connect.")
    scheme, _, token = socket.headers.get("authorization", "").partition(" ")
    if scheme.lower() != SUBPROTOCOL:
        protocols = list(socket.scope.get("subprotocols", ()))
        token = protocols[1] if len(protocols) == 2 and protocols[0] == SUBPROTOCOL else ""
    if not token:
        raise Unauthenticated("Sign in: by `Authorization: Bearer`, or by the subprotocols `bearer, TOKEN`.")
    return await accounts.identify(token.strip())


def _is_own(socket: WebSocket, origin: str) -> bool:
    """Whether a page of this origin came from where the socket goes to."""
    return urlsplit(origin).netloc == socket.headers.get("host")


def subprotocol(socket: WebSocket) -> str | None:
    """What to choose of the subprotocols that the client offers."""
    return SUBPROTOCOL if SUBPROTOCOL in socket.scope.get("subprotocols", ()) else None
