"""What the operator does straight in the database: inviting people, and verifying the audit log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from app.access import LOCAL
from app.cli.console import Failure
from app.cli.portal import settings_of
from app.config import Settings
from app.database import Database, migrate
from app.services.audit import Audit, Verdict, seal
from app.services.authorizer import Authorizer
from app.services.known_tokens import KnownTokens
from app.services.links import INVITATION_DAYS, Link, Links
from app.services.people import People
from app.services.policies import ADMIN, Policies
from app.services.sign_ins import SignIns


@asynccontextmanager
async def open_database(settings: Settings) -> AsyncIterator[Database]:
    """The database of a portal, brought up to date where the portal would do that too."""
    await asyncio.to_thread(migrate, settings.sqlalchemy_url, allowed=settings.database_auto_migrate)
    database = Database(settings.sqlalchemy_url, before_commit=seal)
    await database.open()
    try:
        yield database
    finally:
        await database.close()


@asynccontextmanager
async def open_policies(settings: Settings) -> AsyncIterator[tuple[Database, Authorizer, Policies]]:
    """The database of a portal, with who may do what in it."""
    async with open_database(settings) as database:
        authorizer = Authorizer(Audit(database))
        policies = Policies(database, authorizer, settings.path(settings.roles_file))
        await policies.open()
        yield database, authorizer, policies


async def _invite(settings: Settings, role: str, days: float, *, unless_admin: bool) -> Link | None:
    async with open_policies(settings) as (database, authorizer, policies):
        known = KnownTokens(database, policies)
        sign_ins = SignIns(settings, database, authorizer, known)
        people = People(database, authorizer, policies, sign_ins, known)
        if unless_admin and await people.has_admin():
            return None
        if not policies.has_role(role):
            names = ", ".join(found.name for found in policies.all_roles())
            raise Failure(f"There is no role {role!r}.", f"There are: {names}.")
        return await Links(database, authorizer, policies).invite(LOCAL, role, days, alone=unless_admin)


def invite(portal: Path, role: str, days: float = INVITATION_DAYS) -> Link:
    """An invitation in the operator's name. Raises `Failure`."""
    link = asyncio.run(_invite(settings_of(portal), role, days, unless_admin=False))
    assert link is not None
    return link


def invite_first_admin(portal: Path) -> Link | None:
    """An invitation for an admin, in place of earlier ones; nothing when there is an admin."""
    return asyncio.run(_invite(settings_of(portal), ADMIN, INVITATION_DAYS, unless_admin=True))


async def _verify(settings: Settings, head: str | None) -> Verdict:
    # Who verifies changes nothing; and where there is no log, none is whole.
    async with open_database(settings.replace(database_auto_migrate=False)) as database:
        return await Audit(database).verify(head)


def verify_audit(portal: Path, head: str | None) -> Verdict:
    """Whether the audit log is whole."""
    return asyncio.run(_verify(settings_of(portal), head))
