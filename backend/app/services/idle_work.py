"""What is done for a session until it speaks again: the summary of what was cut, and warming the prompt."""

from __future__ import annotations

import asyncio
from typing import Any

from sqlalchemy import Connection

from app.config import Settings
from app.errors import PortalError
from app.events import GenerationOptions, Usage
from app.logs import get_logger
from app.services.accounting import Accounting
from app.services.admission import Ticket
from app.services.drain import Drain
from app.services.exchanges import exchanges_in
from app.services.history import History
from app.services.llm_client import LLMClient
from app.services.memory import Memory
from app.services.places import Meter
from app.services.prompting import Asked
from app.services.prompts import estimate_prompt, estimate_tokens
from app.services.replies import Completion
from app.services.store import Store
from app.services.turns import Turn
from app.services.usage import TurnUsage
from app.tasks import Tasks

MOST_TRIES = 3
"""How often the summary of a cut is begun: sessions that speak quickly would pay for it again and again."""

MOST_OF_BUDGET = 4
"""A summary has at most the budget's tokens divided by this."""

WORDS_A_TOKEN = 0.6

NOTES = (
    "You keep the notes of a conversation, for somebody who will go on with it and knows nothing else of it. "
    "Write down what may matter later: names, facts, wishes, decisions, open questions. Use the language of "
    "the conversation and at most {words} words. Write nothing but the notes."
)

log = get_logger(__name__)


class IdleWork:
    """Works for sessions that are at rest. Whoever speaks again cancels it."""

    def __init__(
        self,
        settings: Settings,
        llm: LLMClient,
        store: Store,
        memory: Memory,
        accounting: Accounting,
        drain: Drain,
    ) -> None:
        self._settings = settings
        self._llm = llm
        self._store = store
        self._memory = memory
        self._accounting = accounting
        self._drain = drain
        self._counting = Tasks("idle work")

    def is_wanted(self, history: History) -> bool:
        """Whether there is something to do."""
        return not self._drain.is_on and (history.is_cold or self._wants_summary(history))

    def _wants_summary(self, history: History) -> bool:
        return (
            self._settings.llm_history_summary > 0
            and history.is_cut
            and history.summarised_to != history.window_start
            and history.summary_tries < MOST_TRIES
        )

    async def warm(self, history: History, turn: Turn, options: GenerationOptions) -> None:
        """Lets the LLM server read what the next prompt will begin with. Raises nothing."""
        try:
            prompt = history.prompt("", turn.row.kind)
            read = await self._llm.warm(turn.session.id, prompt, options)
        except PortalError as error:
            log.debug("a prompt could not be warmed", turn=turn.id, reason=error.code)
            return
        if read is None:
            return
        history.is_cold = False
        if read.prompt_tokens and turn.row.kind == "message":
            history.counted(read.prompt_tokens)
        log.debug("a prompt is warm", turn=turn.id, tokens=read.prompt_tokens, cached=read.cached_tokens)

    async def summarise(self, history: History, turn: Turn, asked: Asked, version: int) -> bool:
        """Has the model write down what was cut, and stores it; tells whether the session has another
        version now. Raises nothing: without a summary it goes on as before."""
        start = history.window_start
        if start is None or turn.meter.own_key or not self._wants_summary(history):
            return False
        history.summary_tries += 1
        try:
            return await self._summarise(history, turn, asked, version, start)
        except PortalError as error:
            log.warning("a summary could not be made", turn=turn.id, reason=error.code)
            history.summary_tries = MOST_TRIES
            return False

    async def _summarise(self, history: History, turn: Turn, asked: Asked, version: int, start: str) -> bool:
        budget = asked.room.budget
        longest = min(self._settings.llm_history_summary, max(budget // MOST_OF_BUDGET, 1))
        messages = await self._notes(history, turn, start, budget, longest)
        if messages is None:
            return False
        ours = GenerationOptions(model=asked.options.model, max_tokens=longest)
        ticket, meter = await self._accounting.admit_work(turn), Meter()
        reply: Completion | None = None
        try:
            reply = await self._llm.in_spare_time(turn.session.id, messages, ours, meter)
        finally:
            text = "" if reply is None else reply.response.strip()
            used = reply.usage if reply is not None else Usage(estimate_prompt(messages), 0, estimated=True)
            spent = self._accounting.work(turn, "summary", used if meter.has_read else Usage(), meter)
            keeping = self._keep(turn, ticket, spent, version, text, start)
            kept = self._counting.start(keeping, f"count {turn.id}")
        if await asyncio.shield(kept):
            history.summarise(text, start)
            return True
        if text:
            history.summary_tries = MOST_TRIES
        return False

    async def _keep(
        self, turn: Turn, ticket: Ticket, spent: TurnUsage, version: int, text: str, until: str
    ) -> bool:
        """Stores a summary, unless it is empty, and in any case what it has used; tells whether the session
        has it now. Whoever speaks does not end this: what was used is used."""

        def also(connection: Connection) -> None:
            self._accounting.write_work(connection, turn, spent)

        try:
            return bool(text) and await self._memory.summarise(turn.session.id, version, text, until, also)
        except PortalError as error:
            log.warning("a summary could not be stored", turn=turn.id, reason=error.code)
            return False
        finally:
            await self._accounting.count_work(ticket, turn, spent)

    async def _notes(
        self, history: History, turn: Turn, start: str, budget: int, longest: int
    ) -> list[dict[str, Any]] | None:
        """The request for a summary: the one there is, and what was cut since then, as much of it as there
        is room for; None when nothing was cut."""
        found = await self._store.message_parent(turn.session.id, start)
        if found is None or found[0] is None:
            return None
        rows = await self._store.messages(found[0], last=history.summarised_to)
        said = [
            f"User: {question.content}\nAssistant: {answer.content}"
            for question, answer, exchange in exchanges_in(rows)
            if not exchange.pinned and exchange.kind == "message"
        ]
        before = [f"Your notes so far:\n{history.summary}"] if history.summary else []
        room = budget - estimate_tokens(NOTES + "".join(before))
        while said and sum(map(estimate_tokens, said)) > room:
            del said[0]
        if not said:
            return None
        notes = NOTES.format(words=max(int(longest * WORDS_A_TOKEN), 1))
        text = "\n\n".join([*before, "What was said then:", *said])
        return [{"role": "system", "content": notes}, {"role": "user", "content": text}]

    async def close(self) -> None:
        """Waits until all that was used is written down."""
        await self._counting.wait()
