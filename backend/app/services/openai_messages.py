"""What is asked for in OpenAI's forms: chat messages, and the items of its Responses API."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from app.errors import InvalidRequest

Given = Mapping[str, Any]
"""A message, item, part or tool as it came."""

SYSTEM = ("system", "developer")
"""The roles of instructions. OpenAI's newer models call them developer's; chat templates know only the
system's."""

ROLES = (*SYSTEM, "user", "assistant", "tool")
TEXT_PARTS = ("text", "input_text", "output_text")

NOT_IN_SESSION = "a session takes a new message of the user; leave X-Session-Id out"
NOT_STORED = "what is stored takes a new message of the user; send store: false"
"""What to do about what no session can take: results of tools, whose calls it does not keep, and pictures."""


# --- chat messages -------------------------------------------------------------------------------


def chat_messages(given: Sequence[Given]) -> list[dict[str, Any]]:
    """Chat messages as LLM servers and their templates know them: text in parts is joined, instructions are
    the system's. Raises `InvalidRequest`."""
    return [_chat_message(message, f"messages.{number}") for number, message in enumerate(given)]


def _chat_message(message: Given, where: str) -> dict[str, Any]:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise InvalidRequest(f"{where}.role: one of {', '.join(ROLES)} is needed")
    if isinstance(content, list):
        content = _joined([_chat_part(part, f"{where}.content") for part in content])
    elif content is None and role == "assistant":
        return dict(message)
    elif not isinstance(content, str):
        raise InvalidRequest(f"{where}.content: a text, or a list of parts, is needed")
    return {**message, "role": "system" if role in SYSTEM else role, "content": content}


def _chat_part(part: Any, where: str) -> Given:
    """A part of a message in the form of chat messages. Raises `InvalidRequest`."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in TEXT_PARTS and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "refusal" and isinstance(part.get("refusal"), str):
        return {"type": "text", "text": part["refusal"]}
    if kind == "input_image" and isinstance(part.get("image_url"), str):
        return {"type": "image_url", "image_url": {"url": part["image_url"]}}
    if kind == "image_url":
        return dict(part)
    raise InvalidRequest(f"{where}: parts of text and image_url are taken, not {str(kind)[:64]!r}")


def _joined(parts: Sequence[Given]) -> str | list[Given]:
    """The text of parts that are nothing else; many chat templates take no parts."""
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return list(parts)


def new_message(messages: Sequence[Given], field: str, otherwise: str) -> tuple[str | None, str]:
    """The system prompt for a new session, if these chat messages begin with one, and the new message of the
    user: their last. Raises `InvalidRequest`, which names the `field` and says what to do `otherwise`."""
    last = messages[-1]
    if last["role"] != "user":
        raise InvalidRequest(f"{field}: the last message must be the user's: {otherwise}")
    if not isinstance(last["content"], str):
        raise InvalidRequest(f"{field}: sessions keep text only: {otherwise}")
    prompt = []
    for message in messages:
        if message["role"] != "system" or not isinstance(message["content"], str):
            break
        prompt.append(message["content"])
    return "\n\n".join(prompt) if prompt else None, last["content"]


# --- the Responses API ---------------------------------------------------------------------------


def input_messages(given: str | Sequence[Given], instructions: str | None) -> list[dict[str, Any]]:
    """The chat messages that instructions and input make. Raises `InvalidRequest`."""
    system = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(given, str):
        return [*system, {"role": "user", "content": given}]
    messages = [*system]
    for number, item in enumerate(given):
        _add_item(messages, item, f"input.{number}")
    return messages


def _add_item(messages: list[dict[str, Any]], item: Given, where: str) -> None:
    kind = item.get("type", "message")
    if kind == "message":
        messages.append(_chat_message({"role": item.get("role"), "content": item.get("content")}, where))
    elif kind == "function_call":
        if not messages or messages[-1].get("role") != "assistant":
            messages.append({"role": "assistant", "content": None})
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        result = {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
        messages.append(_chat_message(result, where))
    elif kind != "reasoning":  # which is not sent to a model again
        raise InvalidRequest(
            f"{where}.type: message, function_call, function_call_output and reasoning are taken, "
            f"not {str(kind)[:64]!r}"
        )


def is_new_message(messages: Sequence[Given]) -> bool:
    """Whether these chat messages are one of the user's, after instructions at most: nothing is lost where
    only the last one is kept."""
    return [message["role"] for message in messages if message["role"] != "system"] == ["user"]


def input_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a generation, from fields of the Responses API. Raises `InvalidRequest`."""
    options = {name: given.get(name) for name in ("model", "temperature", "top_p", "parallel_tool_calls")}
    options["max_tokens"] = given.get("max_output_tokens")
    options["reasoning_effort"] = (given.get("reasoning") or {}).get("effort")
    options["tools"] = list(_tools(given.get("tools") or ())) or None
    choice = given.get("tool_choice")
    if isinstance(choice, dict) and choice.get("type") == "function":
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    options["tool_choice"] = None if options["tools"] is None and choice in ("auto", "none") else choice
    options["response_format"] = _response_format((given.get("text") or {}).get("format"))
    return {name: value for name, value in options.items() if value is not None}


def _tools(given: Sequence[Given]) -> Iterator[dict[str, Any]]:
    for number, tool in enumerate(given):
        if tool.get("type") != "function":
            raise InvalidRequest(f"tools.{number}.type: only function is taken: nothing is run here")
        names = ("name", "description", "parameters", "strict")
        function = {name: tool[name] for name in names if tool.get(name) is not None}
        yield {"type": "function", "function": function}


def _response_format(given: Given | None) -> Given | None:
    if given is None or given.get("type") != "json_schema":
        return given
    names = ("name", "schema", "strict", "description")
    return {"type": "json_schema", "json_schema": {name: given[name] for name in names if name in given}}
