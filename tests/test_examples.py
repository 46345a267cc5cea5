"""The example client in Python, as people run it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.events import new_id
from tests.fake_llm import FakeLLM, text
from tests.support import (
    ROOT,
    GameClient,
    GuardedMosquitto,
    MakePortal,
    Mosquitto,
    Portal,
    Process,
    wait_until,
)

CLIENT = str(ROOT / "docs" / "examples" / "python_client.py")


@pytest.fixture
def project() -> str:
    return f"p{new_id()[-8:]}"


@pytest.fixture
def adviser(
    fake_thread: FakeLLM, mosquitto: Mosquitto, make_portal: MakePortal, tmp_path: Path, project: str
) -> Portal:
    """The portal, with a model that says what a test tells it to; not started yet."""
    settings = {"LLM_SERVER_URL": fake_thread.url, "MQTT_BROKER_URL": mosquitto.url}
    return make_portal(tmp_path, **settings, MQTT_PROJECTS=project, PROJECTS_FILE="none.toml")


Start = Callable[..., Process]


@pytest.fixture
def start(mosquitto: Mosquitto, project: str, tmp_path: Path) -> Iterator[Start]:
    """Starts the client with some flags; what still runs at the end is stopped."""
    made: list[Process] = []

    def client(*flags: str) -> Process:
        command = [sys.executable, CLIENT, "--port", str(mosquitto.port), "--project", project, *flags]
        made.append(Process(command, tmp_path / "client.log"))
        return made[-1]

    yield client
    for running in made:
        running.stop()


def shown(client: Process) -> str:
    """What it has printed when it ends."""
    wait_until(lambda: not client.alive(), 40, "the client's end")
    assert client.stop() == 0, client.log.read_text()
    return client.log.read_text()


def test_a_state_is_answered_by_a_hint(adviser: Portal, fake_thread: FakeLLM, start: Start) -> None:
    adviser.start()
    fake_thread.script.pieces = text(json.dumps({"hint": "Go left."}))
    hint = json.loads(shown(start("--state", '{"player": {"x": 1, "y": 1}}')))
    assert hint["hint"] == "Go left."
    assert hint["requestId"]


def test_a_message_is_answered_piece_by_piece(adviser: Portal, start: Start) -> None:
    adviser.start()
    assert shown(start("--message", "hi")).splitlines() == ["Hello there", "(final) Hello there"]


def test_it_asks_until_somebody_answers(
    adviser: Portal, fake_thread: FakeLLM, mosquitto: Mosquitto, project: str, start: Start
) -> None:
    topic = f"{project}/user_input/s"
    watcher = GameClient(mosquitto.port, topic)
    running = start("--session", "s", "--message", "hi")
    first = watcher.reply(topic)
    assert watcher.reply(topic, 2) == first
    watcher.close()
    adviser.start()
    assert "(final) Hello there" in shown(running)
    assert len(fake_thread.requests) == 1


def test_it_says_so_when_it_may_not_listen(start: Start, project: str, tmp_path: Path) -> None:
    broker = GuardedMosquitto(tmp_path)
    running = start("--port", str(broker.port), "--message", "hi")
    wait_until(lambda: not running.alive(), 20, "the client's end")
    assert running.stop() == 1
    assert f"does not let this client listen to {project}/" in running.log.read_text()
    broker.stop()


def test_its_help_tells_everything() -> None:
    done = subprocess.run([sys.executable, CLIENT, "--help"], capture_output=True, text=True, check=True)
    assert all(flag in done.stdout for flag in ("--state", "--message", "--device", "--broker"))
