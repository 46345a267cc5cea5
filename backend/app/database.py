"""The database: one writer that commits in groups (`app.writing`), a few reader threads, and migrations.

SQLite runs in WAL mode with `synchronous=NORMAL`: a commit survives the death of the process at any
moment; the last commits before a power loss may be lost, but never the database.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from sqlalchemy import Connection, Engine, Table, create_engine, event, make_url, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DataError

from app.distribution import Distribution
from app.errors import Internal, InvalidRequest, PortalError, StorageUnavailable
from app.logs import get_logger
from app.prepared import Prepared
from app.writing import UNAVAILABLE, BeforeCommit, Write, Writer

T = TypeVar("T")
Operation = Callable[[Connection], T | PortalError]
"""Statements of one transaction. It may be run again after a rollback, so it must touch nothing but
the connection. An error is better returned than raised, which would undo what is committed with it."""

READERS = 4
LOCK_TIMEOUT_S = 2
LONGEST_PAUSE_S = 10
"""How long a transaction may do nothing: PostgreSQL ends that of a process that was suspended, or whose
machine is gone, since others wait for its locks."""

DEAD_AFTER = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}
"""After how long of silence a connection to PostgreSQL is given up (libpq's names): about ten seconds."""

RETRY_FIRST_S, RETRY_MOST_S = 0.1, 2.0
REFRESH_S = 2.0

log = get_logger(__name__)


def _unavailable(error: BaseException) -> StorageUnavailable:
    log.warning("the database does not answer", reason=str(getattr(error, "orig", error)))
    return StorageUnavailable("The database does not answer; try again.", retry_after=2)


def _unstorable() -> InvalidRequest:
    return InvalidRequest("text: it holds a character that cannot be stored, such as NUL")


class Database:
    """Runs operations against `url` (SQLAlchemy's form) for one event loop. `before_commit` gets what
    the operations of a transaction have deferred, and writes it with one stroke."""

    def __init__(self, url: str, before_commit: BeforeCommit | None = None) -> None:
        self._engine = create_portal_engine(url)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="db-reader")
        self._writer = Writer(self._engine, before_commit)

    async def open(self) -> None:
        """Starts the threads."""
        self._writer.open()

    async def close(self) -> None:
        """Commits what was asked for and ends the threads."""
        await self._writer.close()
        self._readers.shutdown()
        self._engine.dispose()

    @property
    def write_lag(self) -> Distribution:
        """How long operations took from `write` to their commit, in seconds."""
        return self._writer.lag

    async def write(self, operation: Operation[T], *, short: bool = False) -> T:
        """Runs `operation` in a transaction and returns its result once that is committed. `short` ones have
        a few statements that touch a few rows.

        Operations are carried out in the order of the calls. What an operation raises, or returns as an
        error, is raised; of one that raises nothing is stored. Raises `StorageUnavailable` when the
        database could not take it: locked, full, or away.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._writer.submit(Write(operation, partial(_settle, future)), short=short)
        return await future

    async def read(self, operation: Callable[[Connection], T]) -> T:
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


def _settle(future: asyncio.Future[Any], write: Write) -> None:
    if future.cancelled():
        return
    error = write.error
    if error is None and isinstance(write.result, PortalError):
        error = write.result
    if error is None:
        future.set_result(write.result)
    elif isinstance(error, UNAVAILABLE):
        future.set_exception(_unavailable(error))
    elif isinstance(error, DataError):
        future.set_exception(_unstorable())
    else:
        future.set_exception(error)


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
    """An engine for `url` (SQLAlchemy's form), with SQLite's file made for its owner alone and its pragmas
    set."""
    options: dict[str, Any] = {
        "hide_parameters": True,  # prompts have no place in error messages
        "json_serializer": lambda value: msgspec.json.encode(value).decode(),
        "json_deserializer": msgspec.json.decode,
        "pool_size": READERS + 1,
    }
    if not url.startswith("sqlite"):
        said = make_url(url).query
        patience = {name: value for name, value in DEAD_AFTER.items() if name not in said}
        engine = create_engine(url, pool_pre_ping=True, connect_args=patience, **options)
        event.listen(engine, "connect", _prepare_postgres)
        return engine
    _keep_private(Path(url.removeprefix("sqlite:///")))
    engine = create_engine(
        url, connect_args={"check_same_thread": False, "timeout": LOCK_TIMEOUT_S}, **options
    )
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _keep_private(file: Path) -> None:
    """Makes SQLite's file, for its owner alone, and takes one that everybody may read from all others; what
    the owner has given to a group stays so. SQLite makes its other files with the rights of this one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):  # SQLite says it better
        file.touch(0o600)
        for found in (file, *(file.with_name(file.name + end) for end in ("-wal", "-shm"))):
            if found.exists() and found.stat().st_mode & 0o007:
                found.chmod(0o600)


def _prepare_postgres(connection: Any, _record: object) -> None:
    connection.autocommit = True
    connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT_S}s'")
    connection.execute(f"SET idle_in_transaction_session_timeout = '{LONGEST_PAUSE_S}s'")
    connection.autocommit = False


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver's own BEGIN would come too late: see _begin_sqlite
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    raw: Any = connection.connection.driver_connection
    if not raw.in_transaction:  # the writer begins its own
        raw.execute("BEGIN")


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


MIGRATING = 7_013_501
"""Names the lock of PostgreSQL under which the schema is changed."""

LONGEST_MIGRATION_S = 3600


def lock_schema(connection: Connection) -> None:
    """Begins a transaction, once no other process changes the schema: of several that are started at once
    one migrates, and the others find it done."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SET LOCAL lock_timeout = 0"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:name)"), {"name": MIGRATING})
        return
    raw: Any = connection.connection.driver_connection
    raw.execute(f"PRAGMA busy_timeout = {LONGEST_MIGRATION_S * 1000}")
    raw.execute("BEGIN IMMEDIATE")


def migrate(url: str, *, allowed: bool = True) -> None:
    """Brings the schema at `url` up to date. Raises `Internal` when the database is newer than this
    program, or older and that is not `allowed`."""
    current = _current_revision(url)
    if current == head_revision():
        return
    if current is not None and current > head_revision():
        raise Internal(
            f"The database has schema {current}; this version of the portal knows {head_revision()}, and is "
            "too old for it."
        )
    if not allowed:
        raise Internal(
            f"The database has {f'schema {current}' if current else 'no schema yet'}; this version of the "
            f"portal needs {head_revision()}. When no older one uses it any more, start this one once with "
            "DATABASE_AUTO_MIGRATE=true."
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
