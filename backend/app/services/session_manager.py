"""Sessions and their turns, as the doors see them.

A request is accepted when it is committed. The turns of one session run one at a time, those of
different sessions side by side, and every accepted turn gets exactly one ending.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from app.config import Settings
from app.errors import InvalidRequest, NotFound, StorageUnavailable
from app.events import Cancelled, GenerationOptions, TurnRequest, is_id, new_id
from app.logs import get_logger
from app.loop import LoopDoor
from app.services.llm_client import LLMClient, Message
from app.services.runner import Runner
from app.services.store import Acceptance, Delivery, Ended, MessageRow, SessionRow, Store, TurnRow
from app.services.templates import Templates
from app.services.turns import Turn, answer_of

LEASE_S = 10.0
HEARTBEAT_S = 3.0
SWEEP_S = 1.0

LOCAL_OWNER = "local"
"""The owner of sessions that plain Python makes."""

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class HistoryPage:
    """Messages of a session, oldest first. `is_first` when nothing is older than the page."""

    session: SessionRow
    messages: list[MessageRow]
    is_first: bool


class SessionManager:
    """Runs turns. Everything but `process_message` and `aprocess_message` belongs to the portal's
    own event loop."""

    def __init__(self, settings: Settings, store: Store, llm: LLMClient, templates: Templates) -> None:
        self._store = store
        self._llm = llm
        self._templates = templates
        self._epoch = new_id()
        self._instance = settings.instance or f"python-{self._epoch}"
        self._runner = Runner(settings, store, llm, self._instance)
        self._accepting: set[asyncio.Task[Turn]] = set()

    def on_delivery(self, listener: Callable[[Delivery, Turn], None]) -> None:
        """Calls `listener` whenever a reply that the outbox owes is ready."""
        self._runner.on_delivery = listener

    # --- life ---

    async def open(self) -> None:
        """Takes up the turns that an earlier process of this instance left behind."""
        self._door = LoopDoor(asyncio.get_running_loop())
        await self._store.acquire(self._lease, self._epoch, LEASE_S, force=True)
        self._take_up(await self._store.adopt(self._instance, restarted=True))

    async def close(self) -> None:
        """Stops working; turns that are not done stay accepted, for whoever takes them up."""
        await asyncio.gather(*self._accepting, return_exceptions=True)
        await self._runner.close()
        with suppress(StorageUnavailable):
            await self._store.release(self._lease, self._epoch)

    @property
    def _lease(self) -> str:
        return f"instance:{self._instance}"

    async def heartbeat(self) -> None:
        """Renews this instance's lease. Runs until cancelled."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            try:
                if not await self._store.acquire(self._lease, self._epoch, LEASE_S):
                    log.error("another process took over under this instance's name", instance=self._instance)
            except Exception as error:  # noqa: BLE001 - whatever it is, the next beat may succeed
                log.warning("the heartbeat could not be written", reason=type(error).__name__)

    async def sweep(self) -> None:
        """Takes up the turns of instances that died. Runs until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                if await self._store.has_orphans(self._instance):
                    self._take_up(await self._store.adopt(self._instance))
            except Exception as error:  # noqa: BLE001 - likewise
                log.warning("orphaned turns could not be looked for", reason=type(error).__name__)

    def _take_up(self, orphans: Sequence[tuple[TurnRow, SessionRow]]) -> None:
        for row, session in orphans:
            log.info("taking up a turn", turn=row.id, attempt=row.attempt)
            turn = self._runner.turns.get(row.id)
            if turn is None:
                turn = Turn(row, session)
            else:
                turn.restart(row)
            self._runner.enqueue(turn)
            if not row.detached and turn.followers == 0:
                self._runner.interrupt(turn, "stop")

    # --- asking ---

    async def submit(self, request: TurnRequest) -> Turn:
        """Accepts a request: when this returns, it is committed. The turn may be one that the same
        request id has already made, and even ended.

        Raises `InvalidRequest`, `Conflict` (the request id with another body) or `Overloaded`, also as
        `StorageUnavailable` when the database takes nothing; then nothing was accepted.
        """
        if not is_id(request.session_id):
            raise InvalidRequest("session_id: 1 to 128 characters of A-Z a-z 0-9 _ . : - are needed")
        if request.request_id is not None and not is_id(request.request_id):
            raise InvalidRequest("request_id: 1 to 128 characters of A-Z a-z 0-9 _ . : - are needed")
        if not request.message.strip():
            raise InvalidRequest("message: it is empty")
        if "\0" in request.message:
            raise InvalidRequest("message: it holds a NUL character")
        if request.template_id is not None:
            request = await self._with_prompt(request)
        # What is committed must be run, also when who asked is cancelled in between.
        accepting = asyncio.create_task(self._accept(request), name="accept")
        self._accepting.add(accepting)
        accepting.add_done_callback(self._accepting.discard)
        try:
            return await asyncio.shield(accepting)
        except asyncio.CancelledError:
            accepting.add_done_callback(self._runner.abandon)
            raise

    async def _accept(self, request: TurnRequest) -> Turn:
        acceptance = await self._store.accept(
            request, turn_id=new_id(), instance=self._instance, full=self._llm.places.full
        )
        turn = self._admit(acceptance, request.message)
        if acceptance.delivery is not None and acceptance.delivery.ready:
            self._runner.on_delivery(acceptance.delivery, turn)
        return turn

    async def _with_prompt(self, request: TurnRequest) -> TurnRequest:
        """The request with the prompt of its template, if it makes a session."""
        assert request.template_id is not None
        if request.system_prompt is not None:
            raise InvalidRequest("template_id: give either this or system_prompt")
        if await self._store.session(request.owner, request.session_id) is not None:
            return request
        version = await self._templates.get(request.owner, request.template_id)
        prompt = version.render(request.variables)
        return replace(request, system_prompt=prompt, template_version=version.id)

    def _admit(self, acceptance: Acceptance, message: str) -> Turn:
        row = acceptance.turn
        if acceptance.kind == "known":
            live = self._runner.turns.get(row.id) if row.is_active else None
            return live or self._runner.turn_elsewhere(row, acceptance.session)
        turn = Turn(row, acceptance.session)
        turn.question = message
        self._runner.enqueue(turn)
        return turn

    async def find(self, owner: str, turn_id: str) -> Turn:
        """The turn, live or from the database. Raises `NotFound`, also for another owner's."""
        live = self._runner.turns
        turn = live.get(turn_id)
        if turn is None:
            found = await self._store.turn(turn_id)
            # It may have begun here while the database was read.
            turn = live.get(turn_id) or (self._runner.turn_elsewhere(*found) if found else None)
        if turn is None or turn.session.owner != owner:
            raise NotFound("There is no such turn.")
        return turn

    def chat(self, owner: str, messages: Sequence[Message], options: GenerationOptions) -> Turn:
        """A turn without a session: nothing of it is stored, and it ends with its last follower."""
        self._llm.places.check()
        now = time.time()
        session = SessionRow("", owner, "", "", "", None, None, 0, "", None, now, now)
        row = TurnRow(new_id(), "", 0, None, "", {}, None, False, "running", 1, "", now, None, None)
        turn = Turn(row, session)
        self._runner.run_unstored(turn, messages, options)
        return turn

    def process_message(self, session_id: str, system_prompt: str, user_message: str, **options: Any) -> str:
        """Sends a message in one of plain Python's own sessions and returns the reply; `options` are
        `request_id` and those of `GenerationOptions`.

        May be called from any thread but the event loop's. Raises what `submit` raises and the
        error that the turn ended with.
        """
        return self._door.call(self._process(session_id, system_prompt, user_message, options))

    async def aprocess_message(
        self, session_id: str, system_prompt: str, user_message: str, **options: Any
    ) -> str:
        """`process_message`, to be awaited on any event loop."""
        return await self._door.acall(self._process(session_id, system_prompt, user_message, options))

    async def _process(
        self, session_id: str, system_prompt: str, user_message: str, options: dict[str, Any]
    ) -> str:
        request_id = options.pop("request_id", None)
        request = TurnRequest(
            owner=LOCAL_OWNER,
            session_id=session_id,
            message=user_message,
            request_id=request_id,
            system_prompt=system_prompt,
            options=GenerationOptions(**options),
            detached=request_id is not None,
        )
        turn = await self.submit(request)
        return answer_of(await turn.ended()).response

    # --- sessions ---

    async def page(
        self, owner: str, session_id: str, *, limit: int | None = None, before: str | None = None
    ) -> HistoryPage:
        """The newest `limit` messages, or those older than the message `before`. Raises `NotFound`."""
        session = await self.session(owner, session_id)
        leaf: str | None = session.leaf_id
        if before is not None:
            parent = await self._store.message_parent(session.id, before)
            if parent is None:
                raise NotFound("before: there is no such message in this session.")
            leaf = parent[0]
        messages = await self._store.messages(leaf, limit=limit)
        is_first = not messages or messages[0].parent_id is None
        if before is None:
            messages += await self._store.waiting_messages(session.id)
        return HistoryPage(session, messages, is_first)

    async def clear(self, owner: str, session_id: str) -> None:
        """Deletes the messages of a session; its running turn is stopped and the waiting ones are
        dropped, each ending as cancelled. Raises `NotFound`."""
        self._cut_off(*await self._store.clear(owner, session_id, self._partial(owner, session_id)))

    async def delete(self, owner: str, session_id: str) -> None:
        """Deletes a session, and stops and drops its turns; `restore` brings it back. Raises `NotFound`."""
        partial = self._partial(owner, session_id)
        self._cut_off(*await self._store.delete_session(owner, session_id, partial))

    def _partial(self, owner: str, session_id: str) -> dict[str, str]:
        """What the live turns of a session have answered so far."""
        live = [t for t in self._runner.turns.values() if t.session.session_id == session_id]
        return {turn.id: "".join(turn.response) for turn in live if turn.session.owner == owner}

    def _cut_off(self, session: str, all_ended: Sequence[Ended]) -> None:
        """The turns of a session were ended in the database: tells them so."""
        for ended in all_ended:
            turn = self._runner.turns.get(ended.turn_id)
            if turn is not None:
                self._runner.interrupt(turn, "ended")
                self._runner.settle(turn, ended)
        self._runner.forget_history(session)

    async def restore(self, owner: str, session_id: str) -> SessionRow:
        """Brings back a deleted session. Raises `NotFound`, or `Conflict` when its id is in use again."""
        return await self._store.restore_session(owner, session_id)

    async def rename(self, owner: str, session_id: str, title: str) -> SessionRow:
        """Gives a session another title. Raises `NotFound`."""
        session = await self.session(owner, session_id)
        await self._store.rename_session(session.id, title)
        return await self.session(owner, session_id)

    async def search(
        self, owner: str, text: str = "", *, limit: int = 50, offset: int = 0
    ) -> tuple[list[SessionRow], int]:
        """The owner's sessions with `text` in the title, those used last first, and how many there are."""
        return await self._store.sessions_of(owner, text, limit=limit, offset=offset)

    async def stop(self, owner: str, session_id: str) -> str | None:
        """Stops the running turn and returns its id once it has ended; None when none runs. Raises
        `NotFound`."""
        session = await self.session(owner, session_id)
        running = [row for row in await self._store.active_turns(session.id) if row.state == "running"]
        if not running:
            return None
        turn = self._runner.turns.get(running[0].id)
        if turn is not None and turn.task is not None:
            self._runner.interrupt(turn, "stop")
            await turn.ended()
        else:
            await self._store.end(running[0], Cancelled(running[0].id, "", None))
        return running[0].id

    async def session(self, owner: str, session_id: str) -> SessionRow:
        """The session that the owner calls so. Raises `NotFound`, also for another owner's."""
        session = await self._store.session(owner, session_id) if is_id(session_id) else None
        if session is None:
            raise NotFound("There is no such session.")
        return session
