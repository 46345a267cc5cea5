"""What a bridge without a web page tells of itself: a line in the log every minute."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from sqlalchemy import Connection, func, select

from app.container import Container
from app.errors import StorageUnavailable
from app.logs import get_logger
from app.models.tables import turns, usage

INTERVAL_S = 60.0

LONGEST_TURN_S = 24 * 3600
"""Turns that took longer are left out."""

log = get_logger(__name__)


async def tell_statistics(container: Container) -> None:
    """Logs what was done in each minute, and at the end in the rest of one. Runs until cancelled."""
    since = time.time()
    try:
        while True:
            await asyncio.sleep(INTERVAL_S)
            since = await _tell(container, since)
    finally:
        await _tell(container, since)


async def _tell(container: Container, since: float) -> float:
    now = time.time()
    try:
        done = await container.database.read(lambda connection: _between(connection, since, now))
    except StorageUnavailable:
        return since  # the next line tells of this time too
    queue = container.llm.queue
    log.info("statistics", seconds=round(now - since), in_flight=queue.taken, waiting=queue.waiting, **done)
    return now


def _between(connection: Connection, since: float, until: float) -> dict[str, Any]:
    age = turns.c.id.between(_id_at(since), _id_at(until))
    requests = connection.scalar(select(func.count()).where(age, turns.c.door == "mqtt"))
    recent = usage.c.turn_id > _id_at(since - LONGEST_TURN_S)
    ended = (recent, usage.c.at > since, usage.c.at <= until, usage.c.door == "mqtt")
    sums = select(
        func.count(),
        func.coalesce(func.sum(usage.c.prompt_tokens + usage.c.completion_tokens), 0),
    )
    attempts, tokens = connection.execute(sums.where(*ended)).one()
    replied = select(func.count(), func.avg(usage.c.elapsed_ms)).where(*ended, usage.c.outcome == "final")
    replies, mean_ms = connection.execute(replied).one()
    return {
        "requests": requests,
        "replies": replies,
        "without_reply": attempts - replies,
        "tokens": tokens,
        "mean_latency_s": round(float(mean_ms or 0) / 1000, 2),
    }


def _id_at(at: float) -> str:
    """What ids begin with that are made at a Unix time: they need no index on when that was."""
    return f"{int(at * 1000):012x}"
