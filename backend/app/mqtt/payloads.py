"""What the MQTT door publishes besides replies: the types that are encoded, and described at
`/asyncapi.json`."""

from __future__ import annotations

from typing import Literal

import msgspec

from app.errors import ErrorInfo


class Notice(msgspec.Struct, frozen=True, omit_defaults=True, rename="camel"):
    """Something was done, as games show it."""

    hint: str
    request_id: str | None = None


class HintRefusal(msgspec.Struct, frozen=True, omit_defaults=True, rename="camel"):
    """A request that has no reply, as games show it: `hint` is empty where a player can do nothing
    about it."""

    hint: str
    error: ErrorInfo
    request_id: str | None = None


class Refusal(msgspec.Struct, frozen=True, rename="camel"):
    """A request that has no reply."""

    error: ErrorInfo
    session_id: str | None
    request_id: str | None


class NewSession(msgspec.Struct, frozen=True, omit_defaults=True, rename="camel"):
    """A fresh session id, with the ids of whoever asked."""

    session_id: str
    request_id: str | None = None
    client_id: str | None = None


class Status(msgspec.Struct, frozen=True):
    """How the portal is. `birth` names the connection, in the will as in the rest, so that a late will is
    not taken for the end of a newer one; `since` is when the process started; `queue` turns wait for the LLM
    server, the next one for `eta_s` seconds."""

    state: Literal["online", "offline", "degraded"]
    birth: str
    model: str | None
    since: str
    version: str
    queue: int
    eta_s: float
