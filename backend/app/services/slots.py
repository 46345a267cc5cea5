"""The slots of a llama.cpp server: which one holds the beginning of which session.

llama.cpp keeps the prompt of the last request in each slot, and reads only what is new when the next one
begins alike. Left to itself it looks for the slot that begins most alike, which with many sessions of one
system prompt is soon another session's. A request for a slot (`id_slot`) that is busy waits for it, even
where others are free: so none is asked for that is in use.
"""

from __future__ import annotations


class Slots:
    """`count` slots, of one server."""

    def __init__(self, count: int = 0) -> None:
        self.count = count
        self._sessions: list[str | None] = [None] * count
        self._free = dict.fromkeys(range(count))  # in the order of their last use
        self._of: dict[str, int] = {}

    def take(self, session: str | None) -> int | None:
        """The slot for a request of `session`: its own while it is free, else the one that was used longest
        ago. None when all are in use, or when there are none: then it is the server's choice."""
        if not self._free:
            return None
        slot = self._of.get(session) if session is not None else None
        if slot is None or slot not in self._free:
            slot = next(iter(self._free))
        del self._free[slot]
        before = self._sessions[slot]
        if before != session:
            if before is not None and self._of.get(before) == slot:
                del self._of[before]
            self._sessions[slot] = session
        if session is not None:
            self._of[session] = slot
        return slot

    def resting(self, session: str) -> int | None:
        """The slot that holds the beginning of a session, if it is free. Others are taken before it now."""
        slot = self._of.get(session)
        if slot is None or slot not in self._free:
            return None
        del self._free[slot]
        self._free[slot] = None
        return slot

    def give_back(self, slot: int | None) -> None:
        """The request has ended. A slot that holds no session's beginning is the next to be used."""
        if slot is None:
            return
        self._free[slot] = None
        if self._sessions[slot] is None:
            self._free = {slot: None, **self._free}
