"""`/api/stats`: what I have used, and what is left."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel

from app.dependencies import AdmissionDep, AuthorizerDep, CurrentUser, UsageDep
from app.hardening import StrictRoute
from app.services.usage import Spent, UsageSum, month_of, today

router = APIRouter(prefix="/api/stats", tags=["usage"], route_class=StrictRoute)


class Used(BaseModel):
    """What was used. `gpu_seconds` is the share of the time that the LLM server was busy; `cost` is in the
    currency of the admin's price list."""

    turns: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    gpu_seconds: float
    cost: float

    @classmethod
    def of(cls, spent: Spent) -> Used:
        """The body of what was spent."""
        return cls(**{name: getattr(spent, name) for name in Spent.__struct_fields__})


class DayUsage(Used):
    """What was used on a day, of a model."""

    day: str
    model: str

    @classmethod
    def of_sum(cls, line: UsageSum) -> DayUsage:
        """The body of a line."""
        return cls(**Used.of(line.spent).model_dump(), day=line.group["day"], model=line.group["model"])


class BudgetBody(BaseModel):
    """A budget that holds for me, and what of it is spent."""

    budget: str
    spent: float
    amount: float


class Stats(BaseModel):
    """What I have used. Days and months are those of UTC."""

    today: Used
    month: Used
    days: list[DayUsage]
    budgets: list[BudgetBody]


@router.get("")
async def stats(
    user: CurrentUser,
    authorizer: AuthorizerDep,
    book: UsageDep,
    admission: AdmissionDep,
    days: Annotated[int, Query(ge=1, le=366, description="How many days back")] = 30,
) -> Stats:
    """What I have used, and what is left of my budgets."""
    await authorizer.check(user, "usage:read")
    day = today()
    since = (datetime.now(UTC) - timedelta(days=days - 1)).strftime("%Y-%m-%d")
    of_day = await book.spent(user.owner, day)
    of_month = await book.spent(user.owner, month_of(day))
    lines = await book.report(["day", "model"], since=since, until=day, owner=user.owner)
    return Stats(
        today=Used.of(of_day),
        month=Used.of(of_month),
        days=[DayUsage.of_sum(line) for line in lines],
        budgets=[
            BudgetBody(budget=one.budget, spent=one.spent, amount=one.amount)
            for one in await admission.budgets(user)
        ],
    )
