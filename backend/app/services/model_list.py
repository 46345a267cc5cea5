"""The models that somebody may use, how each is, and which of them answers where none is named."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from sqlalchemy import Connection, select

from app.access import Identity, matches
from app.database import Database, insert_of, keep_fresh
from app.models.tables import model_syncs
from app.services.authorizer import Authorizer
from app.services.catalog import is_pattern
from app.services.llm_client import LLMClient
from app.services.llm_server import LLMServer, ModelInfo
from app.services.model_defaults import ModelDefaults
from app.services.policies import ALL
from app.services.pool import Status, status_of
from app.services.prices import FREE, Price
from app.services.routing import Route

SYNC_S = 2.0
"""The LLM servers are not asked anew more often than this, whoever wants it."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a model takes and does, as its server tells; None where it does not."""

    tools: bool | None
    vision: bool | None
    thinking: bool | None


@dataclass(frozen=True, slots=True)
class ModelHealth:
    """How the servers that have a model are, since when (Unix time), and how many there are of them.
    `queue` is the number of requests that wait for them, or for another one of the provider."""

    status: Status
    since: float | None
    latency_ms: int | None
    servers: int
    queue: int


@dataclass(frozen=True, slots=True)
class ModelView:
    """A model by the name that requests are to use. `options` and `price` are those of `models.toml`."""

    name: str
    aliases: list[str]
    fallbacks: list[str]
    provider: str
    context_length: int | None
    capabilities: Capabilities
    loaded: bool | None
    options: dict[str, Any]
    price: Price | None
    health: ModelHealth
    is_default: bool
    is_default_for_all: bool


@dataclass(frozen=True, slots=True)
class DefaultView:
    """The `model` that answers where a request names none. `chosen` is what was chosen: where that cannot
    answer now, `note` says so."""

    model: str | None
    chosen: str | None
    note: str | None


@dataclass(frozen=True, slots=True)
class Models:
    """The models, and which of them is the default for the asker, and for all who have chosen none."""

    models: list[ModelView]
    default: DefaultView
    default_for_all: DefaultView


@dataclass(frozen=True, slots=True)
class ModelChange:
    """What became of a model between two looks; `what` names what is another."""

    model: str
    change: Literal["added", "removed", "changed"]
    what: list[str]


@dataclass(frozen=True, slots=True)
class Synced:
    """What there is after the servers were asked anew, and what that has changed."""

    found: Models
    changes: list[ModelChange]


class ModelList:
    """Lists models, and has the LLM servers asked anew. `defaults` are the choices among them."""

    def __init__(
        self, database: Database, authorizer: Authorizer, llm: LLMClient, defaults: ModelDefaults
    ) -> None:
        self._database = database
        self._authorizer = authorizer
        self._llm = llm
        self.defaults = defaults
        self._lock = asyncio.Lock()
        self._asked_at = float("-inf")
        self._seen = 0.0

    # --- what there is ---

    def all(self, who: Identity) -> Models:
        """What is known of the models that the role of who asks may use."""
        patterns = who.role.models
        default, for_all = self.default(who), self.default_for_all(who)
        names = [name for name in sorted(self._names()) if matches(name, patterns)]
        return Models([self._view(name, patterns, default, for_all) for name in names], default, for_all)

    def default(self, who: Identity) -> DefaultView:
        """What answers who asks."""
        model = self._llm.known_model(self.defaults.model(who.owner, who.role, None))
        chosen = self.defaults.chosen(who.owner)
        why = None
        if chosen is not None and chosen != model:
            is_allowed = matches(chosen, who.role.models)
            why = _not_served(chosen, model) if is_allowed else f"Your role may not use {chosen} any more."
        return DefaultView(model if model and matches(model, who.role.models) else None, chosen, why)

    def default_for_all(self, who: Identity) -> DefaultView:
        """What answers those who have chosen nothing, as far as the role of who asks may know."""
        model, chosen = self._llm.known_model(None), self.defaults.chosen(ALL)
        if chosen is not None and not matches(chosen, who.role.models):
            return DefaultView(None, None, None)
        why = _not_served(chosen, model) if chosen not in {None, model} else None
        return DefaultView(model if model and matches(model, who.role.models) else None, chosen, why)

    def _names(self) -> set[str]:
        """What requests may call the models that servers tell of, or that `models.toml` names."""
        catalog, router = self._llm.catalog, self._llm.router
        names = {name for name in catalog.models if not is_pattern(name)}
        for pool in self._llm.pools.values():
            told = (catalog.canonical(model.name) for model in pool.models)
            names.update(name for name in told if router.route(name).pool is pool)
        base = self._llm.router.of_settings()
        found = base.found()
        return names if found is None else names | {base.name_of(found)}

    def _view(
        self, name: str, patterns: tuple[str, ...], default: DefaultView, for_all: DefaultView
    ) -> ModelView:
        catalog, route = self._llm.catalog, self._route(name)
        servers, found = route.pool.having(route.id), route.found()
        price = catalog.price(name)
        fallbacks = (catalog.canonical(fallback) for fallback in route.entry.fallbacks)
        return ModelView(
            name=name,
            aliases=list(route.entry.aliases),
            fallbacks=[fallback for fallback in fallbacks if matches(fallback, patterns)],
            provider=route.pool.upstream.name,
            context_length=route.entry.context if found is None else route.pool.context_of(found),
            capabilities=Capabilities(
                tools=None if found is None else found.tools,
                vision=None if found is None else found.vision,
                thinking=None if found is None else found.thinking,
            ),
            loaded=_is_loaded(route, servers),
            options=route.entry.options.given(),
            price=None if price is FREE else price,
            health=_health(servers, route.pool.places.waiting),
            is_default=name == default.model,
            is_default_for_all=name == for_all.model,
        )

    def _route(self, name: str) -> Route:
        """The way to a model. That of `LLM_MODEL` need not be among those that its server tells of."""
        route, base = self._llm.router.route(name), self._llm.router.of_settings()
        return base if route.found() is None and base.name == name else route

    # --- asking anew ---

    async def sync(self, who: Identity) -> Synced:
        """Asks all servers anew, unless that was done just now, and has every other process do so. Raises
        `Forbidden`."""
        await self._authorizer.check(who, "models:write")
        before = self.all(who)
        self._seen = time.time()
        await self._database.write(partial(_want, self._seen))
        await self.ask_anew()
        found = self.all(who)
        return Synced(found, _changes(before.models, found.models))

    async def ask_anew(self) -> None:
        """Asks all servers for everything that they tell, unless that was done just now. Raises nothing."""
        async with self._lock:
            if time.monotonic() - self._asked_at >= SYNC_S:
                await asyncio.gather(*(pool.ask_anew() for pool in self._llm.pools.values()))
                self._asked_at = time.monotonic()

    async def open(self) -> None:
        """Reads what the database has; servers that were to be asked before need not be asked again."""
        await self.defaults.open()
        self._seen = await self._wanted_at()

    async def watch(self) -> None:
        """Asks anew when another process was told to. Runs until cancelled."""
        await keep_fresh(self._follow, "whether LLM servers are to be asked anew")

    async def _follow(self) -> None:
        wanted_at = await self._wanted_at()
        if wanted_at != self._seen:
            self._seen = wanted_at
            await self.ask_anew()

    async def _wanted_at(self) -> float:
        statement = select(model_syncs.c.at)
        return await self._database.read(lambda c: c.execute(statement).scalar() or 0.0)


def _want(at: float, connection: Connection) -> None:
    inserted = insert_of(connection.dialect.name, model_syncs).values(id=1, at=at)
    connection.execute(inserted.on_conflict_do_update(index_elements=["id"], set_={"at": at}))


def _not_served(chosen: str | None, model: str) -> str:
    return f"{chosen} is not served now; {model or 'no other model'} answers instead."


def _is_loaded(route: Route, servers: Iterable[LLMServer]) -> bool | None:
    """Whether some server has the model in its memory; None where none that is there tells."""
    there = [route.found(server) for server in servers if server.state.problem is None]
    told = {model.loaded for model in there if isinstance(model, ModelInfo)} - {None}
    return True in told if told else None


def _health(servers: Sequence[LLMServer], queue: int) -> ModelHealth:
    status = status_of(servers) if servers else "down"
    there = [s.latency_ms for s in servers if s.state.problem is None and s.latency_ms is not None]
    return ModelHealth(status, _since(servers), min(there, default=None), len(servers), queue)


def _since(servers: Sequence[LLMServer]) -> float | None:
    """When the servers became together what they are: where they differ, when the first of each kind did."""
    good = [server.state.since for server in servers if server.state.state == "ok"]
    bad = [server.state.since for server in servers if server.state.state != "ok"]
    if good and bad:
        return max(min(good), min(bad))
    return max([*good, *bad], default=None)


def _changes(before: Sequence[ModelView], after: Sequence[ModelView]) -> list[ModelChange]:
    old = {model.name: _compared(model) for model in before}
    new = {model.name: _compared(model) for model in after}
    changes = []
    for name in sorted({*old, *new}):
        if name not in old or name not in new:
            changes.append(ModelChange(name, "added" if name in new else "removed", []))
        elif what := [field for field, is_now in new[name].items() if old[name][field] != is_now]:
            changes.append(ModelChange(name, "changed", what))
    return changes


def _compared(model: ModelView) -> dict[str, Any]:
    return {
        "context_length": model.context_length,
        "capabilities": model.capabilities,
        "loaded": model.loaded,
        "status": model.health.status,
        "servers": model.health.servers,
    }
