"""Which portal a command is about, and how that one runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.cli.broker import read_credentials
from app.cli.stack import DEFAULT_STATE, Stack
from app.cli.supervisor import StackState, read_state
from app.config import Settings, load_settings

Portal = Annotated[
    Path,
    typer.Option(
        "--state",
        "--env-file",
        help="The portal: where its state lies; for one that runs by hand, its settings' file",
        metavar="DIR|FILE",
    ),
]


def settings_of(portal: Path) -> Settings:
    """The settings of a portal; while `up` runs it, with the servers that it has there. Raises
    `WrongSettings`."""
    if not _is_stack(portal):
        return load_settings(portal)
    stack, found = Stack(portal.resolve()), _running(portal)
    if found is None:
        return stack.settings()
    llm = {"llm_server_url": found.llm} if found.llm else {}
    settings = load_settings(stack.env_file, mqtt_broker_url=found.broker, **llm)
    credentials = read_credentials(stack.state) if "broker" in found.parts else None
    return settings if credentials is None else credentials.put_into(settings)


def url_of(portal: Path) -> str:
    """Where a portal answers, or would by default."""
    found = _running(portal) if _is_stack(portal) else None
    return Stack().url if found is None else found.url


def _is_stack(portal: Path) -> bool:
    return portal == DEFAULT_STATE or portal.is_dir()


def _running(portal: Path) -> StackState | None:
    found = read_state(Stack(portal.resolve()))
    return found if found is not None and found.is_running else None
