"""Starts the portal: `python run_server.py [--host HOST] [--port PORT] [--env-file FILE]`."""

from __future__ import annotations

import argparse
import asyncio
import gc
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from app.config import (
    DEFAULT_ENV_FILE,
    Settings,
    WrongSettings,
    host_name,
    is_loopback,
    load_settings,
    netloc,
)
from app.container import Container, check_files
from app.errors import InvalidRequest
from app.logs import configure_logging, get_logger
from app.main import create_app

log = get_logger(__name__)

LEAVE_S = 5
"""How long open requests may go on once the turns have ended, or had their time."""


class _Server(uvicorn.Server):
    """Goes on serving after the signal to stop, until the portal has drained, and then ends without an
    error. A second signal ends it at once."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, drain_timeout: float) -> None:
        super().__init__(config)
        self._app = app
        self._drain_timeout = drain_timeout
        self._is_hurried = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to serve, and says where."""
        await super().startup(sockets)
        for listener in (sockets or ()) if self.started else ():
            log.info("serving", url=f"http://{netloc(*listener.getsockname()[:2])}")

    async def main_loop(self) -> None:
        """Serves until the signal, and through what follows it."""
        await super().main_loop()
        container: Container = self._app.state.container
        await container.drain.run(self._drain_timeout, lambda: self._is_hurried)
        if self._is_hurried:
            self.config.timeout_graceful_shutdown = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Notes a signal."""
        self._is_hurried = self.should_exit
        self.should_exit = True


class _WebSocket(WebSocketsSansIOProtocol):
    """Drops a connection whose reader does not read, once its socket is served no more: what it has not taken
    by then it would be kept for without end."""

    async def run_asgi(self) -> None:
        """Serves it."""
        await super().run_asgi()
        if not self.writable.is_set():
            self.transport.abort()


def main() -> int:
    """Runs the server until it is told to stop; returns the exit code."""
    arguments = _arguments()
    try:
        settings = load_settings(arguments.env_file).with_instance(
            f"{host_name()}:{arguments.host}:{arguments.port}"
        )
        check_files(settings)
    except WrongSettings as error:
        return _complain(str(error), *(f"  {line}" for line in error.lines()))
    except InvalidRequest as error:
        return _complain("A file of the settings is wrong:", f"  {error.message}")
    configure_logging(settings.log_level, settings.log_format)
    if not settings.secret_key.get_secret_value():
        if not is_loopback(arguments.host):
            return _complain(
                f"SECRET_KEY is empty. To serve on {arguments.host}, set it in {arguments.env_file}."
            )
        log.warning("SECRET_KEY is empty: a random one is used, and sign-ins end with this run")
        settings = settings.with_secret()
    # The port is taken before the database is opened: whoever has it is this instance, and no other
    # process can take over its turns by mistake.
    try:
        listener = _bind(arguments.host, arguments.port)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        return _complain(f"Port {arguments.port} on {arguments.host} cannot be used: {reason}.")
    return _serve(settings, listener)


def _serve(settings: Settings, listener: socket.socket) -> int:
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        ws=_WebSocket,
        ws_max_size=settings.max_request_bytes,
        ws_per_message_deflate=False,  # its buffers would be half of what a socket takes
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=list(settings.trusted_proxies),
        timeout_graceful_shutdown=LEAVE_S,
    )
    server = _Server(config, app, settings.drain_timeout)
    # What was imported is there for good: looking through it again and again for garbage would stop all
    # streams for some hundredths of a second each time. A turn makes thousands of objects and hardly any that
    # refer to each other, so it pays to look less often.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    # paho's sockets are watched by the event loop, which Windows' default loop cannot do.
    factory = asyncio.SelectorEventLoop if sys.platform == "win32" else config.get_loop_factory()
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(server.serve(sockets=[listener]))
    return 0 if server.started else 3


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    if sys.platform != "win32":
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with ExitStack() as unless_bound:
        unless_bound.enter_context(listener)
        listener.bind((host, port))
        listener.listen(2048)  # two sockets may be bound to one port, until one listens
        unless_bound.pop_all()
    return listener


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Starts Prompt Portal.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (%(default)s)")
    parser.add_argument("--env-file", type=Path, default=DEFAULT_ENV_FILE, help="settings (backend/.env)")
    return parser.parse_args()


def _complain(*lines: str) -> int:
    print(*lines, sep="\n", file=sys.stderr)  # noqa: T201 - there is no log yet
    return 2


if __name__ == "__main__":
    sys.exit(main())
