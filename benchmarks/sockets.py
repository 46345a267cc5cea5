"""Rows about WebSockets: what a thousand that are open cost, and how smooth two hundred live ones are."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import msgspec

from benchmarks.load import Order, Seen
from benchmarks.stage import Bridge, bridge, load, upstream

IDLE, LIVE, SHARED = 1000, 200, 50
RATE = 20.0
WATCHED_S = 20.0
"""How long it is watched what idle sockets cost: longer than the pause between looks at their tokens."""


class Sockets(msgspec.Struct, frozen=True):
    """What was seen: resident memory in MB, CPU as a share of a core, gaps over the upstream's."""

    before_mb: float
    idle_mb: float
    live_mb: float
    idle_cpu: float
    live_gaps: float


_seen: list[Sockets] = []


def idle_memory(column: str, seconds: float) -> float:  # noqa: ARG001 - all rows are asked the same way
    """KB for each of the idle sockets."""
    seen = _all(seconds)
    return (seen.idle_mb - seen.before_mb) / IDLE * 1000


def idle_cpu(column: str, seconds: float) -> float:  # noqa: ARG001
    """Percent of a core that all idle sockets take together."""
    return _last(seconds).idle_cpu * 100


def live_memory(column: str, seconds: float) -> float:  # noqa: ARG001
    """Megabytes with the idle ones and the live ones."""
    return _last(seconds).live_mb


def live_gaps(column: str, seconds: float) -> float:  # noqa: ARG001
    """The 99th percentile of gaps between pieces at live sockets, beside the idle ones, over the
    upstream's own."""
    return _last(seconds).live_gaps


def shared_gaps(column: str, seconds: float) -> float:  # noqa: ARG001
    """The same for many sockets on one session in which one turn runs."""
    tokens = _tokens(seconds)
    with upstream(chunks=tokens, rate=RATE) as port, bridge("portal", port) as there:
        own = load(Order("live", port, 1, seconds, tokens=tokens)).gaps_p99
        return load(_order(there, "shared-sockets", SHARED, seconds, tokens)).gaps_p99 / own


def _tokens(seconds: float) -> int:
    return int(max(3.0, seconds) * RATE)


def _last(seconds: float) -> Sockets:
    """What was seen for the row before, where it was measured."""
    return _seen[-1] if _seen else _all(seconds)


def _all(seconds: float) -> Sockets:
    tokens = _tokens(seconds)
    with upstream(chunks=tokens, rate=RATE) as port, bridge("portal", port) as there:
        own = load(Order("live", port, LIVE, seconds, tokens=tokens)).gaps_p99
        load(_order(there, "live-sockets", 5, seconds, tokens))  # what is set up once is not a socket's
        before = there.resident_mb()
        with ThreadPoolExecutor(1) as pool:
            hold_s = WATCHED_S + 3 * seconds + 30
            holding = pool.submit(load, _order(there, "idle-sockets", IDLE, hold_s, tokens))
            _wait_for_sockets(there)
            idle, used = there.resident_mb(), there.cpu_seconds()
            time.sleep(WATCHED_S)
            cpu = (there.cpu_seconds() - used) / WATCHED_S
            gaps, live = _live(there, seconds, tokens)
            holding.result()
    _seen.append(Sockets(before, idle, live, cpu, gaps / own))
    return _seen[-1]


def _live(there: Bridge, seconds: float, tokens: int) -> tuple[float, float]:
    """The gaps at the live sockets, and the most memory meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        streaming = pool.submit(load, _order(there, "live-sockets", LIVE, seconds, tokens))
        most = there.resident_mb()
        while not streaming.done():
            most = max(most, there.resident_mb())
            time.sleep(0.1)
        seen: Seen = streaming.result()
        return seen.gaps_p99, most


def _order(there: Bridge, kind: str, lanes: int, seconds: float, tokens: int) -> Order:
    fields = {"kind": kind, "port": there.port, "lanes": lanes, "seconds": seconds, "tokens": tokens}
    return msgspec.convert({**fields, "shape": there.shape, "token": there.token}, Order)


def _wait_for_sockets(there: Bridge) -> None:
    assert there.process is not None
    while len(there.process.net_connections(kind="tcp")) < IDLE:
        time.sleep(0.1)
    time.sleep(1)
