"""Who asks, and what they may: the vocabulary of the authorizer and of the limits.

A role is data: `roles.toml` has those that are shipped, and a file of the same form, or the API, adds
others and changes these.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_serializer

PERMISSIONS = {
    "chat:use": "Send messages, stop answers, and clear a session's history",
    "sessions:read": "Read own sessions and follow their turns",
    "sessions:write": "Rename, delete and restore own sessions",
    "projects:write": "Change the system prompt that a project's new sessions begin with",
    "projects:clear": "Clear or delete all sessions of a project at once",
    "templates:read": "Read own templates and render them",
    "templates:write": "Save, delete and restore own templates",
    "keys:write": "Make, see and revoke own API keys",
    "account:write": "Change own password, see and end own sign-ins",
    "usage:read": "See own usage and limits",
    "users:read": "See all accounts and invitations",
    "users:write": "Invite people; change the role of an account, close it, reset its password",
    "roles:write": "Define roles and set limits",
    "usage:read-all": "See what everybody has used, and the alerts",
    "devices:read": "See all MQTT devices",
    "devices:write": "Add and remove MQTT devices, and give them new passwords",
    "servers:read": "See the LLM servers and how they are",
    "servers:write": "Take LLM servers out of service and back",
    "metrics:read": "Read what the portal measures of itself, as Prometheus does",
    "models:write": "Choose the default model for all, and have the LLM servers asked anew what they serve",
    "audit:read": "Read, export and verify the audit log",
}
"""Everything that there is to be allowed, with what it means."""

NEVER_BY_KEY = frozenset({"keys:write", "account:write", "users:write", "roles:write", "devices:write"})
"""What no API key may do, so that a stolen one cannot make itself last."""


def _permission(name: str) -> str:
    subject, _, verb = name.partition(":")
    if name not in PERMISSIONS and name != "*":
        if verb == "*" and any(known.startswith(f"{subject}:") for known in PERMISSIONS):
            return name
        raise ValueError(f"{name!r} is no permission; there are {', '.join(PERMISSIONS)}")
    return name


Permission: TypeAlias = Annotated[str, AfterValidator(_permission)]
"""A permission, `subject:*` for all of a subject, or `*` for all that there are."""

Amount: TypeAlias = Annotated[float | None, Field(ge=0)]
Count: TypeAlias = Annotated[int | None, Field(ge=0)]


class Limits(BaseModel):
    """What may be used. Null leaves a limit to the next wider rule; 0 switches it off. Costs are in the
    currency of `models.toml`; GPU time is a turn's share of the time that the LLM server was busy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_hour: Annotated[Count, Field(description="Messages in any 60 minutes")] = None
    requests_per_session_minute: Annotated[
        Count, Field(description="Messages in any minute of one session")
    ] = None
    concurrent_turns: Annotated[Count, Field(description="Turns that wait or run at once")] = None
    max_tokens: Annotated[Count, Field(description="Longest reply, in tokens")] = None
    daily_tokens: Annotated[Count, Field(description="Tokens read and written a day (UTC)")] = None
    daily_cost: Annotated[Amount, Field(description="Cost a day")] = None
    daily_gpu_seconds: Annotated[Amount, Field(description="GPU seconds a day")] = None
    monthly_tokens: Annotated[Count, Field(description="Tokens a calendar month (UTC)")] = None
    monthly_cost: Annotated[Amount, Field(description="Cost a month")] = None
    monthly_gpu_seconds: Annotated[Amount, Field(description="GPU seconds a month")] = None

    def over(self, wider: Limits) -> Limits:
        """These limits, with those of `wider` where none is set."""
        return wider.model_copy(update=self.model_dump(exclude_none=True))

    def without(self, narrower: Limits) -> Limits:
        """These limits, but for those that `narrower` sets."""
        return self.model_copy(update=dict.fromkeys(narrower.model_dump(exclude_none=True)))


ANY = ("*",)
"""Patterns of names that leave nothing out."""


class Role(BaseModel):
    """What the people of a role may."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    description: Annotated[str, Field(max_length=500)] = ""
    permissions: Annotated[frozenset[Permission], Field(description="`subject:*` and `*` for all")]
    models: Annotated[
        tuple[str, ...], Field(description="Models that may be asked for; `*` stands for anything")
    ] = ANY
    tools: Annotated[tuple[str, ...], Field(description="Tools that may be offered to the model")] = ANY
    system_prompt: Annotated[
        str, Field(max_length=100_000, description="Put before the system prompt of every session")
    ] = ""
    redaction: Annotated[
        bool, Field(description="Mask personal data in messages before they are stored or sent")
    ] = False
    limits: Limits = Limits()

    @field_serializer("permissions")
    def _in_order(self, permissions: frozenset[str]) -> list[str]:
        return sorted(permissions)

    def allows(self, permission: str) -> bool:
        """Whether the role has the permission."""
        subject = permission.partition(":")[0]
        return not self.permissions.isdisjoint((permission, f"{subject}:*", "*"))

    def lacks(self, other: Role) -> list[str]:
        """The permissions of another role that this one has not."""
        return [name for name in PERMISSIONS if other.allows(name) and not self.allows(name)]


ROLE_NAME = r"^[a-z][a-z0-9_-]{0,63}$"

ALL_RIGHTS = Role(description="Whoever runs the portal", permissions=frozenset({"*"}))

Door = Literal["http", "mqtt", "python"]
"""How a request came in."""


@dataclass(frozen=True, slots=True)
class KeyUse:
    """The API key that somebody asks with; or the `device`, which an admin has added."""

    id: str
    name: str
    scopes: frozenset[str]
    project: str | None = None
    device: str | None = None


@dataclass(frozen=True, slots=True)
class Identity:
    """Who asks. `owner` is what sessions belong to: `user:ID`, `anon:PROJECT`, or `local`. `sign_in` or
    `key` is what they showed."""

    owner: str
    role_name: str
    role: Role
    username: str = ""
    email: str = ""
    created_at: float = 0.0
    sign_in: str | None = None
    key: KeyUse | None = None
    door: Door = "http"

    @property
    def user(self) -> str | None:
        """The id of the account, for those that have one."""
        kind, _, name = self.owner.partition(":")
        return name if kind == "user" else None

    @property
    def only_project(self) -> str | None:
        """The project that the key is for, where it is for one alone."""
        return None if self.key is None else self.key.project

    def may(self, permission: str) -> bool:
        """Whether the role, and the key if one is used, has the permission."""
        if self.key is not None and permission not in self.key.scopes:
            return False
        return self.role.allows(permission)


def bearer_token(authorization: str | None) -> str:
    """The token of an `Authorization` header (RFC 6750, 2.1), empty where there is none."""
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


LOCAL = Identity("local", "local", ALL_RIGHTS, username="local", door="python")
"""Plain Python, and programs that hold the server's secret."""


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether one of the patterns, in which `*` stands for anything, is the name's."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
