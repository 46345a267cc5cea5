"""A llama.cpp that runs for as long as the program that started it."""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from app.cli import install
from app.cli.console import Failure, end, tail
from app.cli.parts import STOP_S, Part, check_ports, llm_server
from app.cli.stack import Stack
from app.cli.supervisor import (
    BACKOFF_FIRST_S,
    BACKOFF_MOST_S,
    HEALTHY_S,
    START_TIMEOUT_S,
    cut,
    rotate,
    stopped_as_by_ctrl_c,
)
from app.config import child_environment
from app.logs import get_logger

POLL_S = 0.1

log = get_logger(__name__)


@stopped_as_by_ctrl_c()
def prepare_llm(stack: Stack, slots: int) -> Part:
    """Gets everything that serving the stack's model needs, or the starter model. Raises `Failure`."""
    if importlib.util.find_spec("xllamacpp") is None:
        install.install_packages(stack, "requirements-llm.txt", "llama.cpp's server (35 MB)")
    part = llm_server(stack, stack.model or install.starter_model(stack), slots)
    check_ports([part])
    return part


@asynccontextmanager
async def own_llm(part: Part, file: Path) -> AsyncIterator[None]:
    """Serves what was prepared, with its output in `file`. Raises `Failure` when it does not start; what dies
    later is told in the log, and started again."""
    server = _Server(part, file)
    try:
        await server.start()
        keeper = asyncio.create_task(server.keep(), name="llm server")
        try:
            yield
        finally:
            keeper.cancel()
            with suppress(asyncio.CancelledError):
                await keeper
    finally:
        await asyncio.to_thread(server.stop)


class _Server:
    def __init__(self, part: Part, file: Path) -> None:
        self._part = part
        self._file = file
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Returns once it is ready. Raises `Failure`."""
        rotate(self._file)
        log.info("llama.cpp is being started", address=self._part.address, log=str(self._file))
        process = self._spawn()
        deadline = time.monotonic() + START_TIMEOUT_S
        while not await asyncio.to_thread(self._part.is_ready):
            if process.poll() is not None:
                problem = f"llama.cpp does not start: it ended with code {process.returncode}."
                raise Failure(problem, *tail(self._file), f"(all of it: {self._file})")
            if time.monotonic() > deadline:
                raise Failure(f"llama.cpp is not ready after {START_TIMEOUT_S:.0f} s.", f"See {self._file}.")
            await asyncio.sleep(POLL_S)

    async def keep(self) -> None:
        """Starts it again whenever it dies."""
        backoff = BACKOFF_FIRST_S
        while self._process is not None:
            began = time.monotonic()
            while self._process.poll() is None:
                await asyncio.sleep(POLL_S)
                cut(self._file)
            last = " | ".join(tail(self._file, 3))
            log.error("llama.cpp died; starting it again", code=self._process.returncode, said=last)
            backoff = BACKOFF_FIRST_S if time.monotonic() - began > HEALTHY_S else backoff
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, BACKOFF_MOST_S)
            try:
                self._spawn()
            except OSError as error:  # the dead one stays in its place, and this goes on
                log.error("llama.cpp could not be run", reason=str(error))

    def stop(self) -> None:
        """Ends it."""
        if self._process is None:
            return
        with self._process as process:
            end(process, STOP_S)

    def _spawn(self) -> subprocess.Popen[bytes]:
        with self._file.open("ab") as output:
            self._process = subprocess.Popen(
                [*self._part.command, "--with-parent"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=child_environment(self._part.settings),
                start_new_session=True,  # Ctrl-C is for the bridge, which stops it when it is done with it
            )
        return self._process
