"""The commands of the operator on a portal that is not as it should be."""

from __future__ import annotations

import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli.__main__ import app
from app.cli.stack import Stack
from app.config import child_environment
from tests.support import free_port

COMMANDS = (
    ("invite",),
    ("audit", "verify"),
    ("servers", "list"),
    ("models", "list"),
    ("devices", "list"),
)

Refusals = Callable[[], list[str]]


@pytest.fixture
def refusals(tmp_path: Path) -> Refusals:
    """What the commands say of the portal in `tmp_path`: each refuses, without a traceback."""

    def run() -> list[str]:
        told = [CliRunner().invoke(app, [*words, "--state", str(tmp_path)]) for words in COMMANDS]
        assert {(one.exit_code, type(one.exception)) for one in told} == {(1, SystemExit)}
        return [one.output for one in told]

    return run


def test_a_wrong_setting_is_named_without_its_value(tmp_path: Path, refusals: Refusals) -> None:
    (tmp_path / ".env").write_text("SECRET_KEY=tulip\n")
    assert all("SECRET_KEY" in said and "tulip" not in said for said in refusals())


@pytest.mark.parametrize("option", ["--state", "--env-file"])
def test_a_portal_that_is_not_there_is_not_made(tmp_path: Path, option: str) -> None:
    for words in COMMANDS:
        told = CliRunner().invoke(app, [*words, option, str(tmp_path / "typo" / ".env")])
        assert (told.exit_code, "there is no such file" in told.output) == (1, True), told.output
    assert list(tmp_path.iterdir()) == []


def test_the_schema_is_changed_only_where_the_portal_may(tmp_path: Path, refusals: Refusals) -> None:
    (tmp_path / ".env").write_text("DATABASE_AUTO_MIGRATE=false\n")
    assert all("no schema yet" in said for said in refusals())


def test_an_audit_log_that_is_not_there_is_not_whole(tmp_path: Path) -> None:
    (tmp_path / ".env").touch()
    told = CliRunner().invoke(app, ["audit", "verify", "--state", str(tmp_path)])
    assert (told.exit_code, "no schema yet" in told.output) == (1, True), told.output


def test_a_database_that_does_not_answer(tmp_path: Path, refusals: Refusals) -> None:
    (tmp_path / ".env").write_text(f"DATABASE_URL=postgresql://me:tulip@127.0.0.1:{free_port()}/portal\n")
    assert all("The database cannot be used" in said and "tulip" not in said for said in refusals())


@pytest.mark.parametrize(
    "lines", ["SECRET_KEY=\nLLM_MODEL=m\n", "LLM_MODEL=m", 'SECRET_KEY=""\nLLM_MODEL=m\n']
)
def test_up_writes_a_secret_into_settings_that_have_none(tmp_path: Path, lines: str) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text(lines)
    stack = Stack(tmp_path)
    stack.prepare()
    written = env_file.read_text()
    assert len(stack.settings().secret_key.get_secret_value()) >= 48
    assert stack.settings().llm_model == "m"
    assert stat.S_IMODE(env_file.stat().st_mode) == 0o600
    stack.prepare()
    assert env_file.read_text() == written


def test_a_file_of_the_settings_that_is_wrong(tmp_path: Path) -> None:
    (tmp_path / ".env").touch()
    (tmp_path / "roles.toml").write_text("[x")
    told = CliRunner().invoke(app, ["invite", "--state", str(tmp_path)])
    assert (told.exit_code, "roles.toml: " in told.output) == (1, True), told.output
    assert isinstance(told.exception, SystemExit)


def test_the_link_is_alone_on_the_output(tmp_path: Path) -> None:
    (tmp_path / ".env").touch()
    invite = subprocess.run(
        [sys.executable, "-m", "app.cli", "invite", "--state", str(tmp_path)],
        env=child_environment({}),
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    (link,) = invite.stdout.splitlines()
    assert link.startswith("http://localhost:8000/join#")
    assert "database migrated" in invite.stderr
