"""The MQTT door described as AsyncAPI 3.0 (https://www.asyncapi.com/docs/reference/specification/v3.0.0),
made from the topics and types that it works with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from app import __version__
from app.events import ID_PATTERN
from app.mqtt.bridge import JSON, TEXT
from app.mqtt.schemas import Schema, reference, schemas
from app.mqtt.topics import (
    ASSISTANT_RESPONSE,
    DEVICE,
    HINT,
    NEW_SESSION,
    STATUS,
    STREAM,
    Verb,
    parse,
    request_filters,
)

BINDING = "0.2.0"
"""The version of AsyncAPI's MQTT bindings
(https://github.com/asyncapi/bindings/blob/master/mqtt/README.md)."""

PROJECT = "{project}"
TREE = f"{DEVICE}/{{device}}/"
"""What the topics of a device have after the project."""

DESCRIPTION = f"""
Messages and states of games in, replies and hints out. Requests and answers go at QoS 1; a request is
acknowledged once it is committed, and a repeated `requestId` makes one turn. Retained requests are ignored.
In requests, numbers may be strings and unknown keys are ignored. Session, device and request ids are
`{ID_PATTERN}`.
""".strip()

_PARAMETERS: dict[str, str] = {
    "session": "A session; in a `hint` topic also `all`, for what is about no single one",
    "device": "A device: a user of the broker with topics of its own",
    "request": "The `requestId` of the request that began the turn",
}


@dataclass(frozen=True, slots=True)
class _Message:
    """A payload: what it is, and its schema. `asks` for what clients send; `is_answer` for what goes where a
    request wants it, with the request's correlation data; `tells_id` when `requestId` is in it."""

    summary: str
    payload: Schema
    content_type: str = JSON
    asks: bool = False
    is_answer: bool = False
    tells_id: bool = True

    def rendered(self) -> Schema:
        """The message in AsyncAPI's form."""
        mqtt: Schema = {"contentType": self.content_type, "bindingVersion": BINDING}
        found: Schema = {
            "summary": self.summary,
            "contentType": self.content_type,
            "payload": self.payload,
            "bindings": {"mqtt": mqtt},
        }
        if self.tells_id and self.content_type == JSON:
            found["correlationId"] = {"location": "$message.payload#/requestId"}
        if self.is_answer:
            mqtt["correlationData"] = {"type": "string", "description": "The request's, byte for byte"}
        if self.asks:
            mqtt["correlationData"] = {"type": "string", "description": "It is the request id without one"}
            mqtt["responseTopic"] = {
                "type": "string",
                "description": "Where the answer goes: to the session's own topic or below it",
            }
            found["headers"] = _USER_PROPERTIES
        return found


_USER_PROPERTIES = {
    "type": "object",
    "description": "User properties, which stand for the keys of the same names",
    "properties": {"token": {"type": "string"}, "maxChunkBytes": {"type": "string"}},
}
_TEXT = {"type": "string"}
_EMPTY = {"type": "string", "maxLength": 0}
_EXPIRY = {"type": "integer", "minimum": 1, "description": "What the request had, in seconds; else none"}


def _asked(summary: str, schema: str) -> _Message:
    return _Message(summary, reference(schema), asks=True)


def _asked_in_text(summary: str, payload: Schema = _TEXT) -> _Message:
    return _Message(summary, payload, TEXT, asks=True)


def _answer(summary: str, schema: str) -> _Message:
    return _Message(summary, reference(schema), is_answer=True)


_MESSAGES: dict[str, _Message] = {
    "user_input": _asked("A message", "UserInput"),
    "user_input_text": _asked_in_text("A message; it does not begin with `{`", {**_TEXT, "minLength": 1}),
    "clear": _asked_in_text("Clears the session", _EMPTY),
    "state": _asked("The state of a game", "State"),
    "template": _asked("Another system prompt, for a session or the project", "TemplateBody"),
    "template_text": _asked_in_text("Another system prompt"),
    "target": _asked("The session, or `all`", "TargetBody"),
    "target_text": _asked_in_text("The session, or `all`, or nothing where the topic says it"),
    "ask_session": _asked("Asks for a fresh session id", "Request"),
    "ask_session_text": _asked_in_text("The same; the answer is text too"),
    "cancel": _asked("Stops a turn", "Request"),
    "cancel_text": _asked_in_text("The request id of the turn; empty: the running one"),
    "reply": _Message("The reply, a notice, or `Error: ` and why", _TEXT, TEXT, is_answer=True),
    "reply_json": _answer("With `format: json`: the event that ended the turn", "JsonReply"),
    "refusal": _answer("Why there is no reply, with `format: json` or a Response Topic", "Refusal"),
    "hint": _answer("The answer to a state", "HintReply"),
    "hint_json": _answer("With `format: json`: the event that ended the turn, and its hint", "JsonHintReply"),
    "hint_refusal": _answer("Why there is no hint", "HintRefusal"),
    "notice": _answer("Something was done", "Notice"),
    "event": _Message("An event of a turn, with its number", reference("Packet"), tells_id=False),
    "new_session": _answer("A fresh session id", "NewSession"),
    "new_session_text": _Message("A fresh session id, or `Error: ` and why", _TEXT, TEXT, is_answer=True),
    "status": _Message(
        "How the portal is; the last will says `offline`", reference("Status"), tells_id=False
    ),
}

_ASKED: dict[Verb, tuple[str, ...]] = {
    "user_input": ("user_input", "user_input_text"),
    "state": ("state",),
    "template": ("template", "template_text"),
    "clear_history": ("target", "target_text"),
    "delete_session": ("target", "target_text"),
    "session": ("ask_session", "ask_session_text"),
    "cancel": ("cancel", "cancel_text"),
}

_DONE = (HINT, ("notice", "hint_refusal", "refusal"))
_ANSWERED: dict[Verb, tuple[str, tuple[str, ...]]] = {
    "user_input": (ASSISTANT_RESPONSE, ("reply", "reply_json", "refusal")),
    "state": (HINT, ("hint", "hint_json", "hint_refusal", "refusal")),
    "template": _DONE,
    "clear_history": _DONE,
    "delete_session": _DONE,
    "session": (NEW_SESSION, ("new_session", "new_session_text", "refusal")),
    "cancel": _DONE,
}
"""Where each request is answered, and with what."""

_TOLD: dict[str, tuple[str, ...]] = {
    # A state may ask for its hint at the topic of replies.
    ASSISTANT_RESPONSE: ("reply", "reply_json", "refusal", "hint", "hint_json", "hint_refusal"),
    HINT: ("hint", "hint_json", "hint_refusal", "notice", "refusal"),
    STREAM: ("event",),
    NEW_SESSION: ("new_session", "new_session_text", "refusal"),
    STATUS: ("status",),
}
"""What comes at each kind of topic."""

_BELOW = {ASSISTANT_RESPONSE: "/{session}", HINT: "/{session}", STREAM: "/{session}/{request}"}


def document(projects: Sequence[str]) -> Schema:
    """The AsyncAPI document of a portal that serves these projects."""
    made = _Document(projects)
    for topic in request_filters(PROJECT, devices=True):
        made.add_request(topic)
    for kind in _TOLD:
        made.add_answers("", kind)
        if kind != STATUS:
            made.add_answers(TREE, kind)
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "Prompt Portal", "version": __version__, "description": DESCRIPTION},
        "defaultContentType": JSON,
        "channels": made.channels,
        "operations": made.operations,
        "components": {
            "schemas": schemas(),
            "messages": {name: message.rendered() for name, message in _MESSAGES.items()},
        },
    }


class _Document:
    """Channels, and what the portal does there, as they come together."""

    def __init__(self, projects: Sequence[str]) -> None:
        self.channels: Schema = {}
        self.operations: Schema = {}
        self._parameters = {
            **{name: {"description": text} for name, text in _PARAMETERS.items()},
            "project": {"description": "A project of the portal", "enum": list(projects)},
        }

    def add_request(self, topic: str) -> None:
        """What clients send to a topic filter of `request_filters`."""
        address = parse(PROJECT, topic.replace("+", "x"))
        assert address is not None
        tree, verb, messages = TREE if address.device else "", address.verb, _ASKED[address.verb]
        name, below = _name(tree, verb), ""
        if address.session is not None:
            name, below = f"{name}_in_session", "/{session}"
            messages += ("clear",) if verb == "user_input" else ()
        self._add_channel(name, f"{PROJECT}/{tree}{verb}{below}", messages)
        kind, answers = _ANSWERED[verb]
        at = _name(tree, kind)
        self.operations[f"receive_{name}"] = {
            **_operation("receive", name, messages),
            "reply": {"channel": _channel(at), "messages": _messages_of(at, answers)},
        }

    def add_answers(self, tree: str, kind: str) -> None:
        """What the portal tells at topics of a kind."""
        name, messages = _name(tree, kind), _TOLD[kind]
        self._add_channel(name, f"{PROJECT}/{tree}{kind}{_BELOW.get(kind, '')}", messages)
        operation = self.operations[f"send_{name}"] = _operation("send", name, messages)
        binding = operation["bindings"]["mqtt"]
        binding["retain"] = kind == STATUS
        if kind in {kind for kind, _ in _ANSWERED.values()}:
            binding["messageExpiryInterval"] = _EXPIRY

    def _add_channel(self, name: str, address: str, messages: Sequence[str]) -> None:
        named = re.findall(r"{(\w+)}", address)
        self.channels[name] = {
            "address": address,
            "parameters": {parameter: self._parameters[parameter] for parameter in named},
            "messages": {message: {"$ref": f"#/components/messages/{message}"} for message in messages},
        }


def _name(tree: str, kind: str) -> str:
    return (f"{DEVICE}_{kind}" if tree else kind).replace("/", "_")


def _channel(name: str) -> Schema:
    return {"$ref": f"#/channels/{name}"}


def _messages_of(channel: str, messages: Sequence[str]) -> list[Schema]:
    return [{"$ref": f"#/channels/{channel}/messages/{message}"} for message in messages]


def _operation(action: str, channel: str, messages: Sequence[str]) -> Schema:
    return {
        "action": action,
        "channel": _channel(channel),
        "messages": _messages_of(channel, messages),
        "bindings": {"mqtt": {"qos": 1, "bindingVersion": BINDING}},
    }
