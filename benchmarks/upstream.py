"""An OpenAI-compatible server far faster than any bridge: canned bytes from an `asyncio.Protocol`.

`python -m benchmarks.upstream --port N [--chunks 64] [--rate 0]`: every streamed completion has `chunks`
tokens, all at once, or `rate` of them a second. It counts a token for every four bytes of a request, so
that histories reach their budget as they do with a real model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable
from typing import cast

import uvloop

MODEL = "mock"
BYTES_A_TOKEN = 4
PROMPT_TOKENS = b"%7d"
"""Written into a canned answer: as wide for every number, so that lengths stay what they are."""


def _response(content_type: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _json(body: dict[str, object]) -> bytes:
    return _response("application/json", json.dumps(body, separators=(",", ":")).encode())


def _event(body: dict[str, object]) -> bytes:
    event = b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(event), event)


def _delta(content: str | None, finish: str | None = None) -> dict[str, object]:
    delta = {} if content is None else {"content": content}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": MODEL,
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}  # fmt: skip


class Canned:
    """The bytes of every answer."""

    def __init__(self, chunks: int) -> None:
        text = "".join(f"word{n} " for n in range(chunks))
        model = {"id": MODEL, "object": "model", "owned_by": "mock"}
        self.models = _json({"object": "list", "data": [model]})
        usage = {"prompt_tokens": 1234567, "completion_tokens": chunks}
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        self.whole = _json({"id": "c", "object": "chat.completion", "created": 1, "model": MODEL,
                            "choices": [choice], "usage": usage})  # fmt: skip
        self.head = (
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        self.tokens = [_event(_delta(f"word{n} ")) for n in range(chunks)]
        counted = {**_delta(None), "choices": [], "usage": usage}
        done = b"data: [DONE]\n\n"
        self.end = _event(_delta(None, "stop")) + _event(counted)
        self.end += b"%x\r\n%b\r\n0\r\n\r\n" % (len(done), done)
        self.burst = self.head + b"".join(self.tokens) + self.end


def _counted(answer: bytes, body: bytes) -> bytes:
    """A canned answer with the prompt's length in it."""
    return answer.replace(b"1234567", PROMPT_TOKENS % (len(body) // BYTES_A_TOKEN), 1)


class Upstream(asyncio.Protocol):
    """One connection; requests come one after the other."""

    def __init__(self, canned: Canned, rate: float) -> None:
        self._canned = canned
        self._rate = rate
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance
        self._timer: asyncio.TimerHandle | None = None

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            mark = head.find(b"content-length:")
            length = int(head[mark + 15 :].split(b"\r\n", 1)[0]) if mark >= 0 else 0
            if len(self._buffer) < end + 4 + length:
                return
            body = self._buffer[end + 4 : end + 4 + length]
            self._buffer = self._buffer[end + 4 + length :]
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"get"):
            self._transport.write(self._canned.models)
        elif b'"stream":true' not in body.replace(b'"stream": true', b'"stream":true'):
            self._transport.write(_counted(self._canned.whole, body))
        elif not self._rate:
            self._transport.write(_counted(self._canned.burst, body))
        else:
            self._transport.write(self._canned.head)
            self._end = _counted(self._canned.end, body)
            self._token(0, asyncio.get_running_loop().time())

    def _token(self, number: int, began: float) -> None:
        if number == len(self._canned.tokens):
            self._transport.write(self._end)
            return
        self._transport.write(self._canned.tokens[number])
        loop = asyncio.get_running_loop()
        due = began + (number + 1) / self._rate
        self._timer = loop.call_at(due, self._token, number + 1, began)


async def serve(port: int, factory: Callable[[], asyncio.Protocol]) -> None:
    """Serves for ever."""
    server = await asyncio.get_running_loop().create_server(factory, "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


def main() -> None:
    """Serves on the port that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--chunks", type=int, default=64)
    parser.add_argument("--rate", type=float, default=0.0)
    arguments = parser.parse_args()
    canned = Canned(arguments.chunks)
    uvloop.run(serve(arguments.port, lambda: Upstream(canned, arguments.rate)))


if __name__ == "__main__":
    main()
