"""Topics of the MQTT door: who sent a message, what for, and where an answer may go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from app.events import is_id

Verb = Literal["user_input", "state", "template", "clear_history", "delete_session", "cancel", "session"]
"""What a request topic asks for."""

VERBS: tuple[Verb, ...] = get_args(Verb)

ASSISTANT_RESPONSE, HINT, STREAM, STATUS = "assistant_response", "hint", "stream", "status"
NEW_SESSION = "session/response"
DEVICE = "device"

LONGEST_TOPIC = 1024
EVERY_SESSION = "all"
"""Where a notice goes that is about no single session."""


@dataclass(frozen=True, slots=True)
class Address:
    """A request topic: `P/VERB[/SESSION]`, or the same below `P/device/DEVICE`."""

    project: str
    verb: Verb
    session: str | None
    device: str | None = None

    @property
    def base(self) -> str:
        """What the topics of whoever asked begin with."""
        return f"{self.project}/{DEVICE}/{self.device}" if self.device else self.project

    def at(self, kind: str, session: str) -> str:
        """The topic for answers of a kind to a session."""
        return f"{self.base}/{kind}/{session}"

    def may_answer_at(self, topic: str, kinds: tuple[str, ...], session: str | None) -> bool:
        """Whether an answer may go there: to the asker's own session or below it; for a device to any
        session of its own. Anything else would let one client make the portal write to another's."""
        if any(mark in topic for mark in "+#\0") or len(topic.encode()) > LONGEST_TOPIC:
            return False
        below = [f"{self.base}/{kind}" for kind in kinds]
        if session is not None and self.device is None:
            below = [f"{start}/{session}" for start in below]
        return any(topic == start or topic.startswith(f"{start}/") for start in below)


def request_filters(project: str, *, devices: bool) -> list[str]:
    """The topic filters that the portal subscribes for a project."""
    bases = [project, *([f"{project}/{DEVICE}/+"] if devices else [])]
    return [
        f"{base}/{verb}{level}"
        for base in bases
        for verb in VERBS
        for level in ("", "/+")
        if _has(verb, level)
    ]


def _has(verb: Verb, level: str) -> bool:
    return {"session": not level, "cancel": bool(level)}.get(verb, True)


def parse(project: str, topic: str) -> Address | None:
    """The request topic of a project; None for one that is none."""
    levels = topic.removeprefix(f"{project}/").split("/")
    device = None
    if levels[0] == DEVICE and len(levels) > 2:
        device, levels = levels[1], levels[2:]
        if not is_id(device):
            return None
    verb = next((verb for verb in VERBS if verb == levels[0]), None)
    if verb is None or len(levels) > 2:
        return None
    return Address(project, verb, levels[1] if len(levels) == 2 else None, device)


def status_topic(project: str) -> str:
    """Where the portal says, retained, how it is."""
    return f"{project}/{STATUS}"
