"""Prompt templates: each save is a new version, and versions never change."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import Connection, and_, func, insert, or_, select, update

from app.access import Identity
from app.database import Database
from app.errors import Conflict, NotFound
from app.events import new_id
from app.models.tables import template_versions, templates
from app.services.authorizer import Authorizer
from app.services.templating import Names, names_of, render


class TemplateVersion(msgspec.Struct, frozen=True):
    """A template as it was saved. `template_id` names the template, `id` this version of it; `variables`
    and `optional` are the names in it."""

    id: str
    template_id: str
    number: int
    title: str
    description: str
    content: str
    variables: list[str]
    optional: list[str]
    created_at: float

    def render(self, variables: Mapping[str, Any]) -> str:
        """The prompt. Raises `InvalidRequest` naming the variables that are missing."""
        return render(self.content, variables)


@dataclass(frozen=True, slots=True)
class Draft:
    """What is to be saved."""

    title: str
    description: str
    content: str


COLUMNS = (
    template_versions.c.id,
    template_versions.c.template,
    template_versions.c.number,
    template_versions.c.title,
    template_versions.c.description,
    template_versions.c.content,
    template_versions.c.variables,
    template_versions.c.optional,
    template_versions.c.created_at,
)
IS_LATEST = and_(
    template_versions.c.template == templates.c.id, template_versions.c.number == templates.c.latest
)


class Templates:
    """The templates of all owners; each sees only their own."""

    def __init__(self, database: Database, authorizer: Authorizer) -> None:
        self._database = database
        self._authorizer = authorizer

    async def search(
        self, who: Identity, text: str = "", *, limit: int = 50, offset: int = 0
    ) -> tuple[list[TemplateVersion], int]:
        """The newest versions of the owner's templates with `text` in their title, description or
        content, those saved last first, and how many there are in all."""
        await self._authorizer.check(who, "templates:read")
        wanted = [templates.c.owner == who.owner, templates.c.deleted_at.is_(None), IS_LATEST]
        if text:
            latest = template_versions.c
            searched = (latest.title, latest.description, latest.content)
            wanted.append(or_(*(column.icontains(text, autoescape=True) for column in searched)))
        joined = select(*COLUMNS).select_from(templates.join(template_versions)).where(*wanted)

        def operation(connection: Connection) -> tuple[list[TemplateVersion], int]:
            total = connection.execute(select(func.count()).select_from(joined.subquery())).scalar_one()
            newest = (
                joined.order_by(templates.c.updated_at.desc(), templates.c.id).limit(limit).offset(offset)
            )
            return [TemplateVersion(*row) for row in connection.execute(newest)], total

        return await self._database.read(operation)

    async def create(self, who: Identity, draft: Draft) -> TemplateVersion:
        """Saves a new template. Raises `InvalidRequest` when its content is no template."""
        await self._authorizer.check(who, "templates:write")
        now = time.time()
        version = _version(new_id(), 1, draft, names_of(draft.content), now)
        values = {
            "id": version.template_id,
            "owner": who.owner,
            "latest": 1,
            "created_at": now,
            "updated_at": now,
        }

        def operation(connection: Connection) -> None:
            connection.execute(insert(templates).values(values))
            _insert(connection, version)

        await self._database.write(operation)
        return version

    async def save(
        self, who: Identity, template_id: str, draft: Draft, based_on: int | None = None
    ) -> TemplateVersion:
        """Saves a new version, unless nothing has changed. Raises `NotFound`, `InvalidRequest`, and
        `Conflict` when the newest version is not `based_on` any more."""
        await self._authorizer.check(who, "templates:write")
        names, now = names_of(draft.content), time.time()

        def operation(connection: Connection) -> TemplateVersion | Conflict | None:
            # The write comes first, so that two who save at once are one after the other.
            mine = and_(
                templates.c.id == template_id,
                templates.c.owner == who.owner,
                templates.c.deleted_at.is_(None),
            )
            if not connection.execute(update(templates).where(mine).values(updated_at=now)).rowcount:
                return None
            latest = TemplateVersion(*connection.execute(_latest(template_id)).one())
            if based_on not in {None, latest.number}:
                return Conflict(
                    f"based_on: version {latest.number} was saved since; look at it before you save yours"
                )
            if (latest.title, latest.description, latest.content) == (
                draft.title,
                draft.description,
                draft.content,
            ):
                return latest
            version = _version(template_id, latest.number + 1, draft, names, now)
            _insert(connection, version)
            connection.execute(
                update(templates).where(templates.c.id == template_id).values(latest=version.number)
            )
            return version

        return _found(await self._database.write(operation))

    async def get(self, who: Identity, template_id: str, number: int | None = None) -> TemplateVersion:
        """A version, the newest when no number is given. Raises `NotFound`."""
        await self._authorizer.check(who, "templates:read")
        statement = (
            select(*COLUMNS)
            .select_from(templates.join(template_versions))
            .where(
                templates.c.id == template_id,
                templates.c.owner == who.owner,
                templates.c.deleted_at.is_(None),
            )
            .where(IS_LATEST if number is None else template_versions.c.number == number)
        )
        row = await self._database.read(lambda c: c.execute(statement).first())
        return _found(None if row is None else TemplateVersion(*row))

    async def versions(self, who: Identity, template_id: str) -> list[TemplateVersion]:
        """All versions, the newest first. Raises `NotFound`."""
        await self.get(who, template_id)
        statement = (
            select(*COLUMNS)
            .where(template_versions.c.template == template_id)
            .order_by(template_versions.c.number.desc())
        )
        rows = await self._database.read(lambda c: c.execute(statement).all())
        return [TemplateVersion(*row) for row in rows]

    async def named(self, version_ids: Iterable[str]) -> dict[str, TemplateVersion]:
        """The versions with these ids, also those of deleted templates."""
        wanted = set(version_ids)
        if not wanted:
            return {}
        statement = select(*COLUMNS).where(template_versions.c.id.in_(wanted))
        rows = await self._database.read(lambda c: c.execute(statement).all())
        return {row.id: TemplateVersion(*row) for row in rows}

    async def delete(self, who: Identity, template_id: str) -> None:
        """Takes a template away; sessions made from it keep their prompt. Raises `NotFound`."""
        await self._authorizer.check(who, "templates:write")
        await self._mark(who, template_id, time.time())

    async def restore(self, who: Identity, template_id: str) -> TemplateVersion:
        """Brings a deleted template back. Raises `NotFound`."""
        await self._authorizer.check(who, "templates:write")
        await self._mark(who, template_id, None)
        return await self.get(who, template_id)

    async def _mark(self, who: Identity, template_id: str, deleted_at: float | None) -> None:
        mine = and_(templates.c.id == template_id, templates.c.owner == who.owner)
        if deleted_at is not None:
            mine = and_(mine, templates.c.deleted_at.is_(None))
        statement = update(templates).where(mine).values(deleted_at=deleted_at)
        if not await self._database.write(lambda c: c.execute(statement).rowcount):
            raise NotFound("There is no such template.")


def _version(template_id: str, number: int, draft: Draft, names: Names, now: float) -> TemplateVersion:
    """A new version. The names in it are stored with it: a list of templates need not be read through, and a
    template stays readable when its content would be refused by now."""
    return TemplateVersion(
        new_id(), template_id, number, draft.title, draft.description, draft.content, *names, now
    )


def _insert(connection: Connection, version: TemplateVersion) -> None:
    row = zip((column.name for column in COLUMNS), msgspec.structs.astuple(version), strict=True)
    connection.execute(insert(template_versions).values(dict(row)))


def _latest(template_id: str) -> Any:
    joined = templates.join(template_versions)
    return select(*COLUMNS).select_from(joined).where(templates.c.id == template_id, IS_LATEST)


def _found(outcome: TemplateVersion | None) -> TemplateVersion:
    if outcome is None:
        raise NotFound("There is no such template.")
    return outcome
