"""The parts of a stack: the command of each, and how to see that it is ready."""

from __future__ import annotations

import getpass
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from socket import create_connection

import psutil

from app.cli.console import Failure
from app.cli.stack import HOST, ROOT, Stack
from app.config import BACKEND_DIR, Settings

PROBE_TIMEOUT_S = 2.0

MOSQUITTO_CONFIG = """\
# Written by `setup_llm.sh up`, anew each time.
listener {port} {host}
allow_anonymous true
set_tcp_nodelay true

# Messages for a portal that is away wait on disk; Mosquitto drops what is beyond these bounds
# and still tells the sender that all is well, so they are far above its own.
persistence true
persistence_location {data}/
autosave_interval 30
max_queued_messages 100000
max_queued_bytes 268435456
max_inflight_messages 1000
max_packet_size 1048576
log_dest stderr
log_type error
log_type warning
log_type notice
{user}"""


@dataclass(frozen=True, slots=True)
class Part:
    """A program that the supervisor keeps running. `option` is the flag for another port."""

    name: str
    title: str
    command: list[str]
    port: int
    option: str
    address: str
    is_ready: Callable[[], bool]
    settings: dict[str, str] = field(default_factory=dict)
    instead: str = ""


def parts_of(stack: Stack, model: Path | None, mosquitto: str | None, settings: Settings) -> list[Part]:
    """The parts to start, in the order of need."""
    found = []
    if model is not None:
        found.append(llm_server(stack, model, settings.llm_max_concurrency))
    if mosquitto is not None:
        found.append(_broker(stack, mosquitto))
    found.append(_portal(stack, settings))
    return found


def llm_server(stack: Stack, model: Path, slots: int) -> Part:
    """llama.cpp with a model, for so many generations at once."""
    command = [sys.executable, "-m", "app.cli.llm_server", "--model", str(model)]
    command += ["--host", HOST, "--port", str(stack.llm_port), "--slots", str(slots)]
    return Part(
        "llm",
        "LLM server",
        command,
        stack.llm_port,
        "--llm-port",
        stack.llm_address,
        lambda: answers(f"{stack.llm_address}/health"),
        instead="--llm-url URL, if it is an LLM server",
    )


def _broker(stack: Stack, program: str) -> Part:
    data = stack.state / "mosquitto"
    data.mkdir(exist_ok=True)
    # Started by root it would become a user who may not read this directory.
    user = f"user {getpass.getuser()}\n" if sys.platform != "win32" else ""
    config = data / "mosquitto.conf"
    config.write_text(MOSQUITTO_CONFIG.format(port=stack.mqtt_port, host=HOST, data=data, user=user))
    return Part(
        "broker",
        "MQTT broker",
        [program, "-c", str(config)],
        stack.mqtt_port,
        "--mqtt-port",
        stack.broker_address,
        lambda: _listens(stack.mqtt_port),
        instead="--broker URL, if it is an MQTT broker",
    )


def _portal(stack: Stack, settings: Settings) -> Part:
    command = [sys.executable, str(BACKEND_DIR / "run_server.py"), "--host", HOST, "--port", str(stack.port)]
    return Part(
        "portal",
        "Portal",
        [*command, "--env-file", str(stack.env_file)],
        stack.port,
        "--port",
        stack.url,
        lambda: answers(f"http://{HOST}:{stack.port}/health/live"),
        settings={
            "LLM_SERVER_URL": stack.llm_address,
            "MQTT_BROKER_URL": stack.broker_address,
            "SECRET_KEY": settings.secret_key.get_secret_value(),
        },
    )


def check_port(part: Part) -> None:
    """Raises `Failure` when something else listens on the part's port."""
    if not _listens(part.port):
        return
    ways = [f"choose another one with {part.option}", *([f"use it: {part.instead}"] if part.instead else [])]
    raise Failure(
        f"Port {part.port}, for the {part.title}, is in use{_holder(part.port)}.", "; or ".join(ways)
    )


def _holder(port: int) -> str:
    try:
        for found in psutil.net_connections("tcp"):
            address = tuple(found.laddr)
            if found.status == psutil.CONN_LISTEN and address[1:2] == (port,) and found.pid:
                return f" by {psutil.Process(found.pid).name()} (process {found.pid})"
    except psutil.Error:
        pass  # the system shows it to root only
    return ""


def _listens(port: int) -> bool:
    try:
        with create_connection((HOST, port), PROBE_TIMEOUT_S):
            return True
    except OSError:
        return False


# A proxy that is set for the internet has no part in what is on this machine.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def fetch(request: urllib.request.Request | str, seconds: float) -> bytes:
    """The body of an HTTP answer of this machine; raises `OSError`, with urllib's `HTTPError` for a
    status that is no success."""
    with _opener.open(request, timeout=seconds) as response:
        return bytes(response.read())


def answers(url: str) -> bool:
    """Whether a GET is answered with success."""
    try:
        fetch(url, PROBE_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        return False
    except OSError:
        return False
    return True


def in_checkout(path: Path) -> str:
    """A path as a person in the checkout would type it."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
