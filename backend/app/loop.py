"""The one door from plain threads, and from other event loops, into the loop that runs the middle."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


class LoopDoor:
    """Runs coroutines on one event loop for callers that are elsewhere.

    The objects of the middle live on that loop alone, so none of them needs a lock.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs `coroutine` and blocks until its result is there; what it raises, this raises.

        Raises `RuntimeError` on the loop's own thread, which would wait for itself.
        """
        if _running_loop() is self._loop:
            coroutine.close()
            raise RuntimeError(
                "This would block the event loop it waits for; await the async method instead."
            )
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def acall(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Awaits `coroutine` from whatever event loop the caller runs on."""
        if asyncio.get_running_loop() is self._loop:
            return await coroutine
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))

    def iterate(self, generator: AsyncGenerator[T, None]) -> Iterator[T]:
        """Iterates from a plain thread; leaving the iteration closes the generator."""
        try:
            while True:
                item = self.call(_step(generator))
                if isinstance(item, _End):
                    return
                yield item
        finally:
            self.call(generator.aclose())

    async def aiterate(self, generator: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """Iterates from whatever event loop the caller runs on; leaving closes the generator."""
        try:
            while True:
                item = await self.acall(_step(generator))
                if isinstance(item, _End):
                    return
                yield item
        finally:
            await self.acall(generator.aclose())


class _End:
    """Where a generator ends: `StopAsyncIteration` cannot cross every kind of future."""


_END = _End()


async def _step(generator: AsyncGenerator[T, None]) -> T | _End:
    return await anext(generator, _END)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class BackgroundLoop:
    """An event loop on a daemon thread, for programs that run none of their own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="portal-loop", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the loop and its thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
