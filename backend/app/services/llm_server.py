"""One LLM server at one address: its requests and answers over HTTP.

Chat completions are spoken here directly over HTTP, always streamed: a plain answer is the fold of
a stream, so cancelling, timeouts and partial text work the same for both.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from typing import Any
from urllib.parse import urlencode

import msgspec

from app.config import Settings
from app.errors import (
    ContextExceeded,
    InvalidRequest,
    LLMError,
    LLMTimeout,
    LLMUnavailable,
    Overloaded,
    PortalError,
)
from app.logs import get_logger
from app.services import dialects
from app.services.catalog import DEFAULT, ProviderKind
from app.services.overflows import overflow_in
from app.services.places import Meter
from app.services.prompts import encode_body
from app.services.replies import LONGEST_LINE, NO_JSON, Done, Fault, Piece, ReplyReader, error_text
from app.services.server_state import NEVER_ASKED, Loading, Refused, ServerState
from app.services.slots import Slots
from app.services.spare_time import SpareTime
from app.services.streaming_http import Answer, BrokenAnswer, NoAnswer, NoConnection, StreamingHttp
from app.trace_parent import NONE

log = get_logger(__name__)

Message = Mapping[str, Any]
"""A chat message in OpenAI's form: `{"role": …, "content": …}`."""

COUNT_TIMEOUT_S = 2.0
REFUSAL_S = 2.0
LONGEST_REFUSAL = 65536
"""Seconds and bytes for why a request was refused."""

LONGEST_RETRY_S = 3600.0
LOOK_AGAIN_S = 1.0
TOKEN_RESERVE_S = 60.0
"""A token is replaced so long before it runs out."""

MOST_TOKENS = 1000

LONGEST_EMBEDDINGS = 64 << 20
"""Bytes of an answer with embeddings."""

TOO_LONG = "The LLM server's answer is too long."

_JSON = {"Content-Type": "application/json"}
_FORM = {"Content-Type": "application/x-www-form-urlencoded"}


class Silent(LLMUnavailable):
    """The server did not answer a small question in time: it is away, or very busy."""


class NotOffered(LLMError):
    """The server has no answer to this kind of question."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that the server serves. `id` is the server's name for it, `context` its length in
    tokens where the server tells; `tools`, `vision`, `thinking` and `loaded` are None where it does not.
    `version` differs where the model or the server is known to be another one; empty where nothing is
    known of that."""

    id: str
    server: str
    context: int | None
    version: str = ""
    tools: bool | None = None
    vision: bool | None = None
    thinking: bool | None = None
    loaded: bool | None = None

    @property
    def knows_tools(self) -> bool:
        """Whether it may be sent tools: it is not known to leave them out, or to refuse them."""
        return self.tools is not False

    @property
    def name(self) -> str:
        """The id, without the directories of a server that gives a path for it."""
        return _name_of(self.id)


@lru_cache(256)
def _name_of(model_id: str) -> str:
    is_path = model_id.startswith(("/", "~", ".")) or "\\" in model_id
    return model_id.replace("\\", "/").rsplit("/", 1)[-1] if is_path else model_id


@dataclass(frozen=True, slots=True)
class Embedded:
    """Embeddings, each as the server encoded it, and the tokens of the texts that they were made of."""

    data: Sequence[msgspec.Raw]
    tokens: int


@dataclass(frozen=True, slots=True)
class Upstream:
    """What the servers of one provider have in common. `headers` are more than those that show the `key`."""

    name: str = DEFAULT
    kind: ProviderKind = "compatible"
    key: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    own_keys: bool = False
    capacity: int = 1
    api_version: str = ""
    token_url: str = ""

    @property
    def whose_key(self) -> str:
        """How the portal's key is called."""
        place = "LLM_API_KEY" if self.name == DEFAULT else f"providers.{self.name}.key"
        return f"the portal's key ({place})"

    @property
    def is_asked(self) -> bool:
        """Whether its servers are asked how they are. Without a key of the portal's they would say no."""
        return self.kind in dialects.LOCAL and (bool(self.key) or not self.own_keys)


class LLMServer:
    """Speaks to the LLM server at one address. `models`, `slots` and `latency_ms` are what it said of itself
    when it was last asked; `contexts` what it said when a prompt was too long for a model."""

    def __init__(self, settings: Settings, upstream: Upstream, name: str, url: str) -> None:
        self._settings = settings
        self.upstream = upstream
        self.name = name
        self.url = url
        self.base = dialects.base(upstream.kind, url)
        self.root = self.base.removesuffix("/v1")
        self.state = ServerState(name, upstream.capacity, NEVER_ASKED if upstream.is_asked else None)
        self.models: list[ModelInfo] = []
        self.contexts: dict[str, int] = {}
        self.slots = Slots()
        self.spare_time = SpareTime(self.state.load)
        self.latency_ms: int | None = None
        self.look_again = asyncio.Event()
        self._headers = {**_JSON, **upstream.headers, **dialects.key_headers(upstream.kind, upstream.key)}
        self._tokens: dict[str, tuple[str, float]] = {}

    def open(self, http: StreamingHttp) -> None:
        """From now on it can be asked. It need not be there."""
        self._http = http

    # --- generating ---

    async def generate(
        self,
        model: ModelInfo,
        body: Mapping[str, Any],
        reader: ReplyReader,
        clock: Clock,
        meter: Meter,
        key: str | None,
        more: Mapping[str, str] = NONE,
    ) -> AsyncGenerator[Piece | Done, None]:
        """Posts a chat completion, with another `key` than the provider's where one is given and with `more`
        headers, and yields the reply as `reader` reads it, within the limits of `clock`. It tells `meter`
        when the server has taken the prompt up. Closing the generator closes the request to the server."""
        url = dialects.chat_url(self.upstream.kind, self.url, model.id, self.upstream.api_version)
        try:
            answer = await self._post(url, encode_body(body), clock, key, more)
        except (LLMTimeout, asyncio.CancelledError):  # many show nothing before they have read all of it
            meter.has_read = True
            raise
        try:
            if answer.status != 200:
                refusal = await self._refusal(answer, model.name, own_key=key is not None)
                if isinstance(refusal, ContextExceeded) and refusal.limit is not None:
                    self.contexts[model.id] = refusal.limit
                raise refusal
            meter.has_read = True
            while not reader.complete:
                data = answer.take() or await self._read(answer, clock)
                if not data:
                    break
                pieces = reader.feed(data)
                clock.has_begun = reader.has_begun
                for piece in pieces:
                    yield piece
                if reader.broken is not None:
                    raise reader.broken
            for piece in reader.finish(answer.content_type):
                yield piece
            yield reader.done()
        finally:
            await answer.leave(is_read=reader.complete)

    async def _post(
        self, url: str, body: bytes, clock: Clock, key: str | None, more: Mapping[str, str] = NONE
    ) -> Answer:
        try:
            until = clock.next_limit()
            headers = await self._headers_with(key, until)
            if more:
                headers = {**headers, **more}
            return await self._send("POST", url, headers, body, own_key=key is not None, until=until)
        except TimeoutError:
            raise LLMTimeout(clock.complaint()) from None
        except NoAnswer as error:
            raise self._unreachable(refused=isinstance(error, NoConnection)) from None
        except BrokenAnswer as error:
            raise LLMError(str(error)) from None

    async def _send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes,
        *,
        own_key: bool,
        until: float | None = None,
    ) -> Answer:
        try:
            return await self._http.request(method, url, headers, body, until=until)
        except ValueError:  # it may repeat the key
            raise LLMError(
                f"The LLM server cannot be asked: there is a character in {self._whose(own_key)}, in a "
                "header or in its address that cannot be sent."
            ) from None

    async def _headers_with(self, key: str | None, until: float) -> Mapping[str, str]:
        upstream = self.upstream
        if upstream.kind == "watsonx":
            own_key = key is not None
            key = await self._token_for(upstream.key if key is None else key, until, own_key=own_key)
        elif key is None:
            return self._headers
        return {**self._headers, **dialects.key_headers(upstream.kind, key)}

    async def _token_for(self, key: str, limit: float, *, own_key: bool) -> str:
        """IBM Cloud's token for an API key: good for an hour, and what its services want to see. Raises
        errors that say whose fault it is where there is none."""
        token, until = self._tokens.get(key, ("", 0.0))
        if time.monotonic() < until:
            return token
        form = {"grant_type": "urn:ibm:params:oauth:grant-type:apikey", "apikey": key}
        url, body = self.upstream.token_url, urlencode(form).encode()
        try:
            async with asyncio.timeout_at(limit):
                whole = await self._fetch("POST", url, _FORM, body, partial(self._no_token, own_key=own_key))
            found = msgspec.json.decode(whole, type=_Token)
        except (TimeoutError, NoAnswer):
            raise LLMUnavailable("The token service cannot be reached.", retry_after=LOOK_AGAIN_S) from None
        except (BrokenAnswer, *NO_JSON):
            raise LLMError("The token service gave no token.") from None
        if len(self._tokens) >= MOST_TOKENS:
            self._tokens.clear()
        self._tokens[key] = (found.access_token, time.monotonic() + found.expires_in - TOKEN_RESERVE_S)
        return found.access_token

    async def _read(self, answer: Answer, clock: Clock) -> bytes:
        try:
            return await answer.read(clock.next_limit())
        except TimeoutError:
            raise LLMTimeout(clock.complaint()) from None
        except BrokenAnswer:
            raise LLMError("The LLM server broke off its answer.", retryable=True) from None

    def _unreachable(self, *, refused: bool) -> LLMUnavailable:
        kind = Refused if refused and self.upstream.is_asked else LLMUnavailable
        error = kind("The LLM server cannot be reached.", retry_after=LOOK_AGAIN_S)
        if self.upstream.is_asked:
            self.state.note(error)
            self.look_again.set()
        return error

    def _whose(self, own_key: bool) -> str:
        return "the session's own key" if own_key else self.upstream.whose_key

    async def _refusal(
        self, answer: Answer, model: str | None = None, *, own_key: bool = False
    ) -> PortalError:
        """The error for an answer that is not 200."""
        status, body = answer.status, await self._reason(answer, own_key=own_key)
        if status in {401, 403}:
            return LLMError(f"The LLM server did not accept {self._whose(own_key)}.")
        if status in {400, 413, 422} and (overflow := overflow_in(body)) is not None:
            return overflow
        return _error_of(status, model, _seconds(answer.headers.get("retry-after")))

    async def _no_token(self, answer: Answer, *, own_key: bool) -> PortalError:
        """The error for an answer of the token service that is not 200."""
        status = answer.status
        await self._reason(answer, own_key=own_key)
        if status in {400, 401, 403}:  # IBM Cloud calls a key that it does not know a bad request
            return LLMError(f"The token service did not accept {self._whose(own_key)}.")
        if status == 429:
            retry_after = _seconds(answer.headers.get("retry-after"))
            return Overloaded("The token service is busy.", retry_after=retry_after or 5)
        return LLMError(f"The token service answered with status {status}.", retryable=status >= 500)

    async def _reason(self, answer: Answer, *, own_key: bool) -> bytes:
        """Why a request was refused. It may tell of a server's insides, so it goes to the debug log and not
        to the client."""
        try:
            async with asyncio.timeout(REFUSAL_S):
                body = await answer.read_whole(LONGEST_REFUSAL)
        except (TimeoutError, BrokenAnswer):
            body = b""
        if not own_key:  # a provider may repeat a key that it does not know
            said = error_text(body)
            log.debug("LLM server refused a request", server=self.name, status=answer.status, said=said)
        return body

    # --- embeddings ---

    async def embed(
        self,
        model: ModelInfo,
        texts: Sequence[str],
        asked: Mapping[str, Any],
        clock: Clock,
        key: str | None,
    ) -> Embedded:
        """The embeddings of `texts`, within the limits of `clock` and with another `key` than the provider's
        where one is given; `asked` is what else the server is told. Raises `InvalidRequest` where it makes
        none."""
        kind, body = self.upstream.kind, encode_body({**asked, "model": model.id, "input": texts})
        url = dialects.embeddings_url(kind, self.url, model.id, self.upstream.api_version)
        answer = await self._post(url, body, clock, key)
        is_read = False
        try:
            if answer.status != 200:
                raise await self._refusal(answer, None, own_key=key is not None)
            whole = await self._read_whole(answer, clock)
            is_read = True
            return msgspec.json.decode(whole, type=_Embeddings).as_told()
        except NotOffered:
            raise InvalidRequest("model: the LLM server makes no embeddings with this one") from None
        except NO_JSON:
            raise LLMError("What the LLM server sent are no embeddings.") from None
        finally:
            await answer.leave(is_read=is_read)

    async def _read_whole(self, answer: Answer, clock: Clock) -> bytes:
        parts: list[bytes] = []
        length = 0
        while part := await self._read(answer, clock):
            clock.has_begun = True
            parts.append(part)
            length += len(part)
            if length > LONGEST_EMBEDDINGS:
                raise LLMError(TOO_LONG)
        return b"".join(parts)

    # --- other questions ---

    async def get(self, url: str) -> bytes:
        """What the server answers to a question about itself. Raises `LLMUnavailable`, `LLMError` and what
        else a refusal means."""
        try:
            async with asyncio.timeout(self._settings.llm_connect_timeout):
                return await self._fetch("GET", url, self._headers)
        except TimeoutError:
            raise Silent("The LLM server cannot be reached.", retry_after=LOOK_AGAIN_S) from None
        except NoAnswer:
            raise LLMUnavailable("The LLM server cannot be reached.", retry_after=LOOK_AGAIN_S) from None
        except BrokenAnswer as error:
            raise LLMError(str(error)) from None

    async def _fetch(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes = b"",
        refused: Callable[[Answer], Awaitable[PortalError]] | None = None,
    ) -> bytes:
        """A whole answer. Raises `NoAnswer`, `BrokenAnswer`, and a `PortalError` for a refusal."""
        answer = await self._send(method, url, headers, body, own_key=False)
        is_read = False
        try:
            if answer.status != 200:
                raise await (refused or self._refusal)(answer)
            whole = await answer.read_whole(LONGEST_LINE + 1)
            if len(whole) > LONGEST_LINE:
                raise LLMError(TOO_LONG)
            is_read = True
            return whole
        finally:
            await answer.leave(is_read=is_read)

    async def count_tokens(self, model: ModelInfo, messages: Sequence[Message]) -> int | None:
        """The exact length of the prompt that `messages` make, in tokens; None where the server
        cannot tell (only llama.cpp and vLLM can)."""
        try:
            if model.server == "llamacpp":
                answer = await self.ask(f"{self.base}/chat/completions/input_tokens", {"messages": messages})
                return int(answer["input_tokens"])
            if model.server == "vllm":
                question = {"model": model.id, "messages": messages}
                return int((await self.ask(f"{self.root}/tokenize", question))["count"])
        except (PortalError, KeyError, TypeError, ValueError) as error:
            log.debug("tokens could not be counted", reason=type(error).__name__)
        return None

    async def count_text(self, model: ModelInfo, text: str) -> int | None:
        """The tokens of a text that stands in no prompt; None where the server cannot tell."""
        try:
            if model.server == "llamacpp":
                return len((await self.ask(f"{self.root}/tokenize", {"content": text}))["tokens"])
            if model.server == "vllm":
                question = {"model": model.id, "prompt": text, "add_special_tokens": False}
                return int((await self.ask(f"{self.root}/tokenize", question))["count"])
        except (PortalError, KeyError, TypeError, ValueError) as error:
            log.debug("tokens could not be counted", reason=type(error).__name__)
        return None

    async def ask(self, url: str, body: Mapping[str, Any]) -> Any:
        """What the server answers to a small question that is posted. Raises a `PortalError`."""
        data = encode_body(body)
        try:
            async with asyncio.timeout(COUNT_TIMEOUT_S):
                return msgspec.json.decode(await self._fetch("POST", url, self._headers, data))
        except (TimeoutError, NoAnswer, BrokenAnswer, *NO_JSON) as error:
            raise LLMError(f"It did not answer: {type(error).__name__}.") from None


class Clock:
    """The limits of one request: to begin, between pieces, and in all."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._end = asyncio.get_running_loop().time() + settings.llm_timeout
        self.begin_again()

    def begin_again(self) -> None:
        """Another server is asked: it has as long to begin, and what is left of the whole time."""
        self._first = asyncio.get_running_loop().time() + self._settings.llm_first_token_timeout
        self.has_begun = False

    def sooner(self, deadline: float | None) -> float:
        """When the wait for another place must be over (Unix time)."""
        end = time.time() + self._end - asyncio.get_running_loop().time()
        return end if deadline is None else min(deadline, end)

    @property
    def is_over(self) -> bool:
        """Whether the whole time has passed."""
        return asyncio.get_running_loop().time() >= self._end

    def next_limit(self) -> float:
        """When the wait that begins now must be over, in the loop's time."""
        if not self.has_begun:
            return min(self._end, self._first)
        return min(self._end, asyncio.get_running_loop().time() + self._settings.llm_idle_timeout)

    def complaint(self) -> str:
        """What to say once a limit has passed."""
        settings = self._settings
        if self.is_over:
            return f"The LLM server did not finish its reply within {settings.llm_timeout:g} s."
        if not self.has_begun:
            return f"The LLM server did not begin its reply within {settings.llm_first_token_timeout:g} s."
        return f"The LLM server fell silent in its reply for {settings.llm_idle_timeout:g} s."


class _EmbeddingUsage(msgspec.Struct):
    prompt_tokens: int = 0


class _Embeddings(msgspec.Struct):
    data: list[msgspec.Raw]
    usage: _EmbeddingUsage = msgspec.field(default_factory=_EmbeddingUsage)

    def as_told(self) -> Embedded:
        """What the server made, as it told it."""
        return Embedded(self.data, self.usage.prompt_tokens)


class _Token(msgspec.Struct):
    access_token: str
    expires_in: float


def _error_of(status: int, model: str | None, retry_after: float | None) -> PortalError:
    if status in {400, 413, 422}:
        return LLMError("The LLM server refused the request as wrong or too long.")
    if status == 404 and model:
        return LLMError(f"The LLM server does not know the model {model}.")
    if status == 429:
        return Overloaded("The LLM server is busy.", retry_after=retry_after or 5)
    if status == 503:
        return Loading("The LLM server is not ready yet.", retry_after=retry_after or 2)
    kind = NotOffered if status in {404, 405, 501} else Fault if status == 500 else LLMError
    return kind(f"The LLM server answered with status {status}.", retryable=status >= 500)


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
