"""Which models there are beside those of `LLM_SERVER_URL`, who serves them, and what they cost:
`models.toml`.

    [providers.openai]
    kind = "openai"                       # the dialect that is spoken; `compatible` when left out
    key = { env = "OPENAI_API_KEY" }      # or { file = "openai.key" }, relative to .env, or "sk-…"
    headers = { OpenAI-Organization = "org-1" }
    own_keys = true                       # a session may bring a key of its own

    [models."gpt-4o*"]                    # a pattern, or a name that clients ask for
    provider = "openai"                   # LLM_SERVER_URL when left out
    price = { input = 2.50, cached = 1.25, output = 10.00, gpu_second = 0.0 }

    [models.clever]
    provider = "openai"
    id = "gpt-4o-2024-11-20"              # the provider's name for it; its own name when left out
    aliases = ["smart"]
    fallbacks = ["small"]                 # in this order, where no server of the model can answer
    context = 128000
    omit = ["top_p"]                      # what the model refuses to be told
    options = { temperature = 0.2 }       # where a request does not say otherwise

A name or an alias goes before what `LLM_SERVER_URL` serves, and that before patterns, of which the first that
matches counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    TypeAdapter,
    model_validator,
)

from app.access import matches
from app.config import Settings, http_url
from app.errors import InvalidRequest
from app.events import GenerationOptions
from app.files import read_toml
from app.services.prices import FREE, Price

ProviderKind = Literal[
    "compatible",
    "llamacpp",
    "vllm",
    "ollama",
    "localai",
    "openai",
    "azure",
    "anthropic",
    "bedrock",
    "watsonx",
]
"""The dialects of OpenAI's chat completions that are known apart; `compatible` is any other."""

DEFAULT = "default"
"""The provider that `LLM_SERVER_URL` names, and the model that it serves first."""

URLS = {"openai": "https://api.openai.com/v1", "anthropic": "https://api.anthropic.com/v1"}
"""Of the kinds that are served in one place."""

IBM_TOKENS = "https://iam.cloud.ibm.com/identity/token"

_NAME = r"^[a-z0-9][a-z0-9_-]{0,63}$"
_HEADER = r"^[A-Za-z0-9-]{1,64}$"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SecretFrom(_Strict):
    """Where a secret is kept: an environment variable (or a line of `.env`), or a file with nothing else."""

    env: str | None = None
    file: str | None = None

    @model_validator(mode="after")
    def _one(self) -> SecretFrom:
        if (self.env is None) == (self.file is None):
            raise ValueError("give either env or file")
        return self


Secret = SecretStr | SecretFrom


def _urls(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _options(value: Any) -> Any:
    unknown = sorted(set(value) - set(GenerationOptions.model_fields)) if isinstance(value, Mapping) else []
    if unknown:
        raise ValueError(f"there is no option {', '.join(unknown)}")
    return value


class Provider(_Strict):
    """Who serves models: servers that are alike, all reached with one key."""

    kind: ProviderKind = "compatible"
    url: Annotated[tuple[Annotated[str, AfterValidator(http_url)], ...], BeforeValidator(_urls)] = ()
    key: Secret = SecretStr("")
    headers: dict[Annotated[str, Field(pattern=_HEADER)], Secret] = {}
    own_keys: bool = False
    concurrency: Annotated[int | None, Field(ge=1)] = None
    api_version: str = "2024-10-21"
    token_url: Annotated[str, AfterValidator(http_url)] = IBM_TOKENS

    @model_validator(mode="after")
    def _somewhere(self) -> Provider:
        if not self.urls:
            raise ValueError(f"url: where is it? Only {' and '.join(URLS)} are known")
        if len(set(self.urls)) < len(self.urls):
            raise ValueError("url: one server is named twice")
        return self

    @property
    def urls(self) -> tuple[str, ...]:
        """Where its servers are, without a slash at the end."""
        return self.url or ((URLS[self.kind],) if self.kind in URLS else ())


class Model(_Strict):
    """A model by the name that clients ask for."""

    provider: str = DEFAULT
    id: str | None = None
    aliases: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()
    context: Annotated[int | None, Field(ge=64)] = None
    omit: frozenset[str] = frozenset()
    options: Annotated[GenerationOptions, BeforeValidator(_options)] = GenerationOptions()
    price: Price | None = None


PLAIN = Model()
"""A model that the file says nothing about."""


def is_pattern(name: str) -> bool:
    """Whether a name of the file stands for several models."""
    return any(mark in name for mark in "*?[")


class _File(_Strict):
    providers: dict[Annotated[str, Field(pattern=_NAME)], Provider] = {}
    models: dict[str, Model] = {}

    @model_validator(mode="after")
    def _fits_together(self) -> _File:
        problem = next(self._problems(), None)
        if problem is not None:
            raise ValueError(problem)
        return self

    def _problems(self) -> Iterator[str]:
        if DEFAULT in self.providers:
            yield f"providers.{DEFAULT} is LLM_SERVER_URL; give this one another name"
        names = [*self.models, *(alias for model in self.models.values() for alias in model.aliases)]
        for name, model in self.models.items():
            if model.provider != DEFAULT and model.provider not in self.providers:
                yield f"models.{name}.provider: there is no [providers.{model.provider}]"
            if is_pattern(name) and (model.id or model.aliases):
                yield f"models.{name}: a pattern stands for several models and has no id or aliases"
            if any(is_pattern(alias) for alias in model.aliases):
                yield f"models.{name}.aliases: an alias is a name, not a pattern"
        twice = sorted({name for name in names if names.count(name) > 1} | ({DEFAULT} & set(names)))
        if twice:
            yield f"models.{twice[0]}: this name has a meaning already"


class Catalog:
    """What `models.toml` says."""

    def __init__(self, file: Path) -> None:
        """Reads `file`, which need not exist. Raises `InvalidRequest` when it is wrong."""
        found = read_toml(file, TypeAdapter(_File))
        self.file = file.name
        self.providers: Mapping[str, Provider] = found.providers
        self.models: Mapping[str, Model] = found.models
        self._canonical = {name: name for name in found.models if not is_pattern(name)}
        for name, model in found.models.items():
            self._canonical.update(dict.fromkeys(model.aliases, name))
        self._patterns = {name: model for name, model in found.models.items() if is_pattern(name)}

    def canonical(self, name: str) -> str:
        """The name that an alias stands for; any other name as it is."""
        return self._canonical.get(name, name)

    def has(self, name: str) -> bool:
        """Whether the file has an entry for this canonical name alone."""
        return name in self._canonical

    def model(self, name: str) -> Model:
        """What is said of the model with this canonical name."""
        known = self.models.get(name)
        if known is None or name in self._patterns:
            known = next(
                (model for pattern, model in self._patterns.items() if matches(name, (pattern,))), PLAIN
            )
        return known

    def price(self, name: str) -> Price:
        """What a model costs: nothing where no entry that has a price matches, as a local one does."""
        exact = self.models.get(name)
        if exact is not None and exact.price is not None:
            return exact.price
        prices = (model.price for pattern, model in self._patterns.items() if matches(name, (pattern,)))
        return next(filter(None, prices), FREE)


def secret(settings: Settings, where: str, given: Secret) -> str:
    """A secret of the file. Raises `InvalidRequest`, with `where` in it, when it is not where the file
    says."""
    if isinstance(given, SecretStr):
        return given.get_secret_value()
    found = settings.variable(given.env) if given.env else settings.secret_file(given.file or "")
    if not found.strip():
        place = f"the variable {given.env}" if given.env else f"the file {given.file}"
        raise InvalidRequest(f"{where}: there is nothing in {place}")
    return found
