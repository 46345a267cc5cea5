"""`/api/sessions`: what sessions there are."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from app.dependencies import CurrentUser, SessionsDep
from app.services.store import SessionRow

router = APIRouter(prefix="/api/sessions", tags=["sessions"])


class Session(BaseModel):
    """A session. `template_version` is the version of a template that its system prompt came from."""

    session_id: str
    title: str
    project: str
    system_prompt: str
    template_version: str | None
    created_at: datetime
    updated_at: datetime

    @classmethod
    def of(cls, row: SessionRow) -> Session:
        """The session of a row."""
        return cls(
            session_id=row.session_id,
            title=row.title,
            project=row.project,
            system_prompt=row.system_prompt,
            template_version=row.template_version,
            created_at=datetime.fromtimestamp(row.created_at, UTC),
            updated_at=datetime.fromtimestamp(row.updated_at, UTC),
        )


class SessionPage(BaseModel):
    """A part of the list; `total` counts all that match."""

    sessions: list[Session]
    total: int


class SessionChange(BaseModel):
    """What can be changed of a session."""

    title: Annotated[str, Field(min_length=1, max_length=200)]


@router.get("")
async def list_sessions(
    user: CurrentUser,
    sessions: SessionsDep,
    search: Annotated[str, Query(max_length=200, description="Only titles with this text")] = "",
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    offset: Annotated[int, Query(ge=0)] = 0,
) -> SessionPage:
    """My sessions, those used last first."""
    found, total = await sessions.search(user.owner, search, limit=limit, offset=offset)
    return SessionPage(sessions=[Session.of(row) for row in found], total=total)


@router.get("/{session_id}")
async def get_session(session_id: str, user: CurrentUser, sessions: SessionsDep) -> Session:
    """One session."""
    return Session.of(await sessions.session(user.owner, session_id))


@router.patch("/{session_id}")
async def change_session(
    session_id: str, body: SessionChange, user: CurrentUser, sessions: SessionsDep
) -> Session:
    """Gives a session another title."""
    return Session.of(await sessions.rename(user.owner, session_id, body.title))


@router.delete("/{session_id}", status_code=204)
async def delete_session(session_id: str, user: CurrentUser, sessions: SessionsDep) -> None:
    """Deletes a session; its turns are stopped. It can be restored."""
    await sessions.delete(user.owner, session_id)


@router.post("/{session_id}/restore")
async def restore_session(session_id: str, user: CurrentUser, sessions: SessionsDep) -> Session:
    """Brings a deleted session back, unless its id is in use again."""
    return Session.of(await sessions.restore(user.owner, session_id))
