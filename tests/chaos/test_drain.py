"""The signal to stop: readiness says so at once, and what was accepted is answered first."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

from tests.chaos.support import Form, listens
from tests.fake_llm import FakeLLM, Script, text
from tests.support import GameClient, MakePortal, Mosquitto, Portal, ask, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

STREAMS, PLACES = 50, 40
"""Every other stream is a socket's."""

RESTART = 1012
"""Close code: the service restarts, come again (IANA's registry of WebSocket close codes)."""

PIECES = 20
READY_BAR_S = 1.0


def tell_to_stop(portal: Portal) -> float:
    """Sends the signal, and returns when that was."""
    assert portal.process is not None
    os.kill(portal.process.pid, signal.SIGTERM)
    return time.monotonic()


def exit_code(portal: Portal, seconds: float) -> int:
    """Waits for the end of the process."""
    assert portal.process is not None
    wait_until(lambda: not portal.alive(), seconds, "the end of the process")
    return portal.stop()


async def follow(web: aiohttp.ClientSession, number: int, has_begun: asyncio.Event) -> list[dict[str, Any]]:
    """The events of a stream."""
    events = []
    body = {"session_id": f"s{number}", "message": "hi"}
    headers = {"Accept": "application/x-ndjson"}
    async with web.post("/api/llm/chat/session/stream", json=body, headers=headers) as answer:
        assert answer.status == 200
        async for line in answer.content:
            events.append(json.loads(line))
            if events[-1]["type"] in {"token", "queued"}:
                has_begun.set()
    return events


async def follow_socket(
    web: aiohttp.ClientSession, number: int, has_begun: asyncio.Event
) -> list[dict[str, Any]]:
    """What a socket is sent of its turn, in the words of other doors, and the code that it is closed with."""
    names = {"ai_message_chunk": "token", "ai_message_complete": "final"}
    events = []
    async with web.ws_connect(f"/ws/chat/s{number}") as socket:
        await socket.send_json({"type": "send_message", "message": "hi"})
        async for message in socket:
            said = message.json()
            events += [{**said, "type": names.get(said["type"], said["type"])}] if "id" in said else []
            if events and events[-1]["type"] in {"token", "queued"}:
                has_begun.set()
        events[-1]["closed with"] = socket.close_code
    return events


async def refused_over_a_socket(socket: aiohttp.ClientWebSocketResponse) -> dict[str, Any]:
    """The error that a message is answered with."""
    await socket.send_json({"type": "send_message", "message": "hi", "request_id": "late"})
    said: dict[str, Any] = await socket.receive_json()
    assert (said["type"], said["request_id"]) == ("error", "late")
    error: dict[str, Any] = said["error"]
    return error


async def unready(web: aiohttp.ClientSession) -> dict[str, Any]:
    """What readiness says once it is no longer 200."""
    while True:
        async with web.get("/health/ready") as answer:
            if answer.status != 200:
                assert answer.status == 503
                found: dict[str, Any] = await answer.json()
                return found


async def test_live_streams_are_not_cut(
    fake_thread: FakeLLM, tmp_path: Path, make_portal: MakePortal, form: Form
) -> None:
    portal = make_portal(
        tmp_path, LLM_SERVER_URL=fake_thread.url, LLM_MAX_CONCURRENCY=str(PLACES), DRAIN_TIMEOUT="60"
    )
    await asyncio.to_thread(portal.start)
    pieces = [f"piece {number} " for number in range(PIECES)]
    fake_thread.script = Script(text(*pieces), between=form.drain_s / PIECES)
    with portal.client() as client:
        headers = {"Authorization": client.headers["Authorization"]}
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(portal.url, headers=headers, connector=connector) as web:
            begun = [asyncio.Event() for _ in range(STREAMS)]
            idle = await web.ws_connect("/ws/chat/idle")
            assert (await idle.receive_json())["type"] == "connection_established"
            kinds = (follow, follow_socket)
            following = [asyncio.create_task(kinds[n % 2](web, n, event)) for n, event in enumerate(begun)]
            async with asyncio.timeout(30):
                await asyncio.gather(*(event.wait() for event in begun))
            told = tell_to_stop(portal)
            assert (await unready(web))["status"] == "draining"
            took = time.monotonic() - told
            assert took < READY_BAR_S * form.slack
            async with web.get("/health/live") as answer:
                assert answer.status == 200
            for path, body in (
                ("/api/llm/chat/session", {"session_id": "new", "message": "hi"}),
                ("/api/llm/chat", {"messages": [{"role": "user", "content": "hi"}]}),
            ):
                async with web.post(path, json=body) as answer:
                    said = await answer.json()
                    assert (answer.status, said["error"]["code"]) == (503, "overloaded")
                    assert int(answer.headers["Retry-After"]) >= 1
            error = await refused_over_a_socket(idle)
            assert error["code"] == "overloaded"
            assert error["retry_after"] >= 1
            closing = asyncio.create_task(idle.receive())
            assert not any(task.done() for task in following)
            streams = await asyncio.gather(*following)
            assert (await closing).data == RESTART
            await idle.close()
    print(f"not ready after {took * 1000:.0f} ms; {len(streams)} streams ended whole")
    assert {events[-1]["closed with"] for events in streams[1::2]} == {RESTART}
    for events in streams:
        assert events[-1]["type"] == "final"
        assert events[-1]["response"] == "".join(pieces)
        assert "".join(event["content"] for event in events if event["type"] == "token") == "".join(pieces)
    assert sum(any(event["type"] == "queued" for event in events) for events in streams) == STREAMS - PLACES
    assert await asyncio.to_thread(exit_code, portal, 10) == 0


def test_mqtt_answers_what_it_has_taken_and_leaves_the_rest(
    fake_thread: FakeLLM, mosquitto: Mosquitto, tmp_path: Path, make_portal: MakePortal
) -> None:
    portal = make_portal(
        tmp_path,
        LLM_SERVER_URL=fake_thread.url,
        MQTT_BROKER_URL=mosquitto.url,
        MQTT_PROJECTS="drained",
        DRAIN_TIMEOUT="30",
    ).start()
    topics = [f"drained/assistant_response/{name}" for name in ("before", "after")]
    game = GameClient(mosquitto.port, *topics, "drained/status")
    fake_thread.script = Script(text("one ", "two"), between=1)
    game.publish("drained/user_input/before", {"message": "hi"})
    wait_until(lambda: fake_thread.pieces == 1, what="the first piece")
    tell_to_stop(portal)
    wait_until(lambda: httpx.get(f"{portal.url}/health/ready").status_code == 503, what="the drain")
    game.publish("drained/user_input/after", {"message": "hi"})
    assert game.reply(topics[0]) == b"one two"
    assert exit_code(portal, 10) == 0
    states = [status["state"] for status in game.json_replies("drained/status")]
    assert states[-1] == "offline"
    assert len(fake_thread.requests) == 1, "the second request was not taken"
    assert game.messages(topics[1]) == []
    portal.start()
    assert game.reply(topics[1]) == b"one two", "whoever serves the project next has it"
    game.close()
    wait_until(lambda: listens(portal), what="MQTT")
    assert portal.stop() == 0


def test_what_takes_too_long_is_left_to_the_next_start(
    fake_thread: FakeLLM, tmp_path: Path, make_portal: MakePortal
) -> None:
    portal = make_portal(tmp_path, LLM_SERVER_URL=fake_thread.url, DRAIN_TIMEOUT="1").start()
    fake_thread.script = Script(text("late"), before_first=60)
    body = {"session_id": "s", "message": "hi", "request_id": "r"}
    with portal.client() as client:
        with client.stream("POST", "/api/llm/chat/session/stream", json=body):
            wait_until(lambda: fake_thread.running == 1, what="the generation")
        told = tell_to_stop(portal)
        assert exit_code(portal, 15) == 0
        assert time.monotonic() - told > 1
        fake_thread.script = Script(text("in time"))
        portal.start()
        assert ask(client, "s", request_id="r").json()["response"] == "in time"
    assert portal.stop() == 0


def test_a_repeated_request_is_followed_while_it_drains(
    fake_thread: FakeLLM, tmp_path: Path, make_portal: MakePortal
) -> None:
    portal = make_portal(tmp_path, LLM_SERVER_URL=fake_thread.url, DRAIN_TIMEOUT="30").start()
    fake_thread.script = Script(text("one ", "two"), between=1)
    body = {"session_id": "s", "message": "hi", "request_id": "r"}
    with portal.client() as client:
        with client.stream("POST", "/api/llm/chat/session/stream", json=body):
            wait_until(lambda: fake_thread.pieces == 1, what="the first piece")
        tell_to_stop(portal)
        wait_until(lambda: client.get("/health/ready").status_code == 503, what="the drain")
        assert ask(client, "s", request_id="r").json()["response"] == "one two"
    assert exit_code(portal, 10) == 0


def test_a_second_signal_ends_it_at_once(
    fake_thread: FakeLLM, tmp_path: Path, make_portal: MakePortal
) -> None:
    portal = make_portal(tmp_path, LLM_SERVER_URL=fake_thread.url, DRAIN_TIMEOUT="600").start()
    fake_thread.script = Script(text("late"), before_first=60)
    body = {"session_id": "s", "message": "hi", "request_id": "r"}
    with portal.client() as client:
        with client.stream("POST", "/api/llm/chat/session/stream", json=body):
            wait_until(lambda: fake_thread.running == 1, what="the generation")
        tell_to_stop(portal)
        wait_until(lambda: client.get("/health/ready").status_code == 503, what="the drain")
        tell_to_stop(portal)
        assert exit_code(portal, 5) == 0
