"""Alerts: a part of a budget is spent that somebody should know of."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec
from sqlalchemy import Connection, select

from app.access import Identity
from app.database import Database, insert_new
from app.errors import StorageUnavailable
from app.events import new_id
from app.logs import get_logger
from app.models.tables import alerts
from app.services.audit import note
from app.services.authorizer import Authorizer

if TYPE_CHECKING:
    from app.services.webhooks import Webhook

MOST_EXHAUSTED = 10_000
"""Budgets that are remembered, so that not each refusal asks the database."""

log = get_logger(__name__)


class Alert(msgspec.Struct, frozen=True):
    """`percent` of a subject's `budget` for a `period` (a day or a month) were spent `at` a time."""

    id: str
    subject: str
    budget: str
    period: str
    percent: int
    spent: float
    amount: float
    at: float


class Alerts:
    """Raises alerts, each once a period, and lists them. They are in the database, the log and the audit
    log, and go to the webhook where there is one."""

    def __init__(
        self,
        database: Database,
        authorizer: Authorizer,
        percents: Sequence[int],
        webhook: Webhook | None = None,
    ) -> None:
        self._database = database
        self._authorizer = authorizer
        self._percents = percents
        self._webhook = webhook
        self._exhausted: set[tuple[str, str, str]] = set()

    async def look(
        self, subject: str, budget: str, period: str, spent: float, added: float, amount: float
    ) -> None:
        """`added` has just been spent of a budget, which makes `spent`: raises the alerts that are due."""
        for percent in self._percents:
            threshold = amount * percent / 100
            if spent - added < threshold <= spent:
                await self._raise(
                    Alert(new_id(), subject, budget, period, percent, spent, amount, time.time())
                )

    async def exhaust(self, subject: str, budget: str, period: str, spent: float, amount: float) -> None:
        """There is no room in a budget for what is asked: raises its alerts, though a rest is not spent."""
        which = (subject, budget, period)
        if which in self._exhausted:
            return
        for percent in self._percents:
            if percent <= 100:
                await self._raise(
                    Alert(new_id(), subject, budget, period, percent, spent, amount, time.time())
                )
        if len(self._exhausted) >= MOST_EXHAUSTED:
            self._exhausted.clear()
        self._exhausted.add(which)

    async def _raise(self, alert: Alert) -> None:
        details = {"budget": alert.budget, "period": alert.period, "percent": alert.percent}

        def operation(connection: Connection) -> bool:
            is_new = insert_new(connection, alerts, msgspec.structs.asdict(alert))
            if is_new:
                note(connection, None, "budget.alert", target=alert.subject, details=details)
            return is_new

        try:
            if await self._database.write(operation):
                log.warning("a budget is nearly or wholly spent", subject=alert.subject, **details)
                self._tell(alert)
        except StorageUnavailable:
            log.error("an alert could not be stored", subject=alert.subject, **details)

    def _tell(self, alert: Alert) -> None:
        if self._webhook is not None:
            at = datetime.fromtimestamp(alert.at, UTC)
            self._webhook.tell({"type": "budget.alert", **msgspec.structs.asdict(alert), "at": at})

    async def newest(self, who: Identity, limit: int) -> list[Alert]:
        """The newest alerts. Raises `Forbidden`."""
        await self._authorizer.check(who, "usage:read-all")
        statement = select(alerts).order_by(alerts.c.id.desc()).limit(limit)
        rows = await self._database.read(lambda c: c.execute(statement).all())
        return [Alert(*row) for row in rows]
