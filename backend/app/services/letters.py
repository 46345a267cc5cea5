"""What processes that share a database tell each other over the wire."""

from __future__ import annotations

import msgspec

from app.services.turns import Position
from app.services.watchers import Change, SessionKey
from app.services.wire import Wire


class Letter(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What all letters are. `by` is the instance that is told what comes of it."""


class Watching(Letter, frozen=True, tag="w"):
    """These sessions, and the lists of these owners, are watched at `by`. With `anew` what was told of them
    may have been lost."""

    by: str
    sessions: list[SessionKey]
    lists: list[str]
    anew: bool = False


class TurnBegan(Letter, frozen=True, tag="b"):
    """A turn of a session that is watched has begun."""

    turn: str


class TurnEnded(Letter, frozen=True, tag="e"):
    """A turn has ended: its ending is in the database."""

    turn: str


class ListChanged(Letter, frozen=True, tag="c"):
    """Something has changed in a list that is watched."""

    owner: str
    change: Change


class Noticed(Letter, frozen=True, tag="n"):
    """Somebody does something in a session that is watched."""

    owner: str
    session_id: str
    what: str


class Follow(Letter, frozen=True, tag="f"):
    """A turn is followed at `by`, which has its events up to `last`. They are sent from there when they are
    not sent yet, or `anew`."""

    by: str
    turn: str
    last: Position
    anew: bool


class Leave(Letter, frozen=True, tag="l"):
    """Nobody at `by` follows the turn any more."""

    by: str
    turn: str


class Pieces(Letter, frozen=True, tag="p"):
    """Events of a turn, encoded, the first of them with the number `first` in this attempt. Never its
    ending."""

    turn: str
    attempt: int
    first: int
    events: list[bytes]


class Stop(Letter, frozen=True, tag="s"):
    """A turn is to be stopped."""

    by: str
    turn: str


class Heeded(Letter, frozen=True, tag="h"):
    """It is being stopped."""

    turn: str


AnyLetter = Watching | TurnBegan | TurnEnded | ListChanged | Noticed | Follow | Leave | Pieces | Stop | Heeded

_encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(AnyLetter).decode
"""A letter that has come."""


def post(wire: Wire, instance: str | None, letter: AnyLetter) -> None:
    """Sends a letter to an instance, or to all."""
    wire.tell(instance, _encode(letter))
