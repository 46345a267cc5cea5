"""An LLM server that does what a test tells it: for faults, for counting, and for speed."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from aiohttp import web

from app.loop import BackgroundLoop

USAGE = {
    "prompt_tokens": 20,
    "completion_tokens": 9,
    "prompt_tokens_details": {"cached_tokens": 15},
    "completion_tokens_details": {"reasoning_tokens": 4},
}
"""A usage with all that OpenAI tells."""


@dataclass
class Script:
    """How the next chat completions are answered."""

    pieces: list[dict[str, Any]] = field(default_factory=lambda: text("Hello", " there"))
    status: int = 200
    error: str | dict[str, Any] = "as told"
    before_headers: float = 0.0
    before_warming: float = 0.0
    """The same, where one token is asked for: the prompt is only to be read."""
    gate: threading.Event | None = None
    """Nothing is answered before it is set."""
    held: threading.Event | None = None
    """Nothing comes after the first piece before it is set."""
    before_first: float = 0.0
    between: float = 0.0
    cut_after: int | None = None
    raw: bytes | None = None
    usage: dict[str, Any] | None = field(
        default_factory=lambda: {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    )
    reason: str = "stop"
    calls: list[dict[str, Any]] = field(default_factory=list)
    """What is answered to who offers tools."""
    echo: bool = False
    random: bool = False
    lengths: tuple[int, int] = (20, 20)
    """Fewest and most pieces of a random text."""
    counts: bool = False
    """Whether the usage is as many tokens as the messages have characters, and four for each of them."""
    room: int | None = None
    """Longer prompts, counted so, are refused with `overflow`."""
    notes: str = ""
    """What is answered to who asks for notes of a conversation, with `notes_status`."""
    notes_status: int = 200
    overflow: dict[str, Any] = field(default_factory=lambda: {"code": "context_length_exceeded"})
    headers: dict[str, str] = field(default_factory=dict)
    whole: bool = False
    """Answer in one piece, as a server that does not stream."""
    wire: bytes | None = None
    """What goes over the connection in place of an HTTP answer."""
    flood: int = 0
    """So many bytes come first, without the end of a line."""
    then: Literal["abort", "eof", "hold"] = "abort"
    """What becomes of the connection after `wire` or `cut_after`: a reset, an end of what is sent, or
    nothing."""


def size_of(messages: list[dict[str, Any]]) -> int:
    """How many tokens messages have, where a script counts them."""
    return sum(len(str(message.get("content") or "")) + 4 for message in messages)


def text(*pieces: str) -> list[dict[str, Any]]:
    """Deltas of a reply."""
    return [{"content": piece} for piece in pieces]


@dataclass
class FakeLLM:
    """What was asked for, and what happens next."""

    script: Script = field(default_factory=Script)
    failing: dict[str, Script] = field(default_factory=dict)
    """How the next ones are answered, by model, where it is not as in `script`."""
    model: str = "fake-1"
    owner: str = "test"
    context: int | None = None
    slots: int = 1
    requests: list[dict[str, Any]] = field(default_factory=list)
    token_requests: list[dict[str, Any]] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    finished: int = 0
    pieces: int = 0
    """How many were sent, of all replies."""
    dropped: int = 0
    models_status: int = 200
    props_status: int = 200
    token_status: int = 200
    before_models: float = 0.0
    listed: list[dict[str, Any]] | None = None
    """What it says of its models, in place of the one `model`."""
    told: dict[str, Any] = field(default_factory=dict)
    """What else it answers, by path, or where a model is posted by path and model: what servers tell of
    themselves, each kind in its own way."""
    asked: Counter[str] = field(default_factory=Counter)
    """How often, by path, what servers tell of themselves."""
    url: str = ""
    change: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def until(self, condition: Any, seconds: float = 10.0) -> None:
        """Returns once `condition()` holds of this server."""
        async with asyncio.timeout(seconds), self.change:
            await self.change.wait_for(condition)

    async def _changed(self) -> None:
        async with self.change:
            self.change.notify_all()

    async def models(self, request: web.Request) -> web.Response:
        meta = {} if self.context is None else {"meta": {"n_ctx": self.context}}
        model = {"id": self.model, "object": "model", "owned_by": self.owner, **meta}
        self.asked[request.path] += 1
        await asyncio.sleep(self.before_models)
        listed = [model] if self.listed is None else self.listed
        return web.json_response({"object": "list", "data": listed}, status=self.models_status)

    async def props(self, request: web.Request) -> web.Response:
        self.asked[request.path] += 1
        body = {"chat_template": "tools", "total_slots": self.slots}
        return web.json_response(self.told.get("/props", body), status=self.props_status)

    async def tell(self, request: web.Request) -> web.Response:
        self.asked[request.path] += 1
        model = (await request.json()).get("model") if request.method == "POST" else ""
        told = self.told.get(f"{request.path} {model}".strip())
        return web.json_response(told, status=404 if told is None else 200)

    async def token(self, request: web.Request) -> web.Response:
        self.token_requests.append(dict(await request.post()))
        if self.token_status != 200:
            return web.json_response({"errorMessage": "as told"}, status=self.token_status)
        return web.json_response({"access_token": f"token-{len(self.token_requests)}", "expires_in": 3600})

    async def count(self, request: web.Request) -> web.Response:
        body = await request.json()
        return web.json_response({"input_tokens": size_of(body["messages"])})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append({**body, "headers": dict(request.headers), "path": request.path_qs})
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await self._changed()
        try:
            response = await self._answer(request, body)
            self.finished += 1
            return response
        except (asyncio.CancelledError, ConnectionError):
            self.dropped += 1
            raise
        finally:
            self.running -= 1
            await asyncio.shield(self._changed())

    async def embeddings(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append({**body, "headers": dict(request.headers), "path": request.path_qs})
        await self._changed()
        await _set(self.script.gate)
        await asyncio.sleep(self.script.before_headers)
        if self.script.status != 200:
            error = {"message": self.script.error}
            return web.json_response({"error": error}, status=self.script.status)
        vectors = [[float(len(text)), 0.5] for text in body["input"]]
        data = [{"object": "embedding", "index": n, "embedding": v} for n, v in enumerate(vectors)]
        tokens = sum(map(len, body["input"]))
        return web.json_response({"data": data, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        script = self.failing.get(body.get("model", ""), self.script)
        await asyncio.sleep(script.before_warming if body.get("max_tokens") == 1 else script.before_headers)
        await _set(script.gate)
        if script.wire is not None:
            return await _broken(request, script)
        script = _for(script, body)
        if script.status != 200:
            error = {"message": script.error} if isinstance(script.error, str) else script.error
            return web.json_response({"error": error}, status=script.status, headers=script.headers)
        if script.whole:
            await asyncio.sleep(script.before_first)
            reply = "".join(piece.get("content", "") for piece in script.pieces)
            choice = {"index": 0, "message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}
            return web.json_response({"choices": [choice], "usage": script.usage})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await asyncio.sleep(script.before_first)
        for _ in range(script.flood >> 16):
            await response.write(b"x" * (1 << 16))
        if script.raw is not None:
            await response.write(script.raw)
            return response
        for number, delta in enumerate(script.pieces):
            if script.cut_after == number:
                return await _broken(request, script)
            await response.write(_chunk({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}))
            self.pieces += 1
            await asyncio.sleep(script.between)
            await _set(script.held)
        await response.write(_chunk({"choices": [{"index": 0, "delta": {}, "finish_reason": script.reason}]}))
        if script.usage is not None:
            await response.write(_chunk({"choices": [], "usage": script.usage}))
        await response.write(b"data: [DONE]\n\n")
        return response


async def _set(event: threading.Event | None) -> None:
    while event is not None and not event.is_set():
        await asyncio.sleep(0.01)


def _for(script: Script, body: dict[str, Any]) -> Script:
    """The script, with what it says of this request."""
    messages = body["messages"]
    if script.calls and "tools" in body:
        return replace(script, pieces=script.calls, reason="tool_calls")
    if script.room is not None and size_of(messages) > script.room:
        return replace(script, status=400, error=script.overflow)
    if script.notes and "keep the notes" in messages[0]["content"]:
        script = replace(script, pieces=text(script.notes), status=script.notes_status)
    elif script.echo:
        script = replace(script, pieces=text("echo: ", messages[-1]["content"]))
    elif script.random:  # another text each time it is asked
        length = random.randint(*script.lengths)
        script = replace(script, pieces=text(*(f"{random.getrandbits(32):08x} " for _ in range(length))))
    if script.counts:
        said = sum(len(piece.get("content") or "") for piece in script.pieces)
        script = replace(script, usage={"prompt_tokens": size_of(messages), "completion_tokens": said})
    return script


async def _broken(request: web.Request, script: Script) -> web.StreamResponse:
    transport = request.transport
    assert isinstance(transport, asyncio.Transport)
    transport.write(script.wire or b"")
    if script.then == "eof":
        transport.write_eof()
    if script.then == "abort":
        transport.abort()
    else:
        await asyncio.sleep(3600)
    return web.Response()


def _chunk(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


@asynccontextmanager
async def serve(fake: FakeLLM, port: int = 0) -> AsyncIterator[FakeLLM]:
    """Serves until the context is left; its handlers are cancelled when a client goes."""
    app = web.Application()
    app.router.add_get("/v1/models", fake.models)
    app.router.add_get("/props", fake.props)
    app.router.add_post("/identity/token", fake.token)
    app.router.add_post("/{base:.*}/chat/completions", fake.completions)
    app.router.add_post("/v1/embeddings", fake.embeddings)
    app.router.add_post("/v1/chat/completions/input_tokens", fake.count)
    app.router.add_route("*", "/{path:.*}", fake.tell)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield fake
    finally:
        await runner.cleanup()


class FakeThread:
    """The server on a thread of its own, for tests that run no event loop."""

    def __init__(self) -> None:
        self._background = BackgroundLoop()
        self._stack = AsyncExitStack()
        self.fake: FakeLLM = self._run(self._open(FakeLLM(), 0))

    async def _open(self, fake: FakeLLM, port: int) -> FakeLLM:
        return await self._stack.enter_async_context(serve(fake, port))

    def stop(self) -> None:
        """Closes the port and all connections, as a server that dies."""
        self._run(self._stack.aclose())

    def start(self) -> None:
        """Listens again, at the same port."""
        self._run(self._open(self.fake, int(self.fake.url.rsplit(":", 1)[-1])))

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._background.loop).result(20)

    def close(self) -> None:
        self._run(self._stack.aclose())
        self._background.stop()
