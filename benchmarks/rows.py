"""What is measured, how, and where the bar lies."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from benchmarks import real, sockets
from benchmarks.load import Order
from benchmarks.stage import Impossible, bridge, load, restarted, upstream

LANES = 16
TOKENS = 64
LIVE_RATE = 20.0
LIVE_STEPS = (50, 100, 200, 300, 400, 500, 600, 800)
LIVE_MOST = 2.0
LIVE_S = 10.0
"""How long each stream goes on at least. All begin within the first second, and end within the last: in
shorter ones that would be most of what is measured."""

IDLE_S = 5.0


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `measure(column, seconds)` gives one value; its other arguments are the
    row's own. `rounds` is its own number of rounds:
    some take too long to be repeated."""

    name: str
    title: str
    unit: str
    better: Literal["more", "less"]
    bar: float
    measure: Callable[[str, float], float]
    columns: tuple[str, ...] = ("portal",)
    rounds: int | None = None
    series: Callable[[], dict[str, list[float]]] | None = field(default=None)

    def meets(self, value: float) -> bool:
        """Whether a value is at the bar or better."""
        return value >= self.bar if self.better == "more" else value <= self.bar


def http(column: str, seconds: float) -> float:
    """Whole answers a second, over sessions whose histories grow."""
    with upstream() as port, bridge(column, port) as there:
        return load(Order("whole", there.port, LANES, seconds, there.shape, there.token)).rate


def latency(column: str, seconds: float) -> float:
    """Median milliseconds of one client's request, less the upstream's own beside it."""
    with upstream() as port, bridge(column, port) as there:
        own = load(Order("whole", port, 1, seconds / 2)).median
        seen = load(Order("whole", there.port, 1, seconds, there.shape, there.token)).median
        return (seen - own) * 1000


def burst(column: str, seconds: float) -> float:
    """Streams a second whose 64 pieces are there all at once."""
    with upstream(chunks=TOKENS) as port, bridge(column, port) as there:
        order = Order("burst", there.port, LANES, seconds, there.shape, there.token, TOKENS)
        return load(order).rate


def live(column: str, seconds: float) -> float:
    """How many streams of 20 pieces a second go on at once with the 99th percentile of the gaps between
    pieces at most twice the upstream's own."""
    tokens = int(max(LIVE_S, seconds) * LIVE_RATE)
    best = 0
    for lanes in LIVE_STEPS:
        # A bridge for each step, so that none carries the load of the one before.
        with upstream(chunks=tokens, rate=LIVE_RATE) as port, bridge(column, port) as there:
            own = load(Order("live", port, lanes, seconds, tokens=tokens)).gaps_p99
            try:
                seen = load(Order("live", there.port, lanes, seconds, there.shape, there.token, tokens))
            except Impossible:
                if not best:
                    raise
                break
            if seen.gaps_p99 > LIVE_MOST * own:
                break
        best = lanes
    return best


def mqtt(column: str, seconds: float) -> float:
    """Requests answered a second over MQTT, sixteen games with one request each."""
    with upstream() as port, bridge(column, port, mqtt=True) as there:
        return load(Order("mqtt", there.mqtt_port, LANES, seconds)).rate


def mqtt_latency(column: str, seconds: float) -> float:
    """Median milliseconds from a game's request to its reply, with nothing else going on."""
    with upstream() as port, bridge(column, port, mqtt=True) as there:
        return load(Order("mqtt", there.mqtt_port, 1, seconds)).median * 1000


def memory(column: str, seconds: float) -> float:  # noqa: ARG001 - all rows are asked the same way
    """Resident megabytes some seconds after a start that has nothing to migrate, HTTP and MQTT on."""
    with upstream() as port, bridge(column, port, mqtt=column in {"portal", "paho-sdk"}) as there:
        again = restarted(there)
        time.sleep(IDLE_S)
        return again.resident_mb()


WEB = ("portal", "straight", "fastapi-aiohttp", "fastapi-sdk", "litellm")
BRIDGES = ("portal", "fastapi-aiohttp", "fastapi-sdk", "litellm")
MQTT = ("portal", "paho-sdk")

ROWS = (
    Row("http", "non-streamed, 16 at once", "/s", "more", 1200, http, WEB),
    Row("latency", "the same, 1 at once, added median", "ms", "less", 1.0, latency, BRIDGES),
    Row("burst", "64-token streams, all at once, 16 at once", "/s", "more", 300, burst, WEB),
    Row("live", "live streams at 20 tokens/s, smooth", "streams", "more", 500, live, BRIDGES, rounds=1),
    Row("mqtt", "MQTT request to reply, 16 sessions", "/s", "more", 1500, mqtt, MQTT),
    Row("mqtt-latency", "MQTT round trip, 1 session, median", "ms", "less", 3.0, mqtt_latency, MQTT),
    Row("memory", "resident memory, idle", "MB", "less", 110, memory, (*BRIDGES, "paho-sdk")),
    Row("sockets-idle", "an idle WebSocket, of 1,000", "KB", "less", 60, sockets.idle_memory, rounds=1),
    Row("sockets-cpu", "CPU of 1,000 idle WebSockets", "%", "less", 2, sockets.idle_cpu, rounds=1),
    Row("sockets-memory", "memory with them, 200 live", "MB", "less", 200, sockets.live_memory, rounds=1),
    Row(
        "sockets-live",
        "gaps at these at 20 tokens/s, p99 / mock's",
        "x",
        "less",
        LIVE_MOST,
        sockets.live_gaps,
        rounds=1,
    ),
    Row(
        "sockets-shared",
        "the same, 50 sockets on one session",
        "x",
        "less",
        LIVE_MOST,
        sockets.shared_gaps,
    ),
    Row(
        "real-throughput",
        "8 sessions, llama.cpp: through it / straight",
        "x",
        "more",
        0.95,
        real.throughput,
        rounds=5,
    ),
    Row(
        "real-ttft",
        "time to first token, long chat: it / sliding trim, mean",
        "x",
        "less",
        0.25,
        real.ttft,
        rounds=1,
        series=real.ttft_series,
    ),
    Row("real-ttft-p95", "the same, 95th percentile", "x", "less", 0.4, real.ttft_p95, rounds=1),
    Row("long-history", "CPU of a turn, 1,000 messages / 10", "x", "less", 1.2, real.long_history),
    Row(
        "stored-sessions",
        "growth, 100,000 stored, 1,000 in use",
        "MB",
        "less",
        50,
        real.stored_sessions,
        rounds=1,
    ),
    Row("warm-start", "warm start to ready, starter model", "s", "less", 6, real.warm_start),
    Row("bare", "fresh clone to first answer", "s", "less", 240, real.bare, rounds=1),
)
