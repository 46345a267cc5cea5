"""Where a request goes: which servers have the model that it names, and where else when they cannot
answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from app.access import matches
from app.config import Settings
from app.errors import Expired, InvalidRequest, LLMTimeout, LLMUnavailable, Overloaded, PortalError
from app.services.catalog import DEFAULT, PLAIN, Catalog, Model
from app.services.llm_server import Clock, LLMServer, ModelInfo
from app.services.places import Load, Meter, Place
from app.services.pool import Pool
from app.services.replies import Fault
from app.services.server_state import Loading, Refused, Resting
from app.services.slots import Slots
from app.services.tracing import current_spans
from app.trace_parent import NONE

UNNAMED = frozenset({None, "", DEFAULT})
"""What a request says that leaves the choice of the model to the portal."""


@dataclass(frozen=True, slots=True)
class OwnKey:
    """A key that a session brings for a provider; None where it cannot be read any more."""

    provider: str
    key: str | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class Route:
    """The way to a model: the servers that have it, and their name for it (`id`; None for the default one).
    `name` is what the portal calls it: empty where the servers tell."""

    name: str
    pool: Pool
    id: str | None
    entry: Model

    def found(self, server: LLMServer | None = None) -> ModelInfo | None:
        """The model as a server, or some server, has it; None where that is not known."""
        return self.pool.find(server, self.id, self.entry)

    def lacks_key(self, own_key: OwnKey | None) -> bool:
        """Whether the provider wants a key of the session's own, and the session has none for it."""
        upstream = self.pool.upstream
        has_one = own_key is not None and own_key.provider == upstream.name and own_key.key is not None
        return upstream.own_keys and not upstream.key and not has_one

    def name_of(self, model: ModelInfo) -> str:
        """What the portal calls the model that was found."""
        return self.name or model.name


class Router:
    """Finds the way to a model by its name."""

    def __init__(self, settings: Settings, catalog: Catalog, pools: Mapping[str, Pool]) -> None:
        self._catalog = catalog
        self._pools = pools
        self._default_name = catalog.canonical(settings.llm_model)
        self._served_first = Route("", pools[DEFAULT], None, PLAIN)
        self._seen: list[ModelInfo] | None = None
        self.preferred: str | None = None
        """The model that an admin has made the default one, in place of that of `LLM_MODEL`."""

    def route(self, wanted: str | None) -> Route:
        """The way to a model; nothing, or `default`, is the default one."""
        if wanted not in UNNAMED:
            return self._to(self._catalog.canonical(wanted or ""))
        if self.preferred is not None:
            route = self._to(self.preferred)
            if self.is_served(route):
                return route
        return self.of_settings()

    def is_served(self, route: Route) -> bool:
        """Whether the model can be asked now, as far as is known, or has fallbacks for when it cannot."""
        servers = route.pool.having(route.id)
        return bool(servers) and (
            bool(route.entry.fallbacks) or any(server.state.load.limit for server in servers)
        )

    def fallbacks(self, route: Route, allowed: tuple[str, ...], own_key: OwnKey | None) -> Iterator[Route]:
        """Where to go when no server of the route can answer: to models that are `allowed`, where there is a
        key to show."""
        for name in route.entry.fallbacks:
            found = self.of_settings() if name == DEFAULT else self.route(name)
            model = found.found()
            if model is not None and matches(found.name_of(model), allowed) and not found.lacks_key(own_key):
                yield found

    def of_settings(self) -> Route:
        """The way to the model of `LLM_MODEL`."""
        if self._default_name != DEFAULT:
            route = self._to(self._default_name)
            if route.name:
                return route
        known = self._served_first
        models = known.pool.models
        if models is self._seen:
            return known
        self._seen, model = models, known.found()
        if model is not None and model.name != known.name:  # it is known only since the server was asked
            known = Route(model.name, known.pool, None, self._catalog.model(model.name))
            self._served_first = known
        return known

    def _to(self, name: str) -> Route:
        entry, own = self._catalog.model(name), self._pools[DEFAULT]
        if self._catalog.has(name):
            return Route(name, self._pools[entry.provider], entry.id or name, entry)
        if entry.provider == DEFAULT or own.find(None, name, PLAIN) is not None:
            return Route("", own, name, entry)  # what is served here goes before patterns
        return Route(name, self._pools[entry.provider], name, entry)


class Journey:
    """The way of one request: from server to server, and from the model to its fallbacks, until one begins to
    answer. `begun` says that one has: from then on there is no other way."""

    def __init__(
        self,
        router: Router,
        wanted: str | None,
        allowed: tuple[str, ...],
        session: str | None,
        meter: Meter,
        own_key: OwnKey | None,
    ) -> None:
        self.route = router.route(wanted)
        self.begun = False
        self.server: LLMServer | None = None
        self._fallbacks = router.fallbacks(self.route, allowed, own_key)
        self._session = session
        self._own_key = own_key
        self._meter = meter
        self._place: Place | None = None
        self._slots: Slots | None = None
        self._slot: int | None = None
        self._failed: set[Load] = set()
        self._away: set[Load] = set()
        self._doubtful: list[LLMServer] = []
        self._error: PortalError | None = None
        self._asked = ""
        self._spans = current_spans()

    # --- one stage of the way ---

    async def ready(self) -> None:
        """Returns when some server can be asked. Raises why none can."""
        while not self.route.pool.is_open(self._failed):
            try:
                await self.route.pool.ready()
                if self.route.pool.is_open(self._failed):
                    return
                raise self.route.pool.problem()
            except PortalError as error:
                self._fall_back(error)

    @property
    def is_ready(self) -> bool:
        """Whether some server can be asked, as far as is known."""
        return self.route.pool.is_open(self._failed)

    def ask(self, owner: str) -> Place:
        """A place on this stage. Raises `Overloaded`. Whoever asked must `leave`."""
        pool = self.route.pool
        if self._spans is not None:
            self._spans.waits(pool.upstream.name)
        lacking = pool.lacking(self.route.id)
        barred = {*self._failed, *lacking} if lacking else self._failed
        self._place = pool.ask(owner, self._session, barred, again=self._error is not None)
        return self._place

    def arrive(self) -> tuple[LLMServer, ModelInfo]:
        """The server of the place that was granted, and the model there. Raises `InvalidRequest` when it is
        not served, and `Overloaded` while the server is to be left alone with it."""
        assert self._place is not None
        server = self.server = self.route.pool.server_of(self._place, self._session)
        model = self.route.found(server)
        if model is None:
            raise self.route.pool.not_served()
        self._meter.model = self.route.name_of(model)
        if not self._has_own_key:  # else it is that key's business
            server.state.check(model.id)
        self._asked = model.id
        if self._spans is not None:
            self._spans.asks(server, self._meter.model)
        server.spare_time.make_way()
        return server, model

    def take_slot(self) -> int | None:
        """The slot of the server that is to be used, until the place is given back."""
        assert self.server is not None
        self._slots = self.server.slots
        self._slot = self._slots.take(self._session)
        return self._slot

    def begin(self) -> None:
        """The server has begun to answer. One that failed at the same request failed by its own fault."""
        self.begun = True
        if self.server is not None:
            self.server.state.begun()
        for server in self._doubtful:
            server.state.failed()

    def end(self) -> None:
        """The server has answered to the end."""
        if self.server is not None:
            self.server.state.answered()

    @property
    def headers(self) -> Mapping[str, str]:
        """What the server is told beside what is asked of it."""
        return NONE if self._spans is None else self._spans.headers

    def key(self) -> str | None:
        """The session's own key, where it is for the provider of this stage. Raises `InvalidRequest` when one
        is needed that the session does not have."""
        own, upstream = self._own_key, self.route.pool.upstream
        if own is not None and own.provider == upstream.name and own.key is None:
            raise InvalidRequest(
                "The session's own key cannot be read since the server's secret has changed: set it again."
            )
        if self.route.lacks_key(own):
            raise InvalidRequest(
                f"model: {upstream.name} takes only keys of sessions; give the session one with "
                "PUT /api/sessions/{session_id}/key"
            )
        self._meter.own_key = self._has_own_key
        return own.key if own is not None and self._meter.own_key else None

    @property
    def _has_own_key(self) -> bool:
        return self._own_key is not None and self._own_key.provider == self.route.pool.upstream.name

    def leave(self) -> None:
        """Gives back the place of this stage."""
        if self._slots is not None:
            self._slots.give_back(self._slot)
        if self._place is not None:
            self._meter.gpu_seconds += self._place.leave()
        if self._spans is not None:
            self._spans.leaves()
        self.server = self._place = self._slots = self._slot = None

    # --- going on ---

    def go_on(self, error: PortalError, clock: Clock | None) -> None:
        """This stage has failed. Returns when there is another way to go, and raises `error` when there is
        none."""
        server = self.server
        if self._spans is not None:
            self._spans.failed(error.code)
        if isinstance(error, Expired) and clock is not None and clock.is_over:
            raise LLMTimeout(clock.complaint())
        if server is None or clock is None or not error.retryable:
            raise error
        if clock.is_over:
            raise error
        self._note(server, error)
        if self.begun:
            raise error
        self._failed.add(server.state.load)
        if isinstance(error, LLMUnavailable) and not isinstance(error, Loading):
            self._away.add(server.state.load)
        self._error = self._error or error
        if not self.route.pool.is_open(self._failed):
            self._fall_back(error)

    def stranded(self) -> None:
        """No server is left that could give the place. Raises why, when there is no other way."""
        self._fall_back(self.route.pool.problem())

    def _fall_back(self, error: PortalError) -> None:
        """On to the next model, which servers that failed may have, but for those that could not be reached.
        Raises the first of all errors when there is none: it is that of the model that was asked for."""
        self._error = self._error or error
        following = next(self._fallbacks, None)
        if following is None:
            raise self._error
        if following.pool is self.route.pool:  # all of it failed, so it was not one server's own fault
            self._doubtful.clear()
        self.route, self._failed = following, set(self._away)

    def _note(self, server: LLMServer, error: PortalError) -> None:
        """What the failure says of the server."""
        if isinstance(error, Resting):  # that was known
            return
        if isinstance(error, Overloaded):
            if not self._meter.own_key:  # else it is that key's business
                limits_models = self.route.pool.limits_models
                server.state.busy(error.retry_after or 1.0, self._asked if limits_models else None)
        elif isinstance(error, Fault) and not self.begun:
            self._doubtful.append(server)
        elif not isinstance(error, Refused):  # of that is known more by asking it
            server.state.failed()
