"""Tools for models whose chat template knows none: their calls as constrained JSON.

The server is made to answer with one JSON object, `{"response": text, "tool_calls": [{"name",
"arguments"}]}`, by `response_format: json_schema`. What clients see is the same as from a model that knows
tools: the text as it comes, and the calls at the end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from app.errors import InvalidRequest
from app.events import GenerationOptions, new_id

MOST_CALLS = 4
"""Calls in one reply, so that a small model cannot go on for ever."""

SHORT_REPLY = 400
"""Tokens. Longer texts are left unbounded: servers take no large `maxLength`."""

CHARS_A_TOKEN = 2
"""Of the text; about half of what a token is, so that half of them are left."""

_BEGINNING = re.compile(r'\s*\{\s*"response"\s*:\s*"')
_HIGH, _LOW = r"\\u[dD][89abAB][0-9a-fA-F]{2}", r"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_NO_LOW = r"[^\\]|\\[^u]|\\u[^dD]|\\u[dD][^c-fC-F]"
_HEX, _NO_HEX = "[0-9a-fA-F]{4}", "[0-9a-fA-F]{0,3}[^0-9a-fA-F]"
_UNITS = re.compile(
    rf'(?:[^"\\]|\\[^u]|{_HIGH}{_LOW}|{_HIGH}(?={_NO_LOW})|(?!{_HIGH})\\u{_HEX}|\\u(?={_NO_HEX}))*'
)
"""As much of a JSON string as can be told for sure: no half escape, no half of what may be a pair of
surrogates."""

_ESCAPE = re.compile(rf'(\\["\\/bfnrt]|{_HIGH}{_LOW}|\\u(?![dD][89a-fA-F]){_HEX})|(\\u{_HEX})|\\')
"""An escape; in the second group half a pair of surrogates, which grammars of JSON allow and UTF-8 does not;
else a backslash that escapes nothing, which servers write that keep to no grammar."""

Tools = Sequence[Mapping[str, Any]]
"""Tools in OpenAI's form."""


def constrained(options: GenerationOptions) -> GenerationOptions:
    """The options that make the server answer in the one object. Raises `InvalidRequest` when they ask for
    another form."""
    tools, choice = options.tools or [], options.tool_choice
    if options.response_format is not None:
        raise InvalidRequest("response_format: this model cannot have tools beside it; leave one of them out")
    named = choice.get("function", {}).get("name") if isinstance(choice, dict) else None
    offered = [_function(tool) for tool in tools if named in {None, _function(tool).get("name")}]
    is_required = choice == "required" or named is not None
    calls = {
        "type": "array",
        "items": {"anyOf": [_call_schema(function) for function in offered]},
        "minItems": 1 if is_required else 0,
        "maxItems": MOST_CALLS if offered and choice != "none" else 0,
    }
    schema = _object({"response": _text(options.max_tokens), "tool_calls": calls})
    form = {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema}}
    return options.model_copy(update={"tools": None, "tool_choice": None, "response_format": form})


def _text(max_tokens: int | None) -> dict[str, Any]:
    """The text's schema. In a short reply it leaves room for the calls, which come after it."""
    if max_tokens is None or max_tokens > SHORT_REPLY:
        return {"type": "string"}
    return {"type": "string", "maxLength": CHARS_A_TOKEN * max_tokens}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _call_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    arguments = function.get("parameters") or {"type": "object"}
    return _object({"name": {"const": function.get("name")}, "arguments": arguments})


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function = tool.get("function")
    return function if isinstance(function, Mapping) else {}


def instructions(tools: Tools) -> str:
    """What the model is told of tools that its template does not know."""
    lines = [
        f"- {function.get('name')}({', '.join((function.get('parameters') or {}).get('properties', {}))}): "
        f"{function.get('description', '')}"
        for function in map(_function, tools)
    ]
    return "\n".join(
        [
            'Answer with a JSON object: "response" is what you say, "tool_calls" are the tools that you use, '
            "or none:",
            *lines,
        ]
    )


class ConstrainedReply:
    """Takes the one object apart while it comes. A server that has not kept to the form is taken at its
    word: what it says is the text."""

    def __init__(self) -> None:
        self._raw = ""
        self._cursor: int | None = None
        self._is_plain = False

    def feed(self, piece: str) -> str:
        """As much more of the text as a piece of the object tells."""
        self._raw += piece
        if self._cursor is None and not self._is_plain:
            piece = self._raw
            self._begin()
        return piece if self._is_plain else self._more()

    def flush(self) -> str:
        """What is left to be said at the end: all of it, where the object is another one."""
        return "" if self._is_plain or self._cursor is not None else self._raw

    def _begin(self) -> None:
        found = _BEGINNING.match(self._raw)
        if found is not None:
            self._cursor = found.end()
        self._is_plain = bool(self._raw.strip()) and not self._raw.lstrip().startswith("{")

    def _more(self) -> str:
        if self._cursor is None:
            return ""
        found = _UNITS.match(self._raw, self._cursor)
        assert found is not None
        self._cursor = found.end()
        return str(json.loads(f'"{_mended(found.group())}"', strict=False))

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        """The calls in OpenAI's form, once everything has come; none when it broke off."""
        try:
            reply = msgspec.json.decode(_mended(self._raw), type=_Reply)
        except msgspec.MsgspecError:
            return []
        return [
            {
                "id": f"call_{new_id()}",
                "type": "function",
                "function": {"name": call.name, "arguments": msgspec.json.encode(call.arguments).decode()},
            }
            for call in reply.tool_calls
        ]


def _mended(raw: str) -> str:
    """The JSON with U+FFFD for each lone surrogate, and with backslashes that escape nothing as such."""
    return _ESCAPE.sub(lambda found: found[1] or (r"\ufffd" if found[2] else r"\\"), raw)


class _Call(msgspec.Struct):
    name: str
    arguments: dict[str, Any]


class _Reply(msgspec.Struct):
    tool_calls: list[_Call]
