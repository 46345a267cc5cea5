"""Requests flow while the bridge is killed again and again: none is lost, none gets two answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.support import Form, Player, assert_stored_once
from tests.fake_llm import FakeLLM, Script
from tests.support import MakePortal, Mosquitto, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_kills_in_mid_generation(
    form: Form, fake_thread: FakeLLM, mosquitto: Mosquitto, tmp_path: Path, make_portal: MakePortal
) -> None:
    fake_thread.script = Script(random=True, between=0.02)
    portal = make_portal(
        tmp_path, LLM_SERVER_URL=fake_thread.url, MQTT_BROKER_URL=mosquitto.url, MQTT_PROJECTS="maze"
    ).start()
    player = Player(mosquitto.port, "maze").start()
    try:
        for _ in range(form.bridge_kills):
            player.wait_for_answer()
            wait_until(lambda: fake_thread.running > 0, what="a generation")
            portal.kill()
            wait_until(lambda: fake_thread.running == 0, what="the server noticing")
            portal.start(ready=False)
        player.finish(at_least=form.requests)
    finally:
        player.close()
    player.assert_each_has_one_text()
    again = assert_stored_once(tmp_path / "portal.db", player.asked)
    portal.stop()
    assert again > 0, "some were cut off in mid-generation"
    print(
        f"{form.bridge_kills} kills, {len(player.asked)} requests, {again} begun again, "
        f"{player.replies} replies"
    )
