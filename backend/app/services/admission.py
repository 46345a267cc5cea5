"""The one admission control, below every door: rate limits, budgets, and how many turns at once.

A turn is admitted before it is accepted. It takes one of each window that counts for it, and reserves what
it may cost at most of each budget; when it has ended, however it did, what it has really cost takes the
place of what was reserved.

What holds for somebody is, limit by limit, the first that is set: for the owner, in the role, in the
settings (for people). What is set for the project, the API key, the device, and for `all` holds beside it.

What the owner and the role set counts all that is asked in the owner's name. The settings count people, so
not what the owner's devices ask: the subject of what comes from there is `person:ID`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial

import msgspec

from app.access import Identity, Limits
from app.config import Settings
from app.errors import BudgetExceeded, InvalidRequest, Overloaded, RateLimited, quota_headers
from app.events import TurnRequest, Usage
from app.logs import get_logger
from app.services.alerts import Alerts
from app.services.arrears import Arrears
from app.services.catalog import Catalog
from app.services.ledger import Hold, Lacking, Ledger, Quota, Window
from app.services.policies import ALL, Policies
from app.services.prompts import estimate_tokens
from app.services.usage import PERSON, Spent, UsageBook, month_of, today

BUDGETS = {
    "daily_tokens": "tokens",
    "daily_cost": "cost",
    "daily_gpu_seconds": "gpu_seconds",
    "monthly_tokens": "tokens",
    "monthly_cost": "cost",
    "monthly_gpu_seconds": "gpu_seconds",
}
"""The budgets of `Limits`, and what of `Spent` each of them counts."""

WORDS = {"tokens": "tokens", "cost": "cost units", "gpu_seconds": "GPU seconds"}

YOURS = "You may send"
WHOSE = {
    "all": "All together may send",
    "project": "A project may send",
    "key": "An API key may send",
    "device": "A device may send",
    "session": "A session may get",
}

TYPICAL_GPU_S = 2.0
"""GPU seconds that are reserved for a turn: nobody knows them before."""

MOST_MERGED = 10_000
"""Owners whose limits are kept ready."""

NEXT_TURN_S = 2.0
"""When to come back for whoever has too many turns at once."""

log = get_logger(__name__)


class Ticket(msgspec.Struct, frozen=True):
    """The leave to run a turn: what was taken and reserved for it."""

    turn_id: str
    windows: tuple[Window, ...] = ()
    holds: tuple[Hold, ...] = ()
    budgets: dict[str, tuple[str, str]] = {}
    """The subject and the budget of each hold, by its key."""
    quotas: tuple[Quota, ...] = ()
    day: str = ""
    """That it counts for, also when it ends on another one."""

    @property
    def headers(self) -> Mapping[str, str]:
        """How the rate limits stand, for HTTP."""
        return quota_headers([quota.info for quota in self.quotas])


NO_TICKET = Ticket("")
NOTHING = Spent()


class _OfOwner(msgspec.Struct, frozen=True):
    """The limits of an owner: all of them, and what each subject counts. `own` and `role` are what they were
    made of."""

    own: Limits
    role: Limits
    all: Limits
    counted: list[tuple[str, Limits]]


class Standing(msgspec.Struct, frozen=True):
    """A budget of somebody, and what is spent of it."""

    budget: str
    spent: float
    amount: float


class Admission:
    """Admits turns, and settles what they have cost."""

    def __init__(
        self,
        settings: Settings,
        policies: Policies,
        ledger: Ledger,
        book: UsageBook,
        catalog: Catalog,
        alerts: Alerts,
    ) -> None:
        self._settings = settings
        self._policies = policies
        self._ledger = ledger
        self._book = book
        self._alerts = alerts
        self._catalog = catalog
        self._arrears = Arrears()
        self._merged: dict[tuple[str, bool], _OfOwner] = {}
        self._of_people = Limits(
            concurrent_turns=settings.max_turns_per_user,
            requests_per_hour=settings.rate_limit_per_hour,
            requests_per_session_minute=settings.rate_limit_session_per_minute,
            daily_tokens=settings.daily_token_budget,
        )
        policies.on_limits = self._limits_changed

    async def _limits_changed(self, subject: str) -> None:
        """What was spent while a budget was not set was not counted: what is spent is read anew. An owner's
        own limits may have stood before those of the settings."""
        subjects = (subject, f"{PERSON}{subject.removeprefix('user:')}")
        periods = {budget: _period_of(budget, today()) for budget in BUDGETS}
        keys = [_key_of(one, budget, period) for one in subjects for budget, period in periods.items()]
        await self._arrears.tell(partial(self._ledger.forget, keys))

    async def close(self) -> None:
        """Tells the ledger what it does not know yet."""
        await self._arrears.close()

    def limits_of(self, who: Identity) -> Limits:
        """What holds for somebody, apart from what holds for everybody."""
        return self._of_owner(who).all

    def _of_owner(self, who: Identity) -> _OfOwner:
        own, role = self._policies.limits(who.owner), who.role.limits
        is_person = who.user is not None and (who.key is None or who.key.device is None)
        known = self._merged.get((who.owner, is_person))
        if known is None or known.own is not own or known.role is not role:
            narrow = own.over(role)
            rest = self._of_people.without(narrow) if is_person else Limits()
            counted = [(who.owner, narrow), (f"{PERSON}{who.user}", rest)]
            known = _OfOwner(own, role, narrow.over(rest), [pair for pair in counted if pair[1] != Limits()])
            if len(self._merged) > MOST_MERGED:
                self._merged.clear()
            self._merged[who.owner, is_person] = known
        return known

    async def budgets(self, who: Identity) -> list[Standing]:
        """The budgets that hold for somebody, apart from those for everybody."""
        known: dict[tuple[str, str], Spent] = {}
        return [
            Standing(budget, await self._spent(subject, budget, today(), known), amount)
            for subject, limits in self._of_owner(who).counted
            for budget in BUDGETS
            if (amount := getattr(limits, budget))
        ]

    def longest_reply(self, who: Identity, wanted: int | None, default: Callable[[], int]) -> int | None:
        """The `max_tokens` for a turn: what was `wanted`, or all that is allowed where the `default` is more.
        Raises `InvalidRequest` when more was wanted than is allowed."""
        most = self.limits_of(who).max_tokens
        if not most:
            return wanted
        if wanted is not None and wanted > most:
            raise InvalidRequest(f"max_tokens: at most {most} for you")
        return most if wanted is None and default() > most else wanted

    async def admit(
        self,
        who: Identity,
        request: TurnRequest,
        turn_id: str,
        model: str,
        longest: Callable[[], int] | None = None,
    ) -> Ticket:
        """Lets a turn in. `longest` tells how long its reply may get where the request does not. Raises
        `RateLimited` and `BudgetExceeded`, and takes nothing then."""
        ticket = self._ticket(who, request, turn_id, partial(self._estimate, request, model, longest))
        if ticket.windows:
            ticket = await self._take(ticket)
            _check_windows(ticket.quotas)
        await self._reserve(ticket, lambda: self._usual(request, model, longest))
        return ticket

    async def admit_again(self, who: Identity, request: TurnRequest, turn_id: str, model: str) -> Ticket:
        """The ticket of a turn that was accepted before, by a process that is gone: it counts, and is not
        refused."""
        ticket = self._ticket(who, request, turn_id, partial(self._estimate, request, model))
        await self._seed(ticket)
        await self._ledger.reserve(turn_id, ticket.holds, force=True)
        return msgspec.structs.replace(ticket, windows=())

    async def rename(self, ticket: Ticket, turn_id: str) -> Ticket:
        """The ticket of a turn that was accepted before and begins again, under that turn's id: whoever takes
        the turn up finds what is reserved for it."""
        if not ticket.holds:
            return ticket
        try:
            await self._ledger.reserve(turn_id, ticket.holds, force=True)
        except Overloaded:
            return ticket
        await self._arrears.tell(partial(self._settle, ticket, NOTHING))
        return msgspec.structs.replace(ticket, turn_id=turn_id)

    async def admit_work(self, turn: Ticket, work_id: str) -> Ticket:
        """The ticket of work that follows a turn: it is charged to the same budgets, and counts for no rate
        limit and not as a turn. Raises `BudgetExceeded`."""
        holds = tuple(hold for hold in turn.holds if hold.key in turn.budgets)
        ticket = Ticket(work_id, holds=holds, budgets=turn.budgets, day=turn.day)
        await self._reserve(ticket)
        return ticket

    async def give_back(self, ticket: Ticket) -> None:
        """The turn was not accepted, or was accepted before: it takes nothing."""
        if ticket.windows:
            taken = partial(self._ledger.give_back, ticket.turn_id, ticket.windows)
            await self._arrears.tell(taken)
        await self.settle(ticket, NOTHING)

    async def settle(self, ticket: Ticket, spent: Spent) -> None:
        """The turn has ended, having `spent` this. Where the ledger is away, it is told later."""
        if ticket.holds:
            await self._arrears.tell(partial(self._settle, ticket, spent))

    async def hand_over(self, ticket: Ticket) -> None:
        """The turn is another process' from now on, and counted there."""
        if ticket.holds:
            await self._arrears.tell(partial(self._ledger.hand_over, ticket.turn_id, ticket.holds))

    async def _settle(self, ticket: Ticket, spent: Spent) -> None:
        amounts = {key: float(getattr(spent, BUDGETS[budget])) for key, (_, budget) in ticket.budgets.items()}
        sums = await self._ledger.settle(ticket.turn_id, ticket.holds, amounts)
        for hold in ticket.holds:
            if hold.key in sums and amounts.get(hold.key):
                subject, budget = ticket.budgets[hold.key]
                await self._alerts.look(
                    _told_as(subject), budget, _period(hold), sums[hold.key], amounts[hold.key], hold.budget
                )

    def cost(self, model: str, usage: Usage, gpu_seconds: float) -> float:
        """What a turn costs."""
        return self._catalog.price(model).of(usage, gpu_seconds)

    # --- what counts for a turn ---

    def _ticket(
        self, who: Identity, request: TurnRequest, turn_id: str, estimate: Callable[[], Spent]
    ) -> Ticket:
        own = self.limits_of(who)
        others = [(subject, self._limits_beside(subject, request)) for subject in _subjects(who, request)]
        counted = [*self._of_owner(who).counted, *others]
        windows = [
            Window(_kind(subject), f"{subject}|1h", limits.requests_per_hour, 3600)
            for subject, limits in counted
            if limits.requests_per_hour
        ]
        if own.requests_per_session_minute and who.door != "mqtt" and request.session_id:
            key = f"{who.owner}|{request.session_id}|1m"
            windows.append(Window("session", key, own.requests_per_session_minute, 60))
        day = today()
        holds, budgets = self._holds(counted, day, estimate)
        return Ticket(turn_id, tuple(windows), tuple(holds), budgets, day=day)

    def _limits_beside(self, subject: str, request: TurnRequest) -> Limits:
        """What is set for a subject; for a device also what its project's file says of devices."""
        found = self._policies.limits(subject)
        if _kind(subject) == "device":
            return found.over(self._policies.limits(f"devices:{request.project}"))
        return found

    def _holds(
        self, subjects: Sequence[tuple[str, Limits]], day: str, estimate: Callable[[], Spent]
    ) -> tuple[list[Hold], dict[str, tuple[str, str]]]:
        holds, budgets = [], {}
        most: Spent | None = None
        for subject, limits in subjects:
            if limits.concurrent_turns:
                holds.append(Hold(f"{subject}|turns", 1, limits.concurrent_turns))
            for budget, counted in BUDGETS.items():
                amount = getattr(limits, budget)
                if amount:
                    most = most or estimate()
                    period = _period_of(budget, day)
                    key = _key_of(subject, budget, period)
                    holds.append(Hold(key, float(getattr(most, counted)), amount, _end_of(period)))
                    budgets[key] = (subject, budget)
        return holds, budgets

    def _estimate(self, request: TurnRequest, model: str, longest: Callable[[], int] | None = None) -> Spent:
        """What a turn may spend at most, but for the history, whose length is not known yet."""
        prompt = estimate_tokens(request.message) + estimate_tokens(request.system_prompt or "")
        return self._most(prompt, request.options.max_tokens or self._default_length(longest), model)

    def _usual(self, request: TurnRequest, model: str, longest: Callable[[], int] | None) -> Spent:
        """The same, had the message no words and were its reply to be no longer than others."""
        default = self._default_length(longest)
        return self._most(0, min(request.options.max_tokens or default, default), model)

    def _default_length(self, longest: Callable[[], int] | None) -> int:
        return self._settings.llm_max_tokens if longest is None else longest()

    def _most(self, prompt: int, written: int, model: str) -> Spent:
        return Spent(
            prompt_tokens=prompt,
            completion_tokens=written,
            gpu_seconds=TYPICAL_GPU_S,
            cost=self.cost(model, Usage(prompt, written), TYPICAL_GPU_S),
        )

    async def _take(self, ticket: Ticket) -> Ticket:
        self._arrears.check()
        try:
            quotas = await self._ledger.take(ticket.turn_id, ticket.windows)
        except BaseException:  # it may have been taken all the same
            await self.give_back(ticket)
            raise
        return msgspec.structs.replace(ticket, quotas=tuple(quotas))

    async def _reserve(self, ticket: Ticket, usual: Callable[[], Spent] | None = None) -> None:
        """Reserves what the turn may spend. Raises why that cannot be, and takes nothing at all then. Admins
        are told of a budget that has no room for a `usual` turn any more."""
        if not ticket.holds:
            return
        try:
            self._arrears.check()
            await self._seed(ticket)
            lacking = await self._ledger.reserve(ticket.turn_id, ticket.holds)
            if lacking is not None:
                if usual is not None:
                    await self._tell_spent(ticket, lacking, usual)
                raise _refusal(ticket, lacking)
        except BaseException:
            await self.give_back(ticket)
            raise

    async def _tell_spent(self, ticket: Ticket, lacking: Lacking, usual: Callable[[], Spent]) -> None:
        """Raises the alerts of a budget that nothing fits into any more: the last of it is never spent."""
        hold = lacking.hold
        if hold.key not in ticket.budgets:
            return
        subject, budget = ticket.budgets[hold.key]
        if lacking.spent + float(getattr(usual(), BUDGETS[budget])) > hold.budget:
            period = _period(hold)
            await self._alerts.exhaust(_told_as(subject), budget, period, lacking.spent, hold.budget)

    async def _seed(self, ticket: Ticket) -> None:
        known: dict[tuple[str, str], Spent] = {}
        for hold in await self._ledger.unknown(ticket.holds):
            subject, budget = ticket.budgets[hold.key]
            spent = await self._spent(subject, budget, ticket.day, known)
            await self._ledger.seed(hold, spent)

    async def _spent(self, subject: str, budget: str, day: str, known: dict[tuple[str, str], Spent]) -> float:
        """What is spent of a budget by the database, as far as it is not `known`."""
        since = day if budget.startswith("daily") else month_of(day)
        if (subject, since) not in known:
            known[subject, since] = await self._book.spent(subject, since)
        return float(getattr(known[subject, since], BUDGETS[budget]))


def _subjects(who: Identity, request: TurnRequest) -> list[str]:
    """What else than the owner a turn counts for."""
    key = who.key
    device = [f"device:{key.device}"] if key is not None and key.device is not None else []
    keys = [f"key:{key.id}"] if key is not None else []
    return [*device, *keys, f"project:{request.project}", ALL]


def _told_as(subject: str) -> str:
    """What admins know a subject as."""
    return f"user:{subject.removeprefix(PERSON)}" if subject.startswith(PERSON) else subject


def _kind(subject: str) -> str:
    """What kind a subject is: the name of its rate limit."""
    kind = subject.partition(":")[0]
    return kind if kind in WHOSE else "person"


def _refusal(ticket: Ticket, lacking: Lacking) -> RateLimited:
    hold, spent = lacking.hold, lacking.spent
    if hold.key not in ticket.budgets:
        return RateLimited(
            f"At most {hold.budget:.0f} turns may wait or run at once; wait for one to end.",
            retry_after=NEXT_TURN_S,
        )
    subject, budget = ticket.budgets[hold.key]
    period, what = budget.split("_", 1)
    named = f"The {period} budget of {hold.budget:g} {WORDS[what]} ({_kind(subject)})"
    left = hold.budget - spent
    if hold.amount <= left:
        return RateLimited(
            f"{named} is reserved by turns that run; wait for one to end.", retry_after=NEXT_TURN_S
        )
    return BudgetExceeded(
        f"{named} has {left:g} left; this may take {hold.amount:g}." if left > 0 else f"{named} is spent.",
        retry_after=math.ceil(max(hold.ends_at - time.time(), 1.0)),
        details={"budget": budget},
    )


def _check_windows(quotas: Sequence[Quota]) -> None:
    full = [quota for quota in quotas if quota.is_full]
    if not full:
        return
    worst = max(full, key=lambda quota: quota.resets_in)
    window = worst.window
    span = "an hour" if window.seconds > 60 else "a minute"
    raise RateLimited(
        f"{WHOSE.get(window.name, YOURS)} at most {window.amount} messages in {span}; "
        f"try again in {math.ceil(worst.resets_in)} s.",
        retry_after=worst.resets_in,
        quotas=[quota.info for quota in quotas],
    )


def _period_of(budget: str, day: str) -> str:
    """The day, or its month, that a budget is for."""
    return day if budget.startswith("daily") else day[:7]


def _key_of(subject: str, budget: str, period: str) -> str:
    """What a budget is counted by: each day, or each month, is another one."""
    return f"{subject}|{budget}|{period}"


def _period(hold: Hold) -> str:
    """The day, or the month, of a budget."""
    return hold.key.rsplit("|", 1)[-1]


def _end_of(period: str) -> float:
    """When a day (`2026-11-21`) or a month (`2026-11`) is over, as a Unix time."""
    start = datetime.strptime(period, "%Y-%m-%d" if len(period) == len("2026-11-21") else "%Y-%m")
    first = start.replace(tzinfo=UTC)
    if len(period) == len("2026-11"):
        return (first.replace(day=28) + timedelta(days=4)).replace(day=1).timestamp()
    return (first + timedelta(days=1)).timestamp()
