"""`devices`: MQTT devices, straight in the database and at the broker, also while the portal is away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import typer
from rich.table import Table

from app.access import LOCAL
from app.cli.broker import read_credentials
from app.cli.console import Failure, console, done, failures_shown
from app.cli.people import open_policies
from app.cli.portal import Portal, settings_of
from app.cli.stack import DEFAULT_STATE
from app.config import Settings
from app.mqtt.dynsec import DynamicSecurity
from app.mqtt.rights import emqx_claims
from app.services.devices import Devices

T = TypeVar("T")

STATES = {True: "ready", False: "needs a new password", None: "not known"}

app = typer.Typer(help="MQTT devices: who they are, and what they may at the broker.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The device: its user name at the broker", metavar="NAME")]


@app.command("add")
def add(
    name: Name,
    project: Annotated[list[str], typer.Option("--project", help="A project that it is in; may be repeated")],
    owner: Annotated[str, typer.Option("--owner", help="The username of whom its sessions belong to")],
    portal: Portal = DEFAULT_STATE,
) -> None:
    """Adds a device and prints its password, which is not shown again."""
    device, password = _run(portal, lambda devices: devices.add(LOCAL, name, project, owner))
    done(f"{device.name} is a device of {device.username} in {', '.join(device.projects)}")
    if password is not None:
        print(password)


@app.command("list")
def list_devices(portal: Portal = DEFAULT_STATE) -> None:
    """Shows the devices, and whether the broker knows them."""
    table = Table("Device", "Owner", "Projects", "At the broker", box=None, pad_edge=False)
    for device in _run(portal, lambda devices: devices.all(LOCAL)):
        table.add_row(device.name, device.username, ", ".join(device.projects), STATES[device.at_broker])
    console.print(table if table.row_count else "There are none.")


@app.command("remove")
def remove(name: Name, portal: Portal = DEFAULT_STATE) -> None:
    """Takes a device's rights away and ends its connections."""
    _run(portal, lambda devices: devices.remove(LOCAL, name))
    done(f"{name} is no device any more")


@app.command("password")
def password(name: Name, portal: Portal = DEFAULT_STATE) -> None:
    """Prints a new password for a device, which is not shown again; the old one is good no more."""
    print(_run(portal, lambda devices: devices.new_password(LOCAL, name)))


@app.command("acl")
def acl(name: Name, portal: Portal = DEFAULT_STATE) -> None:
    """Prints what a device may as claims of a token for EMQX."""
    found = [device for device in _run(portal, lambda devices: devices.all(LOCAL)) if device.name == name]
    with failures_shown():
        if not found:
            raise Failure("There is no such device.", "See them with `devices list`.")
    print(msgspec.json.format(msgspec.json.encode(emqx_claims(name, found[0].projects))).decode())


def _run(portal: Path, action: Callable[[Devices], Awaitable[T]]) -> T:
    """Does something with the devices of a portal; shows what was wrong, and ends the program then."""

    async def run(settings: Settings) -> T:
        async with _devices(settings) as devices:
            return await action(devices)

    with failures_shown():
        return asyncio.run(run(_settings(portal)))


def _settings(portal: Path) -> Settings:
    """The settings of a portal whose broker can be asked. Raises `Failure`."""
    settings = settings_of(portal)
    if settings.mqtt_acl == "none" and portal.is_dir() and read_credentials(portal) is not None:
        raise Failure("Its broker does not run, and devices are known there.", "Start it with `up`.")
    return settings


@asynccontextmanager
async def _devices(settings: Settings) -> AsyncIterator[Devices]:
    rights = DynamicSecurity(settings) if settings.mqtt_acl == "mosquitto" else None
    async with open_policies(settings) as (database, authorizer, policies):
        yield Devices(settings, database, authorizer, policies, rights)
