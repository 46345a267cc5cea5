"""`models`: what the LLM servers serve, asked by this command itself, and which model is the default for
all, straight in the database, for all portals that use it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Annotated

import typer
from rich.table import Table

from app.access import LOCAL
from app.cli.console import Failure, console, done, failures_shown, note
from app.cli.people import open_database
from app.cli.portal import Portal, settings_of
from app.cli.stack import DEFAULT_STATE
from app.config import Settings
from app.errors import PortalError
from app.services.audit import Audit
from app.services.authorizer import Authorizer
from app.services.catalog import Catalog
from app.services.llm_client import LLMClient
from app.services.model_defaults import ModelDefaults
from app.services.model_list import DefaultView, ModelList, Models, ModelView

app = typer.Typer(help="Models: which are served, and which is the default.", no_args_is_help=True)

Name = Annotated[
    str | None, typer.Argument(help="A model, as `models list` shows it", metavar="NAME", show_default=False)
]
Reset = Annotated[bool, typer.Option("--reset", help="The model of LLM_MODEL again")]


@app.command("list")
def list_models(portal: Portal = DEFAULT_STATE) -> None:
    """Asks the LLM servers what they serve, and shows it."""
    with failures_shown():
        _show(asyncio.run(_listed(settings_of(portal), sync=False)))


@app.command()
def sync(portal: Portal = DEFAULT_STATE) -> None:
    """The same, and has every portal that runs ask its servers anew."""
    with failures_shown():
        _show(asyncio.run(_listed(settings_of(portal), sync=True)))
        done("Portals that run ask their servers anew within two seconds")


@app.command()
def default(name: Name = None, reset: Reset = False, portal: Portal = DEFAULT_STATE) -> None:
    """Makes a model the default for all who have chosen none; without a name, shows which it is."""
    with failures_shown():
        if name is not None and reset:
            raise Failure("There is both a name and --reset.", "Give one of them.")
        found = asyncio.run(_default(settings_of(portal), name, is_new=reset or name is not None))
        done(f"The default model is {found.model or 'not known: no LLM server answers'}")
        if found.note is not None:
            note(found.note)


async def _listed(settings: Settings, *, sync: bool) -> Models:
    async with _open(settings) as models:
        return (await models.sync(LOCAL)).found if sync else models.all(LOCAL)


async def _default(settings: Settings, name: str | None, *, is_new: bool) -> DefaultView:
    async with _open(settings) as models:
        try:
            if is_new:
                await models.defaults.choose_for_all(LOCAL, name)
        except PortalError as error:
            known = ", ".join(model.name for model in models.all(LOCAL).models)
            raise Failure(error.message, f"There are: {known}.") from None
        return models.default_for_all(LOCAL)


@asynccontextmanager
async def _open(settings: Settings) -> AsyncIterator[ModelList]:
    """The models of a portal, its LLM servers having been asked."""
    llm = LLMClient(settings, Catalog(settings.path(settings.models_file)))
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(open_database(settings))
        await llm.open()
        stack.push_async_callback(llm.close)
        authorizer = Authorizer(Audit(database))
        models = ModelList(database, authorizer, llm, ModelDefaults(database, authorizer, llm))
        await models.open()
        await models.ask_anew()
        yield models


def _show(found: Models) -> None:
    table = Table("Model", "Provider", "Context", "Takes", "Health", "Servers", "", box=None, pad_edge=False)
    for model in found.models:
        context = "" if model.context_length is None else str(model.context_length)
        health, mark = model.health, "default" if model.is_default_for_all else ""
        table.add_row(
            model.name, model.provider, context, _takes(model), health.status, str(health.servers), mark
        )
    console.print(table)
    if found.default_for_all.note is not None:
        note(found.default_for_all.note)


def _takes(model: ModelView) -> str:
    told = model.capabilities
    named = {"tools": told.tools, "vision": told.vision, "thinking": told.thinking}
    return ", ".join(name for name, has in named.items() if has)
