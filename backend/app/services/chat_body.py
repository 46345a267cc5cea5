"""What is sent to an LLM server: the body of a chat completion, made of settings, the model and the
request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.config import Settings
from app.errors import InvalidRequest
from app.events import GenerationOptions
from app.services.catalog import Model
from app.services.dialects import is_strict, shape, without_thinking
from app.services.llm_server import LLMServer, Message, ModelInfo
from app.services.prompts import with_system
from app.services.tools import ConstrainedReply, constrained, instructions


def chat_body(
    settings: Settings,
    server: LLMServer,
    model: ModelInfo,
    entry: Model,
    messages: Sequence[Message],
    options: GenerationOptions,
) -> tuple[dict[str, Any], ConstrainedReply | None]:
    """The body as the server takes it, and who reads a reply that is made of tool calls. Raises
    `InvalidRequest` for what the server or the model is known not to take."""
    if entry.options.model_fields_set:
        options = above(entry.options, options)
    _check_taken(model.server, options)
    if model.vision is False and any(_has_image(message) for message in messages):
        raise InvalidRequest("messages: this model takes no images")
    tools = None
    if options.tools:
        messages, options, tools = _with_tools(settings, model, messages, options)
    body = _body(settings, model, messages, options)
    kind = server.upstream.kind
    if entry.omit or is_strict(kind):
        body = shape(kind, body, omit=entry.omit, asked=frozenset(options.model_fields_set))
    return body, tools


def above(defaults: GenerationOptions, options: GenerationOptions) -> GenerationOptions:
    """The options, and what they leave open from the defaults, also within `extra`. Raises
    `InvalidRequest` when they do not fit together."""
    first, then = defaults.given(), options.given()
    if "extra" in first and "extra" in then:
        then["extra"] = {**first["extra"], **then["extra"]}
    return GenerationOptions.of({**first, **then})


def _with_tools(
    settings: Settings, model: ModelInfo, messages: Sequence[Message], options: GenerationOptions
) -> tuple[Sequence[Message], GenerationOptions, ConstrainedReply | None]:
    """The request as `LLM_TOOL_MODE` wants tools to be asked for, and who reads the reply."""
    mode = settings.llm_tool_mode
    if mode == "off":
        return messages, options.model_copy(update={"tools": None, "tool_choice": None}), None
    if mode == "native" or (mode == "auto" and model.knows_tools):
        return messages, options, None
    told = with_system(messages, after=instructions(options.tools or ()))
    return told, constrained(options), ConstrainedReply()


def _body(
    settings: Settings, model: ModelInfo, messages: Sequence[Message], options: GenerationOptions
) -> dict[str, Any]:
    given = options.given()
    extra = given.pop("extra", {})
    return {
        "temperature": settings.llm_temperature,
        "top_p": settings.llm_top_p,
        "max_tokens": settings.llm_max_tokens,
        **given,
        **_thinking(model.server, options.reasoning_effort, hidden=settings.llm_skip_thinking),
        **extra,
        "model": model.id,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _thinking(server: str, effort: str | None, *, hidden: bool) -> dict[str, Any]:
    """How a server is told how much to think: as much as was asked for, else not at all where it is hidden.
    llama.cpp reads an effort only as a variable of the chat template."""
    if effort is not None and effort != "none":
        return {"chat_template_kwargs": {"reasoning_effort": effort}} if server == "llamacpp" else {}
    return without_thinking(server) if hidden or effort is not None else {}


def _check_taken(server: str, options: GenerationOptions) -> None:
    """Raises `InvalidRequest` for what a server is known to leave out without a word."""
    if server != "library":  # Ollama
        return
    if options.logit_bias is not None:
        raise InvalidRequest("logit_bias: Ollama does not take it; leave it out")
    if options.tool_choice not in {None, "auto"} if isinstance(options.tool_choice, str | None) else True:
        raise InvalidRequest("tool_choice: Ollama always chooses by itself; leave it out")


def _has_image(message: Message) -> bool:
    parts = message.get("content")
    return isinstance(parts, list) and any(
        isinstance(part, dict) and part.get("type") == "image_url" for part in parts
    )
