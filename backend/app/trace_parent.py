"""What a caller says of the trace that its request belongs to (`traceparent` and `tracestate` of W3C Trace
Context).

The doors note it; whoever writes traces reads it, in the same task or in one that this one starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar

_of_caller: ContextVar[Mapping[str, str]] = ContextVar("trace_of_caller")

NONE: Mapping[str, str] = {}
LONGEST = 512
"""Of `tracestate` (section 3.3.1.5)."""


def note_trace(parent: str | None, state: str | None) -> None:
    """The request that this task is about is part of that trace, where it is part of one."""
    if parent:
        more = {"tracestate": state} if state and len(state) <= LONGEST else {}
        _of_caller.set({"traceparent": parent, **more})


def trace_of_caller() -> Mapping[str, str]:
    """What was noted."""
    return _of_caller.get(NONE)
