"""`llamacpp_mqtt_deploy.py` as people run it, against a real broker and a real model."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from app.cli import supervisor
from app.cli.deploy import main
from app.cli.own_llm import own_llm
from app.cli.parts import Part
from app.config import child_environment
from app.events import new_id
from tests.fake_llm import FakeLLM, Script, text
from tests.support import (
    ROOT,
    GameClient,
    GuardedMosquitto,
    LlamaServer,
    MakePortal,
    Mosquitto,
    Process,
    free_port,
    wait_until,
)

pytestmark = pytest.mark.slow

PROGRAM = str(ROOT / "llamacpp_mqtt_deploy.py")


class Deployment(Process):
    """The program with a database in `directory`."""

    def __init__(self, directory: Path, port: int, flags: tuple[str, ...], **settings: str) -> None:
        directory.mkdir(exist_ok=True)
        command = [sys.executable, PROGRAM, "--mqtt_broker", "127.0.0.1", "--mqtt_port", str(port)]
        command += ["--database", str(directory / "mqtt.db"), *flags]
        super().__init__(command, directory / "deploy.log", child_environment(settings))

    def said(self) -> str:
        return self.log.read_text()

    def serving(self, *projects: str, seconds: float = 60) -> Deployment:
        """Waits until it serves the projects."""

        def begun() -> bool:
            assert self.alive(), self.said()
            lines = self.said().splitlines()
            served = [line for line in lines if "MQTT project is served" in line]
            return all(any(f"project={project}" in line for line in served) for project in projects)

        wait_until(begun, seconds, f"serving {projects}")
        return self

    def refused(self) -> str:
        """What it says when it ends by itself."""
        wait_until(lambda: not self.alive(), what="the end")
        assert self.stop() == 1, self.said()
        assert "Traceback" not in self.said()
        return self.said()


Deploy = Callable[..., Deployment]


@pytest.fixture
def deploy(tmp_path: Path, mosquitto: Mosquitto) -> Iterator[Deploy]:
    """Starts the program; what is left at the end is stopped."""
    made: list[Deployment] = []

    def start(*flags: str, name: str = "one", port: int = mosquitto.port, **settings: str) -> Deployment:
        made.append(Deployment(tmp_path / name, port, flags, **settings))
        return made[-1]

    yield start
    for deployment in made:
        deployment.stop()


@pytest.fixture
def project() -> str:
    """A project of each test's own: all tests share a broker."""
    return f"p{new_id()[-8:]}"


@pytest.fixture
def game(mosquitto: Mosquitto, project: str) -> Iterator[GameClient]:
    client = GameClient(mosquitto.port, f"{project}/#", "maze/assistant_response/#")
    yield client
    client.close()


def state_of(game: GameClient, project: str) -> str:
    """What the status topic said last."""
    found = game.messages(f"{project}/status")
    return str(json.loads(found[-1])["state"]) if found else ""


def online(game: GameClient, project: str) -> None:
    """Waits until the model answers."""
    game.wait_for(lambda: any(b'"online"' in said for said in game.messages_unlocked(f"{project}/status")))


def test_with_serve_it_starts_the_starter_model_itself(
    deploy: Deploy, game: GameClient, starter_model: Path
) -> None:
    running = deploy("--serve", "--projects", "maze", "--max-tokens=8").serving("maze")
    session = new_id()
    game.publish(f"maze/user_input/{session}", "Say hi")
    assert not game.reply(f"maze/assistant_response/{session}", seconds=60).startswith(b"Error")
    (llm,) = psutil.Process(running.pid).children()
    log = running.log.with_name("mqtt.db.llm.log")
    told = log.read_text()
    log.rename(log.with_suffix(".kept"))
    log.mkdir()  # a log that cannot be written, as on a full disk
    llm.kill()
    wait_until(lambda: "llama.cpp could not be run" in running.said(), what="the news")
    assert "llama.cpp died; starting it again" in running.said()
    log.rmdir()
    log.with_suffix(".kept").rename(log)
    (again,) = wait_until(lambda: psutil.Process(running.pid).children(), what="another llama.cpp")
    assert running.stop() == 0, running.said()
    assert not again.is_running()
    assert log.read_text().startswith(told), "what it said before it died is kept"


def test_its_llama_dies_with_it(deploy: Deploy, project: str, starter_model: Path) -> None:
    running = deploy("--serve", str(starter_model), "--projects", project).serving(project)
    (llm,) = psutil.Process(running.pid).children()
    running.kill()
    wait_until(lambda: not llm.is_running() or llm.status() == psutil.STATUS_ZOMBIE, what="the end of it")


async def test_the_log_of_its_llama_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "LOG_MOST_BYTES", 1000)
    chatter = "import sys, time\nwhile True: print('x' * 99, flush=True); time.sleep(0.001)"
    part = Part("llm", "LLM server", [sys.executable, "-c", chatter], 0, "", "", is_ready=lambda: True)
    log, old = tmp_path / "llm.log", tmp_path / "llm.old.log"
    async with own_llm(part, log):
        await asyncio.to_thread(wait_until, old.exists, what="another log")
    assert b"\0" not in old.read_bytes() + log.read_bytes()


FETCHING = """
import sys
from dataclasses import replace
from pathlib import Path
from app.cli import deploy, install

state, stack_of = Path(sys.argv[1]), deploy._own_llm
install.DEFAULT_STATE = state
deploy._own_llm = lambda *words: replace(stack_of(*words), state=state)
sys.exit(deploy.main(["--serve", "--projects", "maze", "--database", str(state / "mqtt.db")]))
"""
"""The program where no model is there yet."""


def test_a_signal_ends_it_while_it_fetches_the_model(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as index:
        url = f"http://127.0.0.1:{index.getsockname()[1]}/simple"
        environment = child_environment({"PIP_INDEX_URL": url, "PYTHONPATH": str(ROOT / "backend")})
        command = [sys.executable, "-c", FETCHING, str(tmp_path)]
        running = Process(command, tmp_path / "deploy.log", environment)
        index.settimeout(30)
        connection, _ = index.accept()
        with connection:
            (fetching,) = psutil.Process(running.pid).children()
            assert running.stop(5) == 0, running.log.read_text()
    assert not fetching.is_running()
    assert list((tmp_path / "models").iterdir()) == [], "nothing half done is left"


@pytest.mark.parametrize("notation", [["{a}", "{b}"], ["{a} {b}"], ["{a},{b}"]])
def test_projects_are_given_in_three_notations(
    deploy: Deploy, project: str, llama: LlamaServer, notation: list[str]
) -> None:
    names = f"{project}a", f"{project}b"
    words = [word.format(a=names[0], b=names[1]) for word in notation]
    deploy("--projects", *words, "--server-url", llama.url).serving(*names)


def test_flags_go_before_the_environment(
    deploy: Deploy, game: GameClient, project: str, llama: LlamaServer
) -> None:
    settings = {"MQTT_PROJECTS": project, "LLM_SERVER_URL": llama.url, "LLM_MAX_TOKENS": "1"}
    deploy("--max-tokens", "3", "--temperature", "0", **settings).serving(project)
    online(game, project)
    game.publish(f"{project}/user_input/s", {"message": "Say hi", "format": "json"})
    answer = json.loads(game.reply(f"{project}/assistant_response/s"))
    assert answer["usage"]["completion_tokens"] == 3


def test_so_many_sessions_are_answered_or_wait(
    deploy: Deploy, game: GameClient, project: str, fake_thread: FakeLLM
) -> None:
    fake_thread.script.gate = answer = threading.Event()
    flags = ["--projects", project, "--server_url", fake_thread.url]
    deploy(*flags, "--num_workers", "1", "--max_concurrent_sessions", "2").serving(project)
    statuses = f"{project}/status"
    asked = {"message": "hi", "format": "json"}
    game.publish(f"{project}/user_input/s1", asked)
    wait_until(lambda: fake_thread.running, what="a generation")
    game.publish(f"{project}/user_input/s2", asked)
    game.wait_for(lambda: any(b'"queue":1,' in said for said in game.messages_unlocked(statuses)))
    game.publish(f"{project}/user_input/s3", asked)
    refused = json.loads(game.reply(f"{project}/assistant_response/s3"))
    assert refused["error"]["code"] == "overloaded"
    answer.set()
    for session in ("s1", "s2"):
        assert json.loads(game.reply(f"{project}/assistant_response/{session}"))["type"] == "final"


def test_a_signal_lets_running_turns_end(
    deploy: Deploy, game: GameClient, project: str, fake_thread: FakeLLM
) -> None:
    fake_thread.script = Script(text("one ", "two"), between=1)
    running = deploy("--projects", project, "--server_url", fake_thread.url)
    running.serving(project)
    game.publish(f"{project}/user_input/s", "Say hi")
    wait_until(lambda: fake_thread.pieces == 1, what="the first piece")
    psutil.Process(running.pid).send_signal(signal.SIGTERM)
    assert game.reply(f"{project}/assistant_response/s") == b"one two"
    assert running.stop() == 0, running.said()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_well(
    deploy: Deploy, game: GameClient, project: str, llama: LlamaServer, number: signal.Signals
) -> None:
    running = deploy("--projects", project, "--server_url", llama.url, "--max_tokens", "4")
    running.serving(project)
    online(game, project)
    for session in ("s1", "s2"):
        game.publish(f"{project}/user_input/{session}", "Say hi")
        game.reply(f"{project}/assistant_response/{session}")
    psutil.Process(running.pid).send_signal(number)
    wait_until(lambda: not running.alive(), what="the end")
    assert running.stop() == 0, running.said()
    assert state_of(game, project) == "offline"
    told = re.search(r"statistics .*", running.said())
    assert told is not None
    assert re.search(r"\brequests=2\b", told[0]), told[0]
    assert re.search(r"\breplies=2\b", told[0]), told[0]
    assert re.search(r"\btokens=[1-9]\d+\b", told[0]), told[0]
    assert re.search(r"\bmean_latency_s=(?!0\.0 )\d+\.\d", told[0]), told[0]


def test_sessions_outlive_it(deploy: Deploy, game: GameClient, project: str, llama: LlamaServer) -> None:
    asked = {"message": "Say hi", "requestId": "r1", "format": "json", "maxTokens": 8}
    replies = []
    for number in (1, 2):
        running = deploy("--projects", project, "--server_url", llama.url).serving(project)
        online(game, project)
        game.publish(f"{project}/user_input/s", asked)
        replies.append(json.loads(game.reply(f"{project}/assistant_response/s", number)))
        running.stop()
    assert replies[0]["message_id"] == replies[1]["message_id"]


def test_it_refuses_beside_a_portal_of_the_same_project(
    deploy: Deploy,
    game: GameClient,
    project: str,
    llama: LlamaServer,
    mosquitto: Mosquitto,
    make_portal: MakePortal,
    tmp_path: Path,
) -> None:
    settings = {"LLM_SERVER_URL": llama.url, "MQTT_BROKER_URL": mosquitto.url, "MQTT_PROJECTS": project}
    make_portal(tmp_path, **settings).start()
    online(game, project)
    said = deploy("--projects", project, "--server_url", llama.url).refused()
    assert f"Another bridge serves {project} on mqtt://127.0.0.1:{mosquitto.port}" in said
    assert "--projects" in said
    deploy("--projects", f"{project}x", "--server_url", llama.url, name="two").serving(f"{project}x")


def test_whoever_answers_for_a_project_serves_it(deploy: Deploy, game: GameClient, project: str) -> None:
    game.publish(f"{project}/status", {"state": "degraded"}, retain=True)
    refused = deploy("--projects", project)
    game.reply(f"{project}/session")
    game.publish(f"{project}/session/response", "0123")
    assert f"Another bridge serves {project} " in refused.refused()


def test_a_status_that_nobody_stands_behind_stops_nothing(
    deploy: Deploy, game: GameClient, project: str, llama: LlamaServer
) -> None:
    game.publish(f"{project}/status", {"state": "online", "birth": "long ago"}, retain=True)
    running = deploy("--projects", project, "--server_url", llama.url).serving(project)
    assert f"a bridge that does not answer; going on project={project}" in running.said()
    running.stop()
    assert state_of(game, project) == "offline"


def test_a_broker_may_come_later(deploy: Deploy, project: str, tmp_path: Path, llama: LlamaServer) -> None:
    port = free_port()
    running = deploy("--projects", project, "--server_url", llama.url, port=port)
    wait_until(lambda: "the broker cannot be reached" in running.said(), what="the warning")
    broker = Mosquitto(tmp_path, port)
    running.serving(project)
    running.stop()
    broker.stop()


def test_a_broker_that_lets_it_not_in(deploy: Deploy, project: str, tmp_path: Path) -> None:
    broker = Mosquitto(tmp_path, open_to_all=False)
    said = deploy("--projects", project, "--mqtt-username", "ada", port=broker.port).refused()
    assert "--mqtt_password" in said
    broker.stop()


def test_a_broker_that_keeps_its_topics_from_it(deploy: Deploy, project: str, tmp_path: Path) -> None:
    broker = GuardedMosquitto(tmp_path)
    running = deploy("--projects", project, "--server_url", "http://127.0.0.1:9", port=broker.port)
    said = f"the broker refused a subscription filter={project}/user_input"
    wait_until(lambda: said in running.said(), 20, "the warning")
    psutil.Process(running.pid).send_signal(signal.SIGINT)
    wait_until(lambda: not running.alive(), what="the end")
    assert running.stop() == 0, running.said()
    assert "Traceback" not in running.said()
    broker.stop()


def test_one_database_is_for_one_of_them(deploy: Deploy, project: str, llama: LlamaServer) -> None:
    deploy("--projects", project, "--server_url", llama.url).serving(project)
    assert "--database" in deploy("--projects", f"{project}x", "--server_url", llama.url).refused()


def test_a_database_that_is_newer_is_left_alone(deploy: Deploy, project: str, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    with closing(sqlite3.connect(tmp_path / "one" / "mqtt.db")) as database:
        database.execute("CREATE TABLE alembic_version AS SELECT '9999' AS version_num")
    assert "9999" in deploy("--projects", project).refused()


def test_a_model_that_is_none(deploy: Deploy, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_text("no model")
    said = deploy("--serve", str(model)).refused()
    assert "llama.cpp does not start" in said
    assert "is no GGUF model file" in said


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--temperature", "3"], "--temperature"),
        (["--top-p", "much"], "--top_p"),
        (["--max_tokens", "0"], "--max_tokens"),
        (["--server_url", "localhost"], "--server_url"),
        (["--server_url", "http://192.0.2.1", "--serve"], "--server_url"),
        (["--mqtt_port", "70000"], "--mqtt_port"),
        (["--mqtt_broker", "http://localhost"], "--mqtt_broker"),
        (["--mqtt_broker", "mqtt://me:tulip@localhost"], "--mqtt_broker"),
        (["--projects", ","], "--projects"),
        (["--projects", "a/b"], "--projects"),
        (["--skip_thinking", "maybe"], "--skip_thinking"),
        (["--max_concurrent_sessions", "0"], "--max_concurrent_sessions"),
        (["--serve", "missing.gguf"], "--serve"),
        (["--database", "/missing/mqtt.db"], "--database"),
        (["--log_level", "loud"], "--log_level"),
        (["--temprature", "1"], "--temprature"),
    ],
)
def test_wrong_flags_are_named_in_one_line(
    flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        sys.exit(main(flags))
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert "tulip" not in line


def test_without_the_packages_it_says_what_to_run(tmp_path: Path) -> None:
    alone = tmp_path / "llamacpp_mqtt_deploy.py"
    alone.write_text(Path(PROGRAM).read_text())
    done = subprocess.run(
        [sys.executable, "-S", str(alone)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "setup_llm.sh install" in line
