"""What an LLM server does while it has nothing better to do: work that makes way for turns at once."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from app.services.places import Load

T = TypeVar("T")


class SpareTime:
    """Work in places of one server that no turn wants. It takes none of them: whoever wants one gets it as if
    it were free, and the work ends. `most` is how much the server does at once, where it tells: it may be
    less than it has places."""

    def __init__(self, load: Load) -> None:
        self.most: int | None = None
        self._load = load
        self._tasks: list[asyncio.Task[Any]] = []

    @property
    def is_there(self) -> bool:
        """Whether work may begin."""
        return self._free > 0

    @property
    def _free(self) -> int:
        most = self._load.limit if self.most is None else min(self.most, self._load.limit)
        return most - self._load.taken - len(self._tasks)

    async def run(self, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of the work; None when there is not enough time for it. Raises what it raises."""
        task = asyncio.create_task(work, name="spare time")
        self._tasks.append(task)
        try:
            await asyncio.wait((task,))
        finally:
            if task in self._tasks:
                self._tasks.remove(task)
            task.cancel()
        return None if task.cancelled() else task.result()

    def make_way(self) -> None:
        """A turn has got a place: ends what is in its way."""
        while self._tasks and self._free < 0:
            self._tasks.pop().cancel()
