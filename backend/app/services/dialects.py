"""What differs between those who speak OpenAI's chat completions: addresses, the key, and the fields they
take.

Sources of the facts: the providers' own pages, named in docs/providers.md.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any
from urllib.parse import quote, urlsplit

from app.services.catalog import ProviderKind

LOCAL: frozenset[ProviderKind] = frozenset({"compatible", "llamacpp", "vllm", "ollama", "localai"})
"""Kinds that are asked every few seconds how they are. The others are somebody else's service, for which
that would be rude: how they are is learnt from what they answer."""

OWN = LOCAL - {"compatible"}
"""Kinds that one runs oneself. Of `compatible` that is not known: hosted services are that too."""

OPENAI_FIELDS = frozenset(
    [
        "frequency_penalty",
        "logit_bias",
        "logprobs",
        "max_completion_tokens",
        "messages",
        "metadata",
        "modalities",
        "model",
        "n",
        "parallel_tool_calls",
        "prediction",
        "presence_penalty",
        "prompt_cache_key",
        "reasoning_effort",
        "response_format",
        "safety_identifier",
        "seed",
        "service_tier",
        "stop",
        "store",
        "stream",
        "stream_options",
        "temperature",
        "tool_choice",
        "tools",
        "top_logprobs",
        "top_p",
        "user",
        "verbosity",
        "web_search_options",
    ]
)
"""The fields of OpenAI's own; a request with another one is refused by those who check."""

_STRICT: frozenset[ProviderKind] = frozenset({"openai", "azure", "anthropic", "bedrock", "watsonx"})

# What a server answers for `owned_by` in /v1/models, which tells the kind where nobody has said it.
OWNERS: dict[str, str] = {"llamacpp": "llamacpp", "vllm": "vllm", "ollama": "library"}

# How a server is told not to think; each knows only its own way.
_NO_THINKING: dict[str, dict[str, Any]] = {
    "llamacpp": {"chat_template_kwargs": {"enable_thinking": False}},
    "vllm": {"chat_template_kwargs": {"enable_thinking": False}},
    "library": {"reasoning_effort": "none"},  # Ollama
}


def base(kind: ProviderKind, url: str) -> str:
    """What the paths of the API are below: the URL itself where it has a path, else `/v1`."""
    if kind == "azure":
        return f"{url}/openai/deployments"
    if kind == "bedrock" and not urlsplit(url).path:
        return f"{url}/openai/v1"
    if kind == "watsonx" and not urlsplit(url).path:
        return f"{url}/ml/gateway/v1"
    return url if urlsplit(url).path else f"{url}/v1"


@lru_cache(256)
def chat_url(kind: ProviderKind, url: str, model: str, api_version: str) -> str:
    """Where chat completions of a model are asked for."""
    return _url(kind, url, model, api_version, "chat/completions")


def embeddings_url(kind: ProviderKind, url: str, model: str, api_version: str) -> str:
    """Where embeddings of a model are asked for."""
    return _url(kind, url, model, api_version, "embeddings")


def _url(kind: ProviderKind, url: str, model: str, api_version: str, what: str) -> str:
    if kind == "azure":  # the deployment stands in the path
        return f"{base(kind, url)}/{quote(model, safe='')}/{what}?api-version={quote(api_version)}"
    return f"{base(kind, url)}/{what}"


def key_headers(kind: ProviderKind, key: str) -> dict[str, str]:
    """The headers that show a key."""
    if not key:
        return {}
    return {"api-key": key} if kind == "azure" else {"Authorization": f"Bearer {key}"}


def shape(
    kind: ProviderKind, body: dict[str, Any], *, omit: frozenset[str], asked: frozenset[str]
) -> dict[str, Any]:
    """The body as the kind takes it, without the fields in `omit`. `asked` are those that the request itself
    named: of two that exclude each other they stay."""
    if kind in _STRICT:
        body["max_completion_tokens"] = body.pop("max_tokens")
        body = {name: value for name, value in body.items() if name in OPENAI_FIELDS}
    if kind == "anthropic":
        _one_kind_of_sampling(body, asked)
    if omit:
        if "max_tokens" in omit:
            omit |= {"max_completion_tokens"}
        body = {name: value for name, value in body.items() if name not in omit}
    return body


def _one_kind_of_sampling(body: dict[str, Any], asked: frozenset[str]) -> None:
    """Newer models of Anthropic refuse a request with both `temperature` and `top_p`."""
    if "temperature" in body and "top_p" in body:
        body.pop("temperature" if "top_p" in asked and "temperature" not in asked else "top_p")


def is_strict(kind: ProviderKind) -> bool:
    """Whether it refuses fields that it does not know."""
    return kind in _STRICT


def without_thinking(server: str) -> dict[str, Any]:
    """What tells a server not to think, by its `owned_by`; nothing where there is no way."""
    return _NO_THINKING.get(server, {})
