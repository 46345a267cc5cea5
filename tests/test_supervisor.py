"""What the supervisor does while its parts run: here the broker alone, which is looked at often."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.cli import supervisor
from app.cli.parts import Part, parts_of
from app.cli.stack import HOST, Stack
from app.cli.supervisor import PartState, Supervisor, process, read_state
from tests.support import free_port, program, wait_until

LOG_MOST_BYTES = 100_000


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stack:
    monkeypatch.setattr(supervisor, "WATCH_S", 0.05)
    monkeypatch.setattr(supervisor, "LOG_MOST_BYTES", LOG_MOST_BYTES, raising=False)
    return Stack(tmp_path / "state", mqtt_port=free_port(), mqtt_ws_port=0)


@asynccontextmanager
async def supervised(stack: Stack) -> AsyncIterator[None]:
    """With the broker of a stack running."""
    stack.prepare()
    (broker, _) = parts_of(stack, None, program("mosquitto"), stack.portal_settings())
    ready = asyncio.Event()

    def report(part: Part | None) -> None:
        if part is None:
            ready.set()

    running = asyncio.create_task(Supervisor(stack, [broker], report).run())
    await ready.wait()
    try:
        yield
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        await running


async def until(condition: Callable[[], Any], what: str) -> None:
    await asyncio.to_thread(wait_until, condition, what=what)


def broker_of(stack: Stack) -> PartState:
    state = read_state(stack)
    assert state is not None
    return state.parts["broker"]


async def test_a_full_disk_ends_no_supervision(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    said = ""

    def is_told() -> bool:
        nonlocal said
        said += capsys.readouterr().out
        return said.count("could not be run") >= 2

    log = stack.logs / "broker.log"
    async with supervised(stack):
        died = broker_of(stack).pid
        for file in (log, stack.state / "supervisor.new"):  # as root, too, no directory can be written
            file.unlink(missing_ok=True)
            file.mkdir()
        os.kill(died, signal.SIGKILL)
        await until(is_told, "two tries")
        log.rmdir()
        (stack.state / "supervisor.new").rmdir()
        await until(lambda: broker_of(stack).state == "ready" and broker_of(stack).pid != died, "its return")
        assert process(broker_of(stack).pid, broker_of(stack).created)
    assert re.search(
        r"^! \d{4}-\d\d-\d\d [\d:]{8} The MQTT broker ended with code -9; it is started again", said
    )


async def test_a_log_is_begun_anew_while_the_broker_writes_it(stack: Stack) -> None:
    log, old = stack.logs / "broker.log", stack.logs / "broker.old.log"
    async with supervised(stack):
        await grown(log, old)
        with socket.create_connection((HOST, stack.mqtt_port)):
            await until(lambda: log.stat().st_size > 0, "another line")
        assert b"\0" not in log.read_bytes(), "it goes on at the beginning"
        await grown(log, old)
        assert old.read_text().count("New connection") == 1, "to be looked at leaves no trace"


async def grown(log: Path, old: Path) -> None:
    """Waits until a log that grew too long was begun anew."""
    os.truncate(log, LOG_MOST_BYTES + 1)
    await until(lambda: log.stat().st_size <= LOG_MOST_BYTES < old.stat().st_size, "a new log")


def set_clock(directory: Path, *pids: int) -> None:
    """Makes a `/proc` of an hour later, with these processes."""
    for pid in pids:
        (directory / str(pid)).symlink_to(f"/proc/{pid}")
    stat = Path("/proc/stat").read_text()
    (directory / "stat").write_text(re.sub(r"(?<=btime )\d+", lambda found: str(int(found[0]) + 3600), stat))


async def test_a_clock_that_is_set_changes_no_process(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with supervised(stack):
        broker = broker_of(stack)
        set_clock(tmp_path, os.getpid(), broker.pid)
        with monkeypatch.context() as patch:
            patch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
            state = read_state(stack)
            assert state is not None
            assert state.is_running
            assert process(broker.pid, broker.created)
