"""The history of one session as the model sees it: what fits, with a prefix that stays the same.

An LLM server keeps what it computed for a prompt, and a prompt that begins the same is answered
sooner. A history that drops one exchange a turn never begins the same; so it is cut rarely, and then
to half of the room that there is for it, on whole exchanges. Pinned exchanges and a summary of what was
cut stand before what is left. Of the states of a game only the newest is kept, at the end.

What is sent is kept encoded, and its size is known, so a turn costs the same however long the history is.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from app.errors import InvalidRequest
from app.events import Kind, Usage
from app.services.exchanges import Exchange, asked, exchanges_in, said_by
from app.services.prompts import BYTES_A_TOKEN, MESSAGE_OVERHEAD, Prompt
from app.services.rows import MessageRow

CUT_TO = 0.5
"""How much of the room for exchanges is used after a cut."""

AGAIN = "The player has now sent this very state {times} times. Give another hint than before."

SUMMARY = "What we have said so far, in short:\n{text}"
UNDERSTOOD = "I remember."
"""How a summary is sent: as an exchange, since what users said must not speak with the system prompt's
authority."""

CountTokens = Callable[[Sequence[Any]], Awaitable[int | None]]


@dataclass(frozen=True, slots=True)
class Room:
    """How much a prompt may have: `budget` tokens and `messages` (0: any number). `context` is what the
    model reads at most, where it is known."""

    budget: int
    messages: int = 0
    context: int | None = None


class History:
    """What is still sent: the system prompt, the summary, pinned exchanges from before the cut, and the
    window: all exchanges since then.

    `is_cold` while its beginning is another one than that of the last prompt; `is_cut` when something that
    was said is not sent any more; `summarised_to` is the message up to which the summary reaches, and
    `summary_tries` how often one was begun since the last cut.
    """

    def __init__(self, system_prompt: str) -> None:
        self._system_prompt = system_prompt
        self._summary: Exchange | None = None
        self.summary: str | None = None
        self._head: list[Exchange] = []
        self._window: list[Exchange] = []
        self._last_state: str | None = None
        self._times = 0
        self._total: int | None = None
        self.summarised_to: str | None = None
        self.summary_tries = 0
        self.is_cut = self.is_cold = self._is_less = False
        self._join()

    @classmethod
    def from_rows(cls, system_prompt: str, rows: Sequence[MessageRow]) -> History:
        """The history on a stored path that begins where it was last cut."""
        history = cls(system_prompt)
        for question, answer, exchange in exchanges_in(rows):
            history._append(exchange, question.content, answer.usage)
        if rows and rows[0].parent_id is not None:
            history._total = None  # the last count may be from before the cut
        return history

    # --- what is sent ---

    @property
    def system_prompt(self) -> str:
        """The first message, if there is one."""
        return self._system_prompt

    @system_prompt.setter
    def system_prompt(self, text: str) -> None:
        if text != self._system_prompt:
            self._system_prompt, self._total = text, None
            self._join()

    @property
    def window_start(self) -> str | None:
        """The id of the oldest message of the window."""
        return self._window[0].first_message if self._window else None

    @property
    def size(self) -> int:
        """Tokens of all that is sent before the newest message: as counted, or else estimated."""
        return self._total if self._total is not None else len(self._json) // BYTES_A_TOKEN

    def worded(self, question: str, kind: Kind) -> str:
        """What the model is asked: of a state, also whether the player has sent it before."""
        if kind == "message":
            return question
        again = f"\n\n{AGAIN.format(times=self._times + 1)}" if question == self._last_state else ""
        return asked(question, kind) + again

    def prompt(self, question: str, kind: Kind = "message") -> Prompt:
        """The messages for the model, `question` the newest. A state takes the place of a state."""
        past, count = self._json, self._count
        if kind == "state" and any(exchange.kind == "state" for exchange in self._window[-1:]):
            past, count = past[: self._before_last], count - self._window[-1].count
        elif kind == "state":
            messages = [kept for kept in self._window if kept.kind != "state"]
            past, count = self._joined([*self._outlived, *messages])
        return Prompt(past, said_by("user", question), count + 1)

    def _join(self) -> None:
        """Makes what is sent anew, after more than an addition."""
        self._json, self._count = self._joined(self._outlived)
        self._fixed = len(self._json)
        self._before_last = 0
        for exchange in self._window:
            self._join_on(exchange)

    def _joined(self, exchanges: Sequence[Exchange]) -> tuple[bytearray, int]:
        """These exchanges after the system prompt, and how many messages that makes."""
        system = [said_by("system", self._system_prompt)] if self._system_prompt else []
        json = bytearray(b",".join([*system, *(exchange.json for exchange in exchanges)]))
        return json, len(system) + sum(exchange.count for exchange in exchanges)

    def _join_on(self, exchange: Exchange) -> None:
        self._before_last = len(self._json)
        if self._json:
            self._json += b","
        self._json += exchange.json
        self._count += exchange.count

    # --- what happens ---

    def add(
        self,
        message_id: str,
        question: str,
        answer: str,
        usage: Usage | None,
        kind: Kind = "message",
        *,
        pinned: bool = False,
    ) -> None:
        """An exchange has ended."""
        messages = [
            {"role": "user", "content": asked(question, kind)},
            {"role": "assistant", "content": answer},
        ]
        self._append(Exchange.of(message_id, messages, kind, pinned), question, usage)

    def _append(self, exchange: Exchange, question: str, usage: Usage | None) -> None:
        before, self._total = self._total, None
        if exchange.kind == "state":
            self._times = self._times + 1 if question == self._last_state else 1
            self._last_state = question
            if any(kept.kind == "state" for kept in self._window):
                self._window = [kept for kept in self._window if kept.kind != "state"]
                before = None
                self._join()
        if usage is not None and not usage.estimated:
            self._total = usage.prompt_tokens + usage.completion_tokens - usage.reasoning_tokens
            if before is not None and self._total > before:
                exchange.tokens = self._total - before
        if self._is_less:
            self._is_less, self._total, exchange.tokens = False, None, None
        self._window.append(exchange)
        self._join_on(exchange)

    def begin_after(self, state: str) -> None:
        """The newest state was this one, whether or not it is among the exchanges."""
        self._last_state, self._times = state, 1

    def remember(self, pinned: Sequence[MessageRow], summary: str | None, until: str | None) -> None:
        """What outlives a cut: pinned exchanges from before the window, and a summary of the others before
        the message `until`."""
        self._head = [exchange for _, _, exchange in exchanges_in(pinned) if exchange.pinned]
        self.is_cut = True
        self.summarise(summary, until)
        self.is_cold = False

    def summarise(self, text: str | None, until: str | None) -> None:
        """There is a summary of what was said before the message `until`."""
        self.summary, self.summarised_to = text, until
        if text:
            told = {"role": "user", "content": SUMMARY.format(text=text)}
            self._summary = Exchange.of("", [told, {"role": "assistant", "content": UNDERSTOOD}])
        self._changed(None)

    def counted(self, tokens: int) -> None:
        """The server has counted a prompt with an empty newest message: about all that is sent now."""
        self._total = tokens

    # --- what fits ---

    async def fit(self, question: str, kind: Kind, room: Room, count: CountTokens) -> Prompt:
        """The messages for the model, `question` worded for it, after a cut if there is no room for them.

        Raises `InvalidRequest` when the system prompt and `question` alone are longer than the context.
        """
        question, budget = self.worded(question, kind), room.budget
        if room.messages and self._count + 1 > room.messages:
            self._keep_messages(room.messages)
        prompt = self.prompt(question, kind)
        if self._upper_bound(question) > budget:
            size = await _size(prompt, count)
            if size > budget:
                await self._check_alone(question, room.context, count)
            while size > budget and self._cut(size, len(prompt.json), budget):
                prompt = self.prompt(question, kind)
                size = await _size(prompt, count)
            if size > budget and self._outlived:
                prompt = await self._with_less(question, budget, count)
        self.is_cold = False
        return prompt

    async def _check_alone(self, question: str, context: int | None, count: CountTokens) -> None:
        if context is None:
            return
        least = await _size(History(self._system_prompt).prompt(question), count)
        if least >= context:
            raise InvalidRequest(
                f"message: with the system prompt it has {least} tokens; the model reads at most {context}."
            )

    def make_room(self, room: Room) -> None:
        """Right after an answer: cuts at once when another turn as long as those before would not fit, so
        that the server can read what is left before it is needed."""
        if room.messages and self._count + 1 > room.messages:
            self._keep_messages(room.messages)
        if all(exchange.pinned for exchange in self._window[:-1]):
            return
        typical = self.size * (len(self._json) - self._fixed) // len(self._json) // len(self._window)
        if self.size + typical > room.budget:
            self._cut(self.size, len(self._json), room.budget)

    async def refit(
        self,
        question: str,
        kind: Kind,
        room: Room | None,
        count: CountTokens,
        *,
        sent: Prompt,
        size: int | None,
    ) -> Prompt | None:
        """The messages for the model once more, after the server had no room for `sent`, of `size` tokens
        where it tells: cut to half of the room, or to nothing where nobody knows it. None when there was
        nothing left to leave out. Raises what `fit` raises."""
        budget, before = 0 if room is None else room.budget, len(self._json)
        size = size or max(sent.estimate, budget)
        while len(self._json) >= before and self._cut(size, len(sent.json), budget):
            pass
        if len(self._json) >= before:
            return (
                await self._with_less(self.worded(question, kind), budget, count) if self._outlived else None
            )
        if room is None:
            while self._cut(size, len(sent.json), 0):
                pass
            return await self._with_less(self.worded(question, kind), 0, count)
        if self._total is None:
            self._total = size * len(self._json) // len(sent.json)
        return await self.fit(question, kind, room, count)

    @property
    def _outlived(self) -> list[Exchange]:
        """What is sent before the window."""
        return [*([self._summary] if self._summary is not None else []), *self._head]

    async def _with_less(self, question: str, budget: int, count: CountTokens) -> Prompt:
        """For this once the prompt without the summary and then without pinned exchanges, the oldest first,
        until it fits or nothing is left of them."""
        self._is_less = True
        rest = self._outlived
        while True:
            del rest[:1]
            past, messages = self._joined(rest)
            prompt = Prompt(past, said_by("user", question), messages + 1)
            if not rest or await _size(prompt, count) <= budget:
                return prompt

    def _upper_bound(self, question: str) -> int:
        """Tokens that the prompt has at most: a token is at least a byte of text."""
        past = self._total if self._total is not None else len(self._json)
        return past + len(question.encode()) + 2 * MESSAGE_OVERHEAD

    def _cut(self, size: int, length: int, budget: int) -> bool:
        """Leaves out the oldest exchanges of a prompt of `size` tokens and `length` bytes, at least one,
        until about half of the room for exchanges is used: the newest only when nothing else is left. What
        is pinned goes to the head. False when there was nothing to leave out."""
        if not self._window:
            return False
        fixed = self._fixed * size // length
        surplus = size - fixed - int(max(budget - fixed, 0) * CUT_TO)
        dropped = lost = 0
        while dropped < len(self._window) - 1 and (surplus > 0 or not lost):
            exchange = self._window[dropped]
            if not exchange.pinned:
                surplus -= exchange.tokens or len(exchange.json) * size // length
                lost += 1
            dropped += 1
        self._drop(dropped if lost else len(self._window))
        return True

    def _cut_head(self) -> bool:
        if self._summary is not None:
            self._summary = None
        elif self._head:
            del self._head[0]
        else:
            return False
        self._changed(None)
        return True

    def _drop(self, exchanges: int) -> None:
        """Drops the oldest ones of the window; those that are pinned go to the head."""
        self.is_cut, self.summary_tries = True, 0
        gone, self._window = self._window[:exchanges], self._window[exchanges:]
        total = self._total
        for exchange in gone:
            if exchange.pinned:
                self._head.append(exchange)
            elif exchange.tokens is None or total is None:
                total = None
            else:
                total -= exchange.tokens
        self._changed(total)

    def _changed(self, total: int | None) -> None:
        """The beginning of the prompt is another one now, of `total` tokens."""
        self._total = total
        self.is_cold = True
        self._join()

    def _keep_messages(self, most: int) -> None:
        """Drops the oldest exchanges until half as many messages are left as may be sent: the newest stays,
        even where there is no room for it."""
        kept, dropped = self._count, 0
        while dropped < len(self._window) - 1 and kept + 1 > int(most * CUT_TO):
            kept -= 0 if self._window[dropped].pinned else self._window[dropped].count
            dropped += 1
        if dropped:
            self._drop(dropped)
        while self._count + 1 > most and self._cut_head():
            pass


async def _size(prompt: Prompt, count: CountTokens) -> int:
    exact = await count(prompt)
    return exact if exact is not None else prompt.estimate
