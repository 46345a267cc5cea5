"""The database: one writer thread that commits in groups, a few reader threads, and migrations.

All statements run in threads, so the event loop never waits for a disk or a lock. Writers that come
together are committed together (group commit): on SQLite one fsync serves all of them, and there is
never a second writer in this process to contend with.

SQLite runs in WAL mode with `synchronous=NORMAL`: a commit survives the death of the process at any
moment; the last commits before a power loss may be lost, but never the database.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from sqlalchemy import Connection, Engine, Table, create_engine, event, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DataError, InterfaceError, InternalError, OperationalError

from app.errors import Internal, InvalidRequest, StorageUnavailable
from app.logs import get_logger
from app.prepared import Prepared

T = TypeVar("T")
Operation = Callable[[Connection], T]
"""Statements of one transaction. It may be run again after a rollback, so it must touch nothing but
the connection; a result that is no error is better returned than raised."""

BeforeCommit = Callable[[Connection, list[Any]], None]
"""What is done with the deferred items of a transaction, at its end."""

READERS = 4
LARGEST_GROUP = 256
LOCK_TIMEOUT_S = 2
RETRY_FIRST_S, RETRY_MOST_S = 0.1, 2.0
REFRESH_S = 2.0

UNAVAILABLE = (OperationalError, InterfaceError, InternalError)
"""What SQLAlchemy raises when a database is locked, full, or away."""

log = get_logger(__name__)


def _unavailable(error: BaseException) -> StorageUnavailable:
    log.warning("the database does not answer", reason=str(getattr(error, "orig", error)))
    return StorageUnavailable("The database does not answer; try again.", retry_after=2)


def _unstorable() -> InvalidRequest:
    return InvalidRequest("text: it holds a character that cannot be stored, such as NUL")


class _Write:
    __slots__ = ("error", "future", "operation", "result")

    def __init__(self, operation: Operation[Any], future: asyncio.Future[Any]) -> None:
        self.operation = operation
        self.future = future
        self.result: Any = None
        self.error: BaseException | None = None

    def settle(self) -> None:
        if self.future.cancelled():
            return
        if self.error is None:
            self.future.set_result(self.result)
        elif isinstance(self.error, UNAVAILABLE):
            self.future.set_exception(_unavailable(self.error))
        elif isinstance(self.error, DataError):
            self.future.set_exception(_unstorable())
        else:
            self.future.set_exception(self.error)


class Database:
    """Runs operations against `url` (SQLAlchemy's form) for one event loop. `before_commit` gets what
    the operations of a transaction have deferred, and writes it with one stroke."""

    def __init__(self, url: str, before_commit: BeforeCommit | None = None) -> None:
        self._before_commit = before_commit
        self._engine = create_portal_engine(url)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="db-reader")
        self._writes: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_loop, name="db-writer", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._written = asyncio.Event()

    async def open(self) -> None:
        """Starts the threads."""
        self._loop = asyncio.get_running_loop()
        self._writer.start()

    async def close(self) -> None:
        """Commits what was asked for and ends the threads."""
        self._writes.put(None)
        await self._written.wait()
        self._writer.join()
        self._readers.shutdown()
        self._engine.dispose()

    async def write(self, operation: Operation[T]) -> T:
        """Runs `operation` in a transaction and returns its result once that is committed.

        Operations are carried out in the order of the calls. What an operation raises, its caller
        gets, and nothing of it is stored. Raises `StorageUnavailable` when the database could not
        take it: locked, full, or away.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._writes.put(_Write(operation, future))
        return await future

    async def read(self, operation: Operation[T]) -> T:
        """Runs a reading `operation` and returns its result. Raises `StorageUnavailable`."""

        def run() -> T:
            with self._engine.connect() as connection:
                return operation(connection)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._readers, run)
        except UNAVAILABLE as error:
            raise _unavailable(error) from None
        except DataError:
            raise _unstorable() from None

    def _write_loop(self) -> None:
        assert self._loop is not None
        connection: Connection | None = None
        while (group := self._next_group()) is not None:
            try:
                connection = connection or self._engine.connect()
                _commit_group(connection, group, self._before_commit)
            except BaseException as error:  # noqa: BLE001 - whatever it is, the callers must hear of it
                for write in group:
                    write.error = write.error or error
            if connection is not None and connection.invalidated:
                connection.close()
                connection = None
            self._loop.call_soon_threadsafe(_settle, group)
        if connection is not None:
            connection.close()
        self._loop.call_soon_threadsafe(self._written.set)

    def _next_group(self) -> list[_Write] | None:
        first = self._writes.get()
        if first is None:
            return None
        group = [first]
        while len(group) < LARGEST_GROUP:
            try:
                write = self._writes.get_nowait()
            except queue.Empty:
                break
            if write is None:
                self._writes.put(None)
                break
            group.append(write)
        return group


def _settle(group: list[_Write]) -> None:
    for write in group:
        write.settle()


_DEFERRED = "deferred"


def defer(connection: Connection, item: Any) -> None:
    """Leaves an item to the end of the transaction, where all of them are written together."""
    connection.info[_DEFERRED].append(item)


@contextmanager
def _transaction(connection: Connection, before_commit: BeforeCommit | None) -> Iterator[None]:
    items: list[Any] = []
    connection.info[_DEFERRED] = items
    with connection.begin():
        yield
        if items and before_commit is not None:
            before_commit(connection, items)


def _commit_group(
    connection: Connection, group: list[_Write], before_commit: BeforeCommit | None = None
) -> None:
    """All in one transaction; when one of several fails, each in its own, so that only it fails."""
    try:
        with _transaction(connection, before_commit):
            for write in group:
                write.result = write.operation(connection)
        return
    except Exception as error:  # noqa: BLE001 - it is handed to the callers
        locked = isinstance(error, UNAVAILABLE) and connection.dialect.name == "sqlite"
        if len(group) == 1 or locked:  # each alone would wait for the lock as long as all together
            for write in group:
                write.error = error
            return
    for write in group:
        try:
            with _transaction(connection, before_commit):
                write.result = write.operation(connection)
        except Exception as error:  # noqa: BLE001 - it is handed to the caller
            write.error = error


def insert_new(connection: Connection, table: Table, values: dict[str, Any]) -> bool:
    """Inserts a row unless there is such a one already; tells whether it did."""
    statement = _insert_new(table, tuple(values))
    return statement.first(connection, values) is not None


@cache
def _insert_new(table: Table, _columns: tuple[str, ...]) -> Prepared:
    def made(dialect: str) -> Any:
        return insert_of(dialect, table).on_conflict_do_nothing().returning(*table.primary_key)

    return Prepared(made)


def insert_of(dialect: str, table: Table) -> Any:
    """An INSERT of `postgresql` or `sqlite`, for what standard SQL cannot say: ON CONFLICT."""
    return (postgresql if dialect == "postgresql" else sqlite).insert(table)


def create_portal_engine(url: str) -> Engine:
    """An engine for `url` (SQLAlchemy's form), with SQLite's directory made and its pragmas set."""
    options: dict[str, Any] = {
        "hide_parameters": True,  # prompts have no place in error messages
        "json_serializer": lambda value: msgspec.json.encode(value).decode(),
        "json_deserializer": msgspec.json.decode,
        "pool_size": READERS + 1,
    }
    if not url.startswith("sqlite"):
        return create_engine(url, pool_pre_ping=True, **options)
    Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(
        url, connect_args={"check_same_thread": False, "timeout": LOCK_TIMEOUT_S}, **options
    )
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver's own BEGIN would come too late: see _begin_sqlite
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and writes later fails at once under contention, without
    # waiting; taking the write lock at the beginning waits for its turn.
    in_writer = threading.current_thread().name == "db-writer"
    connection.exec_driver_sql("BEGIN IMMEDIATE" if in_writer else "BEGIN")


async def insist(call: Callable[[], Awaitable[T]], *, unless: Callable[[], bool] = bool) -> T:
    """Repeats what the database cannot take or give now, with growing pauses. Raises
    `StorageUnavailable` only once `unless()` is true."""
    pause = RETRY_FIRST_S
    while True:
        try:
            return await call()
        except StorageUnavailable:
            if unless():
                raise
            await asyncio.sleep(pause)
            pause = min(pause * 2, RETRY_MOST_S)


async def keep_fresh(refresh: Callable[[], Awaitable[None]], what: str) -> None:
    """Reads again, every `REFRESH_S`, what is kept in memory and other processes may change. Runs until
    cancelled."""
    while True:
        await asyncio.sleep(REFRESH_S)
        try:
            await refresh()
        except StorageUnavailable:
            log.warning("something could not be read again", what=what)


# --- migrations ----------------------------------------------------------------------------------

MIGRATIONS = Path(__file__).parent / "migrations"


def head_revision() -> str:
    """The newest migration: the last file by name, as they are numbered."""
    return max(path.stem for path in (MIGRATIONS / "versions").glob("[0-9]*.py")).split("_")[0]


def migrate(url: str) -> None:
    """Brings the schema at `url` up to date. Raises `Internal` when the database is newer than this
    program."""
    current = _current_revision(url)
    if current == head_revision():
        return
    if current is not None and current > head_revision():
        raise Internal(
            f"The database has schema {current}; this version of the portal knows {head_revision()}."
        )
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["url"] = url
    command.upgrade(config, "head")
    log.info("database migrated", from_revision=current, to_revision=head_revision())


def _current_revision(url: str) -> str | None:
    engine = create_portal_engine(url)
    try:
        with engine.connect() as connection:
            if not engine.dialect.has_table(connection, "alembic_version"):
                return None
            return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    finally:
        engine.dispose()
