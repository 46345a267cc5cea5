"""What a turn has cost, written down when it ends, however it does.

The usage row, the day's sums and the audit row belong to the transaction that ends the turn; the budgets
are settled when it is committed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection

from app.database import Database
from app.errors import PortalError
from app.events import Ending, Final, Usage, new_id, type_of
from app.logs import get_logger
from app.services import audit, usage
from app.services.admission import Admission, Ticket
from app.services.audit import Entry
from app.services.measures import estimated
from app.services.places import Meter
from app.services.tally import Tally
from app.services.turns import Turn
from app.services.usage import Line, Spent, TurnUsage
from app.writing import defer

log = get_logger(__name__)


def close_books(connection: Connection, deferred: Sequence[Line | Entry]) -> None:
    """Writes what the operations of a transaction have left to its end. For `Database.before_commit`."""
    lines = [item for item in deferred if isinstance(item, Line)]
    entries = [item for item in deferred if isinstance(item, Entry)]
    # The head of the log, which all processes need, comes last: it is held the shortest then, and whoever
    # has it waits for nobody.
    usage.add_up(connection, lines)
    if entries:
        audit.seal(connection, entries)


class Accounting:
    """Counts what turns have used."""

    def __init__(self, database: Database, admission: Admission, tally: Tally) -> None:
        self._database = database
        self._tally = tally
        self._admission = admission

    def used(self, turn: Turn, ending: Ending) -> TurnUsage:
        """What the turn has used in this attempt."""
        row, meter = turn.row, turn.meter
        tokens = ending.usage if isinstance(ending, Final) else turn.usage or estimated(turn)
        if tokens.cache_hit:
            tokens = Usage()
        first = turn.first_token_at
        return self._usage(
            turn,
            tokens,
            meter,
            turn_id=row.id,
            attempt=row.attempt,
            outcome=type_of(ending),
            ttft_ms=None if first is None else round((first - turn.began) * 1000),
            elapsed_ms=round((time.monotonic() - turn.began) * 1000),
        )

    def _usage(self, turn: Turn, tokens: Usage, meter: Meter, **rest: Any) -> TurnUsage:
        """What was used for a turn, or in its wake, at the cost of whoever asked for it."""
        gpu_seconds = round(meter.gpu_seconds, 4)
        return TurnUsage(
            at=time.time(),
            owner=turn.session.owner,
            api_key=turn.row.api_key or "",
            project=turn.session.project,
            model=meter.model,
            door=turn.row.door,
            prompt_tokens=tokens.prompt_tokens,
            completion_tokens=tokens.completion_tokens,
            cached_tokens=tokens.cached_tokens,
            reasoning_tokens=tokens.reasoning_tokens,
            estimated=tokens.estimated,
            gpu_seconds=gpu_seconds,
            cost=0.0 if meter.own_key else self._admission.cost(meter.model, tokens, gpu_seconds),
            **rest,
        )

    def write(self, connection: Connection, turn: Turn, used: TurnUsage) -> None:
        """Writes it down, with this transaction, unless that was done before."""
        if not usage.write(connection, used, _day(turn, used)):
            return
        details = {
            "session": turn.session.session_id,
            "model": used.model,
            "attempt": used.attempt,
            "prompt_tokens": used.prompt_tokens,
            "completion_tokens": used.completion_tokens,
            "question_chars": len(turn.question or ""),
            "reply_chars": sum(map(len, turn.response)),
        }
        if used.api_key:
            details["key"] = used.api_key
        entry = Entry(used.owner, "turn", turn.id, used.outcome, used.door, details=details)
        defer(connection, entry)

    async def settle(self, turn: Turn, used: TurnUsage) -> None:
        """What is written down is committed: the budgets are charged. Once for each attempt."""
        if turn.is_counted:
            return
        turn.is_counted = True
        self._tally.add(used, turn.usage)
        await self._charge(turn.ticket, used, 1)

    async def _charge(self, ticket: Ticket, used: TurnUsage, turns: int) -> None:
        spent = Spent(
            turns,
            used.prompt_tokens,
            used.completion_tokens,
            used.cached_tokens,
            used.reasoning_tokens,
            used.gpu_seconds,
            used.cost,
        )
        await self._admission.settle(ticket, spent)

    async def count(self, turn: Turn) -> None:
        """Counts a turn whose ending was stored without this: cut off by a clear, or never stored."""
        if turn.is_counted or turn.ending is None:
            return
        used = self.used(turn, turn.ending)
        try:
            await self._database.write(lambda c: self.write(c, turn, used))
        except PortalError as error:
            log.error("what a turn has used could not be stored", turn=turn.id, reason=error.code)
        await self.settle(turn, used)

    async def release(self, turn: Turn) -> None:
        """The turn is counted by another process: what was reserved for it here is free."""
        if not turn.is_counted:
            turn.is_counted = True
            await self._admission.hand_over(turn.ticket)

    # --- work that follows a turn, and is none ---

    async def admit_work(self, turn: Turn) -> Ticket:
        """The leave to do more at the cost of whoever asked for a turn. Raises `BudgetExceeded`."""
        return await self._admission.admit_work(turn.ticket, new_id())

    def work(self, turn: Turn, what: str, tokens: Usage, meter: Meter) -> TurnUsage:
        """What such work has used: `what` it was takes the place of an outcome."""
        elapsed_ms = round(meter.gpu_seconds * 1000)
        ids = {"turn_id": new_id(), "attempt": 1}
        return self._usage(turn, tokens, meter, outcome=what, ttft_ms=None, elapsed_ms=elapsed_ms, **ids)

    def write_work(self, connection: Connection, turn: Turn, used: TurnUsage) -> None:
        """Writes it down, with this transaction, unless that was done before."""
        if not usage.write(connection, used, _day(turn, used), turns=0):
            return
        details = {
            "session": turn.session.session_id,
            "model": used.model,
            "prompt_tokens": used.prompt_tokens,
            "completion_tokens": used.completion_tokens,
        }
        defer(connection, Entry(used.owner, used.outcome, turn.id, "made", used.door, details=details))

    async def count_work(self, ticket: Ticket, turn: Turn, used: TurnUsage) -> None:
        """Charges for work, and writes it down, unless it came to no model or that was done before."""
        if used.model:
            try:
                await self._database.write(lambda c: self.write_work(c, turn, used))
            except PortalError as error:
                log.error("what work has used could not be stored", turn=turn.id, reason=error.code)
        await self._charge(ticket, used, 0)


def _day(turn: Turn, used: TurnUsage) -> str:
    """The day that what was used counts for: that of the budgets it is charged to, where it has such."""
    return turn.ticket.day or usage.day_of(used.at)
