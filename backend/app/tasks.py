"""Tasks that run beside the one that starts them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextvars import Context
from typing import Any, TypeVar

from app.logs import get_logger

T = TypeVar("T")

log = get_logger(__name__)


class Tasks:
    """The tasks that somebody has started and not awaited. They are kept until they have ended, as the event
    loop itself does not, and one that fails is logged."""

    def __init__(self, whose: str) -> None:
        self._whose = whose
        self._running: set[asyncio.Task[Any]] = set()

    def start(
        self, work: Coroutine[Any, Any, T], name: str, context: Context | None = None
    ) -> asyncio.Task[T]:
        """Starts one more, in a copy of this context or in the given one; `name` says what it does."""
        task = asyncio.create_task(work, name=f"{self._whose}: {name}", context=context)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    async def wait(self) -> None:
        """Returns when all that run now have ended."""
        await asyncio.gather(*self._running, return_exceptions=True)

    async def close(self) -> None:
        """Ends all that run."""
        for task in list(self._running):
            task.cancel()
        await self.wait()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task died", task=task.get_name(), exc_info=task.exception())
