"""The example game, opened from the disk as people open it, with a real broker and the portal."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect

from app.events import new_id
from tests.e2e.support import COLOURS, findings_in_all_colours, scrolls_sideways
from tests.fake_llm import FakeLLM, text
from tests.support import ROOT, GameClient, Mosquitto, Portal

FILE = ROOT / "docs" / "examples" / "maze.html"


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    """A broker for browsers."""
    running = Mosquitto(tmp_path_factory.mktemp("mosquitto"), websockets=True)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def adviser(
    module_fake: FakeLLM, broker: Mosquitto, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Portal]:
    """The portal, with a model that says what a test tells it to."""
    running = Portal(
        tmp_path_factory.mktemp("adviser"),
        LLM_SERVER_URL=module_fake.url,
        MQTT_BROKER_URL=broker.url,
        MQTT_PROJECTS="maze",
        PROJECTS_FILE="none.toml",
    ).start()
    yield running
    running.stop()


@pytest.fixture
def watcher(broker: Mosquitto) -> Iterator[GameClient]:
    client = GameClient(broker.port, "maze/#")
    yield client
    client.close()


def play(page: Page, broker: Mosquitto, **query: str) -> str:
    """Opens the game, with hints only when they are asked for; returns its session."""
    session = f"test-{new_id()}"
    words = {"broker": f"ws://127.0.0.1:{broker.ws_port}", "session": session, **query}
    page.goto(f"{FILE.as_uri()}?{urlencode(words)}")
    page.get_by_role("checkbox", name="hints by themselves").uncheck()
    return session


def maze(page: Page) -> Locator:
    return page.get_by_role("img", name="Maze of")


def cell(page: Page, x: int, y: int) -> Locator:
    return maze(page).locator(f"[data-x='{x}'][data-y='{y}']")


def standing(page: Page) -> str:
    found = re.search(r"You are at (\d+, \d+)", maze(page).get_attribute("aria-label") or "")
    assert found
    return found[1]


def deeds(page: Page) -> Locator:
    return page.get_by_role("list", name="What the hint did").get_by_role("listitem")


def connected(page: Page) -> None:
    expect(page.get_by_text("Connected, fake-1 answers")).to_be_visible()


def hint(words: str, *calls: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What the model writes for a hint."""
    named = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return text(json.dumps({"hint": words, "function_calls": named}))


def test_it_is_played_with_the_keys_and_with_a_finger(page: Page, broker: Mosquitto) -> None:
    play(page, broker)
    expect(page.get_by_text("Move to begin")).to_be_visible()
    key, button, there = (
        ("ArrowRight", "Right", "2, 1")
        if cell(page, 2, 1).get_attribute("data-kind") == "free"
        else ("ArrowDown", "Down", "1, 2")
    )
    page.keyboard.press(key)
    assert standing(page) == there
    expect(page.get_by_text("Move to begin")).not_to_be_visible()
    page.keyboard.press({"ArrowRight": "a", "ArrowDown": "w"}[key])
    assert standing(page) == "1, 1"
    if page.get_by_role("group", name="Move").is_visible():
        for name in (button, "Up" if button == "Right" else "Left"):  # there is a wall
            page.get_by_role("button", name=name, exact=True).click()
            assert standing(page) == there
    expect(page.get_by_role("meter", name="Oxygen")).not_to_have_attribute("value", "100")
    assert not scrolls_sideways(page)


def test_a_hint_is_shown_and_what_it_asks_for_is_done(
    page: Page, broker: Mosquitto, adviser: Portal, llm: FakeLLM, watcher: GameClient
) -> None:
    session = play(page, broker)
    connected(page)
    expect(cell(page, 2, 2)).to_have_attribute("data-kind", "wall")
    llm.script.pieces = hint(
        "Dig, and leap.", ("break_wall", {"x": 2, "y": 2}), ("teleport_player", {"x": 2, "y": 2})
    )
    page.get_by_role("button", name="Hint").click()
    expect(page.get_by_role("status").filter(has_text="Dig, and leap.")).to_be_visible()
    expect(cell(page, 2, 2)).to_have_attribute("data-kind", "free")
    assert standing(page) == "2, 2"
    assert deeds(page).all_inner_texts() == ["broke the wall at 2, 2", "brought you to 2, 2"]
    (asked,) = watcher.messages(f"maze/state/{session}")
    state = json.loads(asked)
    assert state["map"][1][1] == "P"
    assert len(state["map"]) == state["size"]["height"]
    assert all(state["map"][germ["y"]][germ["x"]] == "G" for germ in state["germs"])


@pytest.fixture
def broker_without_adviser(tmp_path: Path) -> Iterator[Mosquitto]:
    """Another broker, where a test answers itself."""
    running = Mosquitto(tmp_path, websockets=True)
    yield running
    running.stop()


def test_only_what_makes_sense_is_done(page: Page, broker_without_adviser: Mosquitto) -> None:
    watcher = GameClient(broker_without_adviser.port, "maze/#")
    session = play(page, broker_without_adviser)
    calls = [
        {"name": "break_wall", "arguments": {"x": 0, "y": 2}},
        {"name": "break_wall", "arguments": {"x": 1.5, "y": "2"}},
        {"name": "break_walls", "arguments": {"walls": [{"x": 2, "y": 2}, {"x": -1, "y": 2}, "all"]}},
        {"name": "teleport_player", "arguments": {"x": 99, "y": -1}},
        {"name": "move_exit", "arguments": '{"x": 4, "y": 4}'},
        {"name": "highlight_zone", "arguments": {"zone": "everywhere"}},
        {"name": "constructor", "arguments": {}},
        {"name": "freeze_germs", "arguments": {"seconds": 1e9}},
        "reveal_map",
    ]
    page.get_by_role("button", name="Hint").click()
    asked = json.loads(watcher.reply(f"maze/state/{session}"))
    told = {"hint": "<b>Well</b>", "function_calls": calls, "requestId": asked["requestId"]}
    for _ in range(2):  # the second answer to one request is none
        watcher.publish(f"maze/hint/{session}", told)
    watcher.publish(f"maze/hint/{session}", {"hint": "Template updated"})
    expect(page.get_by_role("log")).to_contain_text("Portal: Template updated")
    expect(page.get_by_role("status").filter(has_text="<b>Well</b>")).to_be_visible()
    assert [text.split(",")[0] for text in deeds(page).all_inner_texts()] == [
        "ignored: break_wall",
        "ignored: break_wall",
        "broke 1 of 3 walls",
        "ignored: teleport_player",
        "ignored: move_exit",
        "ignored: highlight_zone",
        "ignored: constructor",
        "froze the germs for 30 s",
        "ignored: undefined",
    ]
    expect(cell(page, 0, 2)).to_have_attribute("data-kind", "wall")
    assert standing(page) == "1, 1"
    watcher.close()


def test_the_chat_shows_an_answer_as_it_comes(
    page: Page, broker: Mosquitto, adviser: Portal, llm: FakeLLM
) -> None:
    play(page, broker)
    connected(page)
    llm.script.pieces = text("Keep ", "to the ", "<b>left</b> ", "wall.")
    llm.script.between = 0.7
    page.get_by_role("textbox", name="Message").fill("Which way?")
    page.keyboard.press("Enter")
    talk = page.get_by_role("log", name="Conversation").locator("p")
    expect(talk.last).to_have_text(re.compile(r"^Adviser: Keep( to the)? *$"))
    expect(talk.last).to_have_text("Adviser: Keep to the <b>left</b> wall.")
    expect(talk.first).to_have_text("You: Which way?")


def test_everybody_can_use_it(
    page: Page,
    broker: Mosquitto,
    adviser: Portal,
    llm: FakeLLM,
    shot: Callable[[Page, str], None],
) -> None:
    page.emulate_media(reduced_motion="reduce")
    width = page.viewport_size["width"] if page.viewport_size else 0

    def check(state: str) -> None:
        assert findings_in_all_colours(page) == []
        assert not scrolls_sideways(page)
        for colours in COLOURS:
            page.emulate_media(color_scheme=colours)
            shot(page, f"maze-{width}-{colours}-{state}")

    play(page, broker)
    connected(page)
    llm.script.pieces = hint(
        "Go right at the crossing; the way out is near.",
        ("reveal_map", {"seconds": 60}),
        ("highlight_zone", {"zone": {"x": 7, "y": 7, "width": 4, "height": 3}, "seconds": 60}),
    )
    page.get_by_role("button", name="Hint").click()
    expect(page.get_by_text("revealed the map")).to_be_visible()
    llm.script.pieces = text("Keep to the left wall, and mind the germs.")
    page.get_by_role("textbox", name="Message").fill("Which way?")
    page.keyboard.press("Enter")
    expect(page.get_by_text("Adviser: Keep to the left wall")).to_be_visible()
    check("ready")
    page.get_by_text("Connection", exact=True).click()
    page.get_by_role("button", name="Hint").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    expect(page.get_by_text("Move to begin")).not_to_be_visible()
    check("playing")


class TestTheConnection:
    """At one width."""

    @pytest.fixture
    def context(self, browser: Browser) -> Iterator[BrowserContext]:
        opened = browser.new_context(locale="en-GB")
        yield opened
        opened.close()

    def test_a_question_is_asked_again_until_it_is_answered(
        self, page: Page, broker: Mosquitto, adviser: Portal, llm: FakeLLM, watcher: GameClient
    ) -> None:
        session = play(page, broker)
        connected(page)
        adviser.kill()
        expect(page.get_by_text("Connected, but the portal is not running")).to_be_visible()
        broker.stop()
        expect(page.get_by_text("No connection to the broker")).to_be_visible()
        page.get_by_role("textbox", name="Message").fill("Which way?")
        page.keyboard.press("Enter")
        expect(page.get_by_text("waits for a connection")).to_be_visible()
        broker.start()
        topic = f"maze/user_input/{session}"
        watcher.wait_for(lambda: len(watcher.messages_unlocked(topic)) >= 2, 40)
        adviser.start()
        expect(page.get_by_text("Adviser: Hello there")).to_be_visible(timeout=40_000)
        assert len({json.loads(asked)["requestId"] for asked in watcher.messages(topic)}) == 1
        assert len(llm.requests) == 1

    def test_a_broker_that_refuses_says_why(self, page: Page, tmp_path: Path) -> None:
        broker = Mosquitto(tmp_path, websockets=True, open_to_all=False)
        play(page, broker, username="ada")
        expect(page.get_by_text("The broker refuses: this user may not connect")).to_be_visible()
        expect(page.get_by_label("Password")).to_be_visible()
        broker.stop()
