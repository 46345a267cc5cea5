"""Times in bodies."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import overload


@overload
def moment(at: float) -> datetime: ...
@overload
def moment(at: None) -> None: ...
def moment(at: float | None) -> datetime | None:
    """A Unix time in seconds as bodies have it: in UTC."""
    return None if at is None else datetime.fromtimestamp(at, UTC)
