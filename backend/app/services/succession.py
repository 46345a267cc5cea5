"""What becomes of the turns of processes that die, among all those that share a database.

Each process has a lease under its instance's name, which it renews for as long as it lives. When a lease
runs out, whoever notices first takes up the turns that were left. Leases run out also while the database is
away: who could not renew its own cannot tell who lives, until the others have had time to renew theirs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import get_args

from app.access import Door, Identity, KeyUse
from app.errors import PortalError, StorageUnavailable
from app.events import TurnRequest, new_id
from app.logs import get_logger
from app.services.admission import NO_TICKET, Admission, Ticket
from app.services.devices import Devices
from app.services.drain import Drain
from app.services.leases import Leases
from app.services.policies import Policies
from app.services.rows import SessionRow, TurnRow
from app.services.runner import Runner
from app.services.store import Store
from app.services.turns import Turn

LEASE_S = 10.0
HEARTBEAT_S = 3.0
LATE_S = 2 * HEARTBEAT_S
"""After that long without a beat, others may have missed theirs too."""

SWEEP_S = 1.0
FORGET_S = 3600.0

log = get_logger(__name__)


class Succession:
    """Keeps the lease of this process, and takes up the turns of those that lost theirs."""

    def __init__(
        self,
        store: Store,
        leases: Leases,
        runner: Runner,
        admission: Admission,
        policies: Policies,
        devices: Devices,
        drain: Drain,
    ) -> None:
        self._store = store
        self._leases = leases
        self._runner = runner
        self._admission = admission
        self._policies = policies
        self._devices = devices
        self._drain = drain
        self._epoch = new_id()
        self._lease = f"instance:{runner.instance}"
        self._beat_at = self._steady_since = float("-inf")
        self._on_taken_up: Callable[[Turn], None] = lambda _turn: None

    def on_taken_up(self, listener: Callable[[Turn], None]) -> None:
        """Calls `listener` with every turn that this process takes up from another one, or from its own
        life before; also with those that it has taken up already."""
        self._on_taken_up = listener
        for turn in list(self._runner.turns.values()):
            if turn.row.attempt > 1 and turn.ending is None:
                listener(turn)

    async def open(self) -> None:
        """Takes up the turns that an earlier process of this instance left behind."""
        await self._beat(force=True)
        instance = self._runner.instance
        lost = await self._store.active_of(instance)
        await self._take_up(await self._store.adopt(instance, lost, overdue=False))

    async def close(self) -> None:
        """Leaves what is not done to others."""
        with suppress(StorageUnavailable):
            await self._leases.release(self._lease, self._epoch)

    async def heartbeat(self) -> None:
        """Renews this instance's lease. Runs until cancelled."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            try:
                if not await self._beat():
                    log.error(
                        "another process took over under this instance's name", instance=self._runner.instance
                    )
            except Exception as error:  # noqa: BLE001 - whatever it is, the next beat may succeed
                self._beat_at = float("-inf")
                log.warning("the heartbeat could not be written", reason=type(error).__name__)

    async def _beat(self, *, force: bool = False) -> bool:
        """Renews the lease. False when somebody else holds it."""
        is_held = await self._leases.acquire(self._lease, self._epoch, LEASE_S, force=force)
        now = time.monotonic()
        if now > self._beat_at + LATE_S:
            self._steady_since = now
        self._beat_at = now if is_held else float("-inf")
        return is_held

    @property
    def _is_steady(self) -> bool:
        """Whether the lease was renewed in time for so long that others who live have renewed theirs."""
        now = time.monotonic()
        return self._steady_since + LEASE_S <= now <= self._beat_at + LATE_S

    async def sweep(self) -> None:
        """Takes up the turns of instances that died, lets go of those that others have ended, and forgets
        what is kept for a time only. Runs until cancelled."""
        forgot_at = float("-inf")
        missed: frozenset[str] = frozenset()
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                if time.monotonic() - forgot_at > FORGET_S:
                    forgot_at = time.monotonic()
                    await self._store.forget_old()
                await self._runner.let_go()
                if self._drain.is_on:
                    continue
                before, missed = missed, await self._runner.lost()
                await self._adopt(before & missed)
            except Exception as error:  # noqa: BLE001 - likewise
                log.warning("orphaned turns could not be looked for", reason=type(error).__name__)

    async def _adopt(self, lost: Collection[str]) -> None:
        instance = self._runner.instance
        if lost or await self._store.has_orphans(instance, overdue=self._is_steady):
            await self._take_up(await self._store.adopt(instance, lost, overdue=self._is_steady))

    async def _take_up(self, orphans: Sequence[tuple[TurnRow, SessionRow]]) -> None:
        for row, session in orphans:
            turn = self._runner.turns.get(row.id)
            if turn is not None and self._runner.is_here(turn):
                continue  # in an attempt that is void now; when that has come to its end, the turn is lost
            log.info("taking up a turn", turn=row.id, attempt=row.attempt)
            ticket = await self._ticket_of(row, session)
            turn = self._runner.turns.get(row.id)
            if turn is None:
                turn = Turn(row, session)
            else:
                turn.restart(row)
            turn.ticket = ticket
            self._runner.enqueue(turn)
            self._on_taken_up(turn)
            if not row.detached and turn.followers == 0:
                self._runner.interrupt(turn, "stop")

    async def _ticket_of(self, row: TurnRow, session: SessionRow) -> Ticket:
        """What a turn that is taken up counts for: it is not refused any more."""
        who = Identity(
            owner=session.owner,
            role_name=row.role,
            role=self._policies.role(row.role),
            key=self._key_of(row, session),
            door=_door(row.door),
        )
        request = TurnRequest(who, session.session_id, "", project=session.project)
        try:
            return await self._admission.admit_again(who, request, row.id, "")
        except PortalError as error:
            log.warning("a turn could not be counted", turn=row.id, reason=error.code)
            return NO_TICKET

    def _key_of(self, row: TurnRow, session: SessionRow) -> KeyUse | None:
        if row.api_key is None:
            return None
        return self._devices.key(row.api_key, session.project) or KeyUse(row.api_key, "", frozenset())


def _door(name: str) -> Door:
    return next((door for door in get_args(Door) if door == name), "http")
