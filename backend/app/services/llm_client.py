"""The one client of the LLM server: any that speaks OpenAI's chat completions.

Chat completions are spoken here directly over aiohttp, always streamed: a plain answer is the fold of
a stream, so cancelling, timeouts and partial text work the same for both. One read of the socket
gives at most one piece of each kind, however many chunks the server packed into it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import aiohttp
import msgspec

from app.config import Settings
from app.errors import (
    InvalidRequest,
    LLMError,
    LLMTimeout,
    LLMUnavailable,
    Overloaded,
    PortalError,
)
from app.events import GenerationOptions, Usage
from app.logs import get_logger
from app.loop import LoopDoor
from app.services.places import Meter, Places
from app.services.prompts import with_system
from app.services.thinking import Kind, ThinkSplitter
from app.services.tools import ConstrainedReply, constrained, instructions

if TYPE_CHECKING:
    from app.services.session_manager import SessionManager

log = get_logger(__name__)

Message = Mapping[str, Any]
"""A chat message in OpenAI's form: `{"role": …, "content": …}`."""

WATCH_INTERVAL_S = 5.0
WATCH_INTERVAL_DOWN_S = 1.0
COUNT_TIMEOUT_S = 2.0
FRESH_S = 1.0
"""A health report younger than this is not asked for again."""


# --- pieces of a reply ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class InQueue:
    """The request waits for a place: `position` from 1, `eta_s` in seconds."""

    position: int
    eta_s: float


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of the reply (`text`) or of the reasoning before it (`thinking`)."""

    kind: Kind
    content: str


@dataclass(frozen=True, slots=True)
class Done:
    """The end of the reply. `usage` is None where the server did not report it."""

    finish_reason: str
    usage: Usage | None
    tool_calls: list[dict[str, Any]]


Update = InQueue | Piece | Done
"""What a generation yields; `Done` is the last, exactly once."""


@dataclass(slots=True)
class Completion:
    """A whole reply."""

    response: str = ""
    thinking: str = ""
    finish_reason: str = "stop"
    usage: Usage = field(default_factory=Usage)
    tool_calls: list[dict[str, Any]] = field(default_factory=list)

    def add(self, update: Update) -> None:
        """Folds one more update in."""
        if isinstance(update, Piece):
            if update.kind == "text":
                self.response += update.content
            else:
                self.thinking += update.content
        elif isinstance(update, Done):
            self.finish_reason, self.tool_calls = update.finish_reason, update.tool_calls
            self.usage = update.usage or self.usage


# --- what the server says ------------------------------------------------------------------------


class _FunctionDelta(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolCallDelta(msgspec.Struct):
    index: int | None = None
    id: str | None = None
    function: _FunctionDelta | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_ToolCallDelta] | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    message: _Delta | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _CompletionDetails(msgspec.Struct):
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class _ModelMeta(msgspec.Struct):
    n_ctx: int | None = None


class _Model(msgspec.Struct):
    id: str
    owned_by: str | None = ""
    max_model_len: int | None = None
    meta: _ModelMeta | None = None


class _Models(msgspec.Struct):
    data: list[_Model] | None = None


class _TemplateCaps(msgspec.Struct):
    supports_tools: bool = True


class _Props(msgspec.Struct):
    """The part of llama.cpp's `/props` that tells of the chat template."""

    chat_template: str = ""
    chat_template_caps: _TemplateCaps | None = None


_decode_props = msgspec.json.Decoder(_Props).decode
_decode_chunk = msgspec.json.Decoder(_Chunk).decode
_decode_models = msgspec.json.Decoder(_Models).decode


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that the server serves. `id` is the server's name for it, `context` its length in
    tokens where the server tells; `knows_tools` is False where its chat template is known to leave tools
    out."""

    id: str
    server: str
    context: int | None
    knows_tools: bool = True

    @property
    def name(self) -> str:
        """The id, without the directories of a server that gives a path for it."""
        is_path = self.id.startswith(("/", "~", ".")) or "\\" in self.id
        return self.id.replace("\\", "/").rsplit("/", 1)[-1] if is_path else self.id


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
        self._base = settings.llm_server_url
        self.places = Places(settings.llm_max_concurrency, settings.llm_max_queue)
        self._models: list[ModelInfo] = []
        self._problem: PortalError | None = LLMUnavailable("The LLM server has not been asked yet.")
        self._knows_tools = True
        self._latency_ms: int | None = None
        self._probed_at = float("-inf")
        self._probe_lock = asyncio.Lock()
        self._look_again = asyncio.Event()

    async def open(self) -> None:
        """Makes the connection pool. The LLM server need not be there."""
        settings = self._settings
        self._door = LoopDoor(asyncio.get_running_loop())
        key = settings.llm_api_key.get_secret_value()
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(
                total=None, connect=settings.llm_connect_timeout, sock_connect=settings.llm_connect_timeout
            ),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            auto_decompress=True,
        )

    async def close(self) -> None:
        """Closes all connections."""
        await self._http.close()

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
        async with aclosing(self.stream(messages, GenerationOptions(**options))) as updates:
            async for update in updates:
                completion.add(update)
        return completion.response

    async def _generate_stream(
        self, messages: Sequence[Message], options: dict[str, Any]
    ) -> AsyncGenerator[str, None]:
        async with aclosing(self.stream(messages, GenerationOptions(**options))) as updates:
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
        clock = _Clock(self._settings)
        model = await self._resolve(options.model)
        meter.model = model.name
        tools = None
        if options.tools:
            messages, options, tools = self._with_tools(model, messages, options)
        response = await self._post(self._body(model, messages, options), clock)
        reply = _ReplyReader(self._settings.llm_skip_thinking, tools)
        try:
            if response.status != 200:
                raise await _refusal(response, model.name)
            while not reply.complete:
                data = await self._read(response, clock)
                if not data:
                    break
                pieces = reply.feed(data)
                clock.has_begun = reply.has_begun
                for piece in pieces:
                    yield piece
            for piece in reply.finish(response.content_type):
                yield piece
            yield reply.done()
        finally:
            # A reply that was read to its end leaves a connection that can serve again; any other
            # one is closed, which tells the server to stop.
            if not response.content.at_eof():
                await _drain(response) if reply.complete else None
            response.close()

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

    def _body(self, model: ModelInfo, messages: Sequence[Message], options: GenerationOptions) -> bytes:
        settings = self._settings
        body: dict[str, Any] = {
            "temperature": settings.llm_temperature,
            "top_p": settings.llm_top_p,
            "max_tokens": settings.llm_max_tokens,
            **options.given(),
            "model": model.id,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if settings.llm_skip_thinking:
            body |= _NO_THINKING.get(model.server, {})
        return msgspec.json.encode(body)

    async def _post(self, body: bytes, clock: _Clock) -> aiohttp.ClientResponse:
        for attempt in (1, 2):
            try:
                async with asyncio.timeout_at(clock.next_limit()):
                    return await self._http.post(
                        f"{self._base}/v1/chat/completions", data=body, headers=_JSON, allow_redirects=False
                    )
            except TimeoutError as error:
                raise self._too_slow(error, clock) from None
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                # An idle connection may have been closed from the other side: that is no answer,
                # and nothing was generated, so one fresh connection is tried.
                if attempt == 2 or isinstance(error, aiohttp.ClientConnectorError):
                    raise self._unreachable() from None
            except aiohttp.ClientError as error:
                raise LLMError(f"The LLM server's answer is no HTTP: {type(error).__name__}.") from None
        raise AssertionError("unreachable")

    async def _read(self, response: aiohttp.ClientResponse, clock: _Clock) -> bytes:
        try:
            async with asyncio.timeout_at(clock.next_limit()):
                return await response.content.readany()
        except TimeoutError as error:
            raise self._too_slow(error, clock) from None
        except (aiohttp.ClientError, OSError):
            raise LLMError("The LLM server broke off its answer.", retryable=True) from None

    def _too_slow(self, error: TimeoutError, clock: _Clock) -> PortalError:
        if isinstance(error, aiohttp.ConnectionTimeoutError):
            return self._unreachable()
        return LLMTimeout(clock.complaint())

    def _unreachable(self) -> LLMUnavailable:
        error = LLMUnavailable("The LLM server cannot be reached.", retry_after=WATCH_INTERVAL_DOWN_S)
        self._note(error)
        return error

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
        settings = self._settings
        problem = self._problem
        full = self.places.waiting >= max(1, self.places.max_queue)
        status: Literal["ok", "degraded", "down"] = "degraded" if full else "ok"
        if problem is not None:
            status = "down" if problem.code in {"llm_unavailable", "llm_timeout"} else "degraded"
            if isinstance(problem, _Loading):
                status = "degraded"
        return Health(
            status=status,
            model=self._models[0].name if self._models else None,
            latency_ms=None if problem else self._latency_ms,
            temperature=settings.llm_temperature,
            max_tokens=settings.llm_max_tokens,
            queue=self.places.waiting,
        )

    @property
    def context(self) -> int | None:
        """The context length of the model served by default, in tokens, where the server tells."""
        chosen = self._default() if self._models else None
        return chosen.context if chosen else None

    async def watch(self) -> None:
        """Asks the server every few seconds, and at once after a failure. Runs until cancelled."""
        while True:
            await self._probe()
            pause = WATCH_INTERVAL_S if self._problem is None else WATCH_INTERVAL_DOWN_S
            self._look_again.clear()
            try:
                async with asyncio.timeout(pause):
                    await self._look_again.wait()
                await asyncio.sleep(WATCH_INTERVAL_DOWN_S / 4)
            except TimeoutError:
                pass

    async def count_tokens(self, messages: Sequence[Message]) -> int | None:
        """The exact length of the prompt that `messages` make, in tokens; None where the server
        cannot tell (only llama.cpp and vLLM can)."""
        try:
            model = await self._resolve(None)
            if model.server == "llamacpp":
                answer = await self._ask("/v1/chat/completions/input_tokens", {"messages": messages})
                return int(answer["input_tokens"])
            if model.server == "vllm":
                answer = await self._ask("/tokenize", {"model": model.id, "messages": messages})
                return int(answer["count"])
        except (PortalError, KeyError, TypeError, ValueError) as error:
            log.debug("tokens could not be counted", reason=type(error).__name__)
        return None

    async def _ask(self, path: str, body: dict[str, Any]) -> Any:
        try:
            async with (
                asyncio.timeout(COUNT_TIMEOUT_S),
                self._http.post(self._base + path, data=msgspec.json.encode(body), headers=_JSON) as response,
            ):
                if response.status != 200:
                    raise LLMError(f"{path} answered {response.status}.")
                return msgspec.json.decode(await response.read())
        except (TimeoutError, aiohttp.ClientError, msgspec.MsgspecError) as error:
            raise LLMError(f"{path} did not answer: {type(error).__name__}.") from None

    async def _current_models(self) -> list[ModelInfo]:
        await self._probe_if_stale()
        if self._problem is not None:
            raise self._problem
        return self._models

    async def _health(self) -> Health:
        await self._probe_if_stale()
        return self.last_health

    async def _probe_if_stale(self) -> None:
        async with self._probe_lock:
            if time.monotonic() - self._probed_at >= FRESH_S:
                await self._probe()

    async def _probe(self) -> None:
        began = time.monotonic()
        try:
            async with (
                asyncio.timeout(self._settings.llm_connect_timeout),
                self._http.get(f"{self._base}/v1/models", allow_redirects=False) as response,
            ):
                if response.status != 200:
                    raise await _refusal(response, None)
                models = _decode_models(await response.read()).data or []
            if not models:
                raise LLMError("The LLM server serves no model.")
            if [model.id for model in models] != [known.id for known in self._models]:
                self._knows_tools = await self._asks_for_tools(models[0])
            self._models = [_model_info(model, self._knows_tools) for model in models]
            self._latency_ms = round((time.monotonic() - began) * 1000)
            self._note(None)
        except (TimeoutError, aiohttp.ClientError, OSError):
            self._note(LLMUnavailable("The LLM server cannot be reached.", retry_after=WATCH_INTERVAL_DOWN_S))
        except msgspec.MsgspecError:
            self._note(LLMError("What answers at LLM_SERVER_URL is no OpenAI-compatible server."))
        except PortalError as error:
            self._note(error)
        self._probed_at = time.monotonic()

    async def _asks_for_tools(self, model: _Model) -> bool:
        """Whether the chat template of a llama.cpp server knows tools: it leaves them out without a word
        where it does not. Of other servers it is taken for granted."""
        if model.owned_by != "llamacpp":
            return True
        try:
            async with self._http.get(f"{self._base}/props", allow_redirects=False) as response:
                props = _decode_props(await response.read())
        except (aiohttp.ClientError, OSError, msgspec.MsgspecError):
            return True
        if props.chat_template_caps is not None:
            return props.chat_template_caps.supports_tools
        return "tools" in props.chat_template

    def _note(self, problem: PortalError | None) -> None:
        if (problem is None) != (self._problem is None):
            if problem is None:
                log.info("LLM server is there", model=self._default().name)
            else:
                log.warning("LLM server is not there", reason=problem.message)
        self._problem = problem
        if problem is not None:
            self._look_again.set()

    async def model_name(self, wanted: str | None) -> str:
        """The name of the model that answers when `wanted` is asked for. Raises `InvalidRequest` for one
        that is not served, `LLMUnavailable` while nobody knows."""
        return (await self._resolve(wanted)).name

    def known_model(self, wanted: str | None) -> str:
        """The same as far as it is known without asking; else what is wanted, or nothing."""
        if wanted in {None, "", "default"}:
            return self._default().name if self._models else ""
        return next((model.name for model in self._models if wanted in {model.id, model.name}), wanted or "")

    def _default(self) -> ModelInfo:
        wanted = self._settings.llm_model
        for model in self._models:
            if wanted in {model.id, model.name}:
                return model
        first = self._models[0]
        return first if wanted == "default" else replace(first, id=wanted)

    async def _resolve(self, wanted: str | None) -> ModelInfo:
        """The model to ask for. Servers such as vLLM refuse names they do not know, so `default`
        must become the real one."""
        if not self._models or self._problem is not None:
            await self._probe_if_stale()
        if not self._models:
            raise self._problem or LLMUnavailable("The LLM server cannot be reached.")
        if wanted in {None, "", "default"}:
            return self._default()
        for model in self._models:
            if wanted in {model.id, model.name}:
                return model
        raise InvalidRequest(
            "model: the LLM server does not serve this one; try one of "
            + ", ".join(sorted(model.name for model in self._models)[:10])
        )


class _Loading(LLMUnavailable):
    """It answers, but is still loading its model."""


_JSON = {"Content-Type": "application/json"}

# How a server is told not to think; each knows only its own way, and OpenAI refuses what it does not
# know. The keys are the `owned_by` of /v1/models.
_NO_THINKING: dict[str, dict[str, Any]] = {
    "llamacpp": {"chat_template_kwargs": {"enable_thinking": False}},
    "vllm": {"chat_template_kwargs": {"enable_thinking": False}},
    "library": {"reasoning_effort": "none"},  # Ollama
}


class _Clock:
    """The limits of one request: to begin, between pieces, and in all."""

    def __init__(self, settings: Settings) -> None:
        now = asyncio.get_running_loop().time()
        self._settings = settings
        self._end = now + settings.llm_timeout
        self._first = now + settings.llm_first_token_timeout
        self.has_begun = False

    def next_limit(self) -> float:
        """When the wait that begins now must be over, in the loop's time."""
        if not self.has_begun:
            return min(self._end, self._first)
        return min(self._end, asyncio.get_running_loop().time() + self._settings.llm_idle_timeout)

    def complaint(self) -> str:
        """What to say once a limit has passed."""
        settings = self._settings
        if asyncio.get_running_loop().time() >= self._end:
            return f"The LLM server did not finish its reply within {settings.llm_timeout:g} s."
        if not self.has_begun:
            return f"The LLM server did not begin its reply within {settings.llm_first_token_timeout:g} s."
        return f"The LLM server fell silent in its reply for {settings.llm_idle_timeout:g} s."


class _ReplyReader:
    """Turns the bytes of a streamed chat completion into pieces. `tools` takes a constrained reply apart."""

    def __init__(self, skip_thinking: bool, tools: ConstrainedReply | None = None) -> None:
        self._skip_thinking = skip_thinking
        self._tools = tools
        self._buffer = b""
        self._body = b""
        self._splitter = ThinkSplitter()
        self._tool_calls: dict[int, dict[str, Any]] = {}
        self._finish_reason: str | None = None
        self._usage: _Usage | None = None
        self._chars = {"text": 0, "thinking": 0}
        self.has_begun = False
        self.complete = False

    def feed(self, data: bytes) -> list[Piece]:
        """The pieces in what was read, neighbours of one kind joined."""
        parts: list[tuple[Kind, str]] = []
        lines = (self._buffer + data).split(b"\n")
        self._buffer = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._read_event(line[5:].strip(), parts)
            elif not line.startswith((b":", b"event:", b"id:", b"retry:")):
                self._body += line
        return self._pieces(parts)

    def finish(self, content_type: str) -> list[Piece]:
        """The last pieces, after the last byte.

        Raises `LLMError` when the reply is not whole.
        """
        parts: list[tuple[Kind, str]] = []
        if content_type == "application/json":  # a server that does not stream
            self._read_event(self._body + self._buffer, parts)
        if self._finish_reason is None and not self.complete:
            raise LLMError("The LLM server broke off its answer.", retryable=True)
        parts += self._splitter.flush()
        pieces = self._pieces(parts)
        rest = self._tools.flush() if self._tools is not None else ""
        return [*pieces, Piece("text", rest)] if rest else pieces

    def done(self) -> Done:
        """What the reply ends with."""
        calls = [*self._tool_calls.values(), *(self._tools.tool_calls if self._tools else ())]
        reason = self._finish_reason or "stop"
        if self._tools and calls and reason == "stop":
            reason = "tool_calls"
        return Done(reason, self._read_usage(), calls)

    def _read_event(self, data: bytes, parts: list[tuple[Kind, str]]) -> None:
        if data == b"[DONE]":
            self.complete = True
            return
        try:
            chunk = _decode_chunk(data)
        except msgspec.MsgspecError:
            raise LLMError("The LLM server sent something that is no chat completion.") from None
        if chunk.error is not None:
            log.debug("LLM server failed in its reply", said=_message_in(chunk.error))
            raise LLMError("The LLM server failed in its reply.", retryable=True)
        self._usage = chunk.usage or self._usage
        for choice in chunk.choices[:1]:
            self._finish_reason = choice.finish_reason or self._finish_reason
            self._read_delta(choice.delta or choice.message or _Delta(), parts)

    def _read_delta(self, delta: _Delta, parts: list[tuple[Kind, str]]) -> None:
        self.has_begun = True
        if thought := delta.reasoning_content or delta.reasoning:
            parts.append(("thinking", thought))
        if delta.content:
            parts += self._splitter.feed(delta.content)
        for call in delta.tool_calls or ():
            self._read_tool_call(call)

    def _read_tool_call(self, delta: _ToolCallDelta) -> None:
        empty = {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
        index = len(self._tool_calls) if delta.index is None else delta.index
        call = self._tool_calls.setdefault(index, empty)
        call["id"] = delta.id or call["id"]
        if delta.function is not None:
            call["function"]["name"] += delta.function.name or ""
            call["function"]["arguments"] += delta.function.arguments or ""

    def _pieces(self, parts: list[tuple[Kind, str]]) -> list[Piece]:
        joined: list[tuple[Kind, list[str]]] = []
        for kind, content in parts:
            self._chars[kind] += len(content)
            if kind == "thinking" and self._skip_thinking:
                continue
            if joined and joined[-1][0] == kind:
                joined[-1][1].append(content)
            else:
                joined.append((kind, [content]))
        pieces = [self._piece(kind, "".join(contents)) for kind, contents in joined]
        return [piece for piece in pieces if piece.content]

    def _piece(self, kind: Kind, content: str) -> Piece:
        if kind == "text" and self._tools is not None:
            content = self._tools.feed(content)
        return Piece(kind, content.replace("\0", ""))  # PostgreSQL stores no NUL, and no reader wants one

    def _read_usage(self) -> Usage | None:
        usage = self._usage
        if usage is None:
            return None
        cached = (usage.prompt_tokens_details or _PromptDetails()).cached_tokens
        reasoning = (usage.completion_tokens_details or _CompletionDetails()).reasoning_tokens
        if reasoning is None:  # its share of the text
            chars = sum(self._chars.values())
            reasoning = round(usage.completion_tokens * self._chars["thinking"] / chars) if chars else 0
        return Usage(usage.prompt_tokens, usage.completion_tokens, cached or 0, reasoning)


async def _drain(response: aiohttp.ClientResponse) -> None:
    """Reads what little follows the end of a reply, so that its connection can be used again."""
    try:
        async with asyncio.timeout(0.5):
            await response.content.readany()
    except (TimeoutError, aiohttp.ClientError, OSError):
        return


async def _refusal(response: aiohttp.ClientResponse, model: str | None) -> PortalError:
    """The error for an answer that is not 200. What the server says may tell of its insides, so it
    goes to the debug log and not to the client."""
    status = response.status
    try:
        async with asyncio.timeout(2):
            text = _error_text(await response.content.read(65536))
    except (TimeoutError, aiohttp.ClientError, OSError):
        text = ""
    log.debug("LLM server refused a request", status=status, said=text)
    retry_after = _seconds(response.headers.get("Retry-After"))
    if status in {400, 413, 422}:
        return LLMError("The LLM server refused the request as wrong or too long.")
    if status in {401, 403}:
        return LLMError("The LLM server did not accept the portal's key (LLM_API_KEY).")
    if status == 404 and model:
        return LLMError(f"The LLM server does not know the model {model}.")
    if status == 429:
        return Overloaded("The LLM server is busy.", retry_after=retry_after or 5)
    if status == 503:
        return _Loading("The LLM server is not ready yet.", retry_after=retry_after or 2)
    return LLMError(f"The LLM server answered with status {status}.", retryable=status >= 500)


def _error_text(body: bytes) -> str:
    """The message in the body of an error answer."""
    try:
        return _message_in(msgspec.json.decode(body))
    except msgspec.MsgspecError:
        return ""


def _message_in(found: Any) -> str:
    """The message in an error object, in any of the forms that servers use."""
    while isinstance(found, dict):
        found = found.get("error") or found.get("message") or found.get("detail")
    return found[:500] if isinstance(found, str) else ""


def _seconds(header: str | None) -> float | None:
    return float(header) if header and header.isdecimal() else None


def _model_info(model: _Model, knows_tools: bool) -> ModelInfo:
    context = model.max_model_len or (model.meta.n_ctx if model.meta else None)
    return ModelInfo(model.id, model.owned_by or "", context, knows_tools)


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
