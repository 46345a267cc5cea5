"""Starts the real parts that tests need: the portal, llama.cpp, Mosquitto, PostgreSQL, Redis."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from app.access import ALL_RIGHTS, Identity, Role
from app.cli.broker import BrokerConfig, find_plugin, make_credentials
from app.cli.install import find_program
from app.cli.people import invite
from app.config import Settings, child_environment
from app.events import new_id
from app.services.llm_client import LLMClient

ROOT = Path(__file__).resolve().parent.parent

_told = os.environ  # noqa: TID251 - by pytest-xdist
WORKERS = int(_told.get("PYTEST_XDIST_WORKER_COUNT", "1"))
"""How many processes run tests at once."""
WORKER = int(_told.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
"""Which of them this is, from 0 on."""

SECRET = "kT9vQ2mX7pLw4ZrN8sBd3HfYc6JgUeA1oRiV5tKy"


PASSWORD = "correct horse"

NO_PROMPTS = {"PROJECTS_FILE": str(ROOT / "tests" / "projects.toml")}
"""Settings for tests that are not about projects: their sessions begin with no prompt but their own."""

UNLIMITED = {
    **NO_PROMPTS,
    "RATE_LIMIT_PER_HOUR": "0",
    "RATE_LIMIT_SESSION_PER_MINUTE": "0",
    "MAX_TURNS_PER_USER": "0",
}
"""Settings for tests that are not about limits."""


def person(name: str = "1", role: Role = ALL_RIGHTS, **changes: Any) -> Identity:
    """Somebody with an account."""
    return Identity(**{"owner": f"user:{name}", "role_name": "tester", "role": role, **changes})


def _ports() -> Iterator[int]:
    """Each once, in any order. They lie below those that the system gives to outgoing connections, one of
    which could take a port before it is used; those of another worker of pytest are not among them."""
    share = 12_000 // WORKERS
    first = 20_000 + share * WORKER
    yield from random.sample(range(first, first + share), share)


_unused_ports = _ports()


def free_port() -> int:
    """A port that nobody listens on, and that is given to nobody else."""
    for port in _unused_ports:
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("all ports are used up")


def wait_until(condition: Callable[[], Any], seconds: float = 40.0, what: str = "the condition") -> Any:
    """The first true value of `condition()`; fails when there is none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"{what} did not come about within {seconds} s")


def answers(port: int) -> bool:
    """Whether something listens on the port."""
    with socket.socket() as sock:
        sock.settimeout(1)
        return sock.connect_ex(("127.0.0.1", port)) == 0


def program(name: str) -> str:
    """The path of an installed program, also where it is not on a user's PATH."""
    found = find_program(name)
    assert found, f"{name} is needed; `./setup_llm.sh test` installs it"
    return found


class Process:
    """A program with its output in a file."""

    def __init__(self, command: list[str], log: Path, env: dict[str, str] | None = None) -> None:
        self.log = log
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env
            )

    @property
    def pid(self) -> int:
        return self._popen.pid

    def alive(self) -> bool:
        return self._popen.poll() is None

    def kill(self) -> None:
        """As `kill -9`."""
        self._popen.kill()
        self._popen.wait()

    def stop(self, seconds: float = 15.0) -> int:
        """As Ctrl-C in a service manager; returns the exit code."""
        if self.alive():
            self._popen.send_signal(signal.SIGTERM)
        return self._popen.wait(seconds)

    def ready(self, port: int, seconds: float = 60.0) -> None:
        """Waits until it listens."""

        def listening() -> bool:
            assert self.alive(), self.log.read_text()
            return answers(port)

        wait_until(listening, seconds, f"{self.log.stem} on port {port}")


class LlamaServer:
    """llama.cpp with the starter model."""

    def __init__(self, model: Path, directory: Path, *, slots: int = 4, context: int = 2048) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", "app.cli.llm_server", "--model", str(model)]
        self._command += ["--port", str(self.port), "--slots", str(slots), "--ctx", str(context)]
        self._command += ["--threads", "1"]  # the portal, a browser and other tests need cores too
        self._log = directory / "llama.log"
        self.start()

    def start(self) -> None:
        self._process = Process(self._command, self._log, child_environment({}))
        self._process.ready(self.port)

    def pause(self) -> None:
        """Stops the server in its tracks until `resume`."""
        os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self._process.pid, signal.SIGCONT)

    def stop(self) -> None:
        self._process.stop()


class Mosquitto:
    """A broker on a port of its own, with its state in `directory`; for browsers also with WebSockets. It
    lets everybody in, or nobody."""

    def __init__(
        self,
        directory: Path,
        port: int | None = None,
        *,
        websockets: bool = False,
        open_to_all: bool = True,
        max_packet_size: int = 0,
    ) -> None:
        self.port = port or free_port()
        self.url = f"mqtt://127.0.0.1:{self.port}"
        self.ws_port = free_port() if websockets else 0
        self._config = directory / "mosquitto.conf"
        lines = [f"allow_anonymous {str(open_to_all).lower()}", f"listener {self.port} 127.0.0.1"]
        lines += ["set_tcp_nodelay true"]
        lines += ["persistence true", f"persistence_location {directory}/", "max_queued_messages 100000"]
        if max_packet_size:
            lines += [f"max_packet_size {max_packet_size}"]
        if websockets:
            lines += [f"listener {self.ws_port} 127.0.0.1", "protocol websockets"]
        self._config.write_text("\n".join([*lines, "user root", ""]))
        self.start()

    def start(self) -> None:
        log = self._config.with_suffix(".log")
        self._process = Process([program("mosquitto"), "-c", str(self._config)], log)
        self._process.ready(self.port)

    def stop(self) -> None:
        self._process.stop()


class GuardedMosquitto:
    """A broker with dynamic security and WebSockets, as the setup runs it."""

    def __init__(self, directory: Path, **changes: Any) -> None:
        self.port = free_port()
        self.url = f"mqtt://127.0.0.1:{self.port}"
        self.portal = make_credentials(directory)
        plugin = find_plugin(program("mosquitto"))
        assert plugin, "Mosquitto's dynamic security plugin is needed"
        values = {"host": "127.0.0.1", "listen": "127.0.0.1", "plugin": plugin, **changes}
        self.config = BrokerConfig(directory / "mosquitto", port=self.port, **values)
        self._log = directory / "mosquitto.log"
        self.start()

    @property
    def settings(self) -> dict[str, str]:
        """What a portal needs to write its rules."""
        return {
            "MQTT_BROKER_URL": self.url,
            "MQTT_USERNAME": self.portal.username,
            "MQTT_PASSWORD": self.portal.password,
            "MQTT_ACL": "mosquitto",
        }

    def start(self) -> None:
        self.config.write(self.portal)
        self._process = Process([program("mosquitto"), "-c", str(self.config.file)], self._log)
        self._process.ready(self.port)

    def stop(self) -> None:
        self._process.stop()

    def kill(self) -> None:
        self._process.kill()

    def forget(self) -> None:
        """Loses what the plugin has stored, and starts as it did the first time."""
        self.stop()
        (self.config.data / "dynamic-security.json").unlink()
        self.start()


class Redis:
    """A Redis that keeps nothing on the disk."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        command = [program("redis-server"), "--port", str(self.port), "--bind", "127.0.0.1"]
        self._command = [*command, "--save", "", "--appendonly", "no"]
        self._log = directory / "redis.log"
        self.start()

    def start(self) -> None:
        self._process = Process(self._command, self._log)
        self._process.ready(self.port)

    def pause(self) -> None:
        """Stops the server in its tracks until `resume`."""
        os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self._process.pid, signal.SIGCONT)

    def stop(self) -> None:
        self._process.stop()


class Portal:
    """The backend in a process of its own, as `tests/server.py` starts it."""

    program = ROOT / "tests" / "server.py"

    def __init__(self, directory: Path, **settings: str) -> None:
        self.directory = directory
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.env_file = directory / ".env"
        values = {"SECRET_KEY": SECRET, "LOG_LEVEL": "info", "DRAIN_TIMEOUT": "0", **UNLIMITED, **settings}
        self.env_file.write_text("".join(f"{name}={value}\n" for name, value in values.items()))
        self.log = directory / "portal.log"
        self.process: Process | None = None
        self._times: list[str] = []
        self._accounts: set[str] = set()

    def with_times(self, times: Mapping[str, float]) -> Portal:
        """Lets it start with other times than its own, which a test would have to sit through: constants of
        its modules, as `{"app.services.drain.LOOK_S": 0.5}`."""
        self._times = [f"{name}={seconds}" for name, seconds in times.items()]
        return self

    def start(self, *, ready: bool = True) -> Portal:
        command = [sys.executable, str(self.program), *self._times]
        command += ["--port", str(self.port), "--env-file", str(self.env_file)]
        self.process = Process(command, self.log, child_environment({}))
        self.process.ready(self.port)
        wait_until(lambda: self._get("/health/live"), what="liveness")
        if ready:
            wait_until(lambda: self._get("/health/ready"), what="readiness")
        return self

    def _get(self, path: str) -> bool:
        assert self.process is not None
        assert self.process.alive(), self.log.read_text()[-3000:]
        try:
            return httpx.get(self.url + path, timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def alive(self) -> bool:
        return self.process is not None and self.process.alive()

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()

    def stop(self) -> int:
        assert self.process is not None
        return self.process.stop()

    @contextmanager
    def client(self, username: str = "ada", role: str | None = None) -> Iterator[httpx.Client]:
        """An HTTP client that is signed in; the account is made when it is new, with the role."""
        account = {"username": username, "email": f"{username}@example.org", "password": PASSWORD}
        with httpx.Client(base_url=self.url, timeout=60) as client:
            if username not in self._accounts:
                if role is not None:
                    account["invitation"] = self._invitation(role)
                registered = client.post("/api/auth/register", json=account)
                assert registered.status_code in {201, 409}, registered.text
                self._accounts.add(username)
            token = client.post("/api/auth/login", json=account).json()["access_token"]
            client.headers["Authorization"] = f"Bearer {token}"
            yield client

    def _invitation(self, role: str) -> str:
        # On a thread of its own: it runs an event loop, and the caller may be within one.
        with ThreadPoolExecutor(1) as pool:
            return str(pool.submit(invite, self.env_file, role).result().secret)


MakePortal = Callable[..., Portal]
"""The fixture `make_portal`."""


def owner_of(client: httpx.Client) -> str:
    """The owner of what the client makes."""
    return f"user:{client.get('/api/auth/me').json()['id']}"


def ask(client: httpx.Client, session: str | None = None, **body: Any) -> httpx.Response:
    """Sends a message, in a new session where none is named."""
    asked = {"session_id": session or new_id(), "message": "hi", **body}
    return client.post("/api/llm/chat/session", json=asked)


def token_of(client: httpx.Client) -> str:
    """The access token that a client sends."""
    return client.headers["Authorization"].removeprefix("Bearer ")


class GameClient:
    """An MQTT client as games have it: it keeps what it receives."""

    def __init__(
        self,
        port: int,
        *subscriptions: str,
        protocol: MQTTProtocolVersion | None = None,
        username: str = "",
        password: str = "",
    ) -> None:
        self.received: list[tuple[str, bytes, bool]] = []
        self.properties: list[Any] = []
        """MQTT 5's, of each that was received."""
        self._change = threading.Condition()
        self._subscribed = threading.Event()
        self._client = paho.Client(
            CallbackAPIVersion.VERSION2, protocol=protocol or MQTTProtocolVersion.MQTTv311
        )

        if username:
            self._client.username_pw_set(username, password)

        def connected(*_: Any) -> None:
            self._client.subscribe([(topic, 1) for topic in subscriptions])

        def subscribed(*_: Any) -> None:
            self._subscribed.set()

        def message(_client: Any, _data: Any, received: paho.MQTTMessage) -> None:
            with self._change:
                self.received.append((received.topic, bytes(received.payload), received.retain))
                self.properties.append(received.properties)
                self._change.notify_all()

        self._client.on_connect, self._client.on_subscribe = connected, subscribed
        self._client.on_message = message
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        assert self._subscribed.wait(10)

    def publish(self, topic: str, payload: Any, *, retain: bool = False, **properties: Any) -> None:
        """Publishes at QoS 1 and waits for the broker's confirmation. Dicts go as JSON; `properties` are
        MQTT 5's, such as `ResponseTopic`."""
        data = json.dumps(payload) if isinstance(payload, dict) else payload
        said = Properties(PacketTypes.PUBLISH) if properties else None  # type: ignore[no-untyped-call]
        for name, value in properties.items():
            setattr(said, name, value)
        self._client.publish(topic, data, qos=1, retain=retain, properties=said).wait_for_publish(10)

    def json_replies(self, topic: str) -> list[dict[str, Any]]:
        """What has come on a topic, as JSON."""
        return [json.loads(payload) for payload in self.messages(topic)]

    def messages(self, topic: str) -> list[bytes]:
        """What has come on a topic."""
        with self._change:
            return [payload for name, payload, _ in self.received if name == topic]

    def wait_for(self, condition: Callable[[], Any], seconds: float = 60.0) -> Any:
        """The first true value of `condition()`, looked at whenever a message comes."""
        with self._change:
            found = self._change.wait_for(condition, seconds)
        assert found, f"it did not come within {seconds} s; received: {self.received[-20:]}"
        return found

    def reply(self, topic: str, number: int = 1, seconds: float = 60.0) -> bytes:
        """The `number`th message on a topic."""
        self.wait_for(lambda: len(self.messages_unlocked(topic)) >= number, seconds)
        return self.messages(topic)[number - 1]

    def messages_unlocked(self, topic: str) -> list[bytes]:
        return [payload for name, payload, _ in self.received if name == topic]

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


def can_sign_in(port: int, username: str, password: str) -> bool:
    """Whether the broker lets this user in."""
    answers: list[bool] = []
    client = paho.Client(CallbackAPIVersion.VERSION2)
    client.username_pw_set(username, password)
    client.on_connect = lambda _c, _d, _f, reason, _p: answers.append(not reason.is_failure)
    client.connect("127.0.0.1", port)
    while not answers:
        client.loop(1)
    client.disconnect()
    return answers[0]


@contextmanager
def postgres(directory: Path) -> Iterator[str]:
    """A PostgreSQL cluster of its own; yields the URL of its database."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    tool = (lambda name: str(binaries[-1] / name)) if binaries else program
    # PostgreSQL refuses to run as root.
    run_as = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    data, port = directory / "data", free_port()
    if run_as:
        shutil.chown(directory, "postgres")
        for parent in directory.parents:
            if parent.stat().st_uid == 0 and parent.is_relative_to("/tmp") and parent != Path("/tmp"):
                parent.chmod(0o755)
    init = [tool("initdb"), "-D", str(data), "-U", "portal", "--auth=trust", "-E", "UTF8", "--locale=C"]
    subprocess.run([*run_as, *init], check=True, capture_output=True, cwd="/")
    options = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={directory}"]
    options += ["-c", "fsync=off", "-p", str(port)]
    server = Process(
        [*run_as, tool("postgres"), "-D", str(data), *options], directory.parent / "postgres.log"
    )
    try:
        server.ready(port)
        url = f"postgresql://portal@127.0.0.1:{port}/postgres"
        wait_until(lambda: _accepts(url), what="PostgreSQL")
        yield url
    finally:
        server.stop()


def new_database(server: str) -> str:
    """The URL of a new database beside the one of `postgres`."""
    import psycopg

    name = f"t{new_id()}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return server.removesuffix("postgres") + name


def _accepts(url: str) -> bool:
    import psycopg

    try:
        psycopg.connect(url).close()
    except psycopg.OperationalError:
        return False
    return True


@asynccontextmanager
async def client_for(settings: Settings) -> AsyncIterator[LLMClient]:
    """An LLM client, open."""
    client = LLMClient(settings)
    await client.open()
    try:
        yield client
    finally:
        await client.close()
