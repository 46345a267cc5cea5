"""Settings: the only place that reads the environment.

Values come from the environment first, then from the `.env` file, then from the defaults here.
`.env.example` is generated from this class, so its descriptions are the documentation.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import textwrap
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from importlib.util import find_spec
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import SplitResult, unquote, urlsplit

from dotenv import dotenv_values
from pydantic import (
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

BACKEND_DIR = Path(__file__).resolve().parent.parent
DEFAULT_ENV_FILE = BACKEND_DIR / ".env"
EXAMPLE_FILE = BACKEND_DIR / ".env.example"

DEFAULT_LLM_SERVER_URL = "http://localhost:8080"
MIN_SECRET_CHARS = 32
HOST = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?")
KNOWN_SECRETS = (
    "change",
    "secret",
    "example",
    "placeholder",
    "default",
    "password",
    "0123456789",
    "aaaaaaaa",
)


class WrongSettings(Exception):
    """What is wrong with settings, as pairs of a setting's name, empty where it is about none, and a problem.
    It does not tell their values."""

    def __init__(self, env_file: Path, problems: Sequence[tuple[str, str]]) -> None:
        super().__init__(f"The settings in {env_file} are wrong:")
        self._problems = problems

    def lines(self, flags: Mapping[str, str] | None = None) -> list[str]:
        """A line for each problem; a setting that `flags` has is called what it is called there."""
        names = flags or {}
        return [
            f"{names.get(setting, setting.upper())}: {problem}" if setting else problem
            for setting, problem in self._problems
        ]


def _heading(title: str) -> dict[str, Any]:
    return {"section": title}


class Settings(BaseSettings):
    """Everything that can be set. Names are those of the environment, in lower case."""

    model_config = SettingsConfigDict(
        env_file=None, extra="ignore", frozen=True, env_ignore_empty=True, hide_input_in_errors=True
    )

    llm_server_url: str = Field(
        DEFAULT_LLM_SERVER_URL,
        description="The OpenAI-compatible LLM server (llama.cpp, vLLM, Ollama, LocalAI, OpenAI), "
        "with or without /v1. Several that serve the same model, separated by commas, are a pool.",
        json_schema_extra=_heading("LLM server"),
    )
    llm_api_key: SecretStr = Field(SecretStr(""), description="The key for that server, if it wants one.")
    llm_model: str = Field(
        "default", description="The model to ask for. `default` is the first one that the server serves."
    )
    llm_timeout: float = Field(300, gt=0, description="Longest time for one whole reply, in seconds.")
    llm_connect_timeout: float = Field(5, gt=0, description="Longest time to connect, in seconds.")
    llm_first_token_timeout: float = Field(
        120,
        gt=0,
        description="Longest time from the request to the first piece of the reply, in seconds. "
        "Reading a long prompt on a small machine counts here.",
    )
    llm_idle_timeout: float = Field(60, gt=0, description="Longest silence within a reply, in seconds.")
    llm_temperature: float = Field(0.6, ge=0, le=2, description="Sampling temperature; 0 is greedy.")
    llm_top_p: float = Field(0.9, gt=0, le=1, description="Nucleus sampling.")
    llm_max_tokens: int = Field(512, ge=1, description="Longest reply, in tokens.")
    llm_skip_thinking: bool = Field(
        True,
        description="Switch a model's thinking off where the server can, and leave out what comes all "
        "the same. With false it is streamed as `thinking` events, apart from the reply.",
    )
    llm_tool_mode: Literal["auto", "native", "constrained", "off"] = Field(
        "auto",
        description="How a model is asked for tool calls: native (the server's own way), constrained (as "
        "JSON that the server is made to keep to), off (not at all), or auto: native, and constrained "
        "where llama.cpp says that the model's template knows no tools.",
    )
    llm_max_history_tokens: int = Field(
        10000,
        ge=64,
        description="Most tokens of history sent with a message. The server's own context, less "
        "LLM_MAX_TOKENS, is the other bound; the smaller one holds.",
    )
    llm_max_history_messages: int = Field(
        0, ge=0, description="Most messages of history sent with a message; 0 is no bound."
    )
    llm_history_summary: int = Field(
        0,
        ge=0,
        description="Longest summary of what is no longer sent, in tokens: the model writes it in the "
        "background, and reads it with each message. 0 is none.",
    )
    llm_max_concurrency: int = Field(
        8, ge=1, description="Most generations at once at each server. For llama.cpp: its number of slots."
    )
    llm_max_queue: int = Field(
        1000, ge=0, description="Most generations that wait for a place; further ones are refused."
    )

    llm_cache_mb: int = Field(
        0,
        ge=0,
        description="Memory for answers that are given again to the very same question of the same person at "
        "temperature 0, without asking the LLM server, in MiB. 0: none are kept.",
    )

    database_url: str = Field(
        "sqlite:///portal.db",
        description="Where everything is stored: sqlite:///FILE (a relative file lies beside this "
        ".env file) or postgresql://user:password@host/name.",
        json_schema_extra=_heading("Database"),
    )
    database_auto_migrate: bool = Field(
        True,
        description="Bring the database's schema up to date, at start and with commands such as `invite`. "
        "With false they refuse to work with another schema than their own.",
    )

    secret_key: SecretStr = Field(
        SecretStr(""),
        description=f"Signs access tokens; at least {MIN_SECRET_CHARS} random characters (try: "
        'python -c "import secrets; print(secrets.token_urlsafe(48))"). '
        "Left empty, a server on loopback makes one for the time it runs.",
        json_schema_extra=_heading("Accounts"),
    )
    secret_key_previous: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (),
        description="Earlier values of SECRET_KEY, separated by commas: what they signed is good until it "
        "runs out. Put the old one here when you change it, and take it out a month later.",
    )
    registration: Literal["open", "invite", "closed"] = Field(
        "open",
        description="Who may make an account: everybody, whoever was invited, or nobody but with a link that "
        "`./setup_llm.sh invite` makes on this host.",
    )
    default_role: str = Field(
        "author", description="The role of accounts that are made without an invitation."
    )
    roles_file: str = Field(
        "roles.toml",
        description="A file with roles of your own (docs/access.md); relative to this .env file. It need "
        "not exist.",
    )
    access_token_minutes: int = Field(
        30, ge=1, description="How long an access token is good for, in minutes; refresh tokens get new ones."
    )
    refresh_token_days: int = Field(
        30, ge=1, description="How long a sign-in lasts that nobody uses, in days."
    )
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Addresses of reverse proxies in front of the portal, separated by commas. Only what "
        "comes from them is believed when it names another client's address.",
    )
    max_request_bytes: int = Field(
        8_000_000, ge=1024, description="Largest body of a request over HTTP, in bytes."
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Origins of other web pages that may call the portal, separated by commas."
    )

    outbound_allow: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Hosts and networks that are not public and may all the same be sent to, where somebody "
        "gives the portal a URL; separated by commas: hooks.internal, 10.1.0.0/16.",
    )

    rate_limit_per_hour: int = Field(
        100,
        ge=0,
        description="Messages of one person in any 60 minutes, over all doors, keys and sessions; 0 is no "
        "limit. Roles, and limits set for somebody, go before it.",
        json_schema_extra=_heading("Limits"),
    )
    rate_limit_session_per_minute: int = Field(
        20, ge=0, description="Messages in any minute of one session, not over MQTT; 0 is no limit."
    )
    daily_token_budget: int = Field(
        0, ge=0, description="Tokens that one person may use a day (UTC); 0 is no limit."
    )
    max_turns_per_user: int = Field(
        100,
        ge=0,
        description="Turns of one owner that wait or run at once; further ones are refused. 0 is no limit.",
    )
    alert_percent: Annotated[tuple[int, ...], NoDecode] = Field(
        (80, 100), description="Parts of a budget, in percent, at which an alert is raised."
    )
    alert_webhook_url: SecretStr = Field(
        SecretStr(""),
        description="Where alerts are posted as JSON (docs/operations.md): an http or https URL. Empty: "
        "nowhere.",
    )
    models_file: str = Field(
        "models.toml",
        description="A file with providers of models, and the models' names, prices and fallbacks "
        "(docs/providers.md); relative to this .env file. It need not exist.",
    )
    redis_url: str = Field(
        "",
        description="redis://host:port/number, where several processes count limits and budgets together and "
        "tell each other what happens. Empty: each process counts for itself, and events go through "
        "PostgreSQL where that is the database.",
    )

    mqtt_broker_url: str = Field(
        "",
        description="The MQTT broker: mqtt://, mqtts://, ws:// or wss://host:port. Empty, or none: no MQTT.",
        json_schema_extra=_heading("MQTT"),
    )
    mqtt_username: str = Field("", description="The portal's user name at the broker.")
    mqtt_password: SecretStr = Field(SecretStr(""), description="And its password.")
    mqtt_projects: Annotated[tuple[str, ...], NoDecode] = Field(
        ("maze", "driving", "bloodcell", "racing", "prompt_portal", "general"),
        description="Projects to serve, separated by commas or spaces: the first level of every topic.",
    )
    projects_file: str = Field(
        "projects.toml",
        description="A file with projects of your own (docs/operations.md): prompts, tools, limits; relative "
        "to this .env file. It need not exist.",
    )
    mqtt_anonymous: Literal["allow", "deny"] | None = Field(
        None,
        description="Whether messages without a token are answered: allow or deny. Left empty, they are "
        "only with a broker on loopback.",
    )
    mqtt_acl: Literal["none", "mosquitto", "external"] = Field(
        "none",
        description="Who keeps MQTT devices to their own topics. `none`: nobody, so there are no devices. "
        "`mosquitto`: the portal writes their rights into Mosquitto's dynamic security plugin, as "
        "MQTT_USERNAME. `external`: the broker itself, as EMQX with tokens (docs/access.md).",
    )

    home_assistant_discovery: bool = Field(
        False,
        description="Whether each project shows itself to Home Assistant, under the topic homeassistant/: "
        "its state, queue and model, and an entity to send messages to.",
    )

    instance: str = Field(
        "",
        description="This server's name among those that share a database; after a restart it takes up its "
        "own turns at once. Left empty: host name and port.",
        json_schema_extra=_heading("Running"),
    )
    drain_timeout: float = Field(
        30,
        ge=0,
        description="How long turns that have been accepted may go on after the signal to stop, in seconds; "
        "meanwhile /health/ready answers 503 and new turns are refused. The process manager must wait 15 s "
        "longer.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="How much to log.")
    log_format: Literal["console", "json"] = Field(
        "console", description="How: lines for people, or a JSON object a line for programs."
    )
    otel_exporter_otlp_endpoint: str = Field(
        "",
        description="Where traces of turns are sent (OTLP over HTTP), such as http://localhost:4318. Needs "
        "`pip install -r requirements-otel.txt`. Empty: none are made.",
    )
    otel_exporter_otlp_headers: SecretStr = Field(
        SecretStr(""), description="Headers to send with them: name=value, separated by commas."
    )
    otel_service_name: str = Field("prompt-portal", description="What this service is called in traces.")

    _base: Path = PrivateAttr(default=BACKEND_DIR)
    _env_file: Path | None = PrivateAttr(default=None)

    @field_validator(
        "cors_origins",
        "mqtt_projects",
        "trusted_proxies",
        "secret_key_previous",
        "outbound_allow",
        mode="before",
    )
    @classmethod
    def _words(cls, value: object) -> object:
        return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value

    @field_validator("alert_percent", mode="before")
    @classmethod
    def _percents(cls, value: object) -> object:
        return tuple(map(int, value.replace(",", " ").split())) if isinstance(value, str) else value

    @field_validator("database_url")
    @classmethod
    def _database(cls, value: str) -> str:
        if not re.match(r"sqlite:///|postgres(ql)?://|postgresql\+psycopg://", value):
            raise ValueError("give sqlite:///FILE or postgresql://user:password@host/name")
        return value

    @field_validator("redis_url")
    @classmethod
    def _redis(cls, value: str) -> str:
        parts = split_url(value)
        if value and (parts.scheme not in {"redis", "rediss"} or not parts.hostname):
            raise ValueError("give a URL such as redis://localhost:6379/0, or nothing")
        return value

    @field_validator("llm_server_url")
    @classmethod
    def _servers(cls, value: str) -> str:
        servers = [http_url(url).removesuffix("/v1") for url in value.replace(",", " ").split()]
        if not servers or len(set(servers)) < len(servers):
            raise ValueError("give one URL such as http://localhost:8080, or several different ones")
        return ",".join(servers)

    @field_validator("mqtt_broker_url")
    @classmethod
    def _broker(cls, value: str) -> str:
        if value == "none":  # in the environment, where nothing would leave what stands in the file
            return ""
        parts = split_url(value)
        if value and (parts.scheme not in {"mqtt", "mqtts", "ws", "wss"} or not parts.hostname):
            raise ValueError("give a URL such as mqtt://localhost:1883, or nothing for no MQTT")
        if parts.username or parts.password:
            raise ValueError("the user name and the password have settings of their own")
        return value

    @field_validator("mqtt_projects")
    @classmethod
    def _topics(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not name or any(mark in name for mark in "+#/\0$"):
                raise ValueError(f"{name!r} cannot be a level of an MQTT topic")
        return tuple(dict.fromkeys(value))

    @field_validator("mqtt_acl")
    @classmethod
    def _admin_of_broker(cls, value: str, others: ValidationInfo) -> str:
        if value == "mosquitto" and not others.data.get("mqtt_username"):
            raise ValueError(
                "with mosquitto, MQTT_USERNAME must be a user who may change the rights of others"
            )
        return value

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "*" in value:
            raise ValueError(
                "name the origins: with credentials, * would let every page act for its visitors"
            )
        return value

    @field_validator("outbound_allow")
    @classmethod
    def _trusted(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            if not _is_network(entry) and not HOST.fullmatch(entry):
                raise ValueError(f"{entry!r} is neither a host nor a network such as 10.1.0.0/16")
        return value

    @field_validator("alert_webhook_url")
    @classmethod
    def _hook(cls, value: SecretStr) -> SecretStr:
        parts = split_url(value.get_secret_value())
        if value.get_secret_value() and (parts.scheme not in {"http", "https"} or not parts.hostname):
            raise ValueError("give a URL such as https://example.org/hook, or nothing")
        return value

    @field_validator("otel_exporter_otlp_endpoint")
    @classmethod
    def _collector(cls, value: str) -> str:
        if not value:
            return value
        if find_spec("opentelemetry") is None or find_spec("opentelemetry.sdk") is None:
            raise ValueError("traces need more packages: pip install -r requirements-otel.txt")
        return http_url(value)

    @field_validator("otel_exporter_otlp_headers")
    @classmethod
    def _pairs(cls, value: SecretStr) -> SecretStr:
        if not all("=" in pair for pair in value.get_secret_value().split(",") if pair):
            raise ValueError("give name=value, separated by commas")
        return value

    @field_validator("secret_key_previous")
    @classmethod
    def _all_strong(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        return tuple(cls._strong(secret) for secret in value)

    @field_validator("secret_key")
    @classmethod
    def _strong(cls, value: SecretStr) -> SecretStr:
        secret = value.get_secret_value()
        if secret and len(secret) < MIN_SECRET_CHARS:
            raise ValueError(f"at least {MIN_SECRET_CHARS} characters are needed")
        if secret and (len(set(secret)) < 10 or any(word in secret.lower() for word in KNOWN_SECRETS)):
            raise ValueError("this one is known or easy to guess; make a random one")
        return value

    @model_validator(mode="after")
    def _first_token_within_total(self) -> Settings:
        if self.llm_connect_timeout > self.llm_timeout:
            raise ValueError("LLM_CONNECT_TIMEOUT is longer than LLM_TIMEOUT")
        return self

    @property
    def sqlalchemy_url(self) -> str:
        """The database URL with its driver named and its file made absolute."""
        url = self.database_url
        if url.startswith("sqlite:///"):
            return f"sqlite:///{self._base / url.removeprefix('sqlite:///')}"
        for scheme in ("postgresql://", "postgres://"):
            if url.startswith(scheme):
                return f"postgresql+psycopg://{url.removeprefix(scheme)}"
        return url

    @property
    def llm_servers(self) -> tuple[str, ...]:
        """Where the servers of `LLM_SERVER_URL` are, without `/v1`."""
        return tuple(self.llm_server_url.split(","))

    @property
    def otel_headers(self) -> dict[str, str]:
        """What `OTEL_EXPORTER_OTLP_HEADERS` says."""
        pairs = self.otel_exporter_otlp_headers.get_secret_value().split(",")
        return {
            name.strip().lower(): unquote(value.strip())
            for name, _, value in (pair.partition("=") for pair in pairs if pair)
        }

    def variable(self, name: str) -> str:
        """A variable that a file of the admin's names, from the environment first, then from the .env file;
        empty when it is in neither."""
        return (
            os.environ.get(name) or (dotenv_values(self._env_file).get(name) if self._env_file else "") or ""
        )

    def secret_file(self, name: str) -> str:
        """What stands in a file that holds one secret, relative to the .env file; nothing when it cannot be
        read."""
        try:
            return self.path(name).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return ""

    def path(self, name: str) -> Path:
        """A file that a setting names, relative to the .env file."""
        return self._base / name

    @cached_property
    def broker_is_local(self) -> bool:
        """Whether the broker is reached over this machine's loopback interface."""
        return is_loopback(urlsplit(self.mqtt_broker_url).hostname or "")

    @property
    def anonymous_mqtt(self) -> bool:
        """Whether MQTT messages without a token are answered."""
        return self.broker_is_local if self.mqtt_anonymous is None else self.mqtt_anonymous == "allow"

    def with_instance(self, name: str) -> Settings:
        """These settings, with `name` for an instance that has none."""
        return self if self.instance else self.replace(instance=name)

    def with_secret(self) -> Settings:
        """These settings, with a random secret for as long as this process runs."""
        return self.replace(secret_key=SecretStr(secrets.token_urlsafe(48)))

    def replace(self, **changes: Any) -> Settings:
        """A copy with other values, not validated again."""
        return self.model_copy(update=changes)


def load_settings(env_file: Path = DEFAULT_ENV_FILE, **overrides: Any) -> Settings:
    """Settings from `overrides`, the environment and `env_file`; only the default one need not exist. Raises
    `WrongSettings`."""
    try:
        if env_file != DEFAULT_ENV_FILE and not env_file.exists():
            raise WrongSettings(env_file, [("", "there is no such file")])
        settings = Settings(_env_file=env_file, **overrides)
    except ValidationError as error:
        problems = [(".".join(map(str, found["loc"])), found["msg"]) for found in error.errors()]
        raise WrongSettings(env_file, problems) from None
    except (OSError, UnicodeDecodeError) as error:
        raise WrongSettings(env_file, [("", f"the file cannot be read: {_reason(error)}")]) from None
    settings._base = env_file.resolve().parent
    settings._env_file = env_file
    return settings


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror or str(error)


def split_url(url: str) -> SplitResult:
    """The parts of a URL, with a port that can be. Raises `ValueError`, which tells nothing of the URL: there
    may be a password in it."""
    try:
        parts = urlsplit(url)
        if parts.port != 0:  # reading it checks its range
            return parts
    except ValueError:
        pass
    raise ValueError("give a URL whose port, if it names one, is from 1 to 65535")


def http_url(value: str) -> str:
    """A URL of a server, without a slash at its end. Raises `ValueError` when it is none."""
    parts = split_url(value)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment:
        raise ValueError("give a URL such as http://localhost:8080")
    if parts.username is not None or parts.password is not None:
        raise ValueError("leave the user and the password out of it: keys have a place of their own")
    if not value.isascii() or any(character <= " " for character in value):
        raise ValueError("write what is no visible character of ASCII with % or, in a host name, as xn--")
    return value.rstrip("/")


@lru_cache(256)
def is_loopback(host: str) -> bool:
    """Whether `host` names this machine's loopback interface."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _is_network(text: str) -> bool:
    try:
        ip_network(text, strict=False)
    except ValueError:
        return False
    return True


def netloc(host: str, port: int) -> str:
    """Host and port as they stand in a URL."""
    return f"{f'[{host}]' if ':' in host else host}:{port}"


def host_name() -> str:
    """This machine's name."""
    return socket.gethostname()


def child_environment(settings: Mapping[str, str], *, first_on_path: Path | None = None) -> dict[str, str]:
    """The environment for a child process: this one's, with `settings` above it. Programs are looked for
    in `first_on_path` before all other places."""
    environment = {**os.environ, "PYTHONPATH": str(BACKEND_DIR), "PYTHONUNBUFFERED": "1", **settings}
    if first_on_path is not None:
        environment["PATH"] = os.pathsep.join([str(first_on_path), environment.get("PATH", "")])
    return environment


# --- .env.example --------------------------------------------------------------------------------


def env_example() -> str:
    """The text of `.env.example`."""
    lines = [
        "# Settings of Prompt Portal. Change what you need in a copy that only you can read:",
        "# install -m 600 .env.example .env",
        "",
    ]
    for name, field in Settings.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and "section" in extra:
            lines += [f"# --- {extra['section']} ---", ""]
        lines += [f"# {line}" for line in textwrap.wrap(field.description or "", 98)]
        lines += [f"{name.upper()}={_shown(field)}", ""]
    return "\n".join(lines)


def _shown(field: FieldInfo) -> str:
    value = field.default
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "" if value is None else str(value)
