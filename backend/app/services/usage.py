"""What turns have used: a row for each attempt at a turn, and the sums of every day.

Both are written with the turn's ending, in its transaction, so that what was used is counted exactly when
the turn is over; the sums at the end of the transaction, where those of several turns are written together.
Days and months are those of UTC.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from operator import add, attrgetter
from typing import Any, Literal, get_args

import msgspec
from sqlalchemy import ColumnElement, Connection, Row, func, or_, select

from app.database import Database, insert_of
from app.models.tables import api_keys, devices, usage, usage_days
from app.prepared import Prepared
from app.writing import defer


class TurnUsage(msgspec.Struct, frozen=True):
    """What one attempt at a turn has used. `at` is a Unix time in seconds."""

    turn_id: str
    attempt: int
    at: float
    owner: str
    api_key: str
    project: str
    model: str
    door: str
    outcome: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    estimated: bool
    gpu_seconds: float
    cost: float
    ttft_ms: int | None
    elapsed_ms: int


class Line(msgspec.Struct, frozen=True):
    """What comes to a line of `usage_days`, the values in the order of `_KEYS` and `SUMS`."""

    keys: tuple[str, ...]
    sums: tuple[float, ...]


class Spent(msgspec.Struct, frozen=True):
    """What somebody has spent in a time."""

    turns: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    gpu_seconds: float = 0.0
    cost: float = 0.0

    @property
    def tokens(self) -> int:
        """Those read and those written."""
        return self.prompt_tokens + self.completion_tokens


Group = Literal["day", "owner", "api_key", "project", "model", "door"]
"""What sums can be made by."""


class UsageSum(msgspec.Struct, frozen=True):
    """A line of a report: the values of what it is grouped by, and the sums."""

    group: dict[str, str]
    spent: Spent


PERSON = "person:"
"""What the subject of somebody's own budgets begins with: all that they have used, but for their devices."""

SUMS = Spent.__struct_fields__
_KEYS = ("day", *get_args(Group)[1:])
_LINE = (*_KEYS, *SUMS)
_keys_of, _sums_of = attrgetter(*_KEYS[1:]), attrgetter(*SUMS[1:])


def day_of(at: float) -> str:
    """The day of a Unix time: `2026-11-21`."""
    return _day(int(at // 86400))


@lru_cache(16)
def _day(number: int) -> str:
    """The day with this number, 1970-01-01 being 0."""
    return datetime.fromtimestamp(number * 86400, UTC).strftime("%Y-%m-%d")


def _add_row(dialect: str) -> Any:
    return insert_of(dialect, usage).on_conflict_do_nothing().returning(usage.c.turn_id)


def _add_to_sums(dialect: str) -> Any:
    added = insert_of(dialect, usage_days)
    sums = {name: usage_days.c[name] + added.excluded[name] for name in SUMS}
    keys = [usage_days.c[name] for name in _KEYS]
    return added.on_conflict_do_update(index_elements=keys, set_=sums)


_ROW, _SUMS = Prepared(_add_row), Prepared(_add_to_sums)


def write(connection: Connection, used: TurnUsage, day: str, *, turns: int = 1) -> bool:
    """Adds what an attempt has used to a `day`, with this transaction, unless that was done before; tells
    whether it did. It counts for so many `turns`: work that nobody asked for is none."""
    if _ROW.first(connection, msgspec.structs.asdict(used)) is None:
        return False
    defer(connection, Line((day, *_keys_of(used)), (turns, *_sums_of(used))))
    return True


def add_up(connection: Connection, lines: Iterable[Line]) -> None:
    """Writes what the turns of a transaction come to."""
    total: dict[tuple[str, ...], tuple[float, ...]] = {}
    for line in lines:
        before = total.get(line.keys)
        total[line.keys] = line.sums if before is None else tuple(map(add, before, line.sums))
    for keys in sorted(total):  # in any other order, two processes could wait for each other
        _SUMS.run(connection, dict(zip(_LINE, keys + total[keys], strict=True)))


def conditions_of(subject: str) -> list[ColumnElement[bool]]:
    """The lines of `usage_days` that count for a subject of limits."""
    kind, _, name = subject.partition(":")
    if subject == "all":
        return []
    if kind == "project":
        return [usage_days.c.project == name]
    if kind == "key":
        return [usage_days.c.api_key == name]
    if kind == "device":
        return [usage_days.c.api_key.in_(select(devices.c.id).where(devices.c.name == name))]
    if subject.startswith(PERSON):  # a key is never forgotten; a device that was removed is
        by_key = usage_days.c.api_key.in_(select(api_keys.c.id).where(api_keys.c.user == name))
        return [usage_days.c.owner == f"user:{name}", or_(usage_days.c.api_key == "", by_key)]
    return [usage_days.c.owner == subject]


class UsageBook:
    """Reads what was used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def spent(self, subject: str, since: str) -> Spent:
        """What a subject of limits has spent since the day `since`, included."""
        sums = [func.coalesce(func.sum(usage_days.c[name]), 0) for name in SUMS]
        statement = select(*sums).where(usage_days.c.day >= since, *conditions_of(subject))
        row = await self._database.read(lambda c: c.execute(statement).one())
        return _spent(row)

    async def report(
        self,
        by: Sequence[Group],
        *,
        since: str,
        until: str,
        owner: str | None = None,
        project: str | None = None,
    ) -> list[UsageSum]:
        """The sums from the day `since` to the day `until`, by what they are to be grouped by."""
        keys = [usage_days.c[name] for name in by]
        conditions = [usage_days.c.day >= since, usage_days.c.day <= until]
        if owner is not None:
            conditions.append(usage_days.c.owner == owner)
        if project is not None:
            conditions.append(usage_days.c.project == project)
        sums = [func.coalesce(func.sum(usage_days.c[name]), 0) for name in SUMS]
        statement = select(*keys, *sums).where(*conditions).group_by(*keys).order_by(*keys)
        rows = await self._database.read(lambda c: c.execute(statement).all())
        return [UsageSum(dict(zip(by, row, strict=False)), _spent(row[len(by) :])) for row in rows]


def _spent(row: Row[Any] | Sequence[Any]) -> Spent:
    values = dict(zip(SUMS, row, strict=True))
    return msgspec.convert(values, Spent, strict=False)


def today() -> str:
    """The day that it is."""
    return day_of(time.time())


def month_of(day: str) -> str:
    """The first day of a day's month."""
    return f"{day[:7]}-01"
