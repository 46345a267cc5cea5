"""Pinned messages: what somebody wants the model to be sent however often the history is cut."""

from __future__ import annotations

from dataclasses import dataclass

from app.access import Identity
from app.config import Settings
from app.errors import Conflict, InvalidRequest, NotFound
from app.events import GenerationOptions
from app.services.authorizer import Authorizer
from app.services.exchanges import exchanges_in
from app.services.llm_client import LLMClient
from app.services.memory import Memory
from app.services.prompting import room_for
from app.services.prompts import Prompt
from app.services.rows import MessageRow, SessionRow
from app.services.session_manager import SessionManager

MOST_OF_BUDGET = 4
"""All that is pinned in a session may have the budget of a prompt divided by this: a history needs room to
grow between its cuts."""


@dataclass(frozen=True, slots=True)
class Pinned:
    """How much is pinned in a session, and how much may be, in tokens."""

    tokens: int
    most: int


class Pins:
    """Pins messages, and takes pins off."""

    def __init__(
        self,
        settings: Settings,
        memory: Memory,
        sessions: SessionManager,
        authorizer: Authorizer,
        llm: LLMClient,
    ) -> None:
        self._settings = settings
        self._memory = memory
        self._sessions = sessions
        self._authorizer = authorizer
        self._llm = llm

    async def pin(self, who: Identity, session_id: str, message_id: str) -> Pinned:
        """Pins a message, and with it the exchange that it belongs to. Raises `NotFound`, `Conflict` for
        what is never sent to the model, and `InvalidRequest` when too much would be pinned."""
        session = await self._session(who, session_id)
        exchange = await self._memory.exchange(session.id, message_id)
        if not exchange:
            raise NotFound("There is no such message in this session.")
        if exchange[0].kind == "state":
            raise Conflict("Of the states of a game only the newest is sent; they cannot be pinned.")
        if not list(exchanges_in(exchange)):
            raise Conflict("This message has no answer, so it is not sent to the model and cannot be pinned.")
        pinned = await self._with(who, session, exchange)
        if pinned.tokens > pinned.most:
            raise InvalidRequest(
                f"message_id: with it {pinned.tokens} tokens would be pinned; at most {pinned.most} may be. "
                "Take a pin off another message first."
            )
        if not await self._memory.pin(session.id, message_id, pinned=True):
            raise NotFound("There is no such message in this session.")
        return pinned

    async def unpin(self, who: Identity, session_id: str, message_id: str) -> None:
        """Takes the pin off a message. Raises `NotFound`."""
        session = await self._session(who, session_id)
        if not await self._memory.pin(session.id, message_id, pinned=False):
            raise NotFound("There is no such message in this session.")

    async def _session(self, who: Identity, session_id: str) -> SessionRow:
        await self._authorizer.check(who, "sessions:write")
        return await self._sessions.session(who, session_id)

    async def _with(self, who: Identity, session: SessionRow, exchange: list[MessageRow]) -> Pinned:
        """What would be pinned with this exchange."""
        rows = await self._memory.pinned(session.id, session.leaf_id or "")
        if exchange[0].turn_id not in {row.turn_id for row in rows}:
            rows = [*rows, *exchange]
        exchanges = [sent for _, _, sent in exchanges_in(rows)]
        json, count = b",".join(sent.json for sent in exchanges), sum(sent.count for sent in exchanges)
        prompt = Prompt(b"", json, count)
        model = self._sessions.model_for(who)
        counted = await self._llm.count_tokens(prompt, model)
        room = room_for(self._settings, self._llm, GenerationOptions(model=model))
        return Pinned(prompt.estimate if counted is None else counted, room.budget // MOST_OF_BUDGET)
