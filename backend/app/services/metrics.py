"""`/metrics`: how the portal is and what it has done, as Prometheus reads it.

Turns are added up as they end (`Tally`); everything else is looked at when somebody asks. No name in it is
chosen by clients, and nothing tells of a person, a session or a text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from app import __version__
from app.access import Identity
from app.database import Database
from app.distribution import Distribution
from app.errors import StorageUnavailable
from app.services.authorizer import Authorizer
from app.services.llm_client import LLMClient
from app.services.outbox import Outbox
from app.services.runner import Runner
from app.services.server_state import State
from app.services.tally import ModelTally, Tally

if TYPE_CHECKING:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    from prometheus_client.metrics_core import Metric

OUTBOX_S = 2.0
"""How long the database is waited for; without it, what only it knows is left out."""


@dataclass(frozen=True, slots=True)
class ProjectFigures:
    """How the MQTT door of a project is: `in_flight` publishes are not confirmed by the broker yet."""

    project: str
    is_connected: bool
    in_flight: int


@dataclass(frozen=True, slots=True)
class Watched:
    """What is looked at."""

    tally: Tally
    runner: Runner
    llm: LLMClient
    database: Database
    outbox: Outbox
    mqtt: Callable[[], Sequence[ProjectFigures]]


class Metrics:
    """Tells them to whoever has the permission `metrics:read`."""

    def __init__(self, watched: Watched, authorizer: Authorizer) -> None:
        self._watched = watched
        self._authorizer = authorizer

    async def text(self, who: Identity) -> tuple[bytes, str]:
        """All metrics, and the media type of their format. Raises `Forbidden`."""
        await self._authorizer.check(who, "metrics:read")
        # Who never asks need not have the library in memory.
        from prometheus_client import CollectorRegistry, ProcessCollector
        from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_Collector(self._watched, await self._owed()))
        return generate_latest(registry), CONTENT_TYPE_LATEST

    async def _owed(self) -> Mapping[str, int] | None:
        try:
            async with asyncio.timeout(OUTBOX_S):
                return await self._watched.outbox.depths()
        except (StorageUnavailable, TimeoutError):
            return None


class _Collector:
    """What prometheus_client asks for: the metrics of one moment."""

    def __init__(self, watched: Watched, owed: Mapping[str, int] | None) -> None:
        self._watched = watched
        self._owed = owed

    def collect(self) -> Iterator[Metric]:
        """All but those of the process."""
        yield _gauge("portal_info", "The version that runs; always 1.", ("version",), [((__version__,), 1)])
        what = "Tasks of the event loop that have not ended."
        yield _gauge("portal_tasks", what, (), [((), len(asyncio.all_tasks()))])
        yield from self._turns()
        yield from self._models()
        yield from self._servers()
        yield from self._mqtt()
        written = "From handing a write to the database to its commit."
        lag = self._watched.database.write_lag
        yield _histogram("portal_database_write_seconds", written, (), [((), lag)])

    def _turns(self) -> Iterator[Metric]:
        tally, runner = self._watched.tally, self._watched.runner
        labels = ("door", "model", "outcome")
        yield _counter("portal_turns", "Turns that have ended.", labels, tally.turns.items())
        what, refused = "Requests that were answered with an error.", tally.refused.items()
        yield _counter("portal_refusals", what, ("door", "code"), refused)
        what, lasted = "From acceptance to the ending.", tally.durations.items()
        yield _histogram("portal_turn_duration_seconds", what, ("door", "model"), lasted)
        here = runner.here
        running = sum(turn.task is not None for turn in here)
        active = [(("running",), running), (("waiting",), len(here) - running)]
        yield _gauge("portal_turns_active", "Turns that have not ended.", ("state",), active)

    def _models(self) -> Iterator[Metric]:
        models, label = self._watched.tally.models.items(), ("model",)
        tokens: list[tuple[str, str, Callable[[ModelTally], int]]] = [
            ("portal_prompt_tokens", "Tokens read.", lambda of: of.prompt),
            (
                "portal_cached_prompt_tokens",
                "Of these, from the server's prefix cache.",
                lambda of: of.cached,
            ),
            ("portal_completion_tokens", "Tokens written.", lambda of: of.completion),
            ("portal_reasoning_tokens", "Of these, reasoning.", lambda of: of.reasoning),
        ]
        for name, what, read in tokens:
            yield _counter(name, what, label, [((model,), read(of)) for model, of in models])
        what, first = (
            "From acceptance to the reply's first piece.",
            [((m,), of.first_token) for m, of in models],
        )
        yield _histogram("portal_time_to_first_token_seconds", what, label, first)
        what, following = (
            "From token to token, the mean of each turn.",
            [((m,), of.next_token) for m, of in models],
        )
        yield _histogram("portal_time_between_tokens_seconds", what, label, following)

    def _servers(self) -> Iterator[Metric]:
        llm, label = self._watched.llm, ("server",)
        waiting = [((name,), pool.places.waiting) for name, pool in llm.pools.items()]
        yield _gauge("portal_llm_queue", "Turns that wait for a place.", ("provider",), waiting)
        loads = [((server.name,), server.state.load) for server in llm.servers]
        taken = [(name, load.taken) for name, load in loads]
        free = [(name, max(0, load.limit - load.taken)) for name, load in loads]
        yield _gauge("portal_llm_places_taken", "Places that are in use.", label, taken)
        yield _gauge("portal_llm_places_free", "Places that can be had now.", label, free)
        states = [
            ((server.name, state), float(server.state.state == state))
            for server in llm.servers
            for state in get_args(State)
        ]
        what = "1 for the state that the server is in, 0 for others."
        yield _gauge("portal_llm_server_state", what, ("server", "state"), states)

    def _mqtt(self) -> Iterator[Metric]:
        projects, label = self._watched.mqtt(), ("project",)
        connected = [((of.project,), float(of.is_connected)) for of in projects]
        flying = [((of.project,), of.in_flight) for of in projects]
        yield _gauge("portal_mqtt_connected", "1 while the project is subscribed.", label, connected)
        yield _gauge("portal_mqtt_in_flight", "Publishes that the broker has not confirmed.", label, flying)
        if self._owed is not None:
            owed = [((of.project,), self._owed.get(of.project, 0)) for of in projects]
            yield _gauge("portal_mqtt_outbox", "Replies that are ready and not confirmed.", label, owed)


Labels = tuple[str, ...]


def _counter(
    name: str, what: str, labels: Labels, values: Iterable[tuple[Labels, float]]
) -> CounterMetricFamily:
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily(name, what, labels=labels)
    for names, value in values:
        family.add_metric(names, value)
    return family


def _gauge(name: str, what: str, labels: Labels, values: Iterable[tuple[Labels, float]]) -> GaugeMetricFamily:
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(name, what, labels=labels)
    for names, value in values:
        family.add_metric(names, value)
    return family


def _histogram(
    name: str, what: str, labels: Labels, values: Iterable[tuple[Labels, Distribution]]
) -> HistogramMetricFamily:
    from prometheus_client.core import HistogramMetricFamily

    family = HistogramMetricFamily(name, what, labels=labels)
    for names, value in values:
        family.add_metric(names, value.buckets, value.total)
    return family
