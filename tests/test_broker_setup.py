"""The listeners of the Mosquitto that the setup runs."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from app.cli import stack as stack_module
from app.cli.broker import Certificate, Credentials, make_credentials
from app.cli.console import Failure
from app.cli.parts import MorePort, check_ports, parts_of
from app.cli.stack import HOST, Stack
from app.config import Settings
from app.mqtt.connection import Broker, request_once
from app.mqtt.dynsec import CONTROL
from tests.support import Process, free_port, program, wait_until


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    """One for `localhost`, signed by itself."""
    made = Certificate(tmp_path / "cert.pem", tmp_path / "key.pem")
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    ]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(made.key), "-out", str(made.file)]
    subprocess.run(command, check=True, capture_output=True)
    return made


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return Stack(tmp_path / "state", mqtt_port=free_port(), mqtt_ws_port=free_port())


Run = Callable[[Stack], Stack]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Runs the broker of a stack; returns the stack as it can be."""
    running: list[Process] = []

    def start(stack: Stack) -> Stack:
        stack.prepare()
        stack = stack.with_broker(program("mosquitto"))
        (_, part, _) = parts_of(stack, tmp_path, program("mosquitto"), stack.portal_settings())
        part.prepare()
        running.append(Process(part.command, tmp_path / "mosquitto.log"))
        wait_until(part.is_ready, what="the broker")
        return stack

    yield start
    for process in running:
        process.stop()


def can_connect(
    port: int, user: Credentials | None = None, *, web: bool = False, ca: Path | None = None, host: str = HOST
) -> bool:
    client = paho.Client(CallbackAPIVersion.VERSION2, transport="websockets" if web else "tcp")
    answers: list[bool] = []
    client.on_connect = lambda _c, _d, _f, reason, _p: answers.append(not reason.is_failure)
    if user is not None:
        client.username_pw_set(user.username, user.password)
    if ca is not None:
        client.tls_set(str(ca))
    client.connect(host, port)
    while not answers:
        client.loop(1)
    client.disconnect()
    return answers[0]


def rules_can_be_read(stack: Stack) -> bool:
    broker = Broker.of(stack.portal_settings())
    asked = b'{"commands": [{"command": "listRoles"}]}'
    reply = request_once(broker, CONTROL, f"{CONTROL}/response", asked, timeout=5)
    return b"portal" in reply


def test_on_this_machine_everybody_is_let_in(stack: Stack, run: Run) -> None:
    stack = run(stack)
    assert can_connect(stack.mqtt_port)
    assert can_connect(stack.mqtt_ws_port, web=True)
    assert rules_can_be_read(stack)
    assert stack.mqtt_addresses == [f"mqtt://{HOST}:{stack.mqtt_port}", f"ws://{HOST}:{stack.mqtt_ws_port}"]


def test_the_name_of_another_user_counts_for_nothing(
    stack: Stack, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "nobody")  # as `su` leaves it
    assert rules_can_be_read(run(stack))


def test_at_one_address_of_many(stack: Stack, run: Run) -> None:
    stack = run(replace(stack, mqtt_listen="127.0.0.2"))
    assert can_connect(stack.mqtt_port, host="127.0.0.2")
    assert rules_can_be_read(stack), "the portal has its own way in"


@pytest.mark.parametrize("address", ["0.0.0.0", "::"])
def test_beyond_it_only_who_has_a_password(stack: Stack, run: Run, address: str) -> None:
    stack = run(replace(stack, mqtt_listen=address))
    user = make_credentials(stack.state)
    assert [can_connect(stack.mqtt_port), can_connect(stack.mqtt_port, user)] == [False, True]
    assert rules_can_be_read(stack)
    assert stack.portal_settings().anonymous_mqtt is False


def test_tls_on_both_listeners(stack: Stack, run: Run, certificate: Certificate) -> None:
    stack = run(replace(stack, mqtt_certificate=certificate))
    assert stack.mqtt_addresses == [f"mqtts://{HOST}:{stack.mqtt_port}", f"wss://{HOST}:{stack.mqtt_ws_port}"]
    for port, web in ((stack.mqtt_port, False), (stack.mqtt_ws_port, True)):
        assert can_connect(port, web=web, ca=certificate.file, host="localhost")
    assert stack.broker_address == f"mqtt://{HOST}:{stack.mqtt_port + 1}"
    assert rules_can_be_read(stack)


def test_without_websockets_there_are_none(stack: Stack, run: Run) -> None:
    stack = run(replace(stack, mqtt_ws_port=0))
    assert len(stack.mqtt_addresses) == 1
    assert rules_can_be_read(stack)


def test_without_the_plugin_only_this_machine_is_served(
    stack: Stack, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stack_module, "find_plugin", lambda program: None)
    with pytest.raises(Failure, match="no dynamic security plugin"):
        replace(stack, mqtt_listen="0.0.0.0").with_broker(program("mosquitto"))
    stack = run(stack)
    assert "MQTT_ACL=none" in " ".join(capsys.readouterr().out.split())
    assert stack.portal_settings().mqtt_acl == "none"
    assert can_connect(stack.mqtt_port)


def test_a_mosquitto_without_websockets_is_told_of(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stack_module, "has_websockets", lambda program: False)
    assert stack.with_broker(program("mosquitto")).mqtt_ws_port == 0
    assert "built without WebSockets" in capsys.readouterr().out


def test_the_plugin_s_file_without_the_portal_s_password(stack: Stack, tmp_path: Path) -> None:
    stack = replace(stack, mqtt_plugin=tmp_path / "plugin.so")
    stack.prepare()
    stack.broker_config.write(make_credentials(stack.state))
    assert stack.portal_settings().mqtt_username == "portal"
    (stack.state / "broker.json").unlink()
    with pytest.raises(Failure, match="is lost") as failure:
        stack.portal_settings()
    assert "dynamic-security.json" in failure.value.remedies[0]


def test_a_name_is_no_address(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="no IP address"):
        Stack(tmp_path, mqtt_listen="example.org")


def test_all_ports_are_looked_at(stack: Stack, tmp_path: Path, certificate: Certificate) -> None:
    stack = replace(stack, mqtt_certificate=certificate)
    stack.prepare()
    (_, part, _) = parts_of(stack, tmp_path, "mosquitto", stack.portal_settings())
    assert [type(port) for port in part.more_ports] == [MorePort, MorePort]
    for port, option in (
        (stack.mqtt_port, "--mqtt-port"),
        (stack.mqtt_ws_port, "--mqtt-ws-port"),
        (stack.mqtt_port + 1, "--mqtt-port"),
    ):
        check_ports([part])
        with socket.create_server((HOST, port)), pytest.raises(Failure, match=f"Port {port}") as failure:
            check_ports([part])
        assert option in " ".join(failure.value.remedies)


def test_ports_of_its_own_differ(stack: Stack, tmp_path: Path, certificate: Certificate) -> None:
    port = stack.mqtt_port
    stack = replace(stack, mqtt_certificate=certificate, mqtt_ws_port=port + 1)
    stack.prepare()
    parts = parts_of(stack, tmp_path, "mosquitto", stack.portal_settings())
    with pytest.raises(
        Failure, match=f"Port {port + 1} is for the MQTT broker's WebSockets and for the portal's"
    ):
        check_ports(parts)
    with pytest.raises(Failure, match=f"Port {port} is for the MQTT broker and for the Portal"):
        check_ports(parts_of(replace(stack, port=port, mqtt_ws_port=0), tmp_path, "mosquitto", Settings()))
