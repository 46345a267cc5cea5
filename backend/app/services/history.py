"""The history of one session as the model sees it: what fits, with a prefix that stays the same.

An LLM server keeps what it computed for a prompt, and a prompt that begins the same is answered
sooner. A history that drops one exchange a turn never begins the same; so it is cut rarely, and then
down to half of its budget, on whole exchanges. Of the states of a game only the newest is kept, at the end.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from app.errors import InvalidRequest
from app.events import Kind, Usage
from app.services.rows import MessageRow

CUT_TO = 0.5
"""How much of its budget a history keeps when it is cut."""

MESSAGE_OVERHEAD = 16
"""Most tokens that a chat template adds to a message."""

AGAIN = "The player has now sent this very state {times} times. Give another hint than before."

CountTokens = Callable[[Sequence[dict[str, Any]]], Awaitable[int | None]]


@dataclass(slots=True)
class Exchange:
    """One user message and what answered it. `tokens` is the size of the whole conversation up to
    this answer, as the server counted it; None where it did not, or where what came before is gone."""

    first_message: str
    messages: list[dict[str, Any]]
    tokens: int | None = None
    kind: Kind = "message"


class History:
    """The exchanges that are still sent, oldest first."""

    def __init__(self, system_prompt: str, exchanges: list[Exchange] | None = None) -> None:
        self.system_prompt = system_prompt
        self._exchanges = exchanges or []
        self._last_state: str | None = None
        self._times = 0

    @property
    def _system(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []

    @classmethod
    def from_rows(cls, system_prompt: str, rows: Sequence[MessageRow]) -> History:
        """The history on a stored path: turns that failed or never ran are not sent, nor is what there was of
        a reply that failed."""
        history = cls(system_prompt)
        question: MessageRow | None = None
        for row in rows:
            if row.role == "user":
                question = row
            elif row.status != "failed" and question is not None:
                history.add(question.id, question.content, row.content, row.usage, question.kind)
                question = None
        return history

    @property
    def window_start(self) -> str | None:
        """The id of the oldest message that is sent."""
        return self._exchanges[0].first_message if self._exchanges else None

    def add(
        self, message_id: str, question: str, answer: str, usage: Usage | None, kind: Kind = "message"
    ) -> None:
        """An exchange has ended."""
        asked = {"role": "user", "content": _state(question) if kind == "state" else question}
        exchange = Exchange(message_id, [asked, {"role": "assistant", "content": answer}], kind=kind)
        if usage is not None and not usage.estimated:
            exchange.tokens = usage.prompt_tokens + usage.completion_tokens - usage.reasoning_tokens
        if kind == "state":
            self._times = self._times + 1 if question == self._last_state else 1
            self._last_state = question
            self._exchanges = [kept for kept in self._exchanges if kept.kind != "state"]
        self._exchanges.append(exchange)

    def begin_after(self, state: str) -> None:
        """The newest state was this one, whether or not it is among the exchanges."""
        self._last_state, self._times = state, 1

    def worded(self, question: str, kind: Kind) -> str:
        """What the model is asked: of a state, also whether the player has sent it before."""
        if kind == "message":
            return question
        again = question == self._last_state
        return f"{_state(question)}\n\n{AGAIN.format(times=self._times + 1)}" if again else _state(question)

    def prompt(self, question: str, kind: Kind = "message") -> list[dict[str, Any]]:
        """The messages for the model, `question` the newest. A state takes the place of a state."""
        kept = self._exchanges
        if kind == "state" and kept and kept[-1].kind == "state":
            kept = kept[:-1]
        sent = [message for exchange in kept for message in exchange.messages]
        return [*self._system, *sent, {"role": "user", "content": question}]

    async def fit(
        self,
        question: str,
        *,
        kind: Kind = "message",
        budget: int,
        max_messages: int,
        context: int | None,
        count: CountTokens,
    ) -> list[dict[str, Any]]:
        """The messages for the model, `question` worded for it, after a cut if they would not fit into
        `budget` tokens or `max_messages` (0: no bound).

        Raises `InvalidRequest` when the system prompt and `question` alone are longer than `context`.
        """
        question = self.worded(question, kind)
        if max_messages and 2 * len(self._exchanges) + 1 > max_messages:
            self._keep(max(0, int(max_messages * CUT_TO) // 2))
        if self._upper_bound(question) <= budget:
            return self.prompt(question, kind)
        alone = History(self.system_prompt)
        least = await alone._size(question, count)
        if context is not None and least >= context:
            raise InvalidRequest(
                f"message: with the system prompt it has {least} tokens; the model reads at most {context}."
            )
        size = await self._size(question, count)
        while size > budget and self._exchanges:
            self._cut(size, budget)
            size = await self._size(question, count)
        return self.prompt(question, kind)

    def _upper_bound(self, question: str) -> int:
        """Tokens that the prompt has at most: a token is at least a byte of text."""
        new = len(question.encode()) + 2 * MESSAGE_OVERHEAD
        if not self._exchanges:
            return new + sum(len(m["content"].encode()) for m in self._system) + 2 * MESSAGE_OVERHEAD
        known = self._exchanges[-1].tokens
        return new + known if known is not None else new + self._bytes()

    def _bytes(self) -> int:
        return sum(len(m["content"].encode()) + MESSAGE_OVERHEAD for m in self.prompt(""))

    async def _size(self, question: str, count: CountTokens) -> int:
        exact = await count(self.prompt(question))
        return exact if exact is not None else self._estimate(question)

    def _estimate(self, question: str) -> int:
        return sum(estimate_tokens(m["content"]) + MESSAGE_OVERHEAD // 2 for m in self.prompt(question))

    def _cut(self, size: int, budget: int) -> None:
        """Drops the oldest exchanges until about half of the budget is used, at least one."""
        surplus = size - int(budget * CUT_TO)
        dropped = 0
        while dropped < len(self._exchanges) and surplus > 0:
            surplus -= self._tokens_of(dropped)
            dropped += 1
        self._keep(len(self._exchanges) - dropped)

    def _tokens_of(self, index: int) -> int:
        exchange = self._exchanges[index]
        before = self._exchanges[index - 1].tokens if index else 0
        if index and exchange.tokens is not None and before is not None and exchange.tokens > before:
            return exchange.tokens - before
        return sum(estimate_tokens(m["content"]) + MESSAGE_OVERHEAD // 2 for m in exchange.messages)

    def _keep(self, exchanges: int) -> None:
        """Keeps the newest ones. Their counts included what is dropped, so they are known no more."""
        self._exchanges = self._exchanges[len(self._exchanges) - exchanges :]
        for exchange in self._exchanges:
            exchange.tokens = None


def estimate_tokens(text: str) -> int:
    """Roughly how many tokens a text has, rather too many than too few: used only where the server
    does not tell."""
    return len(text.encode()) // 3 + 1


def _state(text: str) -> str:
    return f"The state of the game:\n{text}"
