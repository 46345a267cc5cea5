"""What sockets leave behind."""

from __future__ import annotations

import asyncio

import aiohttp
import httpx
import psutil
import pytest

from tests.support import Portal, wait_until

pytestmark = pytest.mark.slow

SOCKETS, ROUNDS = 200, 5
MOST_MB = 8.0
"""Sockets that keep what they had until the search for garbage comes make it twice as much and more."""


async def come_and_go(portal: Portal, client: httpx.Client, name: str) -> None:
    """Opens sockets on as many sessions, and closes them again."""
    headers = {"Authorization": client.headers["Authorization"]}
    no_limit = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(portal.url, headers=headers, connector=no_limit) as web:
        paths = [f"/ws/chat/{name}-{number}" for number in range(SOCKETS)]
        opened = await asyncio.gather(*(web.ws_connect(path) for path in paths))
        for socket in opened:
            assert (await socket.receive_json())["type"] == "connection_established"
        await asyncio.gather(*(socket.close() for socket in opened))


async def test_closed_sockets_take_no_memory(fake_portal: Portal, client: httpx.Client) -> None:
    assert fake_portal.process is not None
    process = psutil.Process(fake_portal.process.pid)
    await come_and_go(fake_portal, client, "first")
    before = process.memory_info().rss
    for number in range(ROUNDS):
        await come_and_go(fake_portal, client, f"later-{number}")
    wait_until(lambda: len(process.net_connections(kind="tcp")) < SOCKETS, what="the end of the sockets")
    grew_mb = (process.memory_info().rss - before) / 1e6
    print(f"{ROUNDS * SOCKETS} sockets later: {grew_mb:.1f} MB more")
    assert grew_mb < MOST_MB
