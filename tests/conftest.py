"""Fixtures: each gives a real part, or a fake LLM server where a test needs to control it."""

from __future__ import annotations

import compileall
from collections.abc import AsyncIterator, Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from httpx._transports import default
from hypothesis import settings as hypothesis_settings
from pydantic import SecretStr

from app.cli import install
from app.cli.page import build_page
from app.cli.stack import Stack
from app.config import BACKEND_DIR, Settings
from app.events import new_id
from tests.fake_llm import FakeLLM, FakeThread, Script, serve
from tests.support import (
    SECRET,
    UNLIMITED,
    LlamaServer,
    Mosquitto,
    Portal,
    Redis,
    new_database,
    postgres,
    wait_until,
)

# How long an example takes says how busy the machine is.
hypothesis_settings.register_profile("portal", deadline=None)
hypothesis_settings.load_profile("portal")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", metavar="DIR", help="keep pictures of the page there")
    parser.addoption(
        "--chaos",
        choices=("short", "long"),
        default="short",
        help="how often the chaos tests break something",
    )
    parser.addoption(
        "--soak-minutes",
        type=float,
        default=60,
        help="how long the soak lasts with `--chaos long`",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Before there are workers: each would fetch the model and build the page, at the same moment."""
    # Every client, so every `httpx.get`, would read all of the system's certificates anew: 40 ms of a core.
    transport: Any = default
    transport.create_ssl_context = cache(httpx.create_ssl_context)
    if not hasattr(config, "workerinput"):
        # Where Python is told to write no bytecode, each process of the portal would compile it anew.
        compileall.compile_dir(BACKEND_DIR / "app", quiet=2)
    if config.getoption("numprocesses", None):
        install.starter_model(Stack())
        build_page(Stack())


@pytest.fixture(scope="session")
def starter_model() -> Path:
    """The starter model, fetched if it is not there yet."""
    return install.starter_model(Stack())


@pytest.fixture(scope="session")
def llama(starter_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaServer]:
    """llama.cpp with the starter model, for the whole run."""
    server = LlamaServer(starter_model, tmp_path_factory.mktemp("llama"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def mosquitto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    """A broker for the whole run: tests use projects and sessions of their own."""
    broker = Mosquitto(tmp_path_factory.mktemp("mosquitto"))
    yield broker
    broker.stop()


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """PostgreSQL, for the whole run."""
    with postgres(tmp_path_factory.mktemp("postgres")) as url:
        yield url


@pytest.fixture
def postgres_url(postgres_server: str) -> str:
    """A new database in PostgreSQL."""
    return new_database(postgres_server)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new database of each kind, its driver named."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'new' / 'portal.db'}"
    url: str = request.getfixturevalue("postgres_url")
    return url.replace("postgresql://", "postgresql+psycopg://")


@pytest.fixture(scope="module")
def portal(
    llama: LlamaServer, mosquitto: Mosquitto, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Portal]:
    """The portal with a real model and a real broker, for one module."""
    running = Portal(
        tmp_path_factory.mktemp("portal"),
        LLM_SERVER_URL=llama.url,
        MQTT_BROKER_URL=mosquitto.url,
        MQTT_PROJECTS="maze general",
    ).start()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def module_fake() -> Iterator[FakeLLM]:
    """An LLM server that does as it is told, for one module."""
    running = FakeThread()
    yield running.fake
    running.close()


@pytest.fixture
def llm(module_fake: FakeLLM) -> Iterator[FakeLLM]:
    """The same, saying what it says by default, and at rest in the end."""
    module_fake.script = Script()
    module_fake.requests.clear()
    yield module_fake
    module_fake.script = Script()
    wait_until(lambda: module_fake.running == 0, what="the end of all generations")


@pytest.fixture
def session() -> str:
    """The id of a session that nobody has used."""
    return new_id()


@pytest.fixture(scope="module")
def fake_portal(
    module_fake: FakeLLM, mosquitto: Mosquitto, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Portal]:
    """The portal with such an LLM server and a real broker, for one module."""
    running = Portal(
        tmp_path_factory.mktemp("portal"),
        LLM_SERVER_URL=module_fake.url,
        MQTT_BROKER_URL=mosquitto.url,
        MQTT_PROJECTS="maze general",
    ).start()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def admin(fake_portal: Portal) -> Iterator[httpx.Client]:
    """An admin at `fake_portal`, for one module: making an account and signing in cost time on purpose."""
    with fake_portal.client("admin", role="admin") as signed_in:
        yield signed_in


@pytest.fixture
def client(fake_portal: Portal) -> Iterator[httpx.Client]:
    """Somebody new at `fake_portal`."""
    with fake_portal.client(f"ada-{new_id()[-6:]}") as signed_in:
        yield signed_in


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Redis, for the whole run."""
    server = Redis(tmp_path_factory.mktemp("redis"))
    yield server.url
    server.stop()


@pytest.fixture
def make_portal() -> Iterator[Callable[..., Portal]]:
    """Makes portals, for tests that stop and kill them; what is left at the end is stopped."""
    made: list[Portal] = []

    def make(directory: Path, **settings: str) -> Portal:
        made.append(Portal(directory, **settings))
        return made[-1]

    yield make
    for portal in made:
        if portal.process is not None and portal.process.alive():
            portal.kill()


@pytest.fixture
async def fake() -> AsyncIterator[FakeLLM]:
    """An LLM server that does as it is told."""
    async with serve(FakeLLM()) as running:
        yield running


@pytest.fixture
def fake_thread() -> Iterator[FakeLLM]:
    """The same, for tests that run no event loop."""
    running = FakeThread()
    yield running.fake
    running.close()


@pytest.fixture
def settings_for(tmp_path: Path) -> Callable[..., Settings]:
    """Makes settings with a database in the test's own directory."""

    def make(llm_url: str = "http://127.0.0.1:9", **changes: Any) -> Settings:
        values: dict[str, Any] = {
            "llm_server_url": llm_url,
            "database_url": f"sqlite:///{tmp_path / 'portal.db'}",
            "secret_key": SecretStr(SECRET),
            **UNLIMITED,
            **changes,
        }
        return Settings(_env_file=None, **values)

    return make
