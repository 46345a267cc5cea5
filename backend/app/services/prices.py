"""What models cost: the `price` of a model in `models.toml`, which `catalog` reads.

    [models."gpt-4o*".price]
    input = 2.50        # a million tokens of prompt
    cached = 1.25       # a million of those that the server had in its cache; as `input` when left out
    output = 10.00      # a million tokens of reply
    gpu_second = 0.0    # a second of the LLM server's time

The currency is whatever the admin thinks in.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from app.events import Usage

Money = Annotated[float, Field(ge=0)]


class Price(BaseModel):
    """The price of one model, a million tokens and a second."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: Money = 0.0
    cached: Money | None = None
    output: Money = 0.0
    gpu_second: Money = 0.0

    def of(self, usage: Usage, gpu_seconds: float) -> float:
        """What a turn costs."""
        cached = self.input if self.cached is None else self.cached
        fresh = usage.prompt_tokens - usage.cached_tokens
        tokens = fresh * self.input + usage.cached_tokens * cached + usage.completion_tokens * self.output
        return tokens / 1_000_000 + gpu_seconds * self.gpu_second


FREE = Price()
