"""`llamacpp_mqtt_deploy.py`: the MQTT side of the portal in one process, with a database of its own."""

from __future__ import annotations

import argparse
import asyncio
import socket
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from sqlalchemy.exc import SQLAlchemyError

from app.cli.console import Failure, failure_of
from app.cli.only_bridge import check_alone
from app.cli.own_llm import own_llm, prepare_llm
from app.cli.parts import Part
from app.cli.stack import HOST, Stack
from app.cli.statistics import tell_statistics
from app.cli.supervisor import lock_file, on_signals
from app.config import BACKEND_DIR, Settings, WrongSettings, is_loopback, load_settings, netloc
from app.container import Container, check_files, open_container
from app.errors import InvalidRequest, PortalError
from app.logs import configure_logging, get_logger

PROGRAM = "llamacpp_mqtt_deploy.py"
DEFAULT_DATABASE = BACKEND_DIR / "mqtt.db"
DEFAULT_BROKER = "mqtt://localhost:1883"

INTRODUCTION = """\
Serves games and devices over MQTT, without the web: the same sessions, retries and topics as the portal, with
a database of its own. What no flag tells comes from the environment and backend/.env, by the names in [].
"""

EXAMPLE = f"""\
examples:
  python {PROGRAM} --serve --projects maze
  python {PROGRAM} --projects maze driving --server-url http://localhost:8080 --mqtt-broker localhost
"""

SETTING_OF = {
    "projects": "mqtt_projects",
    "server_url": "llm_server_url",
    "server_timeout": "llm_timeout",
    "temperature": "llm_temperature",
    "top_p": "llm_top_p",
    "max_tokens": "llm_max_tokens",
    "max_history_tokens": "llm_max_history_tokens",
    "num_workers": "llm_max_concurrency",
    "skip_thinking": "llm_skip_thinking",
    "mqtt_broker": "mqtt_broker_url",
    "mqtt_username": "mqtt_username",
    "mqtt_password": "mqtt_password",
    "log_level": "log_level",
}
"""The setting behind each flag."""

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Deployment:
    """What the flags, the environment and `backend/.env` ask for. `llm` is there when llama.cpp is to be
    started."""

    settings: Settings
    database: Path
    llm: Stack | None


class _Wrong(Exception):
    """Flags that cannot be; says which."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROGRAM}: {message.removeprefix('argument ')} (--help tells all flags)\n")


def main(arguments: list[str] | None = None) -> int:
    """Runs until Ctrl-C or SIGTERM; returns the exit code: 0, 1 when it cannot run, 2 for wrong flags."""
    options = _parser().parse_args(arguments)
    try:
        deployment = _read(options)
        check_files(deployment.settings)
    except WrongSettings as error:
        return _complain(*error.lines(_flags_of(options)))
    except (_Wrong, InvalidRequest) as error:
        return _complain(str(error))
    configure_logging(deployment.settings.log_level, deployment.settings.log_format)
    # paho's sockets are watched by the event loop, which Windows' default loop cannot do.
    factory = asyncio.SelectorEventLoop if sys.platform == "win32" else None
    try:
        llm = None
        if deployment.llm is not None:
            llm = prepare_llm(deployment.llm, deployment.settings.llm_max_concurrency)
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(_run(deployment, llm))
    except KeyboardInterrupt:
        return 0  # nothing was served yet
    except (Failure, PortalError, SQLAlchemyError) as error:
        failure_of(error).show()
        return 1
    return 0


def _complain(*problems: str) -> int:
    print(*(f"{PROGRAM}: {problem}" for problem in problems), sep="\n", file=sys.stderr)
    return 2


def _flags_of(options: argparse.Namespace) -> dict[str, str]:
    """The flags that were given, by their settings."""
    return {
        setting: f"--{flag}" for flag, setting in SETTING_OF.items() if getattr(options, flag) is not None
    }


# --- flags ---------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [--projects NAME ...] [--serve [MODEL.gguf]] [flags]",
        description=INTRODUCTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def flag(name: str, help_text: str, **how: Any) -> None:
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(*spellings, dest=name, help=help_text, **how)

    def setting(name: str, help_text: str, **how: Any) -> None:
        flag(name, f"{help_text} [{SETTING_OF[name].upper()}]", **{"metavar": "N", **how})

    setting("projects", "what to serve: names in words, or separated by commas", nargs="+", metavar="NAME")
    flag(
        "serve",
        "start llama.cpp first, with this model or with the small starter model; at --server_url if that is "
        "given, else on a free port",
        nargs="?",
        const="",
        metavar="MODEL.gguf",
    )
    setting("server_url", "the OpenAI-compatible LLM server", metavar="URL")
    setting("server_timeout", "longest time for a whole reply", metavar="SECONDS")
    setting("temperature", "sampling temperature, 0 to 2, where a message names none", metavar="T")
    setting("top_p", "nucleus sampling, above 0 to 1, where a message names none", metavar="P")
    setting("max_tokens", "longest reply, in tokens, where a message names none")
    setting("max_history_tokens", "most tokens of history sent with a message")
    setting("skip_thinking", "leave a model's reasoning out", choices=["true", "false"], metavar="true|false")
    setting("num_workers", "most generations at once; for llama.cpp its number of slots")
    flag(
        "max_concurrent_sessions",
        "most sessions that are answered or wait for it at once; further messages are refused as overloaded",
        type=_whole,
        metavar="N",
    )
    setting("mqtt_broker", "the broker: a host, or a URL with mqtt, mqtts, ws or wss", metavar="HOST|URL")
    flag("mqtt_port", "its port (1883, or what its URL says)", type=_port, metavar="PORT")
    setting("mqtt_username", "user name at the broker", metavar="NAME")
    setting(
        "mqtt_password",
        "and its password; everybody on this machine can see it here, so rather set it as",
        metavar="WORD",
    )
    flag(
        "database",
        f"where sessions are kept ({DEFAULT_DATABASE.name} in backend/)",
        type=Path,
        metavar="FILE",
    )
    setting("log_level", "how much to log", metavar="debug|info|warning|error")
    return parser


def _whole(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return number


def _port(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if not 1 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 1 to 65535")
    return number


def _read(options: argparse.Namespace) -> Deployment:
    """What is asked for. Raises `_Wrong` or `WrongSettings`."""
    database = (options.database or DEFAULT_DATABASE).expanduser().resolve()
    if not database.parent.is_dir():
        raise _Wrong(f"--database: there is no folder {database.parent}")
    llm = None if options.serve is None else _own_llm(options.serve, options.server_url)
    flags = _given(options) | {"database_url": f"sqlite:///{database}"}
    if llm is not None:
        flags["llm_server_url"] = llm.llm_address
    others = load_settings(**flags)
    flags["mqtt_broker_url"] = _broker_url(options.mqtt_broker or others.mqtt_broker_url, options.mqtt_port)
    if options.max_concurrent_sessions is not None:
        flags |= _bounds(options.max_concurrent_sessions, others.llm_max_concurrency)
    # The lock of the database's file sees to it that there is only one of this name.
    settings = load_settings(**flags).replace(instance="mqtt-deploy")
    if not settings.secret_key.get_secret_value():
        settings = settings.with_secret()
    return Deployment(settings, database, llm)


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that flags give as they are."""
    given = {setting: getattr(options, flag) for flag, setting in SETTING_OF.items() if flag != "mqtt_broker"}
    if options.projects is not None:
        given["mqtt_projects"] = " ".join(options.projects)
        if not given["mqtt_projects"].replace(",", " ").split():
            raise _Wrong("--projects: name at least one")
    return {setting: value for setting, value in given.items() if value is not None}


def _bounds(sessions: int, workers: int) -> dict[str, int]:
    """Places and queue that together hold so many sessions: each has one turn at a time there."""
    places = min(workers, sessions)
    return {"llm_max_concurrency": places, "llm_max_queue": sessions - places}


def _broker_url(given: str, port: int | None) -> str:
    """A URL for what may be a bare host, with the port if there is one."""
    text = given or DEFAULT_BROKER
    if "://" not in text:
        text = f"mqtt://[{text}]" if text.count(":") > 1 and not text.startswith("[") else f"mqtt://{text}"
    if port is None:
        return text
    try:
        parts = urlsplit(text)
        host, login, at = parts.hostname or "", *parts.netloc.rpartition("@")[:2]
    except ValueError as error:
        raise _Wrong(f"--mqtt_broker: {error}") from None
    return parts._replace(netloc=f"{login}{at}{netloc(host, port)}").geturl()


def _own_llm(name: str, server_url: str | None) -> Stack:
    """The stack whose LLM server is to be started, with the model of that name."""
    port = None
    if server_url is not None:
        parts = urlsplit(server_url)
        if not is_loopback(parts.hostname or ""):
            raise _Wrong("--server_url: with --serve it must be on this machine, as http://localhost:8080")
        port = parts.port or 80
    model = Path(name).expanduser().resolve() if name else None
    if model is not None and not model.is_file():
        raise _Wrong(f"--serve: there is no file {name}")
    return Stack(llm_port=port or _free_port(), model=model, own_llm=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


# --- running -------------------------------------------------------------------------------------


async def _run(deployment: Deployment, llm: Part | None) -> None:
    """Serves until a signal comes, and until the turns have ended then; a second signal ends it at once.
    Raises `Failure`."""
    stop, hurry, opened = asyncio.Event(), asyncio.Event(), list[Container]()
    on_signals(lambda: hurry.set() if stop.is_set() else stop.set())
    serving = asyncio.create_task(_serve(deployment, llm, opened), name="serve")
    stopping = asyncio.create_task(stop.wait(), name="stop")
    await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if opened and not serving.done():
        await opened[0].drain.run(deployment.settings.drain_timeout, hurry.is_set)
    serving.cancel()
    with suppress(asyncio.CancelledError):
        await serving
    log.info("stopped")


async def _serve(deployment: Deployment, llm: Part | None, opened: list[Container]) -> None:
    settings, database = deployment.settings, deployment.database
    async with AsyncExitStack() as stack:
        stack.enter_context(_alone_with(database))
        await asyncio.to_thread(check_alone, settings)
        if llm is not None:
            log_file = database.with_name(f"{database.name}.llm.log")
            await stack.enter_async_context(own_llm(llm, log_file))
        container = await stack.enter_async_context(open_container(settings))
        opened.append(container)
        if not settings.anonymous_mqtt:
            log.warning(
                "messages without a token are not answered, as the broker is not on this machine; "
                "MQTT_ANONYMOUS=allow answers them"
            )
        log.info("serving", projects=" ".join(settings.mqtt_projects), broker=settings.mqtt_broker_url)
        await tell_statistics(container)


@contextmanager
def _alone_with(database: Path) -> Iterator[None]:
    """Holds the lock of the database's file. Raises `Failure`."""
    try:
        with database.with_name(f"{database.name}.lock").open("a") as file:
            try:
                lock_file(file)
            except OSError:
                raise Failure(
                    f"Another {PROGRAM} uses {database}.", "Stop it, or name another file with --database."
                ) from None
            yield
    except PermissionError:
        raise Failure(
            f"{database.parent} cannot be written.", "Choose another place with --database."
        ) from None
