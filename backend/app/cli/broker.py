"""The Mosquitto that `up` runs: what its program can do, its configuration, and its admin's password."""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
from pydantic import SecretStr

from app.config import Settings, is_loopback

PORTAL_USER = "portal"
PROBE_S = 10.0

LIBRARY = "mosquitto_dynamic_security"
LIBRARY_PLACES = (
    "/usr/lib/*-linux-*",
    "/usr/lib64",
    "/usr/lib",
    "/usr/local/lib",
    "/opt/homebrew/lib",
    "/opt/homebrew/opt/mosquitto/lib",
)

HASH_ROUNDS = 101
"""The dynamic security plugin's own number; what is hashed here is random, and gains nothing by more."""

CONFIG = """\
# Written by `setup_llm.sh up`, anew each time.
per_listener_settings false
allow_anonymous {anonymous}
set_tcp_nodelay true

# Messages for a portal that is away wait on disk; Mosquitto drops what is beyond these bounds
# and still tells the sender that all is well, so they are far above its own.
persistence true
persistence_location {data}/
autosave_interval 30
max_queued_messages 100000
max_queued_bytes 268435456
max_inflight_messages 1000
max_packet_size 1048576
log_dest stderr
log_type error
log_type warning
log_type notice
"""


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a listener shows its clients."""

    file: Path
    key: Path


@dataclass(frozen=True, slots=True)
class BrokerConfig:
    """What a broker is to be. `listen` is where clients come in; `own_port` on loopback is for the portal
    alone, where that listener is not for it. `plugin` is the dynamic security plugin's library; without it
    everybody may do everything. `ws_port` 0 is no WebSocket listener."""

    data: Path
    host: str
    port: int
    listen: str
    own_port: int | None = None
    ws_port: int = 0
    plugin: Path | None = None
    certificate: Certificate | None = None

    @property
    def file(self) -> Path:
        """The configuration file."""
        return self.data / "mosquitto.conf"

    @property
    def rights(self) -> Path:
        """The file in which the plugin keeps who may do what."""
        return self.data / "dynamic-security.json"

    @property
    def anonymous(self) -> bool:
        """Whether clients without a user name are let in: only from this machine."""
        return is_loopback(self.listen)

    def write(self, credentials: Credentials | None) -> None:
        """Writes the configuration and, the first time, the file that the plugin then keeps itself."""
        self.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.file.write_text("".join(f"{line}\n" for line in self._lines()))
        if credentials is not None and not self.rights.exists():
            write_private(self.rights, msgspec.json.encode(_first_rights(credentials)))

    def _lines(self) -> Iterator[str]:
        yield CONFIG.format(anonymous=str(self.anonymous).lower(), data=self.data)
        if sys.platform != "win32" and os.geteuid() == 0:
            # Else it would become a user who may not read this directory.
            yield "user root"
        if self.plugin is not None:
            yield f"plugin {self.plugin}"
            yield f"plugin_opt_config_file {self.rights}"
        yield from self._listener(self.port, "mqtt")
        if self.ws_port:
            yield from self._listener(self.ws_port, "websockets")
        if self.own_port is not None:
            yield f"listener {self.own_port} {self.host}"

    def _listener(self, port: int, protocol: str) -> Iterator[str]:
        yield f"listener {port} {self.listen}"
        yield f"protocol {protocol}"
        if self.certificate is not None:
            yield f"certfile {self.certificate.file}"
            yield f"keyfile {self.certificate.key}"


class Credentials(msgspec.Struct, frozen=True):
    """Whom the portal is at its broker: there it may do everything."""

    username: str
    password: str

    def put_into(self, settings: Settings) -> Settings:
        """The settings of a portal that is this user, and that writes what others may."""
        return settings.replace(
            mqtt_username=self.username, mqtt_password=SecretStr(self.password), mqtt_acl="mosquitto"
        )


def make_credentials(state: Path) -> Credentials:
    """The portal's user at the broker of a stack; made once."""
    found = read_credentials(state)
    if found is None:
        found = Credentials(PORTAL_USER, secrets.token_urlsafe(32))
        write_private(_file(state), msgspec.json.encode(found))
    return found


def read_credentials(state: Path) -> Credentials | None:
    """The portal's user at the broker of a stack, where `up` has made it."""
    try:
        return msgspec.json.decode(_file(state).read_bytes(), type=Credentials)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None


def _file(state: Path) -> Path:
    return state / "broker.json"


def write_private(file: Path, content: bytes) -> None:
    """Writes a file that nobody else may read, from the first moment on; it is there whole or not at all."""
    new = file.with_suffix(".new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as output:
        output.write(content)
    new.replace(file)


def _first_rights(credentials: Credentials) -> dict[str, object]:
    """What the plugin begins with: the portal, who may do everything, and nobody else anything. The portal
    itself adds the rights of others."""
    salt = secrets.token_bytes(12)
    key = hashlib.pbkdf2_hmac("sha512", credentials.password.encode(), salt, HASH_ROUNDS)
    everything = [
        ("publishClientSend", "#"),
        ("publishClientReceive", "#"),
        ("subscribePattern", "#"),
        ("publishClientSend", "$CONTROL/dynamic-security/#"),
        ("publishClientReceive", "$CONTROL/dynamic-security/#"),
        ("subscribePattern", "$CONTROL/dynamic-security/#"),
    ]
    return {
        "defaultACLAccess": {
            "publishClientSend": False,
            "publishClientReceive": False,
            "subscribe": False,
            "unsubscribe": True,
        },
        "clients": [
            {
                "username": credentials.username,
                "textname": "Prompt Portal",
                "password": base64.b64encode(key).decode(),
                "salt": base64.b64encode(salt).decode(),
                "iterations": HASH_ROUNDS,
                "roles": [{"rolename": "portal", "priority": 0}],
            }
        ],
        "groups": [],
        "roles": [
            {
                "rolename": "portal",
                "acls": [
                    {"acltype": kind, "topic": topic, "priority": 0, "allow": True}
                    for kind, topic in everything
                ],
            }
        ],
    }


# --- what the program can do ---------------------------------------------------------------------


def find_plugin(program: str) -> Path | None:
    """The library of the dynamic security plugin, where it came with Mosquitto."""
    home = Path(program).resolve().parent
    if sys.platform == "win32":
        beside = home / f"{LIBRARY}.dll"
        return beside if beside.exists() else None
    places = [home.parent / "lib", *map(Path, LIBRARY_PLACES)]
    found = (match for place in places for match in _inside(place) if match.exists())
    return next(found, None)


def _inside(place: Path) -> Iterator[Path]:
    for directory in Path(place.anchor).glob(str(place.relative_to(place.anchor))):
        yield directory / f"{LIBRARY}.so"


def has_websockets(program: str) -> bool:
    """Whether this Mosquitto was built with WebSocket listeners."""
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "probe.conf"
        # It reads on until the first line that it does not understand, and ends there.
        config.write_text("listener 1 127.0.0.1\nprotocol websockets\nend_of_probe\n")
        probe = subprocess.run(
            [program, "-c", str(config)], capture_output=True, check=False, timeout=PROBE_S
        )
    return b"end_of_probe" in probe.stdout + probe.stderr
