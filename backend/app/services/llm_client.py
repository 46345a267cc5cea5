"""The one client of the LLM server: any that speaks OpenAI's chat completions.

What waits for a place, what is asked for, and how plain Python asks, is here; the server itself is spoken to
in `llm_server`, and its replies are read in `replies`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from app.config import Settings
from app.errors import InvalidRequest, PortalError
from app.events import GenerationOptions, Usage
from app.loop import LoopDoor
from app.services.llm_server import Clock, LLMServer, Loading, Message, ModelInfo
from app.services.places import Meter, Places
from app.services.prompts import with_system
from app.services.replies import Completion, InQueue, Piece, ReplyReader, Update
from app.services.tools import ConstrainedReply, constrained, instructions

if TYPE_CHECKING:
    from app.services.session_manager import SessionManager

COUNT_AT_ONCE_S = 0.5
"""How long the end of a turn waits for its tokens to be counted."""

# How a server is told not to think; each knows only its own way, and OpenAI refuses what it does not
# know. The keys are the `owned_by` of /v1/models.
_NO_THINKING: dict[str, dict[str, Any]] = {
    "llamacpp": {"chat_template_kwargs": {"enable_thinking": False}},
    "vllm": {"chat_template_kwargs": {"enable_thinking": False}},
    "library": {"reasoning_effort": "none"},  # Ollama
}


def _thinking(server: str, effort: str | None, *, hidden: bool) -> dict[str, Any]:
    """How a server is told how much to think: as much as was asked for, else not at all where it is hidden.
    llama.cpp reads an effort only as a variable of the chat template."""
    if effort is not None and effort != "none":
        return {"chat_template_kwargs": {"reasoning_effort": effort}} if server == "llamacpp" else {}
    return _NO_THINKING.get(server, {}) if hidden or effort is not None else {}


def _check_taken(server: str, options: GenerationOptions) -> None:
    """Raises `InvalidRequest` for what a server is known to leave out without a word."""
    if server != "library":  # Ollama
        return
    if options.logit_bias is not None:
        raise InvalidRequest("logit_bias: Ollama does not take it; leave it out")
    if options.tool_choice not in {None, "auto"} if isinstance(options.tool_choice, str | None) else True:
        raise InvalidRequest("tool_choice: Ollama always chooses by itself; leave it out")


@dataclass(frozen=True, slots=True)
class Health:
    """How the LLM server is: `degraded` means that it is there but cannot answer now. `queue` is the
    number of requests that wait for it."""

    status: Literal["ok", "degraded", "down"]
    model: str | None
    latency_ms: int | None
    temperature: float
    max_tokens: int
    queue: int


class LLMClient:
    """Speaks to the LLM server, at most `LLM_MAX_CONCURRENCY` generations at once.

    The methods without `a` in front block and may be called from any thread but the event loop's;
    those with it may be awaited on any event loop. `stream` is for the portal's own loop.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._server = LLMServer(settings, settings.llm_server_url)
        self.places = Places(settings.llm_max_concurrency, settings.llm_max_queue)

    async def open(self) -> None:
        """Makes the connection pool. The LLM server need not be there."""
        self._door = LoopDoor(asyncio.get_running_loop())
        await self._server.open()

    async def close(self) -> None:
        """Closes all connections."""
        await self._server.close()

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

    async def stream(
        self,
        messages: Sequence[Message],
        options: GenerationOptions,
        *,
        deadline: float | None = None,
        owner: str = "",
        meter: Meter | None = None,
    ) -> AsyncGenerator[Update, None]:
        """Waits for a place, until `deadline` (Unix time) at most and in fair turns with other owners,
        and yields the reply. `meter` tells in the end what was used, also of a reply that broke off.

        Closing the generator closes the request to the server. Raises `Expired` besides what
        `generate` raises.
        """
        place = self.places.ask(owner)
        meter = meter or Meter()
        try:
            async for position in place.wait(deadline):
                yield InQueue(position, self.places.eta(position))
            async with aclosing(self._request(messages, options, meter)) as updates:
                async for update in updates:
                    yield update
        finally:
            meter.gpu_seconds = place.leave()

    async def _request(
        self, messages: Sequence[Message], options: GenerationOptions, meter: Meter
    ) -> AsyncGenerator[Update, None]:
        clock = Clock(self._settings)
        model = await self._server.resolve(options.model)
        meter.model = model.name
        _check_taken(model.server, options)
        tools = None
        if options.tools:
            messages, options, tools = self._with_tools(model, messages, options)
        reader = ReplyReader(self._settings.llm_skip_thinking, tools)
        body = self._body(model, messages, options)
        async with aclosing(self._server.generate(model, body, reader, clock)) as updates:
            async for update in updates:
                yield update

    def _with_tools(
        self, model: ModelInfo, messages: Sequence[Message], options: GenerationOptions
    ) -> tuple[Sequence[Message], GenerationOptions, ConstrainedReply | None]:
        """The request as `LLM_TOOL_MODE` wants tools to be asked for, and who reads the reply."""
        mode = self._settings.llm_tool_mode
        if mode == "off":
            return messages, options.model_copy(update={"tools": None, "tool_choice": None}), None
        if mode == "native" or (mode == "auto" and model.knows_tools):
            return messages, options, None
        told = with_system(messages, after=instructions(options.tools or ()))
        return told, constrained(options), ConstrainedReply()

    def _body(
        self, model: ModelInfo, messages: Sequence[Message], options: GenerationOptions
    ) -> dict[str, Any]:
        settings, given = self._settings, options.given()
        extra = given.pop("extra", {})
        return {
            "temperature": settings.llm_temperature,
            "top_p": settings.llm_top_p,
            "max_tokens": settings.llm_max_tokens,
            **given,
            **_thinking(model.server, options.reasoning_effort, hidden=settings.llm_skip_thinking),
            **extra,
            "model": model.id,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    async def count_tokens(self, messages: Sequence[Message]) -> int | None:
        """The exact length of the prompt that `messages` make, in tokens; None where the server
        cannot tell (only llama.cpp and vLLM can)."""
        try:
            model = await self._server.resolve(None)
        except PortalError:
            return None
        return await self._server.count_tokens(model, messages)

    async def count(self, messages: Sequence[Message], reply: str, wanted: str | None) -> Usage | None:
        """What a generation that the server did not report has used, counted with its tokenizer; None where
        it has none, or does not answer at once."""
        server = self._server
        if server.problem is not None:
            return None
        try:
            async with asyncio.timeout(COUNT_AT_ONCE_S):
                model = await server.resolve(wanted)
                prompt = await server.count_tokens(model, messages)
                written = await server.count_text(model, reply) if reply and prompt is not None else 0
        except (TimeoutError, PortalError):
            return None
        return None if prompt is None or written is None else Usage(prompt, written)

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
        """How the server was when it was last asked."""
        settings, server = self._settings, self._server
        problem = server.problem
        full = self.places.waiting >= max(1, self.places.max_queue)
        status: Literal["ok", "degraded", "down"] = "degraded" if full else "ok"
        if problem is not None:
            status = "down" if problem.code in {"llm_unavailable", "llm_timeout"} else "degraded"
            if isinstance(problem, Loading):
                status = "degraded"
        return Health(
            status=status,
            model=server.models[0].name if server.models else None,
            latency_ms=None if problem else server.latency_ms,
            temperature=settings.llm_temperature,
            max_tokens=settings.llm_max_tokens,
            queue=self.places.waiting,
        )

    @property
    def context(self) -> int | None:
        """The context length of the model served by default, in tokens, where the server tells."""
        return self._server.default().context if self._server.models else None

    async def watch(self) -> None:
        """Asks the server every few seconds, and at once after a failure. Runs until cancelled."""
        await self._server.watch()

    async def model_name(self, wanted: str | None) -> str:
        """The name of the model that answers when `wanted` is asked for. Raises `InvalidRequest` for one
        that is not served, `LLMUnavailable` while nobody knows."""
        return (await self._server.resolve(wanted)).name

    def known_model(self, wanted: str | None) -> str:
        """The same as far as it is known without asking; else what is wanted, or nothing."""
        models = self._server.models
        if wanted in {None, "", "default"}:
            return self._server.default().name if models else ""
        return next((model.name for model in models if wanted in {model.id, model.name}), wanted or "")

    async def _current_models(self) -> list[ModelInfo]:
        await self._server.probe_if_stale()
        if self._server.problem is not None:
            raise self._server.problem
        return self._server.models

    async def _health(self) -> Health:
        await self._server.probe_if_stale()
        return self.last_health


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
