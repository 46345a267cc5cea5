"""What a turn asks of the model: its options, its history, and how much of that there is room for."""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec

from app.access import Role
from app.config import Settings
from app.errors import ContextExceeded
from app.events import GenerationOptions
from app.logs import get_logger
from app.services.history import CountTokens, History, Room
from app.services.llm_client import LLMClient
from app.services.memory import Memory
from app.services.model_defaults import ModelDefaults
from app.services.policies import Policies
from app.services.projects import Projects
from app.services.prompts import Prompt, estimate_tokens
from app.services.rows import SessionRow
from app.services.store import Store
from app.services.tools import instructions
from app.services.turns import Turn

log = get_logger(__name__)


class Asked(msgspec.Struct, frozen=True):
    """What a turn asks for, and how much its prompt may have."""

    options: GenerationOptions
    room: Room


def room_for(settings: Settings, llm: LLMClient, options: GenerationOptions) -> Room:
    """How much a prompt may have: what the settings allow, and what the model's context has room for beside
    the reply."""
    budget, context = settings.llm_max_history_tokens, llm.context_of(options.model)
    if context is not None:
        reserve = llm.max_tokens_of(options)
        if options.tools:
            reserve += estimate_tokens(instructions(options.tools))
        budget = min(budget, max(context - reserve, context // 4))
    return Room(budget, settings.llm_max_history_messages, context)


class Prompting:
    """Makes the prompts of turns."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        memory: Memory,
        llm: LLMClient,
        policies: Policies,
        projects: Projects,
        defaults: ModelDefaults,
    ) -> None:
        self._settings = settings
        self._store = store
        self._memory = memory
        self._llm = llm
        self._policies = policies
        self._projects = projects
        self._defaults = defaults

    def role_of(self, turn: Turn) -> Role:
        """The role of who asked."""
        return self._policies.role(turn.row.role)

    def options(self, turn: Turn) -> GenerationOptions:
        """What was asked for, above what the project has, of the model that is asked now; a state is answered
        with the project's tools."""
        project = self._projects.project(turn.session.project)
        given: dict[str, Any] = {
            name: value
            for name in ("temperature", "top_p", "max_tokens")
            if (value := getattr(project, name)) is not None
        }
        if turn.row.kind == "state" and (tools := project.tools_for(self.role_of(turn).tools)):
            given["tools"] = tools
        options = {**given, **turn.row.options}
        wanted = turn.row.options.get("model")
        model = self._defaults.model(turn.session.owner, self.role_of(turn), wanted)
        if model != wanted:
            options["model"] = model
        return GenerationOptions.of(options)

    def system_prompt(self, session: SessionRow, turn: Turn) -> str:
        """What the role and the session begin with."""
        return "\n\n".join(filter(None, (self.role_of(turn).system_prompt, session.system_prompt)))

    async def recall(self, session: SessionRow, turn: Turn) -> History:
        """The history before the turn, and the turn's question, from what is stored."""
        rows = await self._store.messages(turn.row.message_id, last=session.window_start)
        turn.question = ""
        if rows:
            asked = rows[-1]
            turn.question, turn.asked_at, turn.is_pinned = asked.content, asked.created_at, asked.pinned
        history = History.from_rows(self.system_prompt(session, turn), rows)
        if rows and rows[0].parent_id is not None:
            kept = await self._memory.before(session.id, rows[0])
            history.remember(kept.pinned, kept.summary, kept.until)
        if turn.row.kind == "state":
            before = await self._store.last_state(session.id)
            if before is not None:
                history.begin_after(before)
        return history

    def asked(self, turn: Turn) -> Asked:
        """What the turn asks for."""
        options = self.options(turn)
        return Asked(options, room_for(self._settings, self._llm, options))

    async def fit(self, history: History, turn: Turn, asked: Asked) -> Prompt:
        """The prompt for the turn's question. Raises `InvalidRequest` when that alone is too long."""
        return await history.fit(turn.question or "", turn.row.kind, asked.room, self._count(asked))

    async def refit(self, history: History, turn: Turn, asked: Asked, refused: ContextExceeded) -> Prompt:
        """The prompt once more, after a cut, when the server had no room for it. Raises what it was
        `refused` with where there is nothing left to cut, and `InvalidRequest`."""
        sent = turn.prompt
        assert isinstance(sent, Prompt)
        known = self._llm.context_of(asked.options.model) is not None
        log.info("the server had no room for a prompt", turn=turn.id, limit=refused.limit, size=refused.size)
        room = room_for(self._settings, self._llm, asked.options) if known else None
        prompt = await history.refit(
            turn.question or "", turn.row.kind, room, self._count(asked), sent=sent, size=refused.size
        )
        if prompt is None:
            raise refused
        return prompt

    def _count(self, asked: Asked) -> CountTokens:
        return partial(self._llm.count_tokens, model=asked.options.model)
