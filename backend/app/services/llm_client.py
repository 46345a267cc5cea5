"""The one client of the LLM servers: any that speak OpenAI's chat completions.

What waits for a place, which server is asked, and how plain Python asks, is here; a server itself is spoken
to in `llm_server`, and its replies are read in `replies`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from app.access import ANY
from app.config import Settings
from app.errors import Overloaded, PortalError
from app.events import GenerationOptions, Usage
from app.loop import LoopDoor
from app.services.catalog import DEFAULT, Catalog
from app.services.chat_body import chat_body
from app.services.exact_cache import ExactCache
from app.services.llm_server import Clock, Embedded, LLMServer, Message, ModelInfo
from app.services.places import Meter, NoServer, Places, Queue
from app.services.pool import Pool, Status, default_upstream, upstream_of
from app.services.replies import Completion, Done, InQueue, Piece, ReplyReader, Update
from app.services.routing import Journey, OwnKey, Route, Router
from app.services.streaming_http import StreamingHttp

if TYPE_CHECKING:
    from app.services.session_manager import SessionManager


T = TypeVar("T")

OWN_CACHE = {"llamacpp", "vllm"}
"""Servers that keep what they have read for those who run them, at no price."""

COUNT_AT_ONCE_S = 0.5
"""How long the end of a turn waits for its tokens to be counted."""


@dataclass(frozen=True, slots=True)
class Health:
    """How the LLM servers are: `degraded` means that some cannot answer, or that none can now and may soon.
    `queue` is the number of requests that wait for one."""

    status: Status
    model: str | None
    latency_ms: int | None
    temperature: float
    max_tokens: int
    queue: int


class LLMClient:
    """Speaks to the LLM servers, at most `LLM_MAX_CONCURRENCY` generations at once to each.

    The methods without `a` in front block and may be called from any thread but the event loop's;
    those with it may be awaited on any event loop. `stream` is for the portal's own loop.
    """

    def __init__(self, settings: Settings, catalog: Catalog | None = None) -> None:
        """Raises `InvalidRequest` when `models.toml` names secrets that are not there."""
        self._settings = settings
        self.catalog = catalog or Catalog(settings.path(settings.models_file))
        self.queue = Queue(settings.llm_max_queue)
        self.pools = {DEFAULT: Pool(settings, default_upstream(settings), settings.llm_servers, self.queue)}
        for name, provider in self.catalog.providers.items():
            upstream = upstream_of(settings, name, provider, self.catalog.file)
            self.pools[name] = Pool(settings, upstream, provider.urls, self.queue)
        self.router = Router(settings, self.catalog, self.pools)
        self.own_key_providers = sorted(name for name, pool in self.pools.items() if pool.upstream.own_keys)
        """Those that take keys that sessions bring."""
        self._cache = ExactCache(settings) if settings.llm_cache_mb else None

    async def open(self) -> None:
        """Makes the connection pool. The LLM servers need not be there."""
        self._door = LoopDoor(asyncio.get_running_loop())
        self._http = StreamingHttp(connect_timeout=self._settings.llm_connect_timeout)
        for pool in self.pools.values():
            pool.open(self._http)

    async def close(self) -> None:
        """Closes all connections."""
        for pool in self.pools.values():
            pool.close()
        self._http.close()

    @property
    def places(self) -> Places:
        """The places at the servers of the default model."""
        return self.router.route(None).pool.places

    def full(self, wanted: str | None) -> Overloaded | None:
        """The error for whoever asks for a model now, when nobody more may wait."""
        route = self.router.route(wanted)
        return route.pool.places.full(route.pool.lacking(route.id))

    @property
    def servers(self) -> list[LLMServer]:
        """All servers, of all providers."""
        return [server for pool in self.pools.values() for server in pool.servers]

    # --- generating ---

    def generate(self, messages: Sequence[Message], **options: Any) -> str:
        """The reply to `messages`; `options` are those of `GenerationOptions`.

        Raises `LLMUnavailable`, `LLMTimeout`, `LLMError`, `Overloaded` or `InvalidRequest`.
        """
        return self._door.call(self._generate(messages, options))

    async def agenerate(self, messages: Sequence[Message], **options: Any) -> str:
        """`generate`, to be awaited."""
        return await self._door.acall(self._generate(messages, options))

    def generate_stream(self, messages: Sequence[Message], **options: Any) -> Iterator[str]:
        """The reply in pieces, as they come. Leaving the iteration ends the generation. Raises what
        `generate` raises."""
        return self._door.iterate(self._generate_stream(messages, options))

    def agenerate_stream(self, messages: Sequence[Message], **options: Any) -> AsyncGenerator[str, None]:
        """`generate_stream`, for `async for`."""
        return self._door.aiterate(self._generate_stream(messages, options))

    async def _generate(self, messages: Sequence[Message], options: dict[str, Any]) -> str:
        completion = Completion()
        async with aclosing(self.stream(messages, GenerationOptions.of(options))) as updates:
            async for update in updates:
                completion.add(update)
        return completion.response

    async def _generate_stream(
        self, messages: Sequence[Message], options: dict[str, Any]
    ) -> AsyncGenerator[str, None]:
        async with aclosing(self.stream(messages, GenerationOptions.of(options))) as updates:
            async for update in updates:
                if isinstance(update, Piece) and update.kind == "text":
                    yield update.content

    def stream(
        self,
        messages: Sequence[Message],
        options: GenerationOptions,
        *,
        deadline: float | None = None,
        owner: str = "",
        session: str | None = None,
        meter: Meter | None = None,
        own_key: OwnKey | None = None,
        allowed: tuple[str, ...] = ANY,
    ) -> AsyncGenerator[Update, None]:
        """Waits for a place, until `deadline` (Unix time) at most and in fair turns with other owners,
        and yields the reply. `meter` tells in the end what was used, also of a reply that broke off.

        A `session` stays with the server that has its prefix. Where a server fails before the first piece,
        another one is asked, and then the model's fallbacks that are `allowed`. Closing the generator closes
        the request to the server. Raises `Expired` besides what `generate` raises. Where answers are kept
        (`LLM_CACHE_MB`), one to the same question of the same owner is given again, at once.
        """
        meter = meter or Meter()
        journey = Journey(self.router, options.model, allowed, session, meter, own_key)
        updates = self._updates(
            journey, partial(self._reply, journey, meter, messages, options), deadline, owner
        )
        if self._cache is None or own_key is not None:
            return updates
        question = self._cache.question(journey.route, owner, messages, options)
        return updates if question is None else self._cache.answer(question, updates, meter)

    async def _updates(
        self,
        journey: Journey,
        reply: Callable[[Clock], AsyncGenerator[T, None]],
        deadline: float | None,
        owner: str,
    ) -> AsyncGenerator[InQueue | T, None]:
        clock: Clock | None = None
        while True:
            if not journey.is_ready:
                await journey.ready()
            place = journey.ask(owner)
            try:
                async for position in place.wait(clock.sooner(deadline) if clock else deadline):
                    yield InQueue(position, place.eta(position))
                clock = _begun(clock, self._settings)
                async with aclosing(reply(clock)) as updates:
                    async for update in updates:
                        if not journey.begun:
                            journey.begin()
                        yield update
                journey.end()
                return
            except NoServer:
                journey.stranded()
            except PortalError as error:
                journey.go_on(error, clock)
            finally:
                journey.leave()

    def _reply(
        self,
        journey: Journey,
        meter: Meter,
        messages: Sequence[Message],
        options: GenerationOptions,
        clock: Clock,
    ) -> AsyncGenerator[Piece | Done, None]:
        server, model = journey.arrive()
        body, tools = chat_body(self._settings, server, model, journey.route.entry, messages, options)
        if (slot := journey.take_slot()) is not None:
            body["id_slot"] = slot
        reader = ReplyReader(self._settings.llm_skip_thinking, tools)
        return server.generate(model, body, reader, clock, meter, journey.key(), journey.headers)

    async def in_spare_time(
        self, session: str, messages: Sequence[Message], options: GenerationOptions, meter: Meter
    ) -> Completion | None:
        """The whole reply, made at the session's server while that has a place which no turn wants; None when
        there is none, or not for long enough. Raises what `generate` raises."""
        route = self.router.route(options.model)
        server = route.pool.home_of(session)
        if server is None or not server.spare_time.is_there:
            return None
        slots = server.slots
        slot = slots.take(None)  # its prompt begins as no session does
        if slot is None and slots.count:
            return None
        work = self._whole(route, server, messages, options, meter, slot)
        return await server.spare_time.run(work, partial(slots.give_back, slot))

    async def warm(
        self, session: str, messages: Sequence[Message], options: GenerationOptions
    ) -> Usage | None:
        """Lets the session's server read a prompt in its spare time, so that those which begin the same are
        answered sooner: only where the prefix cache is one's own. Returns what it has read, or None."""
        route = self.router.route(options.model)
        server = route.pool.home_of(session)
        found = None if server is None else route.found(server)
        if server is None or found is None or found.server not in OWN_CACHE or not server.upstream.is_asked:
            return None
        slot = server.slots.resting(session)
        if not server.spare_time.is_there or (slot is None and server.slots.count):
            return None
        # llama.cpp generates a token also where none is asked for, and vLLM refuses to generate none.
        shortest = options.model_copy(update={"max_tokens": 1})
        work = self._whole(route, server, messages, shortest, Meter(), slot)
        read = await server.spare_time.run(work)
        return None if read is None else read.usage

    async def _whole(
        self,
        route: Route,
        server: LLMServer,
        messages: Sequence[Message],
        options: GenerationOptions,
        meter: Meter,
        slot: int | None,
    ) -> Completion:
        model = route.found(server)
        if model is None:
            raise route.pool.not_served()
        server.state.check(model.id)
        completion, began, meter.model = Completion(), time.monotonic(), route.name_of(model)
        body, tools = chat_body(self._settings, server, model, route.entry, messages, options)
        if slot is not None:
            body["id_slot"] = slot
        reader = ReplyReader(self._settings.llm_skip_thinking, tools)
        try:
            generating = server.generate(model, body, reader, Clock(self._settings), meter, None)
            async with aclosing(generating) as updates:
                async for update in updates:
                    completion.add(update)
        finally:
            meter.gpu_seconds = time.monotonic() - began
        return completion

    async def embed(
        self,
        texts: Sequence[str],
        model: str | None,
        asked: Mapping[str, Any],
        *,
        owner: str = "",
        meter: Meter | None = None,
    ) -> Embedded:
        """The embeddings of `texts`. It waits for a place, and goes to another server, as `stream` does.
        Raises what `generate` raises: `InvalidRequest` where the server makes none."""
        journey = Journey(self.router, model, (), None, meter or Meter(), None)

        async def made(clock: Clock) -> AsyncGenerator[Embedded, None]:
            server, found = journey.arrive()
            yield await server.embed(found, texts, asked, clock, journey.key())

        async with aclosing(self._updates(journey, made, None, owner)) as updates:
            async for update in updates:
                if isinstance(update, Embedded):
                    return update
        raise AssertionError("embeddings ended without saying so")

    def max_tokens_of(self, options: GenerationOptions) -> int:
        """How long a reply may get that is asked for with these options, in tokens."""
        return options.max_tokens or self.default_max_tokens(options.model)

    def default_max_tokens(self, model: str | None) -> int:
        """The same, where it is not asked for."""
        return self.router.route(model).entry.options.max_tokens or self._settings.llm_max_tokens

    async def count_tokens(self, messages: Sequence[Message], model: str | None = None) -> int | None:
        """The exact length of the prompt that `messages` make for a model, in tokens; None where the server
        cannot tell (only llama.cpp and vLLM can)."""
        try:
            server, found = await self._one(model)
        except PortalError:
            return None
        return await server.count_tokens(found, messages)

    async def count(self, messages: Sequence[Message], reply: str, wanted: str | None) -> Usage | None:
        """What a generation that the server did not report has used, counted with its tokenizer; None where
        it has none, or does not answer at once."""
        if not self.router.route(wanted).pool.is_open():
            return None
        try:
            async with asyncio.timeout(COUNT_AT_ONCE_S):
                server, model = await self._one(wanted)
                prompt = await server.count_tokens(model, messages)
                written = await server.count_text(model, reply) if reply and prompt is not None else 0
        except (TimeoutError, PortalError):
            return None
        return None if prompt is None or written is None else Usage(prompt, written)

    async def _one(self, wanted: str | None) -> tuple[LLMServer, ModelInfo]:
        """A server that has a model, to be asked something small, and the model there. Raises why there is
        none."""
        route = self.router.route(wanted)
        server = await route.pool.one()
        model = route.found(server)
        if model is None:
            raise route.pool.not_served()
        return server, model

    # --- models and health ---

    def models(self) -> list[ModelInfo]:
        """The models that the server serves now. Raises `LLMUnavailable`, `LLMTimeout` or `LLMError`."""
        return self._door.call(self._current_models())

    async def amodels(self) -> list[ModelInfo]:
        """`models`, to be awaited."""
        return await self._door.acall(self._current_models())

    def health(self) -> Health:
        """How the server is, asked within the last second. Raises nothing."""
        return self._door.call(self._health())

    async def ahealth(self) -> Health:
        """`health`, to be awaited."""
        return await self._door.acall(self._health())

    @property
    def last_health(self) -> Health:
        """How the servers were when they were last asked."""
        settings, route = self._settings, self.router.route(None)
        status = route.pool.status
        full = self.queue.waiting >= max(1, self.queue.most)
        if status == "ok" and (full or any(pool.status != "ok" for pool in self.pools.values())):
            status = "degraded"
        return Health(
            status=status,
            model=self.known_model(None) or None,
            latency_ms=route.pool.latency_ms,
            temperature=settings.llm_temperature,
            max_tokens=settings.llm_max_tokens,
            queue=self.queue.waiting,
        )

    def context_of(self, model: str | None) -> int | None:
        """The context length of a model, in tokens, where the server or `models.toml` tells."""
        route = self.router.route(model)
        found = route.found()
        return None if found is None else route.pool.context_of(found)

    async def watch(self) -> None:
        """Asks the servers every few seconds how they are, and at once after a failure. Runs until
        cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for pool in self.pools.values():
                tasks.create_task(pool.watch(), name="llm servers watch")

    async def model_name(self, wanted: str | None) -> str:
        """The name of the model that answers when `wanted` is asked for. Raises `InvalidRequest` for one
        that is not served, `LLMUnavailable` while nobody knows."""
        route = self.router.route(wanted)
        found = route.found()
        if found is None:
            await route.pool.look()
            route = self.router.route(wanted)
            found = route.found()
        if found is None:
            raise route.pool.not_served()
        return route.name_of(found)

    def known_model(self, wanted: str | None) -> str:
        """The same as far as it is known without asking; else what is wanted, or nothing."""
        route = self.router.route(wanted)
        found = route.found()
        return (wanted or "") if found is None else route.name_of(found)

    def is_known(self, model: str) -> bool:
        """Whether a model of this name is configured, or known to be served."""
        if self.catalog.has(model) or model == self.catalog.canonical(self._settings.llm_model):
            return True
        return any(found.name == model for pool in self.pools.values() for found in pool.models)

    @property
    def can_answer(self) -> bool:
        """Whether the default model can be asked now, by whichever server."""
        pool = self.router.route(None).pool
        return pool.is_open() and self.queue.waiting < max(1, self.queue.most)

    async def _current_models(self) -> list[ModelInfo]:
        pool = self.router.route(None).pool
        await pool.look()
        await pool.ready()
        return pool.models

    async def _health(self) -> Health:
        await self.router.route(None).pool.look()
        return self.last_health


def _begun(clock: Clock | None, settings: Settings) -> Clock:
    """The limits of a request, which has come to a server; to the next one where it has a clock."""
    if clock is None:
        return Clock(settings)
    clock.begin_again()
    return clock


# --- the documented accessors for plain Python ---------------------------------------------------


def get_llm_client() -> LLMClient:
    """The client of this process. Outside a running portal it opens one, with its event loop on a
    thread of its own and settings from the environment and `backend/.env`."""
    from app.container import current

    return current().llm


def get_session_manager() -> SessionManager:
    """The session manager of this process, opened as by `get_llm_client`."""
    from app.container import current

    return current().sessions
