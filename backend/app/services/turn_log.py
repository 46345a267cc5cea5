"""What the log, and traces, tell of turns: one line when a turn is accepted, and one when it has ended, with
ids and names and never what was said."""

from __future__ import annotations

import time

from app.events import Ending, Failed, type_of
from app.logs import get_logger
from app.services.turns import Turn

log = get_logger(__name__)


def accepted(turn: Turn, model: str) -> None:
    """A turn is committed, or, without a session, about to run. `model` is what is known to be asked."""
    row = turn.row
    log.info("turn accepted", turn=row.id, door=row.door, model=model, kind=row.kind, attempt=row.attempt)


def ended(turn: Turn, ending: Ending) -> None:
    """Its ending is stored."""
    more = {"code": ending.error.code} if isinstance(ending, Failed) else {}
    log.info(
        "turn ended",
        turn=turn.row.id,
        door=turn.row.door,
        model=turn.meter.model,
        outcome=type_of(ending),
        ms=round((time.monotonic() - turn.began) * 1000),
        **more,
    )
    if turn.spans is not None:
        turn.spans.end(ending, turn.usage, turn.meter.model)
