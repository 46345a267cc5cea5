"""Two instances on one database and one broker: one listens, and the other takes its place in time."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from app.mqtt.bridge import LEASE_S, RENEW_S
from tests.chaos.support import Form, Player, assert_stored_once, listens
from tests.fake_llm import FakeLLM, Script
from tests.support import GameClient, MakePortal, Mosquitto, Portal, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TAKEOVER_S = LEASE_S + RENEW_S + 2.0
"""The lease runs out, the other one looks, and connects."""


@dataclass
class Pair:
    """Who listens, and who waits for its place."""

    listening: Portal
    waiting: Portal
    database: Path

    def wait_for_takeover(self, since: float) -> float:
        """The seconds until the other one listens; then they have changed places."""
        wait_until(lambda: listens(self.waiting), 30, "the other one")
        self.listening, self.waiting = self.waiting, self.listening
        return time.monotonic() - since


@pytest.fixture
def pair(fake_thread: FakeLLM, mosquitto: Mosquitto, tmp_path: Path, make_portal: MakePortal) -> Pair:
    fake_thread.script = Script(random=True, between=0.02)
    database = tmp_path / "shared.db"
    settings = {"LLM_SERVER_URL": fake_thread.url, "DATABASE_URL": f"sqlite:///{database}"}
    settings |= {"MQTT_BROKER_URL": mosquitto.url, "MQTT_PROJECTS": "twice"}
    directories = [tmp_path / name for name in ("one", "two")]
    for directory in directories:
        directory.mkdir()
    one, two = (make_portal(directory, **settings) for directory in directories)
    return Pair(one.start(), two.start(ready=False), database)


@pytest.fixture
def player(pair: Pair, mosquitto: Mosquitto) -> Iterator[Player]:
    playing = Player(mosquitto.port, "twice", pace_s=0.05).start()
    yield playing
    playing.close()


def test_the_other_one_takes_over(form: Form, fake_thread: FakeLLM, pair: Pair, player: Player) -> None:
    took = []
    for _ in range(form.takeovers):
        wait_until(lambda: fake_thread.running > 0, what="a generation")
        assert listens(pair.listening)
        assert not listens(pair.waiting), "only one listens"
        pair.listening.kill()
        took.append(pair.wait_for_takeover(time.monotonic()))
        pair.waiting.start(ready=False)
    again = played_to_the_end(form, pair, player)
    assert max(took) <= TAKEOVER_S, took
    print(
        f"{form.takeovers} takeovers, within {max(took):.1f} s, {len(player.asked)} requests, "
        f"{again} begun again, {player.replies} replies"
    )


def test_who_comes_back_has_lost_its_place(
    form: Form, fake_thread: FakeLLM, pair: Pair, player: Player
) -> None:
    for _ in range(form.takeovers):
        wait_until(lambda: fake_thread.running > 0, what="a generation")
        pause(pair)
        pair.wait_for_takeover(time.monotonic())
        os.kill(pid(pair.waiting), signal.SIGCONT)
        wait_until(lambda: not listens(pair.waiting) and listens(pair.listening), what="one that listens")
    again = played_to_the_end(form, pair, player)
    print(
        f"{form.takeovers} pauses, {len(player.asked)} requests, {again} begun again, "
        f"{player.replies} replies"
    )


def pid(portal: Portal) -> int:
    assert portal.process is not None
    return portal.process.pid


def pause(pair: Pair) -> None:
    """Stops the listening one in its tracks, outside of any transaction: within one it would lock the other
    one out."""

    def stopped_between_transactions() -> bool:
        os.kill(pid(pair.listening), signal.SIGSTOP)
        with closing(sqlite3.connect(pair.database, timeout=1, isolation_level=None)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                os.kill(pid(pair.listening), signal.SIGCONT)
                return False
        return True

    wait_until(stopped_between_transactions, what="a moment outside of transactions")


def played_to_the_end(form: Form, pair: Pair, player: Player) -> int:
    """Plays on until all is answered, and checks what is stored; returns how many turns were begun again."""
    player.finish(at_least=form.requests)
    player.assert_each_has_one_text()
    again = assert_stored_once(pair.database, player.asked)
    pair.listening.stop()
    pair.waiting.stop()
    return again


def test_what_was_sent_to_one_that_stood_still_is_one_turn(
    fake_thread: FakeLLM, pair: Pair, mosquitto: Mosquitto
) -> None:
    """Without request ids: the broker has sent it to both, and says so to the other one only."""
    fake_thread.script = Script(random=True)
    game = GameClient(mosquitto.port, "twice/assistant_response/#")
    said = [f"message {number}" for number in range(20)]
    pause(pair)
    for number, message in enumerate(said):
        game.publish(f"twice/user_input/still-{number}", message)
    pair.wait_for_takeover(time.monotonic())
    for number in range(len(said)):
        game.reply(f"twice/assistant_response/still-{number}")
    os.kill(pid(pair.waiting), signal.SIGCONT)
    log = pair.waiting.log
    wait_until(lambda: "another instance took over" in log.read_text(), 30, "what it has heard")
    pair.waiting.stop()
    game.close()
    with closing(sqlite3.connect(pair.database)) as connection:
        asked = connection.execute("SELECT content FROM messages WHERE role = 'user'").fetchall()
    assert sorted(content for (content,) in asked) == sorted(said)
