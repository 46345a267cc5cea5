"""The servers of one provider: alike, so that any of them may answer; a session stays where its prefix is."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from typing import Literal

from app.config import Settings
from app.errors import InvalidRequest, LLMUnavailable, PortalError
from app.services.catalog import DEFAULT, Model, Provider, Secret, secret
from app.services.dialects import OWN, OWNERS
from app.services.llm_server import LLMServer, ModelInfo, Upstream
from app.services.places import Load, Place, Places, Queue
from app.services.server_probe import Probe
from app.services.streaming_http import StreamingHttp

Status = Literal["ok", "degraded", "down"]

LOOK_S = 1.0

MOST_HOMES = 10_000
"""Sessions of which it is known which server has their prefix."""


class Pool:
    """The servers of one provider. Each name in `servers` is the provider's, with a number from 1."""

    def __init__(self, settings: Settings, upstream: Upstream, urls: Collection[str], queue: Queue) -> None:
        self._settings = settings
        self.upstream = upstream
        self.servers = [
            LLMServer(settings, upstream, f"{upstream.name}-{number}", url)
            for number, url in enumerate(urls, 1)
        ]
        self.places = Places(queue, [server.state.load for server in self.servers])
        self._of_load = {server.state.load: server for server in self.servers}
        self._probes = [Probe(server) for server in self.servers] if upstream.is_asked else []
        self._homes: OrderedDict[str, Load] = OrderedDict()
        for server in self.servers:
            server.state.on_offer = self.places.offer

    def open(self, http: StreamingHttp) -> None:
        """From now on its servers can be asked."""
        for server in self.servers:
            server.open(http)

    def close(self) -> None:
        """Forgets what was to happen later."""
        for server in self.servers:
            server.state.close()

    async def watch(self) -> None:
        """Asks each server every few seconds how it is, and at once after a failure. Runs until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for probe in self._probes:
                tasks.create_task(probe.watch(), name="llm server watch")

    async def look(self) -> None:
        """Asks each server how it is, unless that was done within the last second; where some server takes
        requests, those that do not answer at once are not waited for. Raises nothing."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_S if self.is_open() else None):
                await asyncio.gather(*(probe.if_stale() for probe in self._probes))

    async def ask_anew(self) -> None:
        """Asks each server for everything that it tells. Raises nothing."""
        await asyncio.gather(*(probe.anew() for probe in self._probes))

    @property
    def limits_models(self) -> bool:
        """Whether a server that is asked too much may be asked for another model all the same: the limits of
        somebody else's service are for each model."""
        return self.upstream.name != DEFAULT and self.upstream.kind not in OWN

    # --- choosing a server ---

    def is_open(self, barred: Collection[Load] = ()) -> bool:
        """Whether some server, but for those `barred`, takes requests."""
        return any(load.limit and load not in barred for load in self.places.loads)

    async def ready(self) -> None:
        """Returns when some server takes requests, having asked them anew if none did. Raises why none
        does."""
        if not self.is_open():
            await self.look()
            if not self.is_open():
                raise self.problem()

    async def one(self) -> LLMServer:
        """A server that can be asked something small. Raises why there is none."""
        await self.ready()
        return next(server for server in self.servers if server.state.load.limit)

    def problem(self) -> PortalError:
        """Why no server takes requests; of several reasons one that will pass."""
        reasons = [server.state.why for server in self.servers]
        return min(reasons, key=lambda error: (not error.retryable, error.retry_after or 0.0))

    def ask(self, owner: str, session: str | None, barred: Collection[Load], *, again: bool) -> Place:
        """A place at one of the servers, but for those `barred`: where the session was last, if it can be,
        and the least loaded one otherwise. Raises `Overloaded`."""
        home = None if session is None or len(self.servers) == 1 else self._homes.get(session)
        return self.places.ask(owner, home, barred, again=again)

    def home_of(self, session: str) -> LLMServer | None:
        """The server that has the session's prefix."""
        if len(self.servers) == 1:
            return self.servers[0]
        home = self._homes.get(session)
        return None if home is None else self._of_load[home]

    def lacking(self, wanted: str | None) -> Collection[Load]:
        """Where a model is known not to be served, of servers that differ in that."""
        if wanted is None or len(self.servers) == 1 or self.upstream.name != DEFAULT:
            return ()
        return [s.state.load for s in self.servers if s.models and not _named(s.models, wanted)]

    def server_of(self, place: Place, session: str | None) -> LLMServer:
        """The server of a place that was granted, which now has the session's prefix."""
        if len(self.servers) == 1:
            return self.servers[0]
        assert place.load is not None
        if session is not None:
            self._homes[session] = place.load
            self._homes.move_to_end(session)
            if len(self._homes) > MOST_HOMES:
                self._homes.popitem(last=False)
        return self._of_load[place.load]

    @property
    def status(self) -> Status:
        """How it is: `ok` while all servers are that are in service; `degraded` when some are not, or when
        all may soon be."""
        return status_of(self.servers)

    @property
    def latency_ms(self) -> int | None:
        """How long one that is there took to say so."""
        return next((s.latency_ms for s in self.servers if s.state.problem is None), None)

    # --- models ---

    @property
    def models(self) -> list[ModelInfo]:
        """The models that are served, by whichever server, each once."""
        if len(self.servers) == 1:
            return self.servers[0].models
        found: dict[str, ModelInfo] = {}
        for server in self.servers:
            for model in server.models:
                found.setdefault(model.name, model)
        return list(found.values())

    def having(self, wanted: str | None) -> list[LLMServer]:
        """The servers that have a model, or the default one, as far as they tell: what a server of
        `models.toml` that names none has is taken from there."""
        is_trusted = self.upstream.name != DEFAULT
        return [
            server
            for server in self.servers
            if (wanted is None or _named(server.models, wanted) if server.models else is_trusted)
        ]

    def find(self, server: LLMServer | None, wanted: str | None, entry: Model) -> ModelInfo | None:
        """The model `wanted`, or the default one, as `server` serves it, or some server of the pool; None
        where it is not known to."""
        models = self.models if server is None else server.models
        found = _named(models, wanted) if wanted is not None else self._default(models)
        if found is None and self.upstream.name != DEFAULT and wanted is not None:
            found = ModelInfo(wanted, OWNERS.get(self.upstream.kind, self.upstream.kind), None)
        if found is not None and entry.context is not None:
            found = replace(found, context=entry.context)
        return found

    def _default(self, models: list[ModelInfo]) -> ModelInfo | None:
        wanted = self._settings.llm_model
        if not models:
            return None
        return models[0] if wanted == DEFAULT else _named(models, wanted) or replace(models[0], id=wanted)

    def context_of(self, model: ModelInfo) -> int | None:
        """The context of a model, as its servers told it, or as they have told when a prompt was too long."""
        told = [server.contexts[model.id] for server in self.servers if model.id in server.contexts]
        known = [*told, *([model.context] if model.context is not None else [])]
        return min(known, default=None)

    def not_served(self) -> PortalError:
        """The error for a model that no server serves."""
        names = sorted(model.name for model in self.models)
        if not names:
            return LLMUnavailable("The LLM server cannot be reached.")
        return InvalidRequest(
            f"model: the LLM server does not serve this one; try one of {', '.join(names[:10])}"
        )


def status_of(servers: Collection[LLMServer]) -> Status:
    """How some servers are together."""
    states = {server.state.state for server in servers}
    if states <= {"ok", "draining", "drained"} and "ok" in states:
        return "ok"
    is_open = any(server.state.load.limit for server in servers)
    return "down" if states <= {"down", "broken"} and not is_open else "degraded"


def _named(models: list[ModelInfo], wanted: str | None) -> ModelInfo | None:
    return next((model for model in models if wanted in {model.id, model.name}), None)


def default_upstream(settings: Settings) -> Upstream:
    """The provider that `LLM_SERVER_URL` names. Raises `InvalidRequest` for a key that cannot be sent."""
    key = _sendable("LLM_API_KEY", settings.llm_api_key.get_secret_value())
    return Upstream(key=key, capacity=settings.llm_max_concurrency)


def upstream_of(settings: Settings, name: str, provider: Provider, file: str) -> Upstream:
    """A provider of `models.toml`, with its secrets. Raises `InvalidRequest` when one is missing, or cannot
    be sent."""
    where = f"{file}: providers.{name}"
    return Upstream(
        name=name,
        kind=provider.kind,
        key=_secret(settings, f"{where}.key", provider.key),
        headers={
            header: _secret(settings, f"{where}.headers.{header}", value)
            for header, value in provider.headers.items()
        },
        own_keys=provider.own_keys,
        capacity=provider.concurrency or settings.llm_max_concurrency,
        api_version=provider.api_version,
        token_url=provider.token_url,
    )


def _secret(settings: Settings, where: str, given: Secret) -> str:
    return _sendable(where, secret(settings, where, given))


def _sendable(where: str, value: str) -> str:
    """What a header is to say, without the line break that `echo` leaves behind a secret."""
    value = value.strip()
    if not value.isprintable() or max(value, default="") > "\xff":
        raise InvalidRequest(f"{where}: there is a character in it that no header can have")
    return value
