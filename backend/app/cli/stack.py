"""What one portal with its servers is made of: where its files lie, and where each part listens."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from app.cli.broker import (
    BrokerConfig,
    Certificate,
    find_plugin,
    has_websockets,
    make_credentials,
    read_credentials,
    write_private,
)
from app.cli.console import Failure, note
from app.config import (
    BACKEND_DIR,
    DEFAULT_ENV_FILE,
    DEFAULT_LLM_SERVER_URL,
    Settings,
    env_example,
    is_loopback,
    load_settings,
)

ROOT = BACKEND_DIR.parent
DEFAULT_STATE = ROOT / ".portal"
HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Stack:
    """The parts that `up` starts. `llm_url` and `broker_url` are set where a server that is there
    already is used instead of an own one; `broker_url` is empty where there is no broker at all. Each
    generation of an own LLM server has `context` tokens, where that is set.
    `own_llm` and `own_broker` start own ones whatever the settings name. The own broker listens on
    `mqtt_listen`; `mqtt_plugin` is its dynamic security plugin, once that was looked for."""

    state: Path = DEFAULT_STATE
    port: int = 8000
    llm_port: int = 8080
    mqtt_port: int = 1883
    llm_url: str | None = None
    broker_url: str | None = None
    model: Path | None = None
    context: int | None = None
    own_llm: bool = False
    own_broker: bool = False
    mqtt_ws_port: int = 9001
    mqtt_listen: str = HOST
    mqtt_certificate: Certificate | None = None
    mqtt_plugin: Path | None = None

    def __post_init__(self) -> None:
        try:
            ip_address(self.mqtt_listen)
        except ValueError:
            raise Failure(
                f"--mqtt-listen: {self.mqtt_listen!r} is no IP address.",
                "0.0.0.0 stands for all of this machine.",
            ) from None
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
        """Where the broker answers the portal; empty without one."""
        return f"mqtt://{HOST}:{self._portal_mqtt_port}" if self.broker_url is None else self.broker_url

    @property
    def mqtt_addresses(self) -> list[str]:
        """Where the broker answers its clients."""
        if self.broker_url is not None:
            return [self.broker_url] if self.broker_url else []
        is_v6 = ":" in self.mqtt_listen
        host = f"[{self.mqtt_listen}]" if is_v6 else self.mqtt_listen
        mark = "s" if self.mqtt_certificate else ""
        web = [f"ws{mark}://{host}:{self.mqtt_ws_port}"] if self.mqtt_ws_port else []
        return [f"mqtt{mark}://{host}:{self.mqtt_port}", *web]

    @property
    def _portal_mqtt_port(self) -> int:
        """The portal's own way in is without TLS: no certificate needs to be for the name of loopback."""
        return self.mqtt_port + 1 if self.mqtt_certificate else self.mqtt_port

    @property
    def broker_config(self) -> BrokerConfig:
        """What the own broker is to be."""
        is_reached = self.mqtt_listen in {HOST, "0.0.0.0"} and self.mqtt_certificate is None  # noqa: S104
        return BrokerConfig(
            self.state / "mosquitto",
            host=HOST,
            port=self.mqtt_port,
            listen=self.mqtt_listen,
            own_port=None if is_reached else self._portal_mqtt_port,
            ws_port=self.mqtt_ws_port,
            plugin=self.mqtt_plugin,
            certificate=self.mqtt_certificate,
        )

    def with_broker(self, program: str) -> Stack:
        """This stack as this Mosquitto can serve it; says what it cannot. Raises `Failure` when it cannot
        serve beyond this machine."""
        plugin, web = find_plugin(program), self.mqtt_ws_port
        if plugin is None and not is_loopback(self.mqtt_listen):
            raise Failure(
                "This Mosquitto has no dynamic security plugin, so whoever reached it could do everything.",
                "Install a Mosquitto that has it, or leave out --mqtt-listen.",
            )
        if not is_loopback(self.mqtt_listen) and self.mqtt_certificate is None:
            note("Without --mqtt-cert the passwords of devices cross the network as they are.")
        if plugin is None:
            note("This Mosquitto has no dynamic security plugin: there can be no devices (MQTT_ACL=none).")
        if web and not has_websockets(program):
            note("This Mosquitto was built without WebSockets: games in a browser cannot use it.")
            web = 0
        return replace(self, mqtt_plugin=plugin, mqtt_ws_port=web)

    def without_broker(self) -> Stack:
        """The same over HTTP alone."""
        return replace(self, broker_url="")

    def prepare(self) -> None:
        """Makes the state directory, the settings where there are none, and the secret that they lack. Raises
        `Failure`, or `WrongSettings`."""
        try:
            self.state.mkdir(parents=True, exist_ok=True)
            if not self.env_file.exists():
                write_private(self.env_file, env_example().encode())
            if not self.settings().secret_key.get_secret_value():
                _add_secret(self.env_file)
        except OSError as error:
            raise Failure(
                f"{error.filename} cannot be written: {error.strerror}.",
                "Choose another place with --state DIR.",
            ) from None

    def settings(self) -> Settings:
        """The settings in the file. Raises `WrongSettings`."""
        return load_settings(self.env_file)

    def as_set(self) -> Stack:
        """This stack with the servers that its settings name, where no option asked for own ones."""
        settings = self.settings()
        changes: dict[str, str] = {}
        if self.llm_url is None and not self.own_llm and settings.llm_server_url != DEFAULT_LLM_SERVER_URL:
            changes["llm_url"] = settings.llm_server_url
        if self.broker_url is None and not self.own_broker and settings.mqtt_broker_url:
            changes["broker_url"] = settings.mqtt_broker_url
        return replace(self, **changes)  # type: ignore[arg-type]

    def portal_settings(self) -> Settings:
        """The settings of this stack's portal: those of the file, with the own broker. Raises `Failure`, or
        `WrongSettings`."""
        settings = self.settings().replace(mqtt_broker_url=self.broker_address)
        if self.broker_url is not None:
            return settings
        if not self.broker_config.anonymous:
            settings = settings.replace(mqtt_anonymous="deny")
        if self.mqtt_plugin is None:
            return settings.replace(mqtt_acl="none")
        rights = self.broker_config.rights
        if rights.exists() and read_credentials(self.state) is None:
            raise Failure(
                f"{self.state / 'broker.json'} is lost, and with it the portal's password at its broker.",
                f"Take it from a backup; or delete {rights} too: devices then need new passwords.",
            )
        return make_credentials(self.state).put_into(settings)


def _add_secret(env_file: Path) -> None:
    line = f"SECRET_KEY={secrets.token_urlsafe(48)}\n"
    text, found = re.subn(r"(?m)^SECRET_KEY=\s*?\n", line, env_file.read_text(), count=1)
    write_private(env_file.resolve(), (text if found else f"{text}\n{line}").encode())
