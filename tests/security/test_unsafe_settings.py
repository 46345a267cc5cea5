"""Settings that would leave a door open: the portal does not start with them, or keeps the door shut."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.events import new_id
from tests.fake_llm import FakeLLM
from tests.support import SECRET, GameClient, MakePortal, Mosquitto, Process, program
from tests.test_run_server import refuse_settings

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("SECRET_KEY=Short1!", "SECRET_KEY: "),
        ("SECRET_KEY=your-secret-key-here-your-secret-key-here", "SECRET_KEY: "),
        ("SECRET_KEY=change-me-in-production-0aB3dE5fG7hJ9kL1", "SECRET_KEY: "),
        ("SECRET_KEY=abababababababababababababababababababab", "SECRET_KEY: "),
        (f"SECRET_KEY={SECRET}\nSECRET_KEY_PREVIOUS=short", "SECRET_KEY_PREVIOUS: "),
        ("CORS_ORIGINS=*", "CORS_ORIGINS: "),
        ("CORS_ORIGINS=https://a.example,*", "CORS_ORIGINS: "),
        ("OUTBOUND_ALLOW=*", "OUTBOUND_ALLOW: "),
        ("OUTBOUND_ALLOW=10.0.0.0/99", "OUTBOUND_ALLOW: "),
        ("OUTBOUND_ALLOW=http://hooks.internal", "OUTBOUND_ALLOW: "),
        ("ALERT_WEBHOOK_URL=file:///etc/passwd", "ALERT_WEBHOOK_URL: "),
    ],
)
def test_it_does_not_start_even_on_loopback_and_names_the_setting(
    tmp_path: Path, line: str, said: str
) -> None:
    output = refuse_settings(tmp_path, line)
    assert said in output
    assert "Short1!" not in output


def own_address() -> str:
    """An address of this machine that is not loopback."""
    for found in psutil.net_if_addrs().values():
        for address in found:
            if address.family == socket.AF_INET and not address.address.startswith("127."):
                return str(address.address)
    pytest.skip("this machine has only loopback")


class OpenBroker(Mosquitto):
    """A broker that listens everywhere."""

    def start(self) -> None:
        text = self._config.read_text().replace(f"listener {self.port} 127.0.0.1", f"listener {self.port}")
        self._config.write_text(text)
        self._process = Process(
            [program("mosquitto"), "-c", str(self._config)], self._config.with_suffix(".log")
        )
        self._process.ready(self.port)


@pytest.fixture
def open_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenBroker]:
    broker = OpenBroker(tmp_path_factory.mktemp("broker"))
    yield broker
    broker.stop()


def test_with_a_broker_beyond_loopback_nobody_is_served_who_does_not_show_who_they_are(
    open_broker: OpenBroker, make_portal: MakePortal, tmp_path: Path, fake_thread: FakeLLM
) -> None:
    settings: dict[str, Any] = {"LLM_SERVER_URL": fake_thread.url, "MQTT_PROJECTS": "maze"}
    url = f"mqtt://{own_address()}:{open_broker.port}"
    make_portal(tmp_path, MQTT_BROKER_URL=url, **settings).start()
    game, session = GameClient(open_broker.port, "maze/assistant_response/#"), new_id()
    try:
        game.publish(f"maze/user_input/{session}", "hello")
        said = game.reply(f"maze/assistant_response/{session}").decode()
    finally:
        game.close()
    assert said.startswith("Error: token: messages without one are not answered")
    assert fake_thread.requests == []
