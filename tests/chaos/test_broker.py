"""The broker crashes and is restarted, as the setup configures it, while requests flow."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.support import Form, Player, assert_stored_once, listens
from tests.fake_llm import FakeLLM, Script
from tests.support import GuardedMosquitto, MakePortal, Portal, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

BACK_WITHIN_S = 5.0
"""What the portal may take to be subscribed again."""


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[GuardedMosquitto]:
    running = GuardedMosquitto(tmp_path)
    yield running
    running.stop()


@pytest.fixture
def portal(fake_thread: FakeLLM, broker: GuardedMosquitto, tmp_path: Path, make_portal: MakePortal) -> Portal:
    fake_thread.script = Script(random=True, between=0.02)
    settings = {"LLM_SERVER_URL": fake_thread.url, "MQTT_PROJECTS": "maze", **broker.settings}
    settings["LOG_LEVEL"] = "debug"  # all attempts to connect are told then
    return make_portal(tmp_path, **settings).start()


def comes_back(portal: Portal, since: float) -> float:
    """Seconds until the portal is subscribed again."""
    wait_until(lambda: listens(portal), BACK_WITHIN_S + 5, "the portal's return")
    return time.monotonic() - since


def test_the_broker_is_killed(
    form: Form, fake_thread: FakeLLM, broker: GuardedMosquitto, portal: Portal, tmp_path: Path
) -> None:
    player = Player(broker.port, "maze", pace_s=0.05, repeat_s=2.0).start()
    try:
        for _ in range(form.broker_kills):
            player.wait_for_answer()
            wait_until(lambda: fake_thread.running > 0, what="a generation")
            broker.kill()
            wait_until(lambda: not listens(portal), what="the portal noticing")
            broker.start()
        player.finish(at_least=form.requests)
    finally:
        player.close()
    player.assert_each_has_one_text()
    assert_stored_once(tmp_path / "portal.db", player.asked, in_order=False)
    portal.stop()
    print(
        f"{form.broker_kills} kills of the broker, {len(player.asked)} requests, "
        f"{player.repeats} sent again, {player.replies} replies"
    )


def test_the_broker_is_restarted_under_load(
    form: Form, broker: GuardedMosquitto, portal: Portal, tmp_path: Path
) -> None:
    player = Player(broker.port, "maze", pace_s=0.05).start()
    took: list[float] = []
    try:
        for number in range(form.broker_restarts):
            player.wait_for_answer()
            failed = attempts(portal)
            broker.stop()
            wait_until(lambda: not listens(portal), what="the portal noticing")
            # The longer it is away, the longer are the pauses between attempts; after five they are longest.
            wanted = failed + (0, 3, 5)[number % 3]
            wait_until(lambda to=wanted: attempts(portal) >= to, 40, "attempts to connect")  # type: ignore[misc]
            broker.start()
            took.append(comes_back(portal, time.monotonic()))
        player.finish(at_least=form.requests)
    finally:
        player.close()
    player.assert_each_has_one_text()
    assert_stored_once(tmp_path / "portal.db", player.asked)
    portal.stop()
    assert max(took) <= BACK_WITHIN_S, took
    print(
        f"{form.broker_restarts} restarts of the broker, {len(player.asked)} requests, {player.replies} "
        f"replies; subscribed again after at most {max(took):.1f} s"
    )


def attempts(portal: Portal) -> int:
    """How often the portal has found no broker."""
    return portal.log.read_text().count("the broker cannot be reached")
