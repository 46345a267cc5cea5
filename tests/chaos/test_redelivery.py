"""The bridge dies after its commit and before its acknowledgement: the broker sends the message again."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

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


def contents(portal: Portal, session: str, role: str) -> list[str]:
    """What the messages of a session say, in order."""
    of_session = (
        "SELECT m.content FROM messages m JOIN turns t ON t.id = m.turn_id "
        "JOIN sessions s ON s.id = t.session "
        "WHERE s.session_id = ? AND s.deleted_at IS NULL AND m.role = ? ORDER BY t.position"
    )
    with closing(sqlite3.connect(portal.directory / "portal.db")) as connection:
        return [row[0] for row in connection.execute(of_session, (session, role))]


def last_answered(portal: Portal, session: str) -> str:
    """The newest message of the session, if all of them have answers."""
    asked, replies = (contents(portal, session, role) for role in ("user", "assistant"))
    return asked[-1] if asked and len(asked) == len(replies) else ""


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
    wait_until(lambda: contents(portal, session, "assistant"), what="the turn")
    assert game.received == [], "nothing has reached the broker"
    restart(portal, proxy)
    # Behind the first one in its session, so it is answered after whatever that one is answered with.
    game.publish(f"again/user_input/{session}", "and now?")
    replies = f"again/assistant_response/{session}"
    game.reply(replies, 2)
    assert [text.decode() for text in game.messages(replies)] == contents(portal, session, "assistant")
    assert contents(portal, session, "user") == ["hello", "and now?"]


def test_a_clear_is_not_repeated_over_what_came_behind_it(
    portal: Portal, proxy: Proxy, game: GameClient
) -> None:
    """In whichever way it was asked for."""
    clears = [("clear_history", b""), ("user_input", b""), ("template", b"Be kind."), ("delete_session", b"")]
    sessions = {new_id(): clear for clear in clears}
    for session in sessions:
        game.publish(f"again/user_input/{session}", "before")
    for session in sessions:
        game.reply(f"again/assistant_response/{session}")
    proxy.deaf = True
    for session, (verb, payload) in sessions.items():
        game.publish(f"again/{verb}/{session}", payload)
        game.publish(f"again/user_input/{session}", {"message": "behind", "requestId": "r"})
    for session in sessions:
        wait_until(lambda of=session: last_answered(portal, of) == "behind", what="it")  # type: ignore[misc]
    restart(portal, proxy)
    for session in sessions:
        game.publish(f"again/user_input/{session}", "after")
    for session, (verb, _) in sessions.items():
        wait_until(lambda of=session: last_answered(portal, of) == "after", what="it")  # type: ignore[misc]
        assert contents(portal, session, "user")[-2:] == ["behind", "after"], verb
