"""One LLM server at one address: its requests and answers over HTTP, its models, and how it is.

Chat completions are spoken here directly over aiohttp, always streamed: a plain answer is the fold of
a stream, so cancelling, timeouts and partial text work the same for both.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
import msgspec

from app.config import Settings
from app.errors import InvalidRequest, LLMError, LLMTimeout, LLMUnavailable, Overloaded, PortalError
from app.logs import get_logger
from app.services.replies import LONGEST_LINE, NO_JSON, Done, Piece, ReplyReader, error_text

log = get_logger(__name__)

Message = Mapping[str, Any]
"""A chat message in OpenAI's form: `{"role": …, "content": …}`."""

WATCH_INTERVAL_S = 5.0
WATCH_INTERVAL_DOWN_S = 1.0
COUNT_TIMEOUT_S = 2.0
LONGEST_RETRY_S = 3600.0
FRESH_S = 1.0
"""A health report younger than this is not asked for again."""

_JSON = {"Content-Type": "application/json"}


# --- what the server says of itself --------------------------------------------------------------


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


class Loading(LLMUnavailable):
    """It answers, but is still loading its model."""


class LLMServer:
    """Speaks to the LLM server at one address."""

    def __init__(self, settings: Settings, url: str) -> None:
        self._settings = settings
        self._base = url
        self.models: list[ModelInfo] = []
        self.problem: PortalError | None = LLMUnavailable("The LLM server has not been asked yet.")
        self.latency_ms: int | None = None
        self._knows_tools = True
        self._probed_at = float("-inf")
        self._probe_lock = asyncio.Lock()
        self._look_again = asyncio.Event()

    async def open(self) -> None:
        """Makes the connection pool. The server need not be there."""
        settings = self._settings
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

    async def generate(
        self, model: ModelInfo, body: Mapping[str, Any], reader: ReplyReader, clock: Clock
    ) -> AsyncGenerator[Piece | Done, None]:
        """Posts a chat completion and yields the reply as `reader` reads it, within the limits of `clock`.
        Closing the generator closes the request to the server."""
        response = await self._post(msgspec.json.encode(body), clock)
        try:
            if response.status != 200:
                raise await _refusal(response, model.name)
            while not reader.complete:
                data = await self._read(response, clock)
                if not data:
                    break
                pieces = reader.feed(data)
                clock.has_begun = reader.has_begun
                for piece in pieces:
                    yield piece
            for piece in reader.finish(response.content_type):
                yield piece
            yield reader.done()
        finally:
            # A reply that was read to its end leaves a connection that can serve again; any other
            # one is closed, which tells the server to stop.
            if not response.content.at_eof():
                await _drain(response) if reader.complete else None
            response.close()

    async def _post(self, body: bytes, clock: Clock) -> aiohttp.ClientResponse:
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

    async def _read(self, response: aiohttp.ClientResponse, clock: Clock) -> bytes:
        try:
            async with asyncio.timeout_at(clock.next_limit()):
                return await response.content.readany()
        except TimeoutError as error:
            raise self._too_slow(error, clock) from None
        except (aiohttp.ClientError, OSError):
            raise LLMError("The LLM server broke off its answer.", retryable=True) from None

    def _too_slow(self, error: TimeoutError, clock: Clock) -> PortalError:
        if isinstance(error, aiohttp.ConnectionTimeoutError):
            return self._unreachable()
        return LLMTimeout(clock.complaint())

    def _unreachable(self) -> LLMUnavailable:
        error = LLMUnavailable("The LLM server cannot be reached.", retry_after=WATCH_INTERVAL_DOWN_S)
        self._note(error)
        return error

    async def count_tokens(self, model: ModelInfo, messages: Sequence[Message]) -> int | None:
        """The exact length of the prompt that `messages` make, in tokens; None where the server
        cannot tell (only llama.cpp and vLLM can)."""
        try:
            if model.server == "llamacpp":
                answer = await self._ask("/v1/chat/completions/input_tokens", {"messages": messages})
                return int(answer["input_tokens"])
            if model.server == "vllm":
                answer = await self._ask("/tokenize", {"model": model.id, "messages": messages})
                return int(answer["count"])
        except (PortalError, KeyError, TypeError, ValueError) as error:
            log.debug("tokens could not be counted", reason=type(error).__name__)
        return None

    async def count_text(self, model: ModelInfo, text: str) -> int | None:
        """The tokens of a text that stands in no prompt; None where the server cannot tell."""
        try:
            if model.server == "llamacpp":
                return len((await self._ask("/tokenize", {"content": text}))["tokens"])
            if model.server == "vllm":
                body = {"model": model.id, "prompt": text, "add_special_tokens": False}
                return int((await self._ask("/tokenize", body))["count"])
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
                return msgspec.json.decode(await _whole(response))
        except (TimeoutError, aiohttp.ClientError, *NO_JSON) as error:
            raise LLMError(f"{path} did not answer: {type(error).__name__}.") from None

    # --- models and health ---

    def default(self) -> ModelInfo:
        """The model that answers when none is named. Some must be known."""
        wanted = self._settings.llm_model
        for model in self.models:
            if wanted in {model.id, model.name}:
                return model
        first = self.models[0]
        return first if wanted == "default" else replace(first, id=wanted)

    async def resolve(self, wanted: str | None) -> ModelInfo:
        """The model to ask for. Servers such as vLLM refuse names they do not know, so `default` must
        become the real one. Raises `InvalidRequest` for one that is not served, `LLMUnavailable` while
        nobody knows."""
        if not self.models or self.problem is not None:
            await self.probe_if_stale()
        if not self.models:
            raise self.problem or LLMUnavailable("The LLM server cannot be reached.")
        if wanted in {None, "", "default"}:
            return self.default()
        for model in self.models:
            if wanted in {model.id, model.name}:
                return model
        raise InvalidRequest(
            "model: the LLM server does not serve this one; try one of "
            + ", ".join(sorted(model.name for model in self.models)[:10])
        )

    async def watch(self) -> None:
        """Asks the server every few seconds, and at once after a failure. Runs until cancelled."""
        while True:
            await self._probe()
            pause = WATCH_INTERVAL_S if self.problem is None else WATCH_INTERVAL_DOWN_S
            self._look_again.clear()
            try:
                async with asyncio.timeout(pause):
                    await self._look_again.wait()
                await asyncio.sleep(WATCH_INTERVAL_DOWN_S / 4)
            except TimeoutError:
                pass

    async def probe_if_stale(self) -> None:
        """Asks the server, unless it was asked within the last second. Raises nothing."""
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
                models = _decode_models(await _whole(response)).data or []
            if not models:
                raise LLMError("The LLM server serves no model.")
            if [model.id for model in models] != [known.id for known in self.models]:
                self._knows_tools = await self._asks_for_tools(models[0])
            self.models = [_model_info(model, self._knows_tools) for model in models]
            self.latency_ms = round((time.monotonic() - began) * 1000)
            self._note(None)
        except (TimeoutError, aiohttp.ClientError, OSError):
            self._note(LLMUnavailable("The LLM server cannot be reached.", retry_after=WATCH_INTERVAL_DOWN_S))
        except NO_JSON:
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
                props = _decode_props(await _whole(response))
        except (aiohttp.ClientError, OSError, LLMError, *NO_JSON):
            return True
        if props.chat_template_caps is not None:
            return props.chat_template_caps.supports_tools
        return "tools" in props.chat_template

    def _note(self, problem: PortalError | None) -> None:
        if (problem is None) != (self.problem is None):
            if problem is None:
                log.info("LLM server is there", model=self.default().name)
            else:
                log.warning("LLM server is not there", reason=problem.message)
        self.problem = problem
        if problem is not None:
            self._look_again.set()


class Clock:
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


async def _whole(response: aiohttp.ClientResponse) -> bytes:
    """The body of a short answer. Raises `LLMError` when it is not short."""
    body = b""
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > LONGEST_LINE:
            raise LLMError("The LLM server's answer is too long.")
    return body


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
            text = error_text(await response.content.read(65536))
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
        return Loading("The LLM server is not ready yet.", retry_after=retry_after or 2)
    return LLMError(f"The LLM server answered with status {status}.", retryable=status >= 500)


def _seconds(header: str | None) -> float | None:
    """The seconds of a Retry-After, which may also be a date (RFC 9110, 10.2.3)."""
    if header is None:
        return None
    try:
        seconds = float(header) if header.isdecimal() else _until(parsedate_to_datetime(header))
    except ValueError:
        return None
    return min(max(seconds, 0.0), LONGEST_RETRY_S)


def _until(moment: datetime) -> float:
    return moment.timestamp() - time.time()


def _model_info(model: _Model, knows_tools: bool) -> ModelInfo:
    context = model.max_model_len or (model.meta.n_ctx if model.meta else None)
    return ModelInfo(model.id, model.owned_by or "", context, knows_tools)
