"""Payloads of the MQTT door: what its answers look like."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from app.errors import PortalError
from app.events import (
    Cancelled,
    Ending,
    Final,
    Kind,
    ReplyTarget,
    Restarted,
    Thinking,
    Token,
    TurnEvent,
    encode,
    new_id,
)
from app.mqtt.contract import Command
from app.mqtt.payloads import HintRefusal, NewSession, Notice, Refusal
from app.services.hints import hint_of
from app.services.projects import Project
from app.services.turns import Numbered, answer_of

PACKET_BYTES = 9
"""What an MQTT packet has beside topic and payload: fixed header, lengths, packet id, empty properties."""

SEQ_BYTES = len(b',"seq":1000000')
LEAST_ROOM = 112
"""Bytes of a payload that an event with a few characters of text needs."""

_encode = msgspec.json.encode


def answer(
    target: ReplyTarget, ending: Ending, kind: Kind, request_id: str | None, project: Project
) -> bytes:
    """The payload that tells how a turn of a kind ended."""
    if target.form == "json":
        return _encode({**_event(ending, kind, project), **_ids(target, request_id)})
    try:
        reply = answer_of(ending)
    except PortalError as error:
        return refusal(target, error, request_id)
    if target.form == "text":
        return reply.response.encode()
    return _encode({**msgspec.to_builtins(hint_of(reply, project)), "requestId": request_id})


def _event(ending: Ending, kind: Kind, project: Project) -> dict[str, Any]:
    event: dict[str, Any] = msgspec.to_builtins(ending)
    if kind == "state" and isinstance(ending, Final | Cancelled):
        event |= msgspec.to_builtins(hint_of(ending, project))
    return event


def refusal(target: ReplyTarget, error: PortalError, request_id: str | None) -> bytes:
    """The payload for a request that has no reply."""
    if target.form == "hint":
        # Only what a player can do something about is shown where the game shows hints.
        text = "" if error.code in {"superseded", "expired"} else f"Error: {error.message}"
        return _encode(HintRefusal(text, error.info, request_id))
    if target.form == "json" or target.json_errors:
        return _encode(Refusal(error.info, target.session_id or None, request_id))
    return f"Error: {error.message}".encode()


def notice(target: ReplyTarget, text: str, request_id: str | None) -> bytes:
    """The payload that tells that something was done."""
    if target.form == "text":
        return text.encode()
    return _encode(Notice(text, request_id))


def new_session(command: Command) -> bytes:
    """The payload with a fresh session id."""
    if command.is_plain:
        return new_id().encode()
    return _encode(NewSession(new_id(), command.request_id, command.body.client_id or None))


def _ids(target: ReplyTarget, request_id: str | None) -> dict[str, Any]:
    return {"sessionId": target.session_id or None, "requestId": request_id}


# --- streams -------------------------------------------------------------------------------------


class Packets:
    """Cuts the events of a turn into payloads with `seq`, from 0, and from 0 again after `restarted`. With
    `chunk` a packet with its topic has at most so many bytes, where the topic leaves room for it."""

    def __init__(self, topic: str, chunk: int | None) -> None:
        self._seq = 0
        self._room = None if chunk is None else max(chunk - PACKET_BYTES - len(topic.encode()), LEAST_ROOM)

    def of(self, events: Sequence[Numbered]) -> Iterator[bytes]:
        """The payloads of events. The same turn gives the same ones whenever it is asked for."""
        for numbered in events:
            event = numbered.event
            if isinstance(event, Restarted):
                self._seq = 0
            for part in self._parts(event):
                yield self._numbered(part)
                self._seq += 1
            if isinstance(event, Restarted):
                self._seq = 0

    def _numbered(self, event: bytes) -> bytes:
        return event[:-1] + b',"seq":%d}' % self._seq

    def _parts(self, event: TurnEvent) -> Iterator[bytes]:
        """The event, or what it has to be cut into; not numbered yet."""
        whole = encode(event)
        if self._fits(whole):
            yield whole
        elif isinstance(event, Token | Thinking):
            for piece in self._cut(event):
                yield encode(msgspec.structs.replace(event, content=piece))
        else:
            yield self._shortened(event)

    def _fits(self, event: bytes) -> bool:
        return self._room is None or len(event) + SEQ_BYTES <= self._room

    def _shortened(self, event: TurnEvent) -> bytes:
        """The event without its largest fields. What a client needs to go on is always there; a reply is
        in the pieces before."""
        fields: dict[str, Any] = msgspec.to_builtins(event)
        while not self._fits(_encode(fields)) and (names := fields.keys() - {"type", "turn_id"}):
            largest = max(names, key=lambda name: len(_encode(fields[name])))
            value = fields.pop(largest)
            if largest == "response":
                fields["response_bytes"] = len(value.encode())
        return _encode(fields)

    def _cut(self, event: Token | Thinking) -> Iterator[str]:
        """The text in pieces that fit, each of whole characters."""
        assert self._room is not None
        room = self._room - SEQ_BYTES - len(encode(msgspec.structs.replace(event, content="")))
        start = used = 0
        for index, character in enumerate(event.content):
            size = len(_encode(character)) - 2  # as JSON, where a quote has two bytes
            if used + size > room and index > start:
                yield event.content[start:index]
                start, used = index, 0
            used += size
        yield event.content[start:]
