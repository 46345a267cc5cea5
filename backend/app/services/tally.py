"""What the turns of this process have come to, in numbers: added up as they end, read when somebody asks.

Names in it are bounded: doors, outcomes and error codes are the portal's own, and models those that are
served or configured; any other is `other`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from app.distribution import LATENCIES_S, SHORT_S, Distribution
from app.events import Usage
from app.services.usage import TurnUsage

MOST_MODELS = 100
"""Models that are counted each for itself."""

NO_MODEL, OTHER_MODEL = "none", "other"


class ModelTally:
    """What the turns of one model have come to; times in seconds."""

    __slots__ = ("cached", "completion", "first_token", "next_token", "prompt", "reasoning")

    def __init__(self) -> None:
        self.prompt = self.cached = self.completion = self.reasoning = 0
        self.first_token = Distribution(LATENCIES_S)
        self.next_token = Distribution(SHORT_S)
        """The mean of each turn: nothing is measured between two pieces."""


class Tally:
    """Adds up. `is_known` tells whether a model is served or configured."""

    def __init__(self, is_known: Callable[[str], bool]) -> None:
        self._is_known = is_known
        self.turns: Counter[tuple[str, str, str]] = Counter()
        """By door, model and outcome."""
        self.durations: dict[tuple[str, str], Distribution] = {}
        """From acceptance to the ending, by door and model."""
        self.models: dict[str, ModelTally] = {}
        self.refused: Counter[tuple[str, str]] = Counter()
        """Requests that were answered with an error, by door and code."""

    def add(self, used: TurnUsage, usage: Usage | None) -> None:
        """A turn has ended. `usage` is what its reply took, where it came to one."""
        model = self._name(used.model)
        self.turns[used.door, model, used.outcome] += 1
        duration = self.durations.get((used.door, model))
        if duration is None:
            duration = self.durations[used.door, model] = Distribution(LATENCIES_S)
        duration.add(used.elapsed_ms / 1000)
        of_model = self.models.get(model)
        if of_model is None:
            of_model = self.models[model] = ModelTally()
        of_model.prompt += used.prompt_tokens
        of_model.cached += used.cached_tokens
        of_model.completion += used.completion_tokens
        of_model.reasoning += used.reasoning_tokens
        if used.ttft_ms is not None:
            of_model.first_token.add(used.ttft_ms / 1000)
        if usage is not None and usage.tokens_per_second and not usage.cache_hit:
            of_model.next_token.add(1 / usage.tokens_per_second)

    def refuse(self, door: str, code: str) -> None:
        """A request was answered with an error."""
        self.refused[door, code] += 1

    def _name(self, model: str) -> str:
        if model in self.models:
            return model
        if not model:
            return NO_MODEL
        return model if len(self.models) < MOST_MODELS and self._is_known(model) else OTHER_MODEL
