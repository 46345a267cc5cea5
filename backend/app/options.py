"""What the options of a generation may be, as OpenAI-compatible servers take them.

Objects are checked in shape and passed on as they came: what a server knows beyond that is its own. Errors
name the field, down to the one inside an object.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired, TypeVar

import msgspec
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo
from typing_extensions import TypedDict

from app.errors import InvalidRequest

MOST_STOPS = 4
MOST_EXTRA = 64
MOST_BIASES = 1024

_PASSED_ON = ConfigDict(extra="allow")
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")

T = TypeVar("T")


def _encodable(value: T) -> T:
    """Refuses what JSON takes and UTF-8 does not: a lone surrogate."""
    try:
        msgspec.json.encode(value)
    except (UnicodeEncodeError, RecursionError):
        raise ValueError("it holds a character that is none, or is nested too deeply") from None
    return value


Objects = Annotated[list[dict[str, Any]], AfterValidator(_encodable)]
"""A list of JSON objects."""

Object = Annotated[dict[str, Any], AfterValidator(_encodable)]
"""A JSON object."""


# --- stop, logit_bias ----------------------------------------------------------------------------


def _stop(value: object) -> object:
    texts = value if isinstance(value, list) else [value]
    if not 1 <= len(texts) <= MOST_STOPS or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"a text, or a list of 1 to {MOST_STOPS} texts, none of them empty, is needed")
    return _encodable(value)


Stop = Annotated[str | list[str], BeforeValidator(_stop)]
"""Texts that end the reply."""

LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MOST_BIASES),
]
"""By the number of a token, what is added to its logit."""


# --- response_format -----------------------------------------------------------------------------


class NamedSchema(TypedDict):
    """A JSON Schema that the reply is made to keep to."""

    __pydantic_config__ = _PASSED_ON  # type: ignore[misc]

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    schema: NotRequired[dict[str, Any]]
    strict: NotRequired[bool | None]


class ResponseFormat(TypedDict):
    """The form of the reply."""

    __pydantic_config__ = _PASSED_ON  # type: ignore[misc]

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NotRequired[NamedSchema]


def _with_schema(value: ResponseFormat) -> ResponseFormat:
    if value["type"] == "json_schema" and "json_schema" not in value:
        raise ValueError('beside the type, "json_schema": {"name": …, "schema": …} is needed')
    return value


Format = Annotated[ResponseFormat, AfterValidator(_with_schema), AfterValidator(_encodable)]
"""OpenAI's `response_format`."""


# --- tools ---------------------------------------------------------------------------------------


def _object_schema(value: dict[str, Any]) -> dict[str, Any]:
    if value and value.get("type") != "object":
        raise ValueError('a JSON Schema of an object is needed: {"type": "object", "properties": {…}}')
    return value


ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class Function(TypedDict):
    """A function that the model may ask for. `parameters` is the JSON Schema of its arguments."""

    __pydantic_config__ = _PASSED_ON  # type: ignore[misc]

    name: ToolName
    description: NotRequired[str | None]
    parameters: NotRequired[Annotated[dict[str, Any], AfterValidator(_object_schema)]]
    strict: NotRequired[bool | None]


class FunctionTool(TypedDict):
    """A tool in OpenAI's form."""

    __pydantic_config__ = _PASSED_ON  # type: ignore[misc]

    type: Literal["function"]
    function: Function


def _each_once(value: list[FunctionTool]) -> list[FunctionTool]:
    times = Counter(tool["function"]["name"] for tool in value)
    twice = [name for name, count in times.items() if count > 1]
    if twice:
        raise ValueError(f"each tool needs a name of its own; {', '.join(twice)} comes more than once")
    return value


Tools = Annotated[
    list[FunctionTool],
    Field(min_length=1, max_length=128),
    AfterValidator(_each_once),
    AfterValidator(_encodable),
]
"""OpenAI's `tools`."""


class NamedFunction(TypedDict):
    """The name of a tool."""

    name: str


class NamedChoice(TypedDict):
    """The one tool that the model is to use."""

    type: Literal["function"]
    function: NamedFunction


def chosen_tool(choice: object) -> str | None:
    """The tool that a `tool_choice` names, if it names one."""
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def names_of(tools: list[Any] | None) -> list[str]:
    """The names of tools in OpenAI's form."""
    return [tool["function"]["name"] for tool in tools or ()]


def _choice(value: object, given: ValidationInfo) -> object:
    named = chosen_tool(value)
    is_named = isinstance(value, dict) and value.get("type") == "function" and named is not None
    if value not in {"auto", "none", "required"} if isinstance(value, str) else not is_named:
        raise ValueError('auto, none, required, or {"type": "function", "function": {"name": …}} is needed')
    tools = given.data.get("tools")
    if named is not None and tools is not None and named not in names_of(tools):
        raise ValueError(f"there is no tool of this name; there are {', '.join(names_of(tools))}")
    return value


ToolChoice = Annotated[
    Literal["auto", "none", "required"] | NamedChoice, BeforeValidator(_choice), AfterValidator(_encodable)
]
"""OpenAI's `tool_choice`."""


# --- extra ---------------------------------------------------------------------------------------

OF_THE_PORTAL = frozenset(
    {
        *("messages", "prompt", "stream", "stream_options", "n", "n_cmpl", "best_of", "echo", "user"),
        *("functions", "function_call", "max_completion_tokens", "n_predict", "num_predict"),
        *("max_new_tokens", "id_slot", "slot_id", "response_fields", "return_progress", "priority"),
        *("request_id", "api_key", "api_base", "base_url", "chat_template", "chat_template_kwargs"),
        *("fallbacks", "metadata", "store", "service_tier", "kv_transfer_params"),
        *("models", "route", "provider", "plugins", "preset", "web_search_options"),  # OpenRouter's
    }
)
"""Keys of a request that the portal sets itself, or that would change how many replies there are, how long
they may get, who is asked and at whose cost."""

OF_THEIR_OWN = frozenset(
    {
        *("temperature", "top_p", "max_tokens", "model", "stop", "seed", "frequency_penalty"),
        *("presence_penalty", "logit_bias", "tools", "tool_choice", "parallel_tool_calls"),
        *("response_format", "reasoning_effort", "extra"),
    }
)
"""Options that have a field of their own."""


def _extra(value: dict[str, Any]) -> dict[str, Any]:
    for key in value:
        if key in OF_THEIR_OWN:
            raise ValueError(f"{key} has a field of its own; give it there")
        if key in OF_THE_PORTAL:
            raise ValueError(f"{key} is set by the portal; leave it out")
        if _KEY.fullmatch(key) is None:
            raise ValueError(f"{key[:64]!r} is no name of an option")
    return value


Extra = Annotated[
    dict[str, Any], Field(max_length=MOST_EXTRA), AfterValidator(_extra), AfterValidator(_encodable)
]
"""What only some servers take, as they call it."""


def invalid(error: ValidationError) -> InvalidRequest:
    """What is wrong, by field, with something that was asked for."""
    problems = [
        {"field": ".".join(str(part) for part in found["loc"]), "problem": problem_in(found)}
        for found in error.errors(include_url=False, include_input=False)
    ]
    message = "; ".join(f"{problem['field']}: {problem['problem']}" for problem in problems[:5])
    return InvalidRequest(message, details=problems)


def problem_in(found: Mapping[str, Any]) -> str:
    """What one of pydantic's errors says is wrong."""
    return str(found["msg"]).removeprefix("Value error, ")
