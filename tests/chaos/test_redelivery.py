"""The bridge dies after its commit and before its acknowledgement: the broker sends the message again."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from app.events import new_id
from tests.fake_llm import FakeLLM, Script
from tests.proxy import Proxy
from tests.support import GameClient, MakePortal, Mosquitto, Portal, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.fixture
def proxy(mosquitto: Mosquitto) -> Iterator[Proxy]:
    """What is between the bridge and the broker."""
    between = Proxy(mosquitto.port)
    yield between
    between.close()


@pytest.fixture
def portal(fake_thread: FakeLLM, proxy: Proxy, tmp_path: Path, make_portal: MakePortal) -> Portal:
    fake_thread.script = Script(random=True)
    broker = f"mqtt://127.0.0.1:{proxy.port}"
    settings = {"LLM_SERVER_URL": fake_thread.url, "MQTT_BROKER_URL": broker, "MQTT_PROJECTS": "again"}
    return make_portal(tmp_path, **settings).start()


@pytest.fixture
def game(mosquitto: Mosquitto) -> Iterator[GameClient]:
    client = GameClient(mosquitto.port, "again/assistant_response/#", "again/hint/#")
    yield client
    client.close()


def stored(portal: Portal, statement: str) -> list[Any]:
    """The first column of what the database has."""
    with closing(sqlite3.connect(portal.directory / "portal.db")) as connection:
        return [row[0] for row in connection.execute(statement)]


def turns_ended(portal: Portal) -> int:
    return int(stored(portal, "SELECT count(*) FROM turns WHERE state = 'final'")[0])


def restart(portal: Portal, proxy: Proxy) -> None:
    """Kills the bridge, of which the broker has heard nothing for a while, and starts it again."""
    portal.kill()
    proxy.cut()
    proxy.deaf = False
    portal.start()


def test_a_message_without_a_request_id_is_one_turn(portal: Portal, proxy: Proxy, game: GameClient) -> None:
    session = new_id()
    proxy.deaf = True
    game.publish(f"again/user_input/{session}", "hello")
    wait_until(lambda: turns_ended(portal) == 1, what="the turn")
    assert game.received == [], "nothing has reached the broker"
    restart(portal, proxy)
    # Behind the first one in its session, so it is answered after whatever that one is answered with.
    game.publish(f"again/user_input/{session}", "and now?")
    replies = f"again/assistant_response/{session}"
    game.reply(replies, 2)
    texts = stored(portal, "SELECT content FROM messages WHERE role = 'assistant' ORDER BY created_at")
    assert [text.decode() for text in game.messages(replies)] == texts
    asked = stored(portal, "SELECT content FROM messages WHERE role = 'user' ORDER BY created_at")
    assert asked == ["hello", "and now?"]


@pytest.mark.parametrize(
    ("verb", "payload"),
    [("clear_history", b""), ("user_input", b""), ("template", b'{"template": "Be kind."}')],
)
def test_a_clear_is_not_repeated_over_what_came_behind_it(
    portal: Portal, proxy: Proxy, game: GameClient, verb: str, payload: bytes
) -> None:
    session = new_id()
    replies = f"again/assistant_response/{session}"
    game.publish(f"again/user_input/{session}", "before")
    game.reply(replies)
    proxy.deaf = True
    game.publish(f"again/{verb}/{session}", payload)
    game.publish(f"again/user_input/{session}", "behind")
    wait_until(lambda: turns_ended(portal) == 2, what="the turn behind it")
    restart(portal, proxy)
    game.publish(f"again/user_input/{session}", "after")
    wait_until(lambda: turns_ended(portal) >= 3, what="the turn after it")
    asked = stored(portal, "SELECT content FROM messages WHERE role = 'user' ORDER BY created_at")
    assert asked == ["behind", "after"]
