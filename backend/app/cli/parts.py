"""The parts of a stack: the command of each, and how to see that it is ready."""

from __future__ import annotations

import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from ipaddress import ip_address
from pathlib import Path
from socket import create_connection

import psutil

from app.cli.broker import read_credentials
from app.cli.console import Failure
from app.cli.stack import HOST, ROOT, Stack
from app.config import BACKEND_DIR, Settings

PROBE_TIMEOUT_S = 2.0

STOP_S = 8.0
"""How long a part has to end, before it is killed."""

CLOSE_S = 15.0
"""How long the portal has to end once it has drained."""


@dataclass(frozen=True, slots=True)
class MorePort:
    """A further port of a part, and how to choose another one."""

    port: int
    title: str
    remedy: str
    host: str = HOST


@dataclass(frozen=True, slots=True)
class Part:
    """A program that the supervisor keeps running. `prepare` is done before it is first started; `is_ready`
    is asked on and on where it `is_watched`. `option` is the flag for another port."""

    name: str
    title: str
    command: list[str]
    port: int
    option: str
    address: str
    is_ready: Callable[[], bool]
    prepare: Callable[[], None] = lambda: None
    is_watched: bool = True
    settings: dict[str, str] = field(default_factory=dict)
    instead: str = ""
    more_ports: Sequence[MorePort] = ()
    stop_s: float = STOP_S

    @property
    def ports(self) -> list[MorePort]:
        """All its ports."""
        return [MorePort(self.port, self.title, f"choose another one with {self.option}"), *self.more_ports]


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
    if stack.context is not None:
        command += ["--ctx", str(stack.context)]
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
    config = stack.broker_config
    more = []
    if config.ws_port:
        remedy = "choose another one with --mqtt-ws-port, or none with --mqtt-ws-port 0"
        more.append(MorePort(config.ws_port, "MQTT broker's WebSockets", remedy, _probed(config.listen)))
    if config.own_port is not None:
        remedy = "choose another --mqtt-port: it is the one after that"
        more.append(MorePort(config.own_port, "portal's own way to the MQTT broker", remedy))
    return Part(
        "broker",
        "MQTT broker",
        [program, "-c", str(config.file)],
        stack.mqtt_port,
        "--mqtt-port",
        " ".join(stack.mqtt_addresses),
        lambda: _listens(config.own_port or stack.mqtt_port),
        prepare=lambda: config.write(read_credentials(stack.state) if config.plugin else None),
        # Mosquitto logs two lines for each look, which tells nothing: the system takes connections also for a
        # program that hangs.
        is_watched=False,
        instead="--broker URL, if it is an MQTT broker",
        more_ports=more,
    )


def _probed(address: str) -> str:
    """Where to try whether something listens on an address."""
    return HOST if ip_address(address).is_unspecified else address


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
            "MQTT_BROKER_URL": settings.mqtt_broker_url or "none",
            "MQTT_USERNAME": settings.mqtt_username,
            "MQTT_PASSWORD": settings.mqtt_password.get_secret_value(),
            "MQTT_ACL": settings.mqtt_acl,
            "MQTT_ANONYMOUS": settings.mqtt_anonymous or "",
        },
        stop_s=settings.drain_timeout + CLOSE_S,
    )


def check_ports(parts: Sequence[Part]) -> None:
    """Raises `Failure` when something else listens on one of the parts' ports, or two have the same."""
    taken: dict[int, str] = {}
    for part in parts:
        for wanted in part.ports:
            if wanted.port in taken:
                raise Failure(
                    f"Port {wanted.port} is for the {taken[wanted.port]} and for the {wanted.title}.",
                    wanted.remedy,
                )
            taken[wanted.port] = wanted.title
            if _listens(wanted.port, wanted.host):
                instead = [f"or use it: {part.instead}"] if part.instead and wanted.port == part.port else []
                raise Failure(
                    f"Port {wanted.port}, for the {wanted.title}, is in use{_holder(wanted.port)}.",
                    wanted.remedy,
                    *instead,
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


def _listens(port: int, host: str = HOST) -> bool:
    try:
        with create_connection((host, port), PROBE_TIMEOUT_S):
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
    except (OSError, HTTPException):
        return False
    return True


def in_checkout(path: Path) -> str:
    """A path as a person in the checkout would type it."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
