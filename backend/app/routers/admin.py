"""`/api/admin`: people, roles, limits, usage and the audit log, for those whose role allows it."""

from __future__ import annotations

import csv
import io
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Path, Query, Response
from fastapi.responses import StreamingResponse
from pydantic import AwareDatetime, BaseModel, Field

from app.access import ROLE_NAME, Limits, Role
from app.dependencies import (
    AlertsDep,
    ApiKeysDep,
    AuditDep,
    AuthorizerDep,
    CurrentUser,
    LinksDep,
    PeopleDep,
    PoliciesDep,
    UsageDep,
)
from app.hardening import StrictRoute
from app.routers.keys import Key, KeyList
from app.routers.stats import Used
from app.routers.times import moment
from app.services.audit import Audit, AuditFilter, AuditRow
from app.services.links import Link
from app.services.people import Person
from app.services.usage import SUMS, Group, UsageSum

router = APIRouter(prefix="/api/admin", tags=["admin"], route_class=StrictRoute)

CSV = "text/csv"
NDJSON = "application/x-ndjson"

FIRST_DAY = date(1970, 1, 1)
"""There is room for the days before it."""


# --- people --------------------------------------------------------------------------------------


class User(BaseModel):
    """An account. `closed_at` is null while it is open."""

    id: str
    username: str
    email: str
    role: str
    created_at: datetime
    closed_at: datetime | None
    last_seen_at: datetime | None

    @classmethod
    def of(cls, person: Person) -> User:
        """The body of an account."""
        return cls(
            id=person.id,
            username=person.username,
            email=person.email,
            role=person.role,
            created_at=moment(person.created_at),
            closed_at=moment(person.closed_at),
            last_seen_at=moment(person.last_seen_at),
        )


class UserPage(BaseModel):
    """A part of the list; `total` counts all that match."""

    users: list[User]
    total: int


class UserChange(BaseModel):
    """What to change of an account; `closed` ends its sign-ins and lets nobody in."""

    role: Annotated[str | None, Field(max_length=64)] = None
    closed: bool | None = None


class NewInvitation(BaseModel):
    """Somebody to invite."""

    role: Annotated[str, Field(max_length=64)]
    days: Annotated[float, Field(gt=0, le=365, description="How long it is good")] = 7


class Invitation(BaseModel):
    """An invitation that can still be used."""

    id: str
    role: str | None
    made_by: str
    created_at: datetime
    expires_at: datetime

    @classmethod
    def of(cls, link: Link) -> Invitation:
        """The body of an invitation."""
        return cls(
            id=link.id,
            role=link.role,
            made_by=link.made_by,
            created_at=moment(link.created_at),
            expires_at=moment(link.expires_at),
        )


class InvitationList(BaseModel):
    """Invitations, the newest first."""

    invitations: list[Invitation]


class OneUseLink(BaseModel):
    """A link that was made just now: `path` at this portal's address, good once. It is shown this once."""

    id: str
    path: str
    expires_at: datetime

    @classmethod
    def of(cls, link: Link) -> OneUseLink:
        """The body of a link."""
        return cls(id=link.id, path=link.path, expires_at=moment(link.expires_at))


@router.get("/users")
async def list_users(
    user: CurrentUser,
    people: PeopleDep,
    search: Annotated[str, Query(max_length=200, description="Only names and addresses with this text")] = "",
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    offset: Annotated[int, Query(ge=0, le=2**53)] = 0,
) -> UserPage:
    """The accounts, by name. That they were shown is in the audit log."""
    found, total = await people.search(user, search, limit=limit, offset=offset)
    return UserPage(users=[User.of(person) for person in found], total=total)


@router.patch("/users/{user_id}")
async def change_user(user_id: str, body: UserChange, user: CurrentUser, people: PeopleDep) -> User:
    """Gives an account another role, closes it or opens it again."""
    return User.of(await people.change(user, user_id, role=body.role, closed=body.closed))


@router.post("/users/{user_id}/password-reset", status_code=201)
async def make_password_link(user_id: str, user: CurrentUser, people: PeopleDep) -> OneUseLink:
    """A link with which the account's owner sets a new password, within a day."""
    return OneUseLink.of(await people.password_link(user, user_id))


@router.delete("/users/{user_id}/sign-ins", status_code=204)
async def sign_user_out(user_id: str, user: CurrentUser, people: PeopleDep) -> None:
    """Ends all sign-ins of an account."""
    await people.sign_out(user, user_id)


@router.get("/users/{user_id}/keys")
async def list_user_keys(user_id: str, user: CurrentUser, keys: ApiKeysDep) -> KeyList:
    """The API keys of an account."""
    return KeyList(keys=[Key.of(key) for key in await keys.of(user, user_id)])


@router.delete("/users/{user_id}/keys/{key_id}", status_code=204)
async def revoke_user_key(user_id: str, key_id: str, user: CurrentUser, keys: ApiKeysDep) -> None:
    """Makes an API key of an account worthless."""
    await keys.revoke(user, key_id, of=user_id)


@router.get("/invitations")
async def list_invitations(user: CurrentUser, links: LinksDep) -> InvitationList:
    """The invitations that can still be used."""
    return InvitationList(invitations=[Invitation.of(link) for link in await links.invitations(user)])


@router.post("/invitations", status_code=201)
async def invite(body: NewInvitation, user: CurrentUser, links: LinksDep) -> OneUseLink:
    """A link with which one account can be made."""
    return OneUseLink.of(await links.invite(user, body.role, body.days))


@router.delete("/invitations/{link_id}", status_code=204)
async def take_invitation_back(link_id: str, user: CurrentUser, links: LinksDep) -> None:
    """Makes an invitation worthless."""
    await links.take_back(user, link_id)


# --- roles and limits ----------------------------------------------------------------------------


class NamedRole(Role):
    """A role, and where it is defined."""

    name: str
    source: Literal["shipped", "file", "api"]


class RoleList(BaseModel):
    """Roles by name."""

    roles: list[NamedRole]


class SubjectLimits(BaseModel):
    """Limits of a subject."""

    subject: str
    limits: Limits


class LimitsList(BaseModel):
    """What is set, by subject."""

    limits: list[SubjectLimits]


RoleName = Annotated[str, Path(pattern=ROLE_NAME)]
Subject = Annotated[
    str,
    Path(
        max_length=200,
        description="`all`, `user:ID` (as in `GET /api/admin/users`), `anon:PROJECT`, `project:NAME`, "
        "`key:ID` (as in `GET /api/admin/users/{id}/keys`), `device:NAME` or `local`",
    ),
]


@router.get("/roles")
async def list_roles(user: CurrentUser, authorizer: AuthorizerDep, policies: PoliciesDep) -> RoleList:
    """The roles that there are."""
    await authorizer.check(user, "users:read")
    found = policies.all_roles()
    return RoleList(roles=[NamedRole(**dict(one.role), name=one.name, source=one.source) for one in found])


@router.put("/roles/{name}")
async def define_role(name: RoleName, body: Role, user: CurrentUser, policies: PoliciesDep) -> NamedRole:
    """Adds a role or changes one. It holds at once, also for who has it already."""
    defined = await policies.define_role(user, name, body)
    return NamedRole(**dict(defined.role), name=defined.name, source=defined.source)


@router.delete("/roles/{name}", status_code=204)
async def delete_role(name: RoleName, user: CurrentUser, policies: PoliciesDep) -> None:
    """Takes back what was defined here; a role that is shipped is then as it was shipped."""
    await policies.delete_role(user, name)


@router.get("/limits")
async def list_limits(user: CurrentUser, policies: PoliciesDep) -> LimitsList:
    """The limits that are set for somebody or something, beside those of roles."""
    found = await policies.all_limits(user)
    return LimitsList(limits=[SubjectLimits(subject=name, limits=found[name]) for name in sorted(found)])


@router.put("/limits/{subject}")
async def set_limits(
    subject: Subject, body: Limits, user: CurrentUser, policies: PoliciesDep
) -> SubjectLimits:
    """Sets the limits of a subject that there is. They hold from the next message on."""
    await policies.set_limits(user, subject, body)
    return SubjectLimits(subject=subject, limits=body)


@router.delete("/limits/{subject}", status_code=204)
async def clear_limits(subject: Subject, user: CurrentUser, policies: PoliciesDep) -> None:
    """Takes the limits of a subject away."""
    await policies.clear_limits(user, subject)


# --- usage ---------------------------------------------------------------------------------------


class UsageLine(Used):
    """The sums of one group; what it is not grouped by is null."""

    day: str | None = None
    owner: str | None = None
    api_key: str | None = None
    project: str | None = None
    model: str | None = None
    door: str | None = None

    @classmethod
    def of_sum(cls, line: UsageSum) -> UsageLine:
        """The body of a line."""
        values: dict[str, Any] = {**Used.of(line.spent).model_dump(), **line.group}
        return cls(**values)


class UsageReport(BaseModel):
    """What was used from the day `since` to the day `until`, both included (UTC)."""

    since: date
    until: date
    lines: list[UsageLine]


class AlertBody(BaseModel):
    """`percent` of a budget were spent."""

    subject: str
    budget: str
    period: str
    percent: int
    spent: float
    amount: float
    at: datetime


class AlertList(BaseModel):
    """Alerts, the newest first."""

    alerts: list[AlertBody]


@router.get(
    "/usage", response_model=UsageReport, responses={200: {"content": {CSV: {"schema": {"type": "string"}}}}}
)
async def usage(
    user: CurrentUser,
    authorizer: AuthorizerDep,
    book: UsageDep,
    since: Annotated[
        date | None, Query(ge=FIRST_DAY, description="First day; 30 days ago when left out")
    ] = None,
    until: Annotated[date | None, Query(ge=FIRST_DAY, description="Last day; today when left out")] = None,
    by: Annotated[
        list[Group] | None,
        Query(description="What to sum by, each on its own: `by=day&by=owner`; `day` when left out"),
    ] = None,
    owner: Annotated[
        str | None, Query(max_length=200, description="Only what this owner used, such as `user:ID`")
    ] = None,
    project: Annotated[str | None, Query(max_length=64)] = None,
    format: Annotated[Literal["json", "csv"], Query()] = "json",
) -> UsageReport | Response:
    """What everybody has used, as JSON or CSV."""
    await authorizer.check(user, "usage:read-all")
    last = until or datetime.now(UTC).date()
    first = since or last - timedelta(days=29)
    groups: Sequence[Group] = list(dict.fromkeys(by or ["day"]))
    lines = await book.report(
        groups, since=first.isoformat(), until=last.isoformat(), owner=owner, project=project
    )
    if format == "csv":
        return _csv(groups, lines)
    return UsageReport(since=first, until=last, lines=[UsageLine.of_sum(line) for line in lines])


def _csv(groups: Sequence[Group], lines: Sequence[UsageSum]) -> Response:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*groups, *SUMS])
    for line in lines:
        cells = [line.group[name] for name in groups]
        writer.writerow([*map(_plain, cells), *(getattr(line.spent, name) for name in SUMS)])
    headers = {"Content-Disposition": 'attachment; filename="usage.csv"'}
    return Response(text.getvalue(), media_type=CSV, headers=headers)


def _plain(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{cell}" if cell[:1] in {"=", "+", "-", "@", "\t", "\r"} else cell


@router.get("/alerts")
async def list_alerts(
    user: CurrentUser, alerts: AlertsDep, limit: Annotated[int, Query(ge=1, le=1000)] = 100
) -> AlertList:
    """The budgets that were nearly or wholly spent."""
    found = await alerts.newest(user, limit)
    return AlertList(
        alerts=[
            AlertBody(
                subject=alert.subject,
                budget=alert.budget,
                period=alert.period,
                percent=alert.percent,
                spent=alert.spent,
                amount=alert.amount,
                at=moment(alert.at),
            )
            for alert in found
        ]
    )


# --- audit ---------------------------------------------------------------------------------------


class AuditEntry(BaseModel):
    """A row of the audit log. `actor` is an owner; empty is nobody who is known."""

    seq: int
    at: datetime
    actor: str
    action: str
    target: str
    outcome: str
    door: str
    personal_data: bool
    details: dict[str, Any]
    hash: str

    @classmethod
    def of(cls, row: AuditRow) -> AuditEntry:
        """The body of a row."""
        return cls(**{**msgspec.structs.asdict(row), "at": moment(row.at)})


class AuditPage(BaseModel):
    """Rows, the newest first. `next` is the `before` of the next page, null on the last."""

    entries: list[AuditEntry]
    next: int | None


class AuditVerdict(BaseModel):
    """Whether the log is whole. `head` is `seq:hash` of its end: note it somewhere else."""

    whole: bool
    rows: int
    head: str
    broken_at: int | None
    problem: str | None


Actor = Annotated[
    str | None, Query(max_length=200, description="Only what this owner did, such as `user:ID`")
]
Action = Annotated[
    str | None, Query(max_length=64, description="Only actions that begin so, such as `auth.`")
]
Outcome = Annotated[str | None, Query(max_length=16)]
Moment = Annotated[AwareDatetime | None, Query(description="With a time zone")]


def _filter(
    actor: Actor = None,
    action: Action = None,
    outcome: Outcome = None,
    since: Moment = None,
    until: Moment = None,
) -> AuditFilter:
    first = None if since is None else since.timestamp()
    return AuditFilter(actor, action, outcome, first, None if until is None else until.timestamp())


Which = Annotated[AuditFilter, Depends(_filter)]


@router.get("/audit")
async def read_audit(
    user: CurrentUser,
    authorizer: AuthorizerDep,
    audit: AuditDep,
    which: Which,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    before: Annotated[int | None, Query(ge=1, le=2**53, description="Only rows older than this one")] = None,
) -> AuditPage:
    """Who did what, the newest first."""
    await authorizer.check(user, "audit:read")
    rows = await audit.search(which, limit=limit, before=before)
    more = rows[-1].seq if len(rows) == limit else None
    return AuditPage(entries=[AuditEntry.of(row) for row in rows], next=more)


@router.get(
    "/audit/export",
    response_class=Response,
    responses={200: {"content": {NDJSON: {"schema": {"$ref": "#/components/schemas/AuditEntry"}}}}},
)
async def export_audit(
    user: CurrentUser, authorizer: AuthorizerDep, audit: AuditDep, which: Which
) -> StreamingResponse:
    """The log as NDJSON, oldest first; with all rows in it, the chain can be verified anywhere."""
    await authorizer.check(user, "audit:read")
    await audit.record(user, "audit.export")
    headers = {"Content-Disposition": 'attachment; filename="audit.ndjson"'}
    return StreamingResponse(_lines(audit, which), media_type=NDJSON, headers=headers)


async def _lines(audit: Audit, which: AuditFilter) -> AsyncIterator[bytes]:
    async for row in audit.rows(which):
        yield msgspec.json.encode(row) + b"\n"


@router.get("/audit/verify")
async def verify_audit(
    user: CurrentUser,
    authorizer: AuthorizerDep,
    audit: AuditDep,
    head: Annotated[
        str | None, Query(pattern=r"^\d{1,15}:[0-9a-f]{64}$", description="A head that was noted before")
    ] = None,
) -> AuditVerdict:
    """Whether no row of the log was changed, taken out or put in."""
    await authorizer.check(user, "audit:read")
    verdict = await audit.verify(head)
    return AuditVerdict(
        whole=verdict.broken_at is None,
        rows=verdict.rows,
        head=verdict.head,
        broken_at=verdict.broken_at,
        problem=verdict.problem,
    )
