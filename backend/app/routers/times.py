"""Times in bodies."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import overload


@overload
def moment(at: float) -> datetime: ...
@overload
def moment(at: None) -> None: ...
def moment(at: float | None) -> datetime | None:
    """A Unix time in seconds as bodies have it: in UTC."""
    return None if at is None else datetime.fromtimestamp(at, UTC)


def deadline_in(seconds: float | None) -> float | None:
    """The Unix time that so many seconds are away; None for none."""
    return None if seconds is None else time.time() + seconds
