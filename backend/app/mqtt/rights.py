"""What whom may do at the broker: one list of topics, from which the rules of each broker are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from app.mqtt.topics import ASSISTANT_RESPONSE, DEVICE, HINT, NEW_SESSION, STATUS, STREAM, VERBS

SESSION = "session"
"""The one request topic that has no session below it."""


@dataclass(frozen=True, slots=True)
class Rights:
    """Topic filters: what may be published to, and what may be subscribed to and received. All else is
    refused. `below` are topics of which one must know the next level, a session's id: a wildcard there is
    refused."""

    publish: tuple[str, ...]
    receive: tuple[str, ...]
    below: tuple[str, ...] = ()


def device_rights(name: str, projects: Sequence[str]) -> Rights:
    """A device's own tree in its projects, and how the portal is there."""
    trees = [f"{project}/{DEVICE}/{name}" for project in projects]
    replies = (ASSISTANT_RESPONSE, HINT, STREAM, NEW_SESSION)
    return Rights(
        publish=tuple(topic for tree in trees for topic in _requests(tree)),
        receive=(
            *(f"{tree}/{reply}/#" for tree in trees for reply in replies),
            *(f"{project}/{STATUS}" for project in projects),
        ),
    )


def anonymous_rights(projects: Sequence[str]) -> Rights:
    """The classic topics of the projects. Whoever knows a session's id may follow it, so none is told."""
    return Rights(
        publish=tuple(topic for project in projects for topic in _requests(project)),
        receive=tuple(f"{project}/{name}" for project in projects for name in (STATUS, NEW_SESSION)),
        below=tuple(
            f"{project}/{name}"
            for project in projects
            for name in (ASSISTANT_RESPONSE, HINT, STREAM, NEW_SESSION)
        ),
    )


def _requests(tree: str) -> list[str]:
    return [f"{tree}/{verb}" if verb == SESSION else f"{tree}/{verb}/#" for verb in VERBS]


def emqx_claims(name: str, projects: Sequence[str]) -> dict[str, Any]:
    """The rights of a device as claims of a JSON Web Token for EMQX 5.5 or newer. Whoever signs them adds
    `exp`. (https://docs.emqx.com/en/emqx/latest/access-control/authn/acl.html)"""
    rights = device_rights(name, projects)
    rules = [("allow", "publish", topic) for topic in rights.publish]
    rules += [("allow", "subscribe", topic) for topic in rights.receive]
    # Without the last rule EMQX would go on to other rules, which allow everything as it is shipped.
    rules.append(("deny", "all", "#"))
    return {
        "username": name,
        "acl": [
            {"permission": permission, "action": action, "topic": topic}
            for permission, action, topic in rules
        ],
    }
