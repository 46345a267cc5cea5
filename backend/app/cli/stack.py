"""What one portal with its servers is made of: where its files lie, and where each part listens."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import SecretStr, ValidationError

from app.cli.console import Failure
from app.config import (
    BACKEND_DIR,
    DEFAULT_ENV_FILE,
    DEFAULT_LLM_SERVER_URL,
    Settings,
    env_example,
    load_settings,
)

ROOT = BACKEND_DIR.parent
DEFAULT_STATE = ROOT / ".portal"
HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Stack:
    """The parts that `up` starts. `llm_url` and `broker_url` are set where a server that is there
    already is used instead of an own one; `broker_url` is empty where there is no broker at all.
    `own_llm` and `own_broker` start own ones whatever the settings name."""

    state: Path = DEFAULT_STATE
    port: int = 8000
    llm_port: int = 8080
    mqtt_port: int = 1883
    llm_url: str | None = None
    broker_url: str | None = None
    model: Path | None = None
    own_llm: bool = False
    own_broker: bool = False

    def __post_init__(self) -> None:
        for option, url in (("--llm-url", self.llm_url), ("--broker", self.broker_url)):
            if url and urlsplit(url).password is not None:
                raise Failure(
                    f"{option}: a password on the command line is seen by everybody on this machine.",
                    f"Put it into the settings instead: {self.env_file}",
                )

    @property
    def env_file(self) -> Path:
        """The settings: `backend/.env`, or a file of its own for a second stack."""
        return DEFAULT_ENV_FILE if self.state == DEFAULT_STATE.resolve() else self.state / ".env"

    @property
    def logs(self) -> Path:
        """The directory of the logs."""
        return self.state / "logs"

    @property
    def url(self) -> str:
        """Where the portal answers."""
        return f"http://localhost:{self.port}"

    @property
    def llm_address(self) -> str:
        """Where the LLM server answers."""
        return self.llm_url or f"http://{HOST}:{self.llm_port}"

    @property
    def broker_address(self) -> str:
        """Where the broker answers; empty without one."""
        return f"mqtt://{HOST}:{self.mqtt_port}" if self.broker_url is None else self.broker_url

    def without_broker(self) -> Stack:
        """The same over HTTP alone."""
        return replace(self, broker_url="")

    def prepare(self) -> None:
        """Makes the state directory, and the settings where there are none."""
        try:
            self.state.mkdir(parents=True, exist_ok=True)
            if not self.env_file.exists():
                _write_settings(self.env_file)
        except OSError as error:
            raise Failure(
                f"{self.state} cannot be written: {error.strerror}.", "Choose another place with --state DIR."
            ) from None

    def settings(self) -> Settings:
        """The settings that the portal will have. Raises `Failure` when the file is wrong."""
        try:
            return load_settings(self.env_file)
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in error.errors()]
            raise Failure(f"The settings in {self.env_file} are wrong:", *problems) from None

    def as_set(self) -> Stack:
        """This stack with the servers that its settings name, where no option asked for own ones."""
        settings = self.settings()
        changes: dict[str, str] = {}
        if self.llm_url is None and not self.own_llm and settings.llm_server_url != DEFAULT_LLM_SERVER_URL:
            changes["llm_url"] = settings.llm_server_url
        if self.broker_url is None and not self.own_broker and settings.mqtt_broker_url:
            changes["broker_url"] = settings.mqtt_broker_url
        return replace(self, **changes)  # type: ignore[arg-type]

    def with_secret(self) -> Settings:
        """The settings, with a secret for this run where the file has none."""
        settings = self.settings()
        if settings.secret_key.get_secret_value():
            return settings
        return settings.replace(secret_key=SecretStr(secrets.token_urlsafe(48)))


def _write_settings(env_file: Path) -> None:
    text = env_example().replace("\nSECRET_KEY=\n", f"\nSECRET_KEY={secrets.token_urlsafe(48)}\n")
    new = env_file.with_suffix(".new")
    new.unlink(missing_ok=True)
    # Nobody else may read it, from the first moment on; and it is there whole, or not at all.
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    new.replace(env_file)
