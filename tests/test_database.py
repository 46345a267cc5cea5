from __future__ import annotations

import asyncio
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path
from subprocess import PIPE, STDOUT

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import Connection, select, text
from sqlalchemy.exc import OperationalError

from app.config import BACKEND_DIR
from app.database import MIGRATIONS, Database, create_portal_engine, head_revision, migrate
from app.errors import Conflict, Internal, StorageUnavailable
from app.models.tables import metadata, template_versions
from app.writing import defer


def test_the_migrations_make_the_tables(database_url: str) -> None:
    migrate(database_url)
    migrate(database_url)
    engine = create_portal_engine(database_url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        version = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
        assert version == head_revision()
    engine.dispose()


def test_of_processes_that_start_at_once_one_migrates(database_url: str) -> None:
    migrates = "import sys; from app.database import migrate; sys.stdin.readline(); migrate(sys.argv[1])"
    command = [sys.executable, "-c", migrates, database_url]
    started = [
        subprocess.Popen(command, cwd=BACKEND_DIR, stdin=PIPE, stdout=PIPE, stderr=STDOUT, text=True)
        for _ in range(4)
    ]
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    told = [process.communicate(timeout=60)[0] for process in started]
    assert [process.returncode for process in started] == [0] * 4, told


def test_who_was_an_admin_is_one_after_the_upgrade(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'old.db'}"
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["url"] = url
    command.upgrade(config, "0002")
    engine = create_portal_engine(url)
    with engine.begin() as connection:
        for name, is_admin in (("ada", True), ("bo", False)):
            values = {"id": name, "email": f"{name}@example.org", "is_admin": is_admin}
            user = text("INSERT INTO users VALUES (:id, :id, :email, 'hash', :is_admin, 1)")
            connection.execute(user, values)
            connection.execute(
                text("INSERT INTO sign_ins VALUES (:id, :id, 1, '', 1, 1, 2, NULL)"), {"id": name}
            )
    migrate(url)
    with engine.connect() as connection:
        roles = connection.execute(text("SELECT id, role, closed_at FROM users ORDER BY id")).all()
        assert [tuple(row) for row in roles] == [("ada", "admin", None), ("bo", "author", None)]
        assert connection.execute(text("SELECT count(*) FROM sign_ins")).scalar() == 2
    command.downgrade(config, "0002")
    with engine.connect() as connection:
        admins = connection.execute(text("SELECT id FROM users WHERE is_admin")).scalars().all()
        assert admins == ["ada"]
    engine.dispose()


def test_the_variables_of_old_templates_are_known_after_the_upgrade(database_url: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["url"] = database_url
    command.upgrade(config, "0011")
    engine = create_portal_engine(database_url)
    contents = {"good": "{{ b }}, {{ a }}{{ c | default('') }}", "bad": "{{ a.b() }}"}
    with engine.begin() as connection:
        template = (
            "INSERT INTO templates (id, owner, latest, created_at, updated_at) VALUES ('t', 'u', 2, 1, 1)"
        )
        connection.execute(text(template))
        for number, (name, content) in enumerate(contents.items()):
            version = "INSERT INTO template_versions VALUES (:name, 't', :number, '', '', :content, 1)"
            connection.execute(text(version), {"name": name, "number": number, "content": content})
    migrate(database_url)
    with engine.connect() as connection:
        found = connection.execute(select(template_versions)).all()
    names = {row.id: (row.variables, row.optional) for row in found}
    assert names == {"good": (["a", "b"], ["c"]), "bad": ([], [])}
    engine.dispose()
    command.downgrade(config, "0011")


@pytest.mark.parametrize(
    ("schema", "said"), [(None, "no schema yet"), ("0001", "DATABASE_AUTO_MIGRATE"), ("9999", "too old")]
)
def test_a_schema_that_may_not_be_changed_must_be_the_right_one(
    database_url: str, schema: str | None, said: str
) -> None:
    engine = create_portal_engine(database_url)
    if schema is not None:
        migrate(database_url)
        migrate(database_url, allowed=False)
        with engine.begin() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = :n"), {"n": schema})
    with pytest.raises(Internal, match=said):
        migrate(database_url, allowed=False)
    with engine.connect() as connection:
        assert engine.dialect.has_table(connection, "users") == (schema is not None)
    engine.dispose()


def modes(directory: Path) -> dict[str, int]:
    return {file.name: stat.S_IMODE(file.stat().st_mode) for file in directory.iterdir()}


def test_nobody_else_reads_the_database(tmp_path: Path) -> None:
    url, file = f"sqlite:///{tmp_path / 'own.db'}", tmp_path / "own.db"
    private = dict.fromkeys(("own.db", "own.db-wal", "own.db-shm"), 0o600)

    def use() -> dict[str, int]:
        engine = create_portal_engine(url)
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE IF NOT EXISTS t (n)"))
            found = modes(tmp_path)
        engine.dispose()
        return found

    assert use() == private
    file.chmod(0o644)
    assert use() == private, "one of an earlier version too"
    file.chmod(0o660)
    assert set(use().values()) == {0o660}, "what is given to a group stays so"


async def test_writes_are_in_order_and_outlast_the_close(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'order.db'}"
    database = Database(url)
    await database.open()
    await database.write(lambda c: c.execute(text("CREATE TABLE t (n INTEGER PRIMARY KEY AUTOINCREMENT, v)")))
    writes = [
        asyncio.create_task(database.write(lambda c, n=n: c.execute(text(f"INSERT INTO t (v) VALUES ({n})"))))  # type: ignore[misc]
        for n in range(600)
    ]
    await asyncio.sleep(0)
    await database.close()
    await asyncio.gather(*writes)
    engine = create_portal_engine(url)
    with engine.connect() as connection:
        assert list(connection.execute(text("SELECT v FROM t ORDER BY n")).scalars()) == list(range(600))
    engine.dispose()


async def test_nobody_waits_for_a_lock_for_ever(postgres_url: str) -> None:
    url = postgres_url.replace("postgresql://", "postgresql+psycopg://")
    database = Database(url)
    await database.open()
    await database.write(lambda c: c.execute(text("CREATE TABLE t (n INTEGER PRIMARY KEY)")))
    await database.write(lambda c: c.execute(text("INSERT INTO t VALUES (1), (2)")))
    update = "UPDATE t SET n = n + 10 WHERE n = "
    with psycopg.connect(postgres_url) as somebody:
        somebody.execute("SELECT * FROM t WHERE n = 1 FOR UPDATE")
        async with asyncio.timeout(10):
            locked = [database.write(lambda c: c.execute(text(f"{update} 1"))) for _ in range(20)]
            refused = await asyncio.gather(*locked, return_exceptions=True)
            assert {type(error) for error in refused} == {StorageUnavailable}
            await database.write(lambda c: c.execute(text(f"{update} 2")))
    shown = "SHOW idle_in_transaction_session_timeout"
    assert await database.read(lambda c: c.execute(text(shown)).scalar()) == "10s", "nor are others to wait"
    await database.close()


async def test_what_may_have_been_committed_is_not_done_again(postgres_url: str) -> None:
    url = postgres_url.replace("postgresql://", "postgresql+psycopg://")
    database, begun, gate = Database(url), threading.Event(), threading.Event()
    await database.open()
    await database.write(lambda c: c.execute(text("CREATE TABLE t (n INTEGER)")))

    def hold(_connection: Connection) -> None:
        begun.set()
        gate.wait(10)

    def end_all(connection: Connection) -> None:
        with psycopg.connect(postgres_url, autocommit=True) as other:
            others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = %s"
            other.execute(others, [connection.execute(text("SELECT pg_backend_pid()")).scalar()])

    def insert(connection: Connection) -> None:
        connection.execute(text("INSERT INTO t VALUES (1)"))

    first = asyncio.create_task(database.write(hold))
    await asyncio.to_thread(begun.wait, 10)  # before it began, it would be of the same group
    group = [
        asyncio.create_task(database.write(operation)) for operation in (insert, end_all, insert, insert)
    ]
    await asyncio.sleep(0)
    gate.set()  # what came meanwhile is one group
    await first
    told = await asyncio.gather(*group, return_exceptions=True)
    assert {type(error) for error in told} == {StorageUnavailable}
    await database.write(lambda c: c.execute(text("INSERT INTO t VALUES (2)")))
    assert await database.read(lambda c: c.execute(text("SELECT n FROM t")).scalars().all()) == [2]
    await database.close()


async def test_what_is_not_committed_is_no_answer(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'full.db'}"

    def full(_connection: Connection, _items: list[object]) -> None:
        raise OperationalError("COMMIT", None, sqlite3.OperationalError("database or disk is full"))

    database = Database(url, full)
    await database.open()
    outcome = await asyncio.gather(
        database.write(lambda _: Conflict("There is one."), short=True),
        database.write(lambda c: defer(c, "item"), short=True),
        return_exceptions=True,
    )
    assert [type(error) for error in outcome] == [StorageUnavailable] * 2
    await database.close()
