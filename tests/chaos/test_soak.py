"""The portal for an hour under everything at once: it must need no more at the end than at the beginning."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter, defaultdict
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import mean
from typing import Any

import aiohttp
import httpx
import psutil
import pytest
from paho.mqtt.enums import MQTTProtocolVersion

from tests.chaos.soak_load import PROJECT, Game, Lane
from tests.chaos.support import Form
from tests.fake_llm import FakeLLM, Script
from tests.support import MakePortal, Mosquitto, Portal, wait_until

pytestmark = pytest.mark.slow

LANES = 24


@dataclass(frozen=True)
class Sample:
    """What the portal has while it is at rest."""

    at_s: float
    acts: int
    tasks: int
    threads: int
    files: int
    memory_mb: float

    def __str__(self) -> str:
        return (
            f"{self.at_s / 60:5.1f} min {self.acts:7} done: {self.tasks} tasks, {self.threads} threads, "
            f"{self.files} files, {self.memory_mb:.1f} MB"
        )


class Soak:
    """A portal, those who use it in turns of so many seconds, and how it is in between."""

    def __init__(self, portal: Portal, broker: Mosquitto, llm: FakeLLM, admin: httpx.Client) -> None:
        self._portal, self._broker, self._admin = portal, broker, admin
        self._llm_port = int(llm.url.rsplit(":", 1)[-1])
        assert portal.process is not None
        self._process = psutil.Process(portal.process.pid)
        self._began = time.monotonic()
        self.done: Counter[str] = Counter()
        with portal.client("ada") as client:
            made = client.post("/api/templates", json={"title": "t", "content": "Hello {{ name }}."})
            self._template = made.json()["id"]
        self._seeds = count()

    def play(self, seconds: float, rate: float) -> Sample:
        """Puts so many acts a second on it, and looks at it once it is at rest."""
        with self._portal.client("ada") as client:
            asyncio.run(self._play(client.headers["Authorization"], seconds, LANES / rate))
        wait_until(self._is_at_rest, what="a portal at rest")
        return self._sample()

    async def _play(self, authorization: str, seconds: float, every_s: float) -> None:
        headers, limit = {"Authorization": authorization}, aiohttp.TCPConnector(limit=0)
        protocols = (MQTTProtocolVersion.MQTTv311, MQTTProtocolVersion.MQTTv5)
        async with AsyncExitStack() as stack:
            session = aiohttp.ClientSession(self._portal.url, headers=headers, connector=limit)
            web = await stack.enter_async_context(session)
            games = [
                await stack.enter_async_context(Game(self._broker.port, protocol)) for protocol in protocols
            ]
            lanes = [Lane(web, games, self._template, next(self._seeds)) for _ in range(LANES)]
            async with asyncio.TaskGroup() as group:
                for lane in lanes:
                    group.create_task(lane.run(seconds, every_s))
        self.done.update(act for lane in lanes for act in lane.done.elements())

    def _figures(self) -> dict[str, float]:
        """The metrics, each as the sum over its labels."""
        figures: defaultdict[str, float] = defaultdict(float)
        for name, value in re.findall(r"^(portal_\w+)(?:\{.*\})? (\S+)$", self._text(), re.MULTILINE):
            figures[name] += float(value)
        return figures

    def _text(self) -> str:
        return self._admin.get("/metrics").raise_for_status().text

    def _is_at_rest(self) -> bool:
        """Nothing runs, waits, or is owed, and no client is connected but this one."""
        now = self._figures()
        busy = [now[f"portal_{name}"] for name in ("turns_active", "mqtt_outbox", "mqtt_in_flight")]
        return not any(busy) and self._clients() <= 1

    def _clients(self) -> int:
        mine = [found for found in self._connections() if found.laddr.port == self._portal.port]
        return sum(found.status == psutil.CONN_ESTABLISHED for found in mine)

    def _connections(self) -> list[Any]:
        return self._process.net_connections(kind="tcp")

    def _files(self) -> int:
        """Without the connections that are kept for the next requests to the LLM server: the more were needed
        at once a moment ago, the more there are."""
        kept = [found for found in self._connections() if found.raddr and found.raddr.port == self._llm_port]
        return self._process.num_fds() - len(kept)

    def _sample(self) -> Sample:
        tasks = int(self._figures()["portal_tasks"])
        acts, threads, files = sum(self.done.values()), self._process.num_threads(), self._files()
        memory = self._process.memory_info().rss / 1e6
        return Sample(time.monotonic() - self._began, acts, tasks, threads, files, memory)


def test_it_needs_no_more_at_the_end(
    fake_thread: FakeLLM,
    mosquitto: Mosquitto,
    tmp_path: Path,
    make_portal: MakePortal,
    form: Form,
    pytestconfig: pytest.Config,
) -> None:
    portal = make_portal(
        tmp_path,
        LLM_SERVER_URL=fake_thread.url,
        LLM_MAX_CONCURRENCY="64",
        MQTT_BROKER_URL=mosquitto.url,
        MQTT_PROJECTS=PROJECT,
        # Out of reach, but counted: that too must not take more and more memory.
        RATE_LIMIT_SESSION_PER_MINUTE="100000",
        MAX_TURNS_PER_USER="10000",
        DAILY_TOKEN_BUDGET="1000000000000",
        LOG_LEVEL="warning",
    ).start()
    fake_thread.script = Script(random=True, lengths=(4, 12), between=0.01)
    minutes = pytestconfig.getoption("--soak-minutes") if form.soak_minutes is None else form.soak_minutes
    with portal.client("admin", role="admin") as admin:
        made = admin.post("/api/keys", json={"name": "metrics", "scopes": ["metrics:read"]}).json()
        admin.headers["Authorization"] = f"Bearer {made['secret']}"  # a sign-in's token would run out
        soak = Soak(portal, mosquitto, fake_thread, admin)
        samples: list[Sample] = []
        while not samples or samples[-1].at_s < minutes * 60:
            samples.append(soak.play(form.soak_turn_s, form.soak_rate))
            fake_thread.requests.clear()
            print(samples[-1], flush=True)
    assert portal.stop() == 0
    print(dict(soak.done.most_common()))
    judge(samples, minutes, form)
    assert "Traceback" not in portal.log.read_text()


def judge(samples: list[Sample], minutes: float, form: Form) -> None:
    """After a quarter of the time, in which caches fill, nothing grows."""
    after = [sample for sample in samples if sample.at_s > minutes * 15] or samples[-1:]
    first, last = after[0], after[-1]
    assert {sample.tasks for sample in after} == {first.tasks}, "the tasks stay as many"
    assert last.threads <= first.threads + form.soak_late
    assert last.files <= first.files + form.soak_late
    few = max(1, len(after) // 5)
    growth = mean(s.memory_mb for s in after[-few:]) - mean(s.memory_mb for s in after[:few])
    print(f"memory grew by {growth:.1f} MB in {(last.at_s - first.at_s) / 60:.0f} minutes")
    assert growth < form.soak_growth_mb
