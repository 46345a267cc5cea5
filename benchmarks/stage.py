"""Starts what is measured, each on its core: the bridge alone on one, all else on the other."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import msgspec
import psutil

from app.config import child_environment
from benchmarks.load import Order, Seen
from benchmarks.peers import KEY, PEERS
from benchmarks.wire import Shape
from tests.support import ROOT, Mosquitto, Portal, Process, free_port

BRIDGE, LOAD = {0}, {1}

LOAD_MOST_S = 180.0
"""How long putting load on may take beyond its own time."""

ENVIRONMENT = child_environment(
    {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "backend"), str(ROOT)]),
        # LiteLLM would fetch its list of prices from the internet at each start.
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
)

Kind = str
"""`portal`, `straight` for the upstream without a bridge, or the name of a peer."""


class Served(Portal):
    """The portal as users run it."""

    program = ROOT / "backend" / "run_server.py"


class Impossible(Exception):
    """This cannot be measured here; the message says why."""


@contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """What is started within runs on these cores only, where the system can pin and has them."""
    if not hasattr(os, "sched_setaffinity") or not cores <= os.sched_getaffinity(0):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def can_pin() -> bool:
    """Whether bridge and load can be kept apart."""
    return hasattr(os, "sched_setaffinity") and os.sched_getaffinity(0) >= (BRIDGE | LOAD)


@dataclass(frozen=True, slots=True)
class Bridge:
    """Something that answers, and where. `mqtt_port` is its broker's, 0 without one."""

    port: int
    shape: Shape
    process: psutil.Process | None = None
    token: str = ""
    mqtt_port: int = 0
    portal: Portal | None = None

    def resident_mb(self) -> float:
        """Resident memory of the process and its children, in MB of 1,000,000 bytes."""
        assert self.process is not None
        family = [self.process, *self.process.children(recursive=True)]
        return sum(member.memory_info().rss for member in family) / 1e6

    def cpu_seconds(self) -> float:
        """CPU time that the process has used."""
        assert self.process is not None
        times = self.process.cpu_times()
        return float(times.user + times.system)


@contextmanager
def upstream(*, chunks: int = 64, rate: float = 0.0) -> Iterator[int]:
    """The mock LLM server; yields its port."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.upstream", "--port", str(port)]
    command += ["--chunks", str(chunks), "--rate", str(rate)]
    with running(command, port, LOAD):
        yield port


@contextmanager
def running(command: list[str], port: int, cores: set[int], seconds: float = 90.0) -> Iterator[Process]:
    """A program that listens on `port`, until the context is left."""
    with tempfile.TemporaryDirectory() as directory:
        with on_cores(cores):
            process = Process(command, Path(directory) / "log", ENVIRONMENT)
        try:
            process.ready(port, seconds)
            yield process
        finally:
            process.kill()


@contextmanager
def bridge(
    kind: Kind, upstream_port: int, *, mqtt: bool = False, settings: dict[str, str] | None = None
) -> Iterator[Bridge]:
    """The portal, a peer, or nothing, in front of an upstream."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        broker = None
        if mqtt:
            with on_cores(LOAD):
                broker = Mosquitto(directory)
            stack.callback(broker.stop)
        if kind == "straight":
            yield Bridge(upstream_port, "openai")
        elif kind == "portal":
            yield stack.enter_context(_portal(directory, upstream_port, broker, settings or {}))
        else:
            yield stack.enter_context(_peer(kind, directory, upstream_port, broker))


@contextmanager
def _portal(
    directory: Path, upstream_port: int, broker: Mosquitto | None, settings: dict[str, str]
) -> Iterator[Bridge]:
    values = {
        "LLM_SERVER_URL": f"http://127.0.0.1:{upstream_port}",
        "LLM_MAX_CONCURRENCY": "1000",
        "LOG_LEVEL": "warning",
        "MQTT_BROKER_URL": broker.url if broker else "",
        # Out of reach, but counted: what limits cost belongs to what is measured.
        "RATE_LIMIT_PER_HOUR": "100000000",
        "RATE_LIMIT_SESSION_PER_MINUTE": "100000000",
        "MAX_TURNS_PER_USER": "100000",
        **settings,
    }
    portal = Served(directory, **values)
    try:
        with on_cores(BRIDGE):
            portal.start()
        with portal.client("bench") as client:
            token = client.headers["Authorization"].removeprefix("Bearer ")
        assert portal.process is not None
        process = psutil.Process(portal.process.pid)
        yield Bridge(portal.port, "portal", process, token, broker.port if broker else 0, portal)
    finally:
        if portal.process is not None:
            portal.kill()


def restarted(there: Bridge) -> Bridge:
    """The portal once more, with the database that it has made by now; a peer as it is."""
    if there.portal is None:
        return there
    there.portal.stop()
    with on_cores(BRIDGE):
        there.portal.start()
    assert there.portal.process is not None
    return replace(there, process=psutil.Process(there.portal.process.pid))


@contextmanager
def _peer(kind: Kind, directory: Path, upstream_port: int, broker: Mosquitto | None) -> Iterator[Bridge]:
    peer = PEERS[kind]
    peer.install()
    if kind == "paho-sdk":
        if broker is None:
            raise Impossible("it speaks MQTT only")
        with running(peer.command(broker.port, upstream_port, directory), broker.port, BRIDGE) as process:
            yield Bridge(0, "openai", psutil.Process(process.pid), mqtt_port=broker.port)
        return
    port = free_port()
    with running(peer.command(port, upstream_port, directory), port, BRIDGE) as process:
        _wait_until_it_answers(port)
        yield Bridge(port, "openai", psutil.Process(process.pid), KEY)


def _wait_until_it_answers(port: int) -> None:
    body = {"model": "mock", "messages": [{"role": "user", "content": "hello"}]}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    answer = httpx.post(url, json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
    if answer.status_code != 200:
        raise Impossible(f"it answers with {answer.status_code}: {answer.text[:200]}")


def load(order: Order) -> Seen:
    """Puts load on. Raises `Impossible` when it did not go well."""
    command = [sys.executable, "-m", "benchmarks.load", msgspec.json.encode(order).decode()]
    with on_cores(LOAD):
        limit = order.seconds + LOAD_MOST_S
        done = subprocess.run(
            command, capture_output=True, check=False, env=ENVIRONMENT, cwd=ROOT, timeout=limit
        )
    if done.returncode != 0:
        raise Impossible(done.stderr.decode(errors="replace").strip().rsplit("\n", 1)[-1][:300])
    seen = msgspec.json.decode(done.stdout, type=Seen)
    if seen.error:
        raise Impossible(seen.error)
    return seen
