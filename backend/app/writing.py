"""How operations that change the database are committed: in the order in which they come, and those that come
together with one commit.

A thread does it, so that the event loop never waits for a disk or a lock. SQLite, which runs in this
process, takes less time for the few statements of a turn than it costs to hand them to a thread: `short`
operations run on the event loop itself, as long as the thread has nothing to do and nobody else holds the
lock of the file.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError

from app.distribution import LATENCIES_S, SHORT_S, Distribution
from app.logs import get_logger
from app.prepared import Prepared, driver_of, keep_driver, let_go

Operation = Callable[[Connection], Any]
BeforeCommit = Callable[[Connection, list[Any]], None]
"""What is done with the deferred items of a transaction, at its end."""

UNAVAILABLE = (OperationalError, InterfaceError, InternalError)
"""What SQLAlchemy raises when a database is locked, full, or away."""

LARGEST_GROUP = 256
LARGEST_SHORT_GROUP = 32
"""Operations in one commit; on the event loop they must be few."""

CHECKPOINT_EVERY = 500
"""Operations on the event loop after which the log of SQLite is written back into its file, by a thread: it
waits for the disk."""

SQLITE_BUSY = 5
LOCK_NOT_AVAILABLE = "55P03"
"""PostgreSQL's code for a lock that was waited for as long as `lock_timeout` allows."""

WRITE_LAGS_S = (*SHORT_S[:5], *LATENCIES_S[:11])

log = get_logger(__name__)


class Write:
    """An operation, and what has become of it: `settle` gets it then, on the event loop."""

    __slots__ = ("asked_at", "error", "operation", "result", "settle")

    def __init__(self, operation: Operation, settle: Callable[[Write], None]) -> None:
        self.operation = operation
        self.settle = settle
        self.asked_at = time.monotonic()
        self.result: Any = None
        self.error: BaseException | None = None


class Writer:
    """The only writer of this process. `before_commit` gets what the operations of a transaction have
    deferred, and writes it with one stroke."""

    def __init__(self, engine: Engine, before_commit: BeforeCommit | None) -> None:
        self._engine = engine
        self._before_commit = before_commit
        self._queue: queue.SimpleQueue[Write | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="db-writer", daemon=True)
        self._in_thread = 0
        self._short: list[Write] = []
        self._near: Connection | None = None
        self._since_checkpoint = 0
        self._is_written = asyncio.Event()
        self.lag = Distribution(WRITE_LAGS_S)
        """How long operations took to be committed, in seconds."""

    def open(self) -> None:
        """Starts the thread."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        if self._engine.dialect.name == "sqlite":
            self._near = self._engine.connect()
            raw = keep_driver(self._near)
            raw.execute("PRAGMA busy_timeout=0")  # whoever waits for a lock is the thread
            raw.execute("PRAGMA wal_autocheckpoint=0")

    async def close(self) -> None:
        """Commits what was asked for, and ends the thread."""
        self._hand_over()
        self._queue.put(None)
        await self._is_written.wait()
        self._thread.join()
        if self._near is not None:
            self._near.invalidate()  # its pragmas are not those of others
            let_go(self._near)

    def submit(self, write: Write, *, short: bool) -> None:
        """Takes an operation; `write.settle` is called when it is committed, or has failed."""
        if short and self._near is not None and not self._in_thread:
            if not self._short:
                self._loop.call_soon(self._gather, 0)
            self._short.append(write)
            return
        self._hand_over()
        self._put(write)

    # --- on the event loop ---

    def _hand_over(self) -> None:
        """Leaves to the thread what has come first and was not committed yet."""
        waiting, self._short = self._short, []
        for write in waiting:
            self._put(write)

    def _put(self, write: Write) -> None:
        self._in_thread += 1
        self._queue.put(write)

    def _gather(self, before: int) -> None:
        """Commits once nothing more has come in a round of the event loop: under load there are more in one
        transaction then, and a single one waits for one round only."""
        if before < len(self._short) < LARGEST_SHORT_GROUP:
            self._loop.call_soon(self._gather, len(self._short))
        else:
            self._commit_short()

    def _commit_short(self) -> None:
        group = self._short[:LARGEST_SHORT_GROUP]
        self._short = self._short[LARGEST_SHORT_GROUP:]
        if not group or self._near is None:
            return
        _commit_group(self._near, group, self._before_commit)
        busy = [write for write in group if _is_busy(write.error)]
        for write in busy:
            write.error = None
            self._put(write)
        if busy:
            self._hand_over()
        elif self._short:
            self._loop.call_soon(self._commit_short)
        self._since_checkpoint += len(group)
        if self._since_checkpoint >= CHECKPOINT_EVERY:
            self._since_checkpoint = 0
            self._loop.run_in_executor(None, _checkpoint, self._engine)
        self._settle([write for write in group if write not in busy])

    def _settle_thread(self, group: Sequence[Write]) -> None:
        self._in_thread -= len(group)
        self._settle(group)

    def _settle(self, group: Sequence[Write]) -> None:
        now = time.monotonic()
        for write in group:
            if write.error is None:
                self.lag.add(now - write.asked_at)
            write.settle(write)

    # --- in the thread ---

    def _work(self) -> None:
        connection: Connection | None = None
        while (group := self._next_group()) is not None:
            try:
                if connection is None:
                    connection = self._engine.connect()
                    keep_driver(connection)
                _commit_group(connection, group, self._before_commit)
            except BaseException as error:  # noqa: BLE001 - whatever it is, the callers must hear of it
                for write in group:
                    write.error = write.error or error
            if connection is not None and connection.invalidated:
                let_go(connection)
                connection = None
            self._loop.call_soon_threadsafe(self._settle_thread, group)
        if connection is not None:
            let_go(connection)
        self._loop.call_soon_threadsafe(self._is_written.set)

    def _next_group(self) -> list[Write] | None:
        first = self._queue.get()
        if first is None:
            return None
        group = [first]
        while len(group) < LARGEST_GROUP:
            try:
                write = self._queue.get_nowait()
            except queue.Empty:
                break
            if write is None:
                self._queue.put(None)
                break
            group.append(write)
        return group


_deferred: dict[Connection, list[Any]] = {}
"""Of each connection in a transaction, what is written at its end."""


def defer(connection: Connection, item: Any) -> None:
    """Leaves an item to the end of the transaction, where all of them are written together."""
    _deferred[connection].append(item)


def _is_busy(error: BaseException | None) -> bool:
    """Whether somebody else has the lock of the file."""
    code = getattr(getattr(error, "orig", None), "sqlite_errorcode", 0)
    return code & 0xFF == SQLITE_BUSY


def _is_locked(connection: Connection, error: BaseException) -> bool:
    """Whether somebody else had a lock for too long."""
    if connection.dialect.name == "sqlite":
        return isinstance(error, UNAVAILABLE)
    return getattr(getattr(error, "orig", None), "sqlstate", None) == LOCK_NOT_AVAILABLE


def _checkpoint(engine: Engine) -> None:
    """Writes SQLite's log back into its file, as far as nobody needs it."""
    try:
        with engine.connect() as connection:
            driver_of(connection).execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    except Exception as error:  # noqa: BLE001 - it is made up for by the next one
        log.warning("the database's log could not be written back", reason=type(error).__name__)


def _carry_out(connection: Connection, writes: Sequence[Write], before_commit: BeforeCommit | None) -> None:
    """Carries operations out, and commits them together."""
    if connection.dialect.name != "sqlite":
        with connection.begin():
            _run(connection, writes, before_commit)
        return
    # `connection.begin()` without what it costs where the driver itself runs the statements.
    _BEGIN.run(connection, {})
    try:
        _run(connection, writes, before_commit)
        if connection.in_transaction():  # some statement was run by SQLAlchemy
            connection.commit()
        else:
            _COMMIT.run(connection, {})
    except BaseException:
        connection.rollback()
        driver_of(connection).rollback()
        raise


def _run(connection: Connection, writes: Sequence[Write], before_commit: BeforeCommit | None) -> None:
    items = _deferred[connection] = []
    try:
        for write in writes:
            write.result = write.operation(connection)
        if items and before_commit is not None:
            before_commit(connection, items)
    finally:
        del _deferred[connection]


# A transaction that reads first and writes later fails at once under contention, without waiting; taking the
# write lock at the beginning waits for its turn.
_BEGIN, _COMMIT = Prepared(text("BEGIN IMMEDIATE")), Prepared(text("COMMIT"))


def _commit_group(connection: Connection, group: Sequence[Write], before_commit: BeforeCommit | None) -> None:
    """All in one transaction; when one of several fails, each in its own, so that only it fails. Not where
    each alone would wait for a lock as long as all together, or where the connection is lost: all may have
    been committed."""
    try:
        _carry_out(connection, group, before_commit)
        return
    except Exception as error:  # noqa: BLE001 - it is handed to the callers
        if len(group) == 1 or connection.invalidated or _is_locked(connection, error):
            for write in group:
                write.error = error
            return
    for write in group:
        try:
            _carry_out(connection, [write], before_commit)
        except Exception as error:  # noqa: BLE001 - it is handed to the caller
            write.error = error
