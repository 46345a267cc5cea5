"""`/api/sessions`: what sessions there are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field, SecretStr, field_validator

from app.dependencies import CurrentUser, MemoryDep, PinsDep, SessionKeysDep, SessionsDep, TemplatesDep
from app.hardening import StrictRoute
from app.routers.times import moment
from app.services.memory import Memory
from app.services.rows import SessionRow
from app.services.session_keys import StoredKey
from app.services.templates import Templates, TemplateVersion

router = APIRouter(prefix="/api/sessions", tags=["sessions"], route_class=StrictRoute)


class SessionTemplate(BaseModel):
    """The version of a template that a session was made from. `id` names the template, which may have
    newer versions, or be deleted."""

    id: str
    version: int
    version_id: str
    title: str

    @classmethod
    def of(cls, version: TemplateVersion) -> SessionTemplate:
        """The template of a version."""
        return cls(id=version.template_id, version=version.number, version_id=version.id, title=version.title)


class Session(BaseModel):
    """A session. Its system prompt came from `template`, where there is one; `summary` is what the model is
    told of messages that are no longer sent to it."""

    session_id: str
    title: str
    project: str
    system_prompt: str
    template: SessionTemplate | None
    summary: str | None
    created_at: datetime
    updated_at: datetime


class SessionPage(BaseModel):
    """A part of the list; `total` counts all that match."""

    sessions: list[Session]
    total: int


class SessionChange(BaseModel):
    """What can be changed of a session."""

    title: Annotated[str, Field(min_length=1, max_length=200)]


class PinBody(BaseModel):
    """What is pinned in the session now, and how much may be, in tokens."""

    message_id: str
    pinned_tokens: int
    most_tokens: int


@router.get("")
async def list_sessions(
    user: CurrentUser,
    sessions: SessionsDep,
    templates: TemplatesDep,
    memory: MemoryDep,
    search: Annotated[str, Query(max_length=200, description="Only titles with this text")] = "",
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    offset: Annotated[int, Query(ge=0, le=2**53)] = 0,
) -> SessionPage:
    """My sessions, those used last first."""
    found, total = await sessions.search(user, search, limit=limit, offset=offset)
    return SessionPage(sessions=await shown(found, templates, memory), total=total)


@router.get("/{session_id}")
async def get_session(
    session_id: str, user: CurrentUser, sessions: SessionsDep, templates: TemplatesDep, memory: MemoryDep
) -> Session:
    """One session."""
    return await _one(await sessions.session(user, session_id), templates, memory)


@router.patch("/{session_id}")
async def change_session(
    session_id: str,
    body: SessionChange,
    user: CurrentUser,
    sessions: SessionsDep,
    templates: TemplatesDep,
    memory: MemoryDep,
) -> Session:
    """Gives a session another title."""
    return await _one(await sessions.rename(user, session_id, body.title), templates, memory)


@router.delete("/{session_id}", status_code=204)
async def delete_session(session_id: str, user: CurrentUser, sessions: SessionsDep) -> None:
    """Deletes a session; its turns are stopped. It can be restored."""
    await sessions.delete(user, session_id)


@router.post("/{session_id}/restore")
async def restore_session(
    session_id: str, user: CurrentUser, sessions: SessionsDep, templates: TemplatesDep, memory: MemoryDep
) -> Session:
    """Brings a deleted session back, unless its id is in use again."""
    return await _one(await sessions.restore(user, session_id), templates, memory)


class OwnKeyBody(BaseModel):
    """A key for a provider of models that takes keys of sessions."""

    provider: Annotated[str, Field(max_length=64, description="Its name in models.toml")]
    key: Annotated[SecretStr, Field(min_length=1, max_length=4096)]

    @field_validator("key")
    @classmethod
    def _visible(cls, value: SecretStr) -> SecretStr:
        if re.fullmatch("[!-~]+", value.get_secret_value()) is None:
            raise ValueError("only visible characters of ASCII can be sent as a key")
        return value


class SessionKey(BaseModel):
    """That a session has a key of its own, and for which provider. The key itself is shown to nobody."""

    provider: str
    created_at: datetime

    @classmethod
    def of(cls, key: StoredKey) -> SessionKey:
        """The body of a key."""
        return cls(provider=key.provider, created_at=moment(key.created_at))


@router.put("/{session_id}/key")
async def put_key(session_id: str, body: OwnKeyBody, user: CurrentUser, keys: SessionKeysDep) -> SessionKey:
    """Gives a session a key of its own, with which its turns at this provider are asked for."""
    key = body.key.get_secret_value()
    return SessionKey.of(await keys.put(user, session_id, body.provider, key))


@router.get("/{session_id}/key")
async def get_key(session_id: str, user: CurrentUser, keys: SessionKeysDep) -> SessionKey:
    """Whether a session has a key of its own."""
    return SessionKey.of(await keys.get(user, session_id))


@router.delete("/{session_id}/key", status_code=204)
async def delete_key(session_id: str, user: CurrentUser, keys: SessionKeysDep) -> None:
    """Takes a session's key away."""
    await keys.forget(user, session_id)


@router.post("/{session_id}/messages/{message_id}/pin")
async def pin_message(session_id: str, message_id: str, user: CurrentUser, pins: PinsDep) -> PinBody:
    """Pins a message: it is sent to the model, with its question or answer, however often the history is
    cut. At most a quarter of what may be sent can be pinned."""
    pinned = await pins.pin(user, session_id, message_id)
    return PinBody(message_id=message_id, pinned_tokens=pinned.tokens, most_tokens=pinned.most)


@router.delete("/{session_id}/messages/{message_id}/pin", status_code=204)
async def unpin_message(session_id: str, message_id: str, user: CurrentUser, pins: PinsDep) -> None:
    """Takes the pin off a message."""
    await pins.unpin(user, session_id, message_id)


class Chosen(BaseModel):
    """The newest message of the history now."""

    leaf_id: str


class Branches(BaseModel):
    """The places of a session where there is more than one message: the ids in each, the oldest first."""

    branches: list[list[str]]


@router.post("/{session_id}/messages/{message_id}/choose")
async def choose_message(
    session_id: str, message_id: str, user: CurrentUser, sessions: SessionsDep
) -> Chosen:
    """Lets the history go through this message, and on to the newest one behind it: that is what is shown,
    and what the model sees. A busy session is a `conflict`."""
    return Chosen(leaf_id=await sessions.choose(user, session_id, message_id))


@router.get("/{session_id}/branches")
async def get_branches(session_id: str, user: CurrentUser, sessions: SessionsDep) -> Branches:
    """Where messages were answered again, or edited."""
    return Branches(branches=await sessions.branches(user, session_id))


async def _one(row: SessionRow, templates: Templates, memory: Memory) -> Session:
    (session,) = await shown([row], templates, memory)
    return session


async def shown(rows: Sequence[SessionRow], templates: Templates, memory: Memory) -> list[Session]:
    """Sessions as they are shown, with what else is known of them."""
    versions = await templates.named(row.template_version for row in rows if row.template_version)
    summaries = await memory.summaries(rows)
    return [_session(row, versions.get(row.template_version or ""), summaries.get(row.id)) for row in rows]


def _session(row: SessionRow, version: TemplateVersion | None, summary: str | None) -> Session:
    return Session(
        session_id=row.session_id,
        title=row.title,
        project=row.project,
        system_prompt=row.system_prompt,
        template=None if version is None else SessionTemplate.of(version),
        summary=summary,
        created_at=moment(row.created_at),
        updated_at=moment(row.updated_at),
    )
