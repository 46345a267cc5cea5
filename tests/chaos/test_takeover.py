"""A turn whose process died is taken up by another one on the same database, in time."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from app.services.succession import LEASE_S, SWEEP_S
from tests.fake_llm import FakeLLM, Script, text
from tests.support import MakePortal, Portal, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.fixture
def pair(fake_thread: FakeLLM, tmp_path: Path, make_portal: MakePortal) -> tuple[Portal, Portal]:
    """Two instances on one database."""
    database = f"sqlite:///{tmp_path / 'shared.db'}"

    def start(name: str) -> Portal:
        directory = tmp_path / name
        directory.mkdir()
        return make_portal(directory, LLM_SERVER_URL=fake_thread.url, DATABASE_URL=database).start()

    return start("one"), start("two")


def test_another_instance_takes_over_after_the_lease(
    fake_thread: FakeLLM, pair: tuple[Portal, Portal]
) -> None:
    one, two = pair
    fake_thread.script = Script(pieces=text(*["more "] * 100), between=0.05)
    body = {"session_id": "s", "message": "hi", "request_id": "r"}
    behind = {"session_id": "s", "message": "and then?", "request_id": "r2"}
    with two.client() as web, ThreadPoolExecutor(1) as pool:
        token = web.headers["Authorization"]
        with pytest.raises(httpx.HTTPError):
            post_and_kill(one, body, token, fake_thread)
        died = time.monotonic()
        fake_thread.script = Script()
        later = pool.submit(web.post, "/api/llm/chat/session", json=behind)
        wait_until(lambda: len(fake_thread.requests) >= 2, 30, "the second attempt")
        taken_after = time.monotonic() - died
        print(f"taken over after {taken_after:.1f} s")
        assert taken_after <= LEASE_S + SWEEP_S
        answer = web.post("/api/llm/chat/session", json=body)
        assert answer.json()["response"] == "Hello there"
        assert later.result().json()["response"] == "Hello there", "it came meanwhile, and waited"
        asked = [request["messages"][-1]["content"] for request in fake_thread.requests]
        assert asked == ["hi", "hi", "and then?"]
        with web.stream("GET", f"/api/llm/turns/{answer.json()['turn_id']}/events?after=1.20") as stream:
            first = next(line for line in stream.iter_lines() if line.startswith("event:"))
        assert first == "event: restarted", "who saw the first attempt is told that it is void"
    two.stop()


def post_and_kill(portal: Portal, body: dict[str, str], token: str, fake: FakeLLM) -> None:
    """Asks, and kills the portal as soon as the reply has begun."""
    headers = {"Authorization": token}
    url = f"{portal.url}/api/llm/chat/session/stream"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=30) as stream:
        for line in stream.iter_lines():
            if line == "event: token":
                portal.kill()
    assert fake.requests
