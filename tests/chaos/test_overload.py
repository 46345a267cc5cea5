"""Ten times the load that the LLM server can take: the surplus is refused at once, the rest is as before."""

from __future__ import annotations

import asyncio
import time
from itertools import cycle
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from app.events import new_id
from tests.chaos.support import Form
from tests.fake_llm import FakeLLM, Script
from tests.support import MakePortal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

PLACES, QUEUE, REPLY_S = 2, 8, 0.2
LOAD = 10 * PLACES / REPLY_S
"""Requests a second."""

REFUSED_BAR_S = 0.1
LIVE_BAR_S = 0.05


SOCKETS = 100
"""So many that none is asked to send a message before its last one is done with."""


class Load:
    """Requests at a steady pace, whatever becomes of those before: by turns over REST and over a socket."""

    def __init__(self, web: aiohttp.ClientSession) -> None:
        self._web = web
        self.answered = 0
        self.refused: dict[str, list[float]] = {"REST": [], "sockets": []}
        self._sockets: asyncio.Queue[aiohttp.ClientWebSocketResponse] = asyncio.Queue()
        self.live: list[float] = []
        self.queue = 0

    async def run(self, seconds: float) -> None:
        for _ in range(SOCKETS):
            socket = await self._web.ws_connect(f"/ws/chat/{new_id()}")
            assert (await socket.receive_json())["type"] == "connection_established"
            self._sockets.put_nowait(socket)
        end, asking = time.monotonic() + seconds, []
        ways = cycle((self._ask, self._say))
        watching = asyncio.create_task(self._watch())
        while (now := time.monotonic()) < end:
            asking.append(asyncio.create_task(next(ways)()))
            await asyncio.sleep(max(0.0, now + 1 / LOAD - time.monotonic()))
        watching.cancel()
        await asyncio.gather(*asking)
        while not self._sockets.empty():
            await self._sockets.get_nowait().close()

    async def _ask(self) -> None:
        began = time.monotonic()
        body = {"session_id": new_id(), "message": "hi"}
        async with self._web.post("/api/llm/chat/session", json=body) as answer:
            said: dict[str, Any] = await answer.json()
        if answer.status == 200:
            self.answered += 1
            return
        self.refused["REST"].append(time.monotonic() - began)
        assert (answer.status, said["error"]["code"]) == (503, "overloaded")
        assert int(answer.headers["Retry-After"]) >= 1

    async def _say(self) -> None:
        socket = self._sockets.get_nowait()
        began = time.monotonic()
        await socket.send_json({"type": "send_message", "message": "hi"})
        said: dict[str, Any] = await socket.receive_json()
        while said["type"] not in {"error", "ai_message_complete"}:
            said = await socket.receive_json()
        if said["type"] == "ai_message_complete":
            self.answered += 1
        else:
            self.refused["sockets"].append(time.monotonic() - began)
            assert said["error"]["code"] == "overloaded"
            assert said["error"]["retry_after"] >= 1
        self._sockets.put_nowait(socket)

    async def _watch(self) -> None:
        while True:
            began = time.monotonic()
            async with self._web.get("/health/live") as answer:
                assert answer.status == 200
            self.live.append(time.monotonic() - began)
            async with self._web.get("/api/llm/health") as answer:
                self.queue = max(self.queue, (await answer.json())["queue"])
            await asyncio.sleep(0.05)


def p99(times: list[float]) -> float:
    return sorted(times)[int(0.99 * (len(times) - 1))]


async def test_the_surplus_is_refused_at_once(
    fake_thread: FakeLLM, tmp_path: Path, make_portal: MakePortal, form: Form
) -> None:
    portal = make_portal(
        tmp_path,
        LLM_SERVER_URL=fake_thread.url,
        LLM_MAX_CONCURRENCY=str(PLACES),
        LLM_MAX_QUEUE=str(QUEUE),
        LOG_LEVEL="error",
    )
    await asyncio.to_thread(portal.start)
    fake_thread.script = Script(before_first=REPLY_S)
    with portal.client() as client:
        headers = {"Authorization": client.headers["Authorization"]}
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(portal.url, headers=headers, connector=connector) as web:
            load = Load(web)
            await load.run(form.overload_s)
            refused = sum(len(times) for times in load.refused.values())
            quickly = ", ".join(f"{way} {p99(times) * 1000:.0f} ms" for way, times in load.refused.items())
            print(
                f"{load.answered} answered, {refused} refused (p99: {quickly}), alive in "
                f"{p99(load.live) * 1000:.0f} ms (p99; slowest {max(load.live) * 1000:.0f}), "
                f"at most {load.queue} waited"
            )
            assert load.answered >= 0.8 * PLACES / REPLY_S * form.overload_s, "the server is kept busy"
            assert refused > 5 * load.answered
            for times in load.refused.values():
                assert len(times) > refused / 3
                assert p99(times) < REFUSED_BAR_S * form.slack
            assert p99(load.live) < LIVE_BAR_S * form.slack
            assert load.queue <= QUEUE
            assert fake_thread.most_running == PLACES
            async with web.post("/api/llm/chat/session", json={"session_id": "s", "message": "hi"}) as answer:
                assert answer.status == 200, "and then it is as before"
    await asyncio.to_thread(portal.stop)
