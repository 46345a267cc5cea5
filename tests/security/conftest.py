"""One portal for the attacks that leave it as it was: a fake LLM, a real broker."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.fake_llm import FakeLLM, FakeThread
from tests.support import Mosquitto, Portal


@pytest.fixture(scope="session")
def model() -> Iterator[FakeLLM]:
    """What the portal takes for its LLM server."""
    running = FakeThread()
    yield running.fake
    running.close()


@pytest.fixture(scope="session")
def target(
    model: FakeLLM, mosquitto: Mosquitto, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Portal]:
    """The portal that is attacked. Its projects are its own: portals of other tests use the same broker."""
    running = Portal(
        tmp_path_factory.mktemp("target"),
        LLM_SERVER_URL=model.url,
        MQTT_BROKER_URL=mosquitto.url,
        MQTT_PROJECTS="siege keep",
    ).start()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def mallory(target: Portal) -> Iterator[httpx.Client]:
    """An attacker who has an account."""
    with target.client("mallory") as client:
        yield client
