"""A TCP proxy between a client and a server, for what happens to connections in between."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from app.loop import BackgroundLoop

T = TypeVar("T")


class Proxy:
    """Passes bytes on to `port`; `cut` breaks all connections that are open. While it is `deaf`, it throws
    away what clients send. Runs on a thread of its own."""

    def __init__(self, port: int) -> None:
        self.deaf = False
        self._upstream = port
        self._writers: set[asyncio.StreamWriter] = set()
        self._background = BackgroundLoop()
        self._server = self._run(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def cut(self) -> int:
        """Breaks all connections; returns how many there were."""
        return self._run(self._cut())

    def close(self) -> None:
        self._run(self._close())
        self._background.stop()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._background.loop).result(10)

    async def _close(self) -> None:
        self._server.close()
        await self._cut()

    async def _cut(self) -> int:
        count = len(self._writers)
        for writer in list(self._writers):
            writer.transport.abort()
        return count

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            out_reader, out_writer = await asyncio.open_connection("127.0.0.1", self._upstream)
            self._writers |= {writer, out_writer}
            upwards = self._pass(reader, out_writer, lambda: self.deaf)
            await asyncio.gather(upwards, self._pass(out_reader, writer, lambda: False))

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_deaf: Callable[[], bool]
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                if not is_deaf():
                    writer.write(data)
                    await writer.drain()
        self._writers.discard(writer)
        writer.close()
