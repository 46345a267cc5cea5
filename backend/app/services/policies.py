"""Roles and limits: from the file that is shipped, the admin's own file, and the database above both.

All of them are kept in memory, for they are asked for with every request; what another process changes in
the database is known here within `REFRESH_S`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter
from sqlalchemy import Connection, Row, Table, bindparam, delete, func, insert, select, update

from app.access import ROLE_NAME, Identity, Limits, Role
from app.database import Database, keep_fresh
from app.errors import Conflict, InvalidRequest, NotFound
from app.files import read_toml
from app.logs import get_logger
from app.models.tables import api_keys, devices, limits, roles, users
from app.services.audit import note
from app.services.authorizer import Authorizer
from app.services.projects import Projects

SHIPPED_ROLES = Path(__file__).resolve().parent.parent / "roles.toml"

ADMIN = "admin"
"""The role that can always do everything, so that nobody locks everybody out."""

ANONYMOUS = "player"
"""The role of MQTT clients that show no token."""

NEIGHBOUR = "neighbour"
"""Their role where the broker is on this machine."""

ALL = "all"
SUBJECT = re.compile(r"all|local|(user|anon|project|key|device):[A-Za-z0-9_.:-]{1,128}")
"""What limits can be set for: everything together, a project, a key, a device, or an owner."""

_STORED = {
    "user": (
        select(users.c.id).where(users.c.id == bindparam("name")),
        "account; GET /api/admin/users tells the id of each",
    ),
    "key": (
        select(api_keys.c.id).where(api_keys.c.id == bindparam("name"), api_keys.c.revoked_at.is_(None)),
        "API key; GET /api/admin/users/{id}/keys tells the id of each",
    ),
    "device": (
        select(devices.c.id).where(devices.c.name == bindparam("name")),
        "device; GET /api/admin/devices tells their names",
    ),
}
"""How subjects are looked for that the database knows, and what is said where there is none."""

_NONE = Limits()

UNDEFINED = Role(description="This role is not defined any more", permissions=frozenset())

log = get_logger(__name__)

_roles_file = TypeAdapter(dict[str, Role])


@dataclass(frozen=True, slots=True)
class DefinedRole:
    """A role and where it is defined: `shipped`, in the `file`, or by the `api`."""

    name: str
    role: Role
    source: Literal["shipped", "file", "api"]


def read_roles(file: Path) -> dict[str, Role]:
    """The roles of a TOML file; none where it does not exist. Raises `InvalidRequest` when it is wrong."""
    found = read_toml(file, _roles_file)
    for name in found:
        if re.fullmatch(ROLE_NAME, name) is None:
            raise InvalidRequest(f"{file.name}: {name!r} cannot name a role: it begins with a small letter")
    return found


class Policies:
    """What roles and limits there are."""

    def __init__(
        self,
        database: Database,
        authorizer: Authorizer,
        roles_file: Path,
        projects: Projects | None = None,
    ) -> None:
        """The limits of `projects` hold, limit by limit, where the database sets none. Raises
        `InvalidRequest` when `roles_file` is wrong."""
        self._database = database
        self._authorizer = authorizer
        self._from_files = {
            **{name: DefinedRole(name, role, "shipped") for name, role in read_roles(SHIPPED_ROLES).items()},
            **{name: DefinedRole(name, role, "file") for name, role in read_roles(roles_file).items()},
        }
        self._roles = self._from_files
        self._set: Mapping[str, Limits] = {}
        self._project_names: frozenset[str] = frozenset() if projects is None else projects.names
        of_files = {} if projects is None else projects.limits()
        self._below = {subject: found for subject, found in of_files.items() if found != _NONE}
        self._limits: Mapping[str, Limits] = self._below
        self.on_limits: Callable[[str], Awaitable[None]] = _nothing
        """Called with each subject whose limits are others now."""

    async def open(self) -> None:
        """Reads what the database has."""
        await self._refresh()

    async def watch(self) -> None:
        """Looks for what other processes have changed. Runs until cancelled."""
        await keep_fresh(self._refresh, "roles and limits")

    async def _refresh(self) -> None:
        def operation(connection: Connection) -> tuple[list[Any], list[Any]]:
            return (
                list(connection.execute(select(roles.c.name, roles.c.definition))),
                list(connection.execute(select(limits.c.subject, limits.c.definition))),
            )

        stored_roles, stored_limits = await self._database.read(operation)
        defined = {name: DefinedRole(name, Role.model_validate(body), "api") for name, body in stored_roles}
        self._roles = {**self._from_files, **defined}
        self._set = {subject: Limits.model_validate(body) for subject, body in stored_limits}
        over = {subject: found.over(self._below.get(subject, _NONE)) for subject, found in self._set.items()}
        before, self._limits = self._limits, {**self._below, **over}
        for subject in before.keys() | self._limits.keys():
            if before.get(subject, _NONE) != self.limits(subject):
                await self.on_limits(subject)

    # --- roles ---

    def role(self, name: str) -> Role:
        """The role; one that allows nothing when it is not defined any more."""
        found = self._roles.get(name)
        return UNDEFINED if found is None else found.role

    def identity(self, user: Row[Any], **shown: Any) -> Identity:
        """Who a row of `users` is; `shown` is what they have shown, and where."""
        return Identity(
            owner=f"user:{user.id}",
            role_name=user.role,
            role=self.role(user.role),
            username=user.username,
            email=user.email,
            created_at=user.created_at,
            **shown,
        )

    def has_role(self, name: str) -> bool:
        """Whether there is such a role."""
        return name in self._roles

    def all_roles(self) -> list[DefinedRole]:
        """All roles by name."""
        return [self._roles[name] for name in sorted(self._roles)]

    async def define_role(self, who: Identity, name: str, role: Role) -> DefinedRole:
        """Adds a role or changes one. Raises `Forbidden`, and `InvalidRequest` for the admins' one."""
        await self._authorizer.check(who, "roles:write")
        await self._authorizer.check_within(who, role)
        await self._authorizer.check_within(who, self.role(name))
        if name == ADMIN:
            raise InvalidRequest("name: the role of the admins is as it is")
        body = {"definition": role.model_dump(mode="json"), "updated_at": time.time()}
        details = {"permissions": sorted(role.permissions)}

        def operation(connection: Connection) -> None:
            _put(connection, roles, {"name": name}, body)
            note(connection, who, "role.define", target=name, details=details)

        await self._database.write(operation)
        await self._refresh()
        return self._roles[name]

    async def delete_role(self, who: Identity, name: str) -> None:
        """Takes back what the API defined; a role of a file is then as the file has it. Raises
        `Forbidden`, `NotFound`, and `Conflict` while accounts have a role that would be gone."""
        await self._authorizer.check(who, "roles:write")
        await self._authorizer.check_within(who, self.role(name))
        if name in self._from_files:
            await self._authorizer.check_within(who, self._from_files[name].role)

        def operation(connection: Connection) -> Conflict | NotFound | None:
            holders = select(func.count()).select_from(users).where(users.c.role == name)
            count = 0 if name in self._from_files else connection.execute(holders).scalar_one()
            if count:
                return Conflict(f"{count} accounts have this role; give them another one first.")
            if not connection.execute(delete(roles).where(roles.c.name == name)).rowcount:
                return NotFound("The API has defined no such role.")
            note(connection, who, "role.delete", target=name)
            return None

        await self._database.write(operation)
        await self._refresh()

    # --- limits ---

    def limits(self, subject: str) -> Limits:
        """What is set for a subject: `all`, `project:NAME`, `key:ID`, `device:NAME` or an owner."""
        return self._limits.get(subject, _NONE)

    @property
    def has_projects(self) -> bool:
        """Whether limits are set for some project."""
        return any(subject.startswith("project:") for subject in self._limits)

    async def all_limits(self, who: Identity) -> Mapping[str, Limits]:
        """What is set, by subject. Raises `Forbidden`."""
        await self._authorizer.check(who, "usage:read-all")
        return self._set

    async def set_limits(self, who: Identity, subject: str, new: Limits) -> None:
        """Sets the limits of a subject. Raises `InvalidRequest`, and `NotFound` when it is nowhere: its
        limits would limit nobody."""
        await self._authorizer.check(who, "roles:write")
        if SUBJECT.fullmatch(subject) is None:
            raise InvalidRequest(
                "subject: one of all, local, user:ID, anon:PROJECT, project:NAME, key:ID, "
                "device:NAME is needed"
            )
        kind, _, name = subject.partition(":")
        if kind in {"project", "anon"} and name not in self._project_names:
            there_are = ", ".join(sorted(self._project_names))
            raise NotFound(f"subject: there is no such project; there are {there_are}")
        body = {"definition": new.model_dump(exclude_none=True), "updated_at": time.time()}

        def operation(connection: Connection) -> NotFound | None:
            if kind in _STORED:
                statement, what = _STORED[kind]
                if connection.execute(statement, {"name": name}).first() is None:
                    return NotFound(f"subject: there is no such {what}")
            _put(connection, limits, {"subject": subject}, body)
            note(connection, who, "limits.set", target=subject, details=body["definition"])
            return None

        await self._database.write(operation)
        await self._refresh()

    async def clear_limits(self, who: Identity, subject: str) -> None:
        """Takes the limits of a subject away. Raises `NotFound`."""
        await self._authorizer.check(who, "roles:write")

        def operation(connection: Connection) -> bool:
            gone = connection.execute(delete(limits).where(limits.c.subject == subject)).rowcount > 0
            if gone:
                note(connection, who, "limits.clear", target=subject)
            return gone

        if not await self._database.write(operation):
            raise NotFound("No limits are set for this.")
        await self._refresh()


async def _nothing(_subject: str) -> None:
    """Nobody is to be told."""


def _put(connection: Connection, table: Table, key: dict[str, Any], body: dict[str, Any]) -> None:
    ((name, value),) = key.items()
    if not connection.execute(update(table).where(table.c[name] == value).values(body)).rowcount:
        connection.execute(insert(table).values({**key, **body}))
