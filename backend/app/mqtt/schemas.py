"""JSON Schemas of everything that is said over MQTT, made from the types that read and write it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

import msgspec
from pydantic import AliasChoices
from pydantic.json_schema import models_json_schema

from app.events import Ending, Thinking, Token, TurnEvent
from app.mqtt.contract import Ask, Request, TargetBody, TemplateBody
from app.mqtt.payloads import HintRefusal, NewSession, Notice, Refusal, Status
from app.services.hints import Hint

ENDINGS = get_args(Ending)
EVENTS = get_args(TurnEvent)
_BODIES = (Ask, TemplateBody, TargetBody, Request)
_ANSWERS = (Hint, Notice, HintRefusal, Refusal, NewSession, Status)

Schema = dict[str, Any]

_ID_OR_NULL = {"type": ["string", "null"]}


def reference(name: str) -> Schema:
    """A reference to one of `schemas`."""
    return {"$ref": f"#/components/schemas/{name}"}


def schemas() -> dict[str, Schema]:
    """The schemas by their names. Numbers in requests may also be strings."""
    _, found = msgspec.json.schema_components(
        [*_ANSWERS, *EVENTS], ref_template="#/components/schemas/{name}"
    )
    return {**_bodies(), **found, **_packets(found), **_replies(found)}


def _bodies() -> dict[str, Schema]:
    _, made = models_json_schema(
        [(body, "validation") for body in _BODIES], ref_template="#/components/schemas/{model}"
    )
    state = {
        "type": "object",
        "minProperties": 1,
        "description": "Whatever the game has",
    }
    for body in (TemplateBody, TargetBody):
        _add_other_names(body, made["$defs"][body.__name__]["properties"])
    return {
        **made["$defs"],
        "UserInput": {"allOf": [reference("Ask"), {"required": ["message"]}]},
        "State": {
            "description": "The state is under `state`, or it is all keys that `Ask` does not have",
            "allOf": [
                reference("Ask"),
                {"minProperties": 1, "properties": {"state": state}, "additionalProperties": True},
            ],
        },
    }


def _add_other_names(body: type[Request], properties: dict[str, Schema]) -> None:
    """Pydantic tells only the first name that a key may have."""
    for name, field in body.model_fields.items():
        names = field.validation_alias
        first, *others = names.choices if isinstance(names, AliasChoices) else [field.alias or name, name]
        for other in others:
            properties.setdefault(str(other), properties[str(first)])


def _packets(found: dict[str, Schema]) -> dict[str, Schema]:
    """Events as streams carry them: numbered, and without large fields where `maxChunkBytes` asks so."""
    packets = {}
    for event in EVENTS:
        whole = found[event.__name__]
        kept = whole["required"] if event in {Token, Thinking} else ["type", "turn_id"]
        properties = {**whole["properties"], "seq": {"type": "integer", "minimum": 0}}
        if "response" in properties:
            properties["response_bytes"] = {
                "type": "integer",
                "description": "Length of the reply in bytes of UTF-8, where `response` has no room",
            }
        packets[f"{event.__name__}Packet"] = {
            **whole,
            "title": f"{event.__name__}Packet",
            "properties": properties,
            "required": [*kept, "seq"],
        }
    return {**packets, "Packet": _any_of(packets)}


def _replies(found: dict[str, Schema]) -> dict[str, Schema]:
    ids = {"properties": {"sessionId": _ID_OR_NULL, "requestId": _ID_OR_NULL}}
    request_id = {"properties": {"requestId": _ID_OR_NULL}, "required": ["requestId"]}
    hint = {"properties": found["Hint"]["properties"]}
    ending = _any_of(event.__name__ for event in ENDINGS)
    return {
        "HintReply": {"allOf": [reference("Hint"), request_id]},
        "JsonReply": {"allOf": [ending, {**ids, "required": ["sessionId", "requestId"]}]},
        "JsonHintReply": {"allOf": [reference("JsonReply"), hint]},
    }


def _any_of(names: Iterable[str]) -> Schema:
    return {"anyOf": [reference(name) for name in names]}
