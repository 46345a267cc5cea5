"""`servers`: taking LLM servers out of service and back, straight in the database, for all portals that use
it."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer
from rich.table import Table

from app.access import LOCAL
from app.cli.console import Failure, console, done, failures_shown
from app.cli.people import open_database
from app.cli.portal import Portal, settings_of
from app.cli.stack import DEFAULT_STATE
from app.config import Settings
from app.errors import NotFound
from app.services.audit import Audit
from app.services.authorizer import Authorizer
from app.services.catalog import Catalog
from app.services.llm_client import LLMClient
from app.services.servers import Servers, ServerView

app = typer.Typer(help="LLM servers: which are in service.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The server, as `servers list` shows it", metavar="NAME")]


@app.command("list")
def list_servers(portal: Portal = DEFAULT_STATE) -> None:
    """Shows the LLM servers, and which of them are out of service."""
    with failures_shown():
        table = Table("Server", "Address", "In service", box=None, pad_edge=False)
        for server in asyncio.run(_run(settings_of(portal), None, False)):
            table.add_row(server.name, server.url, "no" if server.draining else "yes")
        console.print(table)


@app.command()
def drain(name: Name, portal: Portal = DEFAULT_STATE) -> None:
    """Takes a server out of service: it gets no new requests, and what runs there ends as ever."""
    with failures_shown():
        asyncio.run(_run(settings_of(portal), name, True))
        done(f"{name} gets no new requests")


@app.command()
def undrain(name: Name, portal: Portal = DEFAULT_STATE) -> None:
    """Takes a server back into service."""
    with failures_shown():
        asyncio.run(_run(settings_of(portal), name, False))
        done(f"{name} is in service")


async def _run(settings: Settings, name: str | None, drained: bool) -> list[ServerView]:
    """Drains a server, or takes it back, where one is named; returns what there is then."""
    llm = LLMClient(settings, Catalog(settings.path(settings.models_file)))
    async with open_database(settings) as database:
        servers = Servers(llm, database, Authorizer(Audit(database)))
        await servers.refresh()
        try:
            if name is not None:
                await servers.drain(LOCAL, name, drained)
        except NotFound:
            known = ", ".join(server.name for server in llm.servers)
            raise Failure(f"There is no LLM server {name!r}.", f"There are: {known}.") from None
        return await servers.all(LOCAL)
