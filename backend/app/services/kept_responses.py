"""Responses that are kept: the turns of sessions, by the ids that OpenAI's clients know."""

from __future__ import annotations

from app.access import Identity
from app.errors import NotFound
from app.events import Cancelled, Final
from app.services.authorizer import Authorizer
from app.services.openai_responses import turn_id_of
from app.services.session_manager import SessionManager
from app.services.store import Store
from app.services.turns import Turn


class KeptResponses:
    """Finds and deletes them."""

    def __init__(self, store: Store, sessions: SessionManager, authorizer: Authorizer) -> None:
        self._store = store
        self._sessions = sessions
        self._authorizer = authorizer

    async def find(self, who: Identity, response: str) -> Turn:
        """The turn of a response. Raises `NotFound`, also for another owner's, and for one whose session was
        deleted."""
        await self._authorizer.check(who, "sessions:read")
        try:
            turn = await self._sessions.find(who, turn_id_of(response))
        except NotFound:
            raise NotFound("There is no such response.") from None
        session = await self._store.session(who.owner, turn.session.session_id)
        if session is None or session.id != turn.session.id:
            raise NotFound("There is no such response.")
        return turn

    async def place(self, who: Identity, response: str) -> tuple[str, str | None]:
        """The session of a response, and the message that what goes on from it follows; none while it is not
        there yet, and what goes on waits for it. Raises `NotFound`."""
        turn = await self.find(who, response)
        if turn.ending is None:
            return turn.session.session_id, None
        answer = turn.ending.message_id if isinstance(turn.ending, Final | Cancelled) else None
        return turn.session.session_id, answer or turn.row.message_id

    async def delete(self, who: Identity, response: str) -> None:
        """Deletes a response with its session. Raises `NotFound`, and `Conflict` when the session has
        others."""
        await self._authorizer.check(who, "sessions:write")
        turn = await self.find(who, response)
        await self._sessions.delete(who, turn.session.session_id, only_turn=turn.id)
