"""What an LLM server does while it has nothing better to do: work that makes way for turns at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from app.services.places import Load

T = TypeVar("T")


def _nothing() -> None:
    pass


class SpareTime:
    """Work in places of one server that no turn wants. It takes none of them: whoever wants one gets it as if
    it were free, and the work ends. `most` is how much the server does at once, where it tells: it may be
    less than it has places."""

    def __init__(self, load: Load) -> None:
        self.most: int | None = None
        self._load = load
        self._tasks: dict[asyncio.Task[Any], Callable[[], None]] = {}

    @property
    def is_there(self) -> bool:
        """Whether work may begin."""
        return self._free > 0

    @property
    def _free(self) -> int:
        most = self._load.limit if self.most is None else min(self.most, self._load.limit)
        return most - self._load.taken - len(self._tasks)

    async def run(self, work: Coroutine[Any, Any, T], give_back: Callable[[], None] = _nothing) -> T | None:
        """The result of the work; None when there is not enough time for it. Raises what it raises. What the
        work holds is given back as soon as it is to end, so that the turn in its place can have that."""
        task = asyncio.create_task(work, name="spare time")
        self._tasks[task] = give_back
        try:
            await asyncio.wait((task,))
        finally:
            self._end(task)
        return None if task.cancelled() else task.result()

    def make_way(self) -> None:
        """A turn has got a place: ends what is in its way."""
        while self._tasks and self._free < 0:
            self._end(next(reversed(self._tasks)))

    def _end(self, task: asyncio.Task[Any]) -> None:
        task.cancel()
        self._tasks.pop(task, _nothing)()
