"""Starting the backend by hand."""

from __future__ import annotations

import io
import re
import shutil
import socket
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path
from unittest import mock

import httpx
import pytest

import run_server
from app.config import EXAMPLE_FILE, child_environment
from tests.support import ROOT, MakePortal, free_port

pytestmark = pytest.mark.slow


def refuse(*words: str) -> str:
    """What `run_server.py` says when it does not start."""
    command = [sys.executable, str(ROOT / "backend" / "run_server.py"), *words]
    done = subprocess.run(
        command, env=child_environment({}), capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def refuse_settings(directory: Path, lines: str, port: int | None = None) -> str:
    """What it says of settings with which it does not start: in this process, since nothing has begun by
    then."""
    env_file = directory / ".env"
    env_file.write_text(lines)
    words = ["run_server.py", "--port", str(port or free_port()), "--env-file", str(env_file)]
    with mock.patch.object(sys, "argv", words), redirect_stderr(io.StringIO()) as said:
        assert run_server.main() == 2
    return said.getvalue()


def test_with_the_example_settings_it_serves_on_loopback(tmp_path: Path, make_portal: MakePortal) -> None:
    portal = make_portal(tmp_path)
    shutil.copy(EXAMPLE_FILE, portal.env_file)
    portal.start(ready=False)
    with portal.client() as web:
        assert web.get("/api/auth/me").json()["role"] == "author"
    assert httpx.get(f"{portal.url}/health/ready").json()["database"] == "ok"
    assert portal.stop() == 0
    assert "SECRET_KEY is empty" in portal.log.read_text()
    assert "invite --role admin" in portal.log.read_text()
    assert re.search(rf" serving +url={portal.url}\n", portal.log.read_text())
    assert (tmp_path / "portal.db").exists()


def test_elsewhere_it_wants_a_secret(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.touch()
    said = refuse("--host", "0.0.0.0", "--port", str(free_port()), "--env-file", str(env_file))
    assert re.search(r"SECRET_KEY is empty.*0\.0\.0\.0", said)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("SECRET_KEY=changeme-changeme-changeme-changeme", "SECRET_KEY: "),
        ("SECRET_KEY=short", "SECRET_KEY: "),
        ("LLM_TIMEOUT=soon", "LLM_TIMEOUT: "),
    ],
)
def test_wrong_settings_are_named_without_their_values(tmp_path: Path, line: str, said: str) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text(line)
    output = refuse("--port", str(free_port()), "--env-file", str(env_file))
    assert said in output
    assert line.split("=")[1] not in output


def test_a_port_that_cannot_be_used(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for port in (taken.getsockname()[1], 70000):
            assert f"Port {port}" in refuse_settings(tmp_path, "", port)


def test_settings_that_are_not_there(tmp_path: Path) -> None:
    said = refuse("--port", str(free_port()), "--env-file", str(tmp_path / "typo.env"))
    assert "there is no such file" in said
    assert list(tmp_path.iterdir()) == [], "no database is made beside them"


def test_a_database_that_is_newer_is_left_alone(tmp_path: Path, make_portal: MakePortal) -> None:
    import sqlite3

    portal = make_portal(tmp_path).start(ready=False)
    portal.stop()
    with sqlite3.connect(tmp_path / "portal.db") as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    database.close()
    for setting in ("", "DATABASE_AUTO_MIGRATE=false\n"):
        with portal.env_file.open("a") as settings:
            settings.write(setting)
        portal.log.write_text("")
        with pytest.raises(AssertionError, match="9999"):
            portal.start(ready=False)
