"""The page in a real browser: Chromium, driven by Playwright."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from app.cli.page import build_page
from app.cli.stack import Stack
from tests.e2e.support import let_in
from tests.support import GuardedMosquitto, LlamaServer, Portal, program

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update"]
PATIENCE_MS = 20_000
"""How long things on the page may take to come about, on a machine that is busy with other tests too."""

expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(scope="session", autouse=True)
def built_page() -> None:
    """The page as it is served: built, from the sources as they are."""
    build_page(Stack())


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedMosquitto]:
    """The broker that the portal writes the rights of devices into."""
    running = GuardedMosquitto(tmp_path_factory.mktemp("broker"))
    yield running
    running.stop()


@pytest.fixture(scope="session")
def portal(
    llama: LlamaServer,
    broker: GuardedMosquitto,
    tmp_path_factory: pytest.TempPathFactory,
    pytestconfig: pytest.Config,
) -> Iterator[Portal]:
    """The portal with a real model, for all tests: each has a person of its own. Answers are short, but on
    pictures."""
    directory = tmp_path_factory.mktemp("portal")
    most = "256" if pytestconfig.getoption("--screenshots") else "32"
    settings = {"LLM_MAX_TOKENS": most, "MQTT_PROJECTS": "maze racing", **broker.settings}
    running = Portal(directory, LLM_SERVER_URL=llama.url, **settings).start()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, for one module: while Playwright is there, no other event loop can run."""
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program("chromium"), args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture(params=[1280, 360], ids=["desktop", "phone"])
def context(request: pytest.FixtureRequest, browser: Browser) -> Iterator[BrowserContext]:
    """A browser with a profile of its own, at a desktop's and a phone's width."""
    height = 800 if request.param > 600 else 740
    opened = browser.new_context(viewport={"width": request.param, "height": height}, locale="en-GB")
    opened.set_default_timeout(PATIENCE_MS)
    yield opened
    opened.close()


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """A tab that fails the test when its scripts fail."""
    tab = context.new_page()
    errors: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    yield tab
    assert errors == []


@pytest.fixture
def ada(page: Page, portal: Portal, username: str) -> Page:
    """A tab of somebody who is signed in, and has nothing yet."""
    let_in(page, portal, username)
    return page


@pytest.fixture
def username() -> str:
    """Another person for each test."""
    return f"p{secrets.token_hex(6)}"


@pytest.fixture
def shot(pytestconfig: pytest.Config) -> Callable[[Page, str], None]:
    """Takes a picture of the page, where `--screenshots DIR` asks for them."""
    directory = pytestconfig.getoption("--screenshots")

    def take(page: Page, name: str) -> None:
        if directory:
            page.screenshot(path=Path(directory) / f"{name}.png")

    return take
