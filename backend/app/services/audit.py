"""The audit log: who did what, in rows that are only ever added.

Each row's hash covers the row and the hash of the row before, so a row that is changed, taken out or put
in breaks the chain from there on. What the chain alone cannot show is that its end was cut off, or that
all of it was made anew: for that, note the head (`seq:hash`) somewhere else now and then, and give it to
`verify`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Connection, Row, TextClause, bindparam, insert, select, text, update

from app.access import Identity
from app.database import Database
from app.models.tables import RARE, audit, audit_head
from app.prepared import Prepared
from app.writing import defer

PAGE = 1000
"""Rows that are read at once when all are."""

OK = "ok"
DENIED = "denied"


class Entry(msgspec.Struct, frozen=True):
    """Something that was done or tried. `target` names what it was done to, `outcome` is `ok`, `denied`,
    or a turn's ending. `details` are ids, names and sizes, never content or secrets; `personal_data` says
    that such was shown."""

    actor: str
    action: str
    target: str = ""
    outcome: str = OK
    door: str = ""
    personal_data: bool = False
    details: dict[str, Any] = {}


class AuditRow(msgspec.Struct, frozen=True):
    """An entry as stored. `at` is a Unix time in seconds."""

    seq: int
    at: float
    actor: str
    action: str
    target: str
    outcome: str
    door: str
    personal_data: bool
    details: dict[str, Any]
    hash: str


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which rows; `actions` match from their beginning. Times are Unix times in seconds."""

    actor: str | None = None
    action: str | None = None
    outcome: str | None = None
    since: float | None = None
    until: float | None = None

    def conditions(self) -> list[ColumnElement[bool] | TextClause]:
        """The same in SQL."""
        found: list[ColumnElement[bool] | TextClause] = []
        if self.actor:
            found.append(audit.c.actor == self.actor)
        if self.action:
            found.append(audit.c.action.startswith(self.action, autoescape=True))
            if not "turn".startswith(self.action):
                found.append(text(RARE))  # or the index on these does not serve
        if self.outcome:
            found.append(audit.c.outcome == self.outcome)
        if self.since is not None:
            found.append(audit.c.at >= self.since)
        if self.until is not None:
            found.append(audit.c.at < self.until)
        return found


@dataclass(frozen=True, slots=True)
class Verdict:
    """What verifying found: `broken_at` is the first row that does not fit, if there is one."""

    rows: int
    head: str
    broken_at: int | None = None
    problem: str | None = None


def note(connection: Connection, who: Identity | None, action: str, **rest: Any) -> None:
    """Adds an entry to the log with this transaction: both are stored, or neither is."""
    actor, door = (who.owner, who.door) if who is not None else ("", rest.pop("door", ""))
    if who is not None and who.key is not None:
        rest["details"] = {**rest.get("details", {}), "key": who.key.id}
    defer(connection, Entry(actor, action, door=door, **rest))


def seal(connection: Connection, entries: Sequence[Entry]) -> None:
    """Writes the entries of a transaction at the end of the chain. For `Database.before_commit`."""
    seq, last = _HEAD.one(connection, {})
    now = round(time.time(), 6)  # as it is shown, so that it can be searched for
    rows = []
    for entry in entries:
        seq += 1
        row = AuditRow(
            seq=seq,
            at=now,
            actor=entry.actor,
            action=entry.action,
            target=entry.target,
            outcome=entry.outcome,
            door=entry.door,
            personal_data=entry.personal_data,
            details=entry.details,
            hash="",
        )
        last = _hash(last, row)
        rows.append({**msgspec.structs.asdict(row), "hash": last})
    _INSERT.run_all(connection, rows)
    _MOVE_HEAD.run(connection, {"new_seq": seq, "new_hash": last})


_HEAD = Prepared(select(audit_head.c.seq, audit_head.c.hash).with_for_update())
_INSERT = Prepared(insert(audit))
_MOVE_HEAD = Prepared(update(audit_head).values(seq=bindparam("new_seq"), hash=bindparam("new_hash")))


def _hash(previous: str, row: AuditRow) -> str:
    """The row's hash: SHA-256 of the hash before and the row without its own, as JSON with sorted keys."""
    content = {name: value for name, value in msgspec.structs.asdict(row).items() if name != "hash"}
    return hashlib.sha256(previous.encode() + msgspec.json.encode(content, order="deterministic")).hexdigest()


class Audit:
    """Reads, adds to and verifies the log."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def record(self, who: Identity | None, action: str, **rest: Any) -> None:
        """Adds an entry that belongs to no other transaction."""
        await self._database.write(lambda c: note(c, who, action, **rest))

    async def search(
        self, which: AuditFilter, *, limit: int = 100, before: int | None = None
    ) -> list[AuditRow]:
        """The newest rows, or those older than `before`."""
        statement = select(audit).where(*which.conditions()).order_by(audit.c.seq.desc()).limit(limit)
        if before is not None:
            statement = statement.where(audit.c.seq < before)
        return [_row(row) for row in await self._database.read(lambda c: c.execute(statement).all())]

    async def rows(self, which: AuditFilter) -> AsyncIterator[AuditRow]:
        """All rows, oldest first."""
        after = 0
        while True:
            statement = (
                select(audit)
                .where(*which.conditions(), audit.c.seq > after)
                .order_by(audit.c.seq)
                .limit(PAGE)
            )
            page = await self._database.read(lambda c, s=statement: c.execute(s).all())  # type: ignore[misc]
            for row in page:
                yield _row(row)
            if len(page) < PAGE:
                return
            after = page[-1].seq

    async def verify(self, head: str | None = None) -> Verdict:
        """Whether the chain is whole and, when a `head` (`seq:hash`) that was noted earlier is given,
        whether it is still that chain."""
        last, count = "", 0
        noted_seq, _, noted_hash = (head or "").partition(":")
        least = (await self._head()).seq  # rows may be added while the others are read
        async for row in self.rows(AuditFilter()):
            if row.seq != count + 1:
                return Verdict(count, f"{count}:{last}", row.seq, f"row {count + 1} is missing")
            last = _hash(last, row)
            count += 1
            if last != row.hash:
                return Verdict(count, f"{row.seq}:{row.hash}", row.seq, f"row {row.seq} was changed")
            if str(row.seq) == noted_seq and last != noted_hash:
                return Verdict(count, f"{count}:{last}", row.seq, "this is another chain than was noted")
        if head is not None and (not noted_seq.isdecimal() or int(noted_seq) > count):
            return Verdict(count, f"{count}:{last}", count + 1, "the noted head is not there any more")
        problem = "rows at the end are missing" if count < least else await self._not_ours(count, last)
        return Verdict(count, f"{count}:{last}", None if problem is None else count + 1, problem)

    async def _not_ours(self, count: int, last: str) -> str | None:
        """What is wrong with the end of a chain that seems whole: it goes on beyond the portal's own."""
        head = await self._head()
        is_ours = count < head.seq or (count, last) == (head.seq, head.hash)
        return None if is_ours else "rows at the end are not the portal's"

    async def _head(self) -> Row[Any]:
        """The number (`seq`) of the newest row, and its hash."""
        return await self._database.read(lambda c: c.execute(select(audit_head)).one())


def _row(row: Row[Any]) -> AuditRow:
    return AuditRow(**row._mapping)
