"""The answer to a game's state: what the model says, and what it wants the game to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from app.events import Cancelled, Final
from app.logs import get_logger
from app.services.projects import Project

log = get_logger(__name__)


class Hint(msgspec.Struct, frozen=True, omit_defaults=True):
    """A hint for the player. `function_calls` are actions of the game, with arguments as the project's
    tools have them."""

    hint: str
    suggestion: str | None = None
    function_calls: list[dict[str, Any]] | None = None


def hint_of(ending: Final | Cancelled, project: Project) -> Hint:
    """The hint in a reply. A prompt may have told the model to answer with a JSON object of the same form:
    then that is it. Calls of unknown tools, or with arguments that are not as their schemas want, are left
    out."""
    calls = [_of_function(call) for call in ending.tool_calls] if isinstance(ending, Final) else []
    written = _written(ending.response)
    if written is None:
        return Hint(ending.response, None, _valid(calls, project) or None)
    more = written.get("function_calls")
    calls += [call for call in more if isinstance(call, dict)] if isinstance(more, list) else []
    suggestion = written.get("suggestion")
    return Hint(
        written["hint"],
        suggestion if isinstance(suggestion, str) else None,
        _valid(calls, project) or None,
    )


def _written(response: str) -> dict[str, Any] | None:
    """The hint that the model itself has written as JSON, also in a fenced block."""
    text = response.strip().removeprefix("```json").removeprefix("```").removesuffix("```").strip()
    if not text.startswith("{"):
        return None
    try:
        found = msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("hint"), str) else None


def _of_function(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call in OpenAI's form as the game wants it."""
    function = call.get("function") or {}
    try:
        arguments = msgspec.json.decode(function.get("arguments") or "{}")
    except (msgspec.MsgspecError, RecursionError):
        arguments = None
    return {"name": function.get("name"), "arguments": arguments}


def _valid(calls: list[dict[str, Any]], project: Project) -> list[dict[str, Any]]:
    found = []
    for call in calls:
        tool = project.tools.get(str(call.get("name")))
        arguments = call.get("arguments")
        if tool is None or not isinstance(arguments, dict) or not tool.validator.is_valid(arguments):
            log.info("a tool call of the model is left out", tool=str(call.get("name"))[:64])
            continue
        found.append({"name": call["name"], "arguments": arguments})
    return found
