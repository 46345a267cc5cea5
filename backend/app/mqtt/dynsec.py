"""Rights of devices and of anonymous clients, written into Mosquitto's dynamic security plugin.

Each device is a client of the plugin with one role of its own, `device:NAME`, by which the portal knows what
it has made; clients, groups and roles of other admins are left alone. A role ends with rules that refuse
everything, so that what it allows does not hang on the broker's defaults. As found with Mosquitto 2.0.11, a
new password or a removal ends the connections of that client, and rules are checked at each delivery.
(https://mosquitto.org/documentation/dynamic-security/)
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import msgspec

from app.config import Settings
from app.errors import BrokerUnavailable, Conflict
from app.events import new_id
from app.logs import get_logger
from app.mqtt.connection import Broker, request_once
from app.mqtt.rights import Rights, anonymous_rights, device_rights

CONTROL = "$CONTROL/dynamic-security/v1"
TIMEOUT_S = 10.0

PREFIX = "device:"
ANONYMOUS = "portal:anonymous"
"""A group and its role."""

LOCKED = "Waits for a new password"
"""The description of a client whose password nobody knows."""

PAGE = 50
"""So many of a list are asked for at once."""

BATCH = 10
"""So many commands are sent at once: with each, the plugin writes its whole file, and the broker does nothing
else meanwhile."""

DEPTH = 4
"""So many levels of nothing but wildcards are refused below topics of which one must know a level."""

ALLOW, REFUSE, REFUSE_REST = 0, 1, -1
"""Priorities of rules: higher ones are looked at first."""

Command: TypeAlias = dict[str, Any]
Acl: TypeAlias = tuple[str, str, int, bool]

log = get_logger(__name__)


class DynamicSecurity:
    """Speaks to the plugin, over a connection of its own for each batch of commands."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._trouble = ""
        self.reserved = frozenset({settings.mqtt_username})

    async def put(self, name: str, projects: Sequence[str], password: str) -> None:
        """Gives a device its rights and this password, whatever it had before. Raises `Conflict` when the
        name is a client's that the portal has not made, `BrokerUnavailable`."""
        (found,) = await self._ask([{"command": "getClient", "username": name}])
        if "error" not in found and not _is_device(found["data"]["client"]):
            raise Conflict(
                f"The broker has a client {name!r} that the portal has not made; take another name."
            )
        rules = {"rolename": PREFIX + name, "acls": _as_json(_acls(device_rights(name, projects)))}
        client = {"username": name, "roles": [{"rolename": PREFIX + name}]}
        if "error" in found:
            new = [
                {"command": "createRole", **rules},
                {"command": "createClient", **client, "password": password},
            ]
            if not any("error" in answer for answer in await self._ask(new)):
                return
        await self._do(
            [
                {"command": "modifyRole", **rules},
                {"command": "modifyClient", **client, "textdescription": ""},
                {"command": "setClientPassword", "username": name, "password": password},
                {"command": "enableClient", "username": name},
            ]
        )

    async def delete(self, name: str) -> None:
        """Takes a device's rights away and ends its connections. Raises `BrokerUnavailable`."""
        if name in await self._devices():
            await self._do(_removal(name))

    async def ready(self) -> frozenset[str]:
        """The devices that can sign in. Raises `BrokerUnavailable`."""
        return frozenset(name for name, client in (await self._devices()).items() if not _is_locked(client))

    async def sync(self, wanted: Callable[[], Awaitable[Mapping[str, Sequence[str]]]]) -> None:
        """Makes the broker have the devices (names, with their projects) that `wanted` returns, and those
        of them that are new to it locked. Raises `BrokerUnavailable`."""
        # The broker is asked before the database: what was there then and has no row now was removed,
        # while a device that is being added has its row first.
        clients, roles = await self._devices(), await self._roles()
        devices = await wanted()
        commands = [*_missing(devices, clients, roles), *await self._anonymous(roles)]
        for name in {*clients, *(role.removeprefix(PREFIX) for role in roles if role.startswith(PREFIX))}:
            if name not in devices:
                commands += _removal(name)
        for start in range(0, len(commands), BATCH):
            await self._do(commands[start : start + BATCH])
        if commands:
            log.info("the broker's rules were brought up to date", commands=len(commands))

    async def _anonymous(self, roles: Mapping[str, set[Acl]]) -> list[Command]:
        """What is to be done for the group of clients without a user name."""
        projects = self._settings.mqtt_projects if self._settings.anonymous_mqtt else ()
        wanted = _acls(anonymous_rights(projects))
        asked = [{"command": "getAnonymousGroup"}, {"command": "getGroup", "groupname": ANONYMOUS}]
        current, group = await self._ask(asked)
        name = current["data"]["group"]["groupname"]
        if name not in {"", ANONYMOUS}:
            log.warning(
                "the broker has another group for anonymous clients, which is left as it is", group=name
            )
            return []
        found = list(_role_command(ANONYMOUS, wanted, roles))
        if "error" in group:
            found.append({"command": "createGroup", "groupname": ANONYMOUS})
        if "error" in group or not group["data"]["group"]["roles"]:
            found.append({"command": "addGroupRole", "groupname": ANONYMOUS, "rolename": ANONYMOUS})
        if not name:
            found.append({"command": "setAnonymousGroup", "groupname": ANONYMOUS})
        return found

    async def _devices(self) -> dict[str, Any]:
        clients = await self._all("listClients", "clients")
        return {client["username"]: client for client in clients if _is_device(client)}

    async def _roles(self) -> dict[str, set[Acl]]:
        return {
            role["rolename"]: {(a["acltype"], a["topic"], a["priority"], a["allow"]) for a in role["acls"]}
            for role in await self._all("listRoles", "roles")
        }

    async def _all(self, command: str, what: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while True:
            page = {"command": command, "verbose": True, "count": PAGE, "offset": len(found)}
            (answer,) = await self._ask([page])
            part = answer["data"][what]
            found += part
            if not part or len(found) >= answer["data"]["totalCount"]:
                return found

    async def _do(self, commands: Sequence[Command]) -> None:
        for answer in await self._ask(commands):
            command, problem = answer["command"], answer.get("error", "")
            # Whoever repeats what is done already has what they want.
            is_done = (command.startswith("create") and problem.endswith("already exists")) or (
                command.startswith("delete") and problem.endswith("not found")
            )
            if problem and not is_done:
                raise BrokerUnavailable(f"The broker refused {command}: {problem}.")

    async def _ask(self, commands: Sequence[Command]) -> list[dict[str, Any]]:
        return await asyncio.to_thread(self._exchange, commands)

    def _exchange(self, commands: Sequence[Command]) -> list[dict[str, Any]]:
        mine = new_id()
        sent = {"commands": [{**command, "correlationData": mine} for command in commands]}
        try:
            reply = request_once(
                Broker.of(self._settings),
                CONTROL,
                f"{CONTROL}/response",
                msgspec.json.encode(sent),
                timeout=TIMEOUT_S,
                is_reply=lambda payload: mine in (one.get("correlationData") for one in _responses(payload)),
            )
        except (OSError, ValueError) as error:
            if str(error) != self._trouble:  # it is asked again and again
                self._trouble = str(error)
                log.warning("the broker's dynamic security does not answer", reason=self._trouble)
            raise BrokerUnavailable(_problem(error)) from None
        self._trouble = ""
        return _responses(reply)


def _problem(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "The broker does not let the portal change its rules: see MQTT_USERNAME and MQTT_PASSWORD."
    return "The broker's dynamic security does not answer; try again when it is there."


def _responses(payload: bytes) -> list[dict[str, Any]]:
    return list(msgspec.json.decode(payload)["responses"])


def _is_device(client: Mapping[str, Any]) -> bool:
    return any(role["rolename"] == PREFIX + client["username"] for role in client["roles"])


def _is_locked(client: Mapping[str, Any]) -> bool:
    return client.get("disabled", False) or client.get("textdescription") == LOCKED


def _missing(
    devices: Mapping[str, Sequence[str]], clients: Mapping[str, Any], roles: Mapping[str, set[Acl]]
) -> Iterator[Command]:
    for name, projects in devices.items():
        yield from _role_command(PREFIX + name, _acls(device_rights(name, projects)), roles)
        if name not in clients:
            yield {
                "command": "createClient",
                "username": name,
                "password": secrets.token_urlsafe(32),
                "textdescription": LOCKED,
                "roles": [{"rolename": PREFIX + name}],
            }


def _role_command(name: str, acls: set[Acl], roles: Mapping[str, set[Acl]]) -> Iterator[Command]:
    if roles.get(name) != acls:
        command = "modifyRole" if name in roles else "createRole"
        yield {"command": command, "rolename": name, "acls": _as_json(acls)}


def _removal(name: str) -> list[Command]:
    return [
        {"command": "deleteClient", "username": name},
        {"command": "deleteRole", "rolename": PREFIX + name},
    ]


def _acls(rights: Rights) -> set[Acl]:
    below = [topic for base in rights.below for topic in (f"{base}/+", f"{base}/+/#")]
    readable = [*rights.receive, *below]
    return {
        *(("publishClientSend", topic, ALLOW, True) for topic in rights.publish),
        *(("publishClientReceive", topic, ALLOW, True) for topic in readable),
        *(("subscribePattern", topic, ALLOW, True) for topic in readable),
        *(("subscribeLiteral", topic, REFUSE, False) for base in rights.below for topic in _guesses(base)),
        ("publishClientSend", "#", REFUSE_REST, False),
        ("publishClientReceive", "#", REFUSE_REST, False),
        ("subscribePattern", "#", REFUSE_REST, False),
    }


def _guesses(base: str) -> Iterator[str]:
    """Filters that name no session. The plugin's patterns cannot tell `+` from a name, so each is listed."""
    for depth in range(1, DEPTH + 1):
        wildcards = "/".join("+" * depth)
        yield f"{base}/{wildcards}"
        yield f"{base}/{wildcards}/#"


def _as_json(acls: set[Acl]) -> list[dict[str, Any]]:
    return [
        {"acltype": kind, "topic": topic, "priority": priority, "allow": allow}
        for kind, topic, priority, allow in sorted(acls)
    ]
