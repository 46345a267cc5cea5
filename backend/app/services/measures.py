"""What a turn has used, where the LLM server has not reported it, and how fast it went."""

from __future__ import annotations

import time

import msgspec

from app.events import Usage
from app.services.prompts import estimate_prompt
from app.services.replies import speed
from app.services.turns import Turn

CHARS_A_TOKEN = 4


def estimated(turn: Turn) -> Usage:
    """Roughly what a turn has used: nothing when no server took it up."""
    if not turn.meter.has_read:
        return Usage(estimated=True)
    # A piece is a token, or several that came together.
    return Usage(estimate_prompt(turn.prompt), max(turn.pieces, turn.chars // CHARS_A_TOKEN), estimated=True)


def told(turn: Turn, usage: Usage) -> Usage:
    """The same, with the model that answered, the time to the first piece of the reply and, if it is not
    known, the speed."""
    model = turn.meter.model or None
    if turn.first_token_at is None:
        return msgspec.structs.replace(usage, model=model)
    pace = usage.tokens_per_second
    if pace is None:
        pace = speed(usage.completion_tokens, time.monotonic() - turn.first_token_at)
    ttft = round((turn.first_token_at - turn.began) * 1000)
    return msgspec.structs.replace(usage, ttft_ms=ttft, tokens_per_second=pace, model=model)


def share_of_thinking(turn: Turn, tokens: int) -> int:
    """How many of the tokens that were written are reasoning, by their share of the text."""
    thought = turn.chars - sum(map(len, turn.response))
    return round(tokens * thought / turn.chars) if turn.chars else 0
