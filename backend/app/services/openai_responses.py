"""The answers of a turn in OpenAI's Responses API: whole, and as its events.

The id of a response is its turn's, so nothing more is stored than the turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from app.errors import NotFound, PortalError, openai_body
from app.events import Cancelled, Ending, Final, Restarted, Thinking, Token, TurnEvent, Usage
from app.services.openai_chat import BEGUN_AGAIN, finish_reason
from app.services.turns import Numbered, Turn, answer_of

PREFIX = "resp_"

Kind = Literal["reasoning", "message"]
Json = dict[str, Any]

_encode = msgspec.json.Encoder().encode


def response_id(turn_id: str) -> str:
    """The id of the response that a turn makes."""
    return PREFIX + turn_id


def turn_id_of(response: str) -> str:
    """The turn that makes a response. Raises `NotFound` for what is no id of a response."""
    if not response.startswith(PREFIX):
        raise NotFound("There is no such response.")
    return response.removeprefix(PREFIX)


@dataclass(frozen=True, slots=True)
class Frame:
    """What a response tells beside what the model says. `options` are those of the request, `model` the one
    to name where it is not known which one answered."""

    turn: Turn
    options: Mapping[str, Any]
    model: str
    instructions: str | None = None
    previous: str | None = None

    def response(self, status: str, output: Sequence[Json] = (), **rest: Any) -> Json:
        """The response, its `output` being so far this."""
        turn, options, name = self.turn, self.options, self.turn.session.session_id
        return {
            "id": response_id(turn.id),
            "object": "response",
            "created_at": int(turn.row.created_at),
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": self.instructions,
            "max_output_tokens": options.get("max_tokens"),
            "model": turn.model or self.model,
            "output": list(output),
            "parallel_tool_calls": options.get("parallel_tool_calls", True),
            "previous_response_id": self.previous,
            "conversation": {"id": name} if name else None,
            "reasoning": {"effort": options.get("reasoning_effort"), "summary": None},
            "store": bool(name),
            "temperature": options.get("temperature"),
            "text": {"format": _flat(options.get("response_format"), "json_schema") or {"type": "text"}},
            "tool_choice": _flat(options.get("tool_choice"), "function") or "auto",
            "tools": [_flat(tool, "function") for tool in options.get("tools") or ()],
            "top_p": options.get("top_p"),
            "truncation": "auto",
            "usage": None,
            "metadata": {},
            **rest,
        }

    def ended(self, ending: Ending, output: Sequence[Json] | None = None) -> Json:
        """The response of a turn that has ended, with the `output` that was told of, if it was."""
        try:
            answer = answer_of(ending)
        except PortalError as error:
            return self.failed(error, output or ())
        items = list(items_of(self.turn, answer)) if output is None else output
        usage = response_usage(answer.usage)
        if isinstance(answer, Cancelled):
            return self.response("cancelled", items, usage=usage)
        if finish_reason(answer) == "length":
            details = {"reason": "max_output_tokens"}
            return self.response("incomplete", items, usage=usage, incomplete_details=details)
        return self.response("completed", items, usage=usage)

    def failed(self, error: PortalError, output: Sequence[Json] = ()) -> Json:
        """The response of a turn that has failed."""
        told = openai_body(error)["error"]
        known = {429: "rate_limit_exceeded", 422: "invalid_prompt"}
        code = known.get(error.status, "server_error")
        return self.response("failed", output, error={"code": code, "message": told["message"]})

    def now(self) -> Json:
        """The response as it is now."""
        ending = self.turn.ending
        return self.response("in_progress") if ending is None else self.ended(ending)


def _flat(given: Any, inner: str) -> Any:
    """A tool, choice or format without the object that chat completions put its fields in."""
    if isinstance(given, Mapping) and isinstance(given.get(inner), Mapping):
        return {"type": given["type"], **given[inner]}
    return given


def response_usage(usage: Usage | None) -> Json:
    """The usage as the Responses API tells it."""
    usage = usage or Usage()
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


# --- output --------------------------------------------------------------------------------------


def items_of(turn: Turn, answer: Final | Cancelled) -> Iterator[Json]:
    """All that was said, item by item."""
    calls = answer.tool_calls if isinstance(answer, Final) else []
    is_whole = isinstance(answer, Final) and finish_reason(answer) != "length"
    status = "completed" if is_whole else "incomplete"
    if turn.reasoning:
        yield _item(turn, "reasoning", turn.reasoning, "completed")
    if answer.response or not calls:
        yield _item(turn, "message", answer.response, status)
    for number, call in enumerate(calls):
        yield _call_item(turn, number, call, "completed")


def _item(turn: Turn, kind: Kind, text: str | None, status: str) -> Json:
    """The item of a text; without one it has only begun."""
    content = [] if text is None else [_part(kind, text)]
    if kind == "reasoning":
        return {"id": f"rs_{turn.id}", "type": kind, "summary": [], "content": content, "status": status}
    return {
        "id": f"msg_{turn.id}",
        "type": kind,
        "role": "assistant",
        "content": content,
        "status": status,
    }


def _part(kind: Kind, text: str) -> Json:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call_item(turn: Turn, number: int, call: Mapping[str, Any], status: str) -> Json:
    return {
        "id": f"fc_{turn.id}_{number}",
        "type": "function_call",
        "call_id": call["id"],
        "name": call["function"]["name"],
        "arguments": call["function"]["arguments"] if status == "completed" else "",
        "status": status,
    }


# --- as events -----------------------------------------------------------------------------------

_TEXT_EVENTS: dict[Kind, tuple[str, Json]] = {
    "reasoning": ("response.reasoning_text", {}),
    "message": ("response.output_text", {"logprobs": []}),
}


class ResponseEvents:
    """The events of a turn as those of a response."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        self._number = 0
        self._output: list[Json] = []
        self._kind: Kind | None = None
        self._texts: list[str] = []
        self._is_over = False

    def encode(self, batch: Sequence[Numbered]) -> bytes:
        """The server-sent events for these."""
        return b"".join(told for item in batch if not self._is_over for told in self._events(item.event))

    def _events(self, event: TurnEvent) -> Iterator[bytes]:
        if isinstance(event, Token):
            yield from self._text("message", event.content)
        elif isinstance(event, Thinking):
            yield from self._text("reasoning", event.content)
        elif isinstance(event, Ending):
            self._is_over = True
            yield from self._begin()
            yield from self._end(event)
        elif isinstance(event, Restarted) and self._number:
            self._is_over = True
            yield self._tell("response.failed", response=self._frame.failed(BEGUN_AGAIN))

    def _tell(self, type_: str, **fields: Any) -> bytes:
        body = _encode({"type": type_, "sequence_number": self._number, **fields})
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (type_.encode(), body)

    def _begin(self) -> Iterator[bytes]:
        if not self._number:
            response = self._frame.response("in_progress")
            yield self._tell("response.created", response=response)
            yield self._tell("response.in_progress", response=response)

    def _text(self, kind: Kind, piece: str) -> Iterator[bytes]:
        if self._kind != kind:
            yield from self._begin()
            yield from self._close("completed")
            yield from self._open(kind)
        self._texts.append(piece)
        name, more = _TEXT_EVENTS[kind]
        yield self._tell(f"{name}.delta", **self._place, delta=piece, **more)

    @property
    def _place(self) -> Json:
        """Where the text that is told of stands."""
        assert self._kind is not None
        item = _item(self._frame.turn, self._kind, None, "in_progress")
        return {"item_id": item["id"], "output_index": len(self._output), "content_index": 0}

    def _open(self, kind: Kind) -> Iterator[bytes]:
        self._kind, self._texts = kind, []
        item = _item(self._frame.turn, kind, None, "in_progress")
        yield self._tell("response.output_item.added", output_index=len(self._output), item=item)
        yield self._tell("response.content_part.added", **self._place, part=_part(kind, ""))

    def _close(self, status: str) -> Iterator[bytes]:
        kind = self._kind
        if kind is None:
            return
        text = "".join(self._texts)
        name, more = _TEXT_EVENTS[kind]
        yield self._tell(f"{name}.done", **self._place, text=text, **more)
        yield self._tell("response.content_part.done", **self._place, part=_part(kind, text))
        yield self._add(_item(self._frame.turn, kind, text, status))
        self._kind = None

    def _add(self, item: Json) -> bytes:
        """An item is whole."""
        told = self._tell("response.output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)
        return told

    def _end(self, ending: Ending) -> Iterator[bytes]:
        """The rest of the output, and the end."""
        is_whole = isinstance(ending, Final) and finish_reason(ending) != "length"
        calls = ending.tool_calls if isinstance(ending, Final) else []
        is_silent = isinstance(ending, Final | Cancelled) and not ending.response and not calls
        if is_silent:
            yield from self._close("completed")
            yield from self._open("message")
        yield from self._close("completed" if is_whole else "incomplete")
        for number, call in enumerate(calls):
            yield from self._call(number, call)
        response = self._frame.ended(ending, self._output)
        # There is no event for a response that was cancelled: it is incomplete for who follows it.
        name = "incomplete" if response["status"] == "cancelled" else response["status"]
        yield self._tell(f"response.{name}", response=response)

    def _call(self, number: int, call: Mapping[str, Any]) -> Iterator[bytes]:
        turn, index, arguments = self._frame.turn, len(self._output), call["function"]["arguments"]
        item = _call_item(turn, number, call, "in_progress")
        place = {"item_id": item["id"], "output_index": index}
        yield self._tell("response.output_item.added", output_index=index, item=item)
        yield self._tell("response.function_call_arguments.delta", **place, delta=arguments)
        yield self._tell(
            "response.function_call_arguments.done", **place, name=item["name"], arguments=arguments
        )
        yield self._add(_call_item(turn, number, call, "completed"))
