"""MQTT devices: broker users that ask in their owner's name, each in a topic tree of its own.

A device is two things: a row here, which says whose it is, and rights at the broker, which only there have a
password. What makes and unmakes both keeps this order, so that no rights are ever without a row but for a
removal's moment, and whatever a crash leaves is mended by the same request again, by a new password, or by
`sync`:

- adding: the row first, which takes the name, then the rights. In between, the device is listed as not at the
  broker, and a new password gives it its rights. When the broker refuses, the row is taken back.
- removing: the rights first, which ends connections, then the row. In between, the device is listed as not at
  the broker, and can be removed again.
- a new password: the audit log first. An entry for what then failed misleads less than a password of which
  the log knows nothing.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from sqlalchemy import Connection, Row, delete, insert, select
from sqlalchemy.exc import IntegrityError

from app.access import Identity, KeyUse
from app.config import Settings
from app.database import Database, keep_fresh
from app.errors import (
    BrokerUnavailable,
    Conflict,
    InvalidRequest,
    NotFound,
    PortalError,
    StorageUnavailable,
)
from app.events import new_id
from app.logs import get_logger
from app.models.tables import devices, users
from app.services.audit import note
from app.services.authorizer import Authorizer
from app.services.policies import Policies

DEVICE_NAME = re.compile(r"(?=.*[A-Za-z0-9])[A-Za-z0-9_.-]{1,64}")
SCOPES = frozenset({"chat:use", "sessions:read", "sessions:write"})
RESERVED = frozenset({"admin", "anonymous", "portal"})

SYNC_RETRY_S, SYNC_S = 2.0, 300.0

log = get_logger(__name__)


class DeviceRights(Protocol):
    """The broker's rules, as somebody who may change them sees them. All raise `BrokerUnavailable`."""

    reserved: frozenset[str]
    """Names of its clients that are no devices."""

    async def put(self, name: str, projects: Sequence[str], password: str) -> None:
        """Gives a device its rights and a password, whatever it had before. Raises `Conflict` when the name
        belongs to a client of somebody else."""

    async def delete(self, name: str) -> None:
        """Takes its rights away and ends its connections; nothing happens where there are none."""

    async def ready(self) -> frozenset[str]:
        """The devices that have rights and a password."""

    async def sync(self, wanted: Callable[[], Awaitable[Mapping[str, Sequence[str]]]]) -> None:
        """Makes the rules fit the devices, with their projects, that `wanted` returns."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device. `owner` is the id of the account that its sessions belong to, `username` its name.
    `at_broker` says whether it can sign in there: not before it has a new password when it is false; null
    when the broker cannot be asked. `created_at` is a Unix time in seconds."""

    id: str
    name: str
    owner: str
    username: str
    projects: tuple[str, ...]
    created_at: float
    at_broker: bool | None = None


_OWNED = select(
    devices.c.id.label("device"),
    devices.c.name,
    devices.c.projects,
    devices.c.created_at.label("added"),
    users,
).join(users, users.c.id == devices.c.user)


class Devices:
    """Adds, lists and removes devices, and tells the MQTT door who they are."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        authorizer: Authorizer,
        policies: Policies,
        acl: DeviceRights | None,
    ) -> None:
        """Without `acl` the portal writes no rules: somebody else keeps to them, or there are none."""
        self._settings = settings
        self._database = database
        self._authorizer = authorizer
        self._policies = policies
        self._acl = acl
        self._known: Mapping[str, Row[Any]] = {}

    @property
    def projects(self) -> tuple[str, ...]:
        """The projects that a device can be in."""
        return self._settings.mqtt_projects

    @property
    def keeper(self) -> Literal["none", "mosquitto", "external"]:
        """Who keeps devices to their own topics."""
        return self._settings.mqtt_acl

    # --- for the MQTT door ---

    async def open(self) -> None:
        """Reads what the database has."""
        await self._refresh()

    async def watch(self) -> None:
        """Looks for what other processes have changed. Runs until cancelled."""
        await keep_fresh(self._refresh, "devices")

    async def keep_in_sync(self) -> None:
        """Makes the broker's rules fit as soon as it is there, and now and then after. Runs until
        cancelled."""
        while True:
            try:
                await self.sync()
                pause = SYNC_S
            except (BrokerUnavailable, StorageUnavailable):
                pause = SYNC_RETRY_S  # whoever failed has logged why
            await asyncio.sleep(pause)

    async def sync(self) -> None:
        """Makes the broker's rules fit the database. Raises `BrokerUnavailable`."""
        if self._acl is not None:
            await self._acl.sync(self._projects)

    def identity(self, name: str, project: str) -> Identity | None:
        """Who asks on the topics of a device in a project: its owner, within the rights of a device. None
        when there is no such device in the project, or its owner's account is closed."""
        row = self._known.get(name)
        if row is None or row.closed_at is not None or project not in row.projects:
            return None
        return self._policies.identity(row, key=_key(row, project), door="mqtt")

    def key(self, device_id: str, project: str) -> KeyUse | None:
        """What a device asks with in a project; None when there is no device with this id."""
        found = next((row for row in self._known.values() if row.device == device_id), None)
        return None if found is None else _key(found, project)

    # --- for admins ---

    async def add(
        self, who: Identity, name: str, projects: Sequence[str], owner: str | None = None
    ) -> tuple[Device, str | None]:
        """A new device of the account with the username `owner`, or of who asks, and its password, which is
        never shown again; None where the portal does not give passwords. Raises `Forbidden`, `Conflict`
        when the name is taken, `InvalidRequest`, `BrokerUnavailable`."""
        await self._authorizer.check(who, "devices:write")
        self._check(name, projects)
        user = await self._owner(who, owner)
        chosen = tuple(dict.fromkeys(projects))
        device = Device(new_id(), name, user.id, user.username, chosen, time.time())
        await self._insert(who, device)
        try:
            password = await self._give_rights(device)
        except PortalError:
            await self._delete(who, device.name, {"reason": "the broker did not take it"})
            raise
        return replace(device, at_broker=None if password is None else True), password

    async def all(self, who: Identity) -> list[Device]:
        """The devices, by name. Raises `Forbidden`."""
        await self._authorizer.check(who, "devices:read")
        rows = await self._rows()
        ready = await self._ready()
        return [_device(row, None if ready is None else row.name in ready) for row in rows]

    async def remove(self, who: Identity, name: str) -> None:
        """Takes a device's rights away at once. Raises `NotFound`, `BrokerUnavailable`."""
        await self._authorizer.check(who, "devices:write")
        await self._find(name)
        if self._acl is not None:
            await self._acl.delete(name)
        await self._delete(who, name, {})

    async def new_password(self, who: Identity, name: str) -> str:
        """Gives a device another password, which is never shown again, and ends its connections. Raises
        `NotFound`, `Forbidden`, `InvalidRequest` where the portal gives no passwords, `BrokerUnavailable`."""
        await self._authorizer.check(who, "devices:write")
        row = await self._find(name)
        await self._authorizer.check_within(who, self._policies.role(row.role))
        if self._acl is None:
            raise InvalidRequest("The portal gives no passwords here: that is for whoever runs the broker.")
        await self._database.write(lambda c: note(c, who, "device.password", target=f"device:{name}"))
        password = await self._give_rights(_device(row, None))
        assert password is not None
        return password

    def _check(self, name: str, projects: Sequence[str]) -> None:
        if self.keeper == "none":
            raise InvalidRequest(
                "Nobody would keep devices to their own topics here: set MQTT_ACL to mosquitto, where the "
                "portal may write the rules of its broker, or to external."
            )
        if DEVICE_NAME.fullmatch(name) is None:
            raise InvalidRequest("name: 1 to 64 characters of A-Z a-z 0-9 _ . - are needed")
        if name in RESERVED or (self._acl is not None and name in self._acl.reserved):
            raise InvalidRequest(f"name: {name!r} is somebody else at the broker; take another one")
        known = self.projects
        unknown = [project for project in projects if project not in known]
        if unknown or not projects:
            problem = f"there is no {', '.join(unknown)}" if unknown else "at least one is needed"
            raise InvalidRequest(f"projects: {problem}; there are {', '.join(known)}")

    async def _owner(self, who: Identity, username: str | None) -> Row[Any]:
        """The account that is to own a device. It must not be mightier than who asks."""
        mine = users.c.id == who.user if username is None else users.c.username == username
        row = await self._database.read(lambda c: c.execute(select(users).where(mine)).first())
        if row is None:
            raise InvalidRequest("owner: there is no such account")
        if row.closed_at is not None:
            raise InvalidRequest("owner: this account is closed")
        await self._authorizer.check_within(who, self._policies.role(row.role))
        return row

    async def _give_rights(self, device: Device) -> str | None:
        if self._acl is None:
            return None
        password = secrets.token_urlsafe(24)
        await self._acl.put(device.name, device.projects, password)
        return password

    async def _ready(self) -> frozenset[str] | None:
        try:
            return None if self._acl is None else await self._acl.ready()
        except BrokerUnavailable:
            return None

    # --- the rows ---

    async def _insert(self, who: Identity, device: Device) -> None:
        values = {
            "id": device.id,
            "name": device.name,
            "user": device.owner,
            "projects": list(device.projects),
            "created_at": device.created_at,
        }
        details = {"owner": f"user:{device.owner}", "projects": list(device.projects)}

        def operation(connection: Connection) -> None:
            connection.execute(insert(devices).values(**values))
            note(connection, who, "device.add", target=f"device:{device.name}", details=details)

        try:
            await self._database.write(operation)
        except IntegrityError:
            raise Conflict("There is a device of this name; remove it first, or take another name.") from None
        await self._refresh()

    async def _delete(self, who: Identity, name: str, details: dict[str, Any]) -> None:
        def operation(connection: Connection) -> None:
            if connection.execute(delete(devices).where(devices.c.name == name)).rowcount:
                note(connection, who, "device.remove", target=f"device:{name}", details=details)

        await self._database.write(operation)
        await self._refresh()

    async def _find(self, name: str) -> Row[Any]:
        statement = _OWNED.where(devices.c.name == name)
        row = await self._database.read(lambda c: c.execute(statement).first())
        if row is None:
            raise NotFound("There is no such device.")
        return row

    async def _rows(self) -> Sequence[Row[Any]]:
        return await self._database.read(lambda c: c.execute(_OWNED.order_by(devices.c.name)).all())

    async def _projects(self) -> dict[str, tuple[str, ...]]:
        return {row.name: tuple(row.projects) for row in await self._rows()}

    async def _refresh(self) -> None:
        self._known = {row.name: row for row in await self._rows()}


def _key(row: Row[Any], project: str) -> KeyUse:
    return KeyUse(row.device, row.name, SCOPES, project=project, device=row.name)


def _device(row: Row[Any], at_broker: bool | None) -> Device:
    return Device(row.device, row.name, row.id, row.username, tuple(row.projects), row.added, at_broker)
