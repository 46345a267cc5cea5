"""What a person sees: lines, progress for everything that takes longer than a moment, and failures."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from rich.console import Console
from rich.text import Text
from sqlalchemy.exc import SQLAlchemyError

from app.config import WrongSettings
from app.errors import PortalError

for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")  # a console that has no ✓ shows something else for it


def _console(*, stderr: bool = False) -> Console:
    """One that shows a string as it is: it may be of others, such as a model's reply. `Text` colours."""
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


console = _console()

QUIET_INTERVAL_S = 10.0
"""Without a terminal, how often a long step says that it goes on."""

TAIL_LINES = 12

STEP_STOP_S = 5.0
"""How long the program of a step has to end, when this one is ended."""


class Failure(Exception):
    """What is wrong, and what to do; shown to the person without a traceback."""

    def __init__(self, problem: str, *remedies: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedies = remedies

    def show(self) -> None:
        """Prints it to standard error."""
        errors = _console(stderr=True)
        errors.print(Text.assemble(("✗", "red"), " ", self.problem), soft_wrap=True)
        for remedy in self.remedies:
            errors.print(f"  {remedy}", soft_wrap=True)


def done(text: str, detail: str = "") -> None:
    """A step is done."""
    told = (f" {detail}", "dim") if detail else ""
    console.print(Text.assemble(("✓", "green"), " ", text, told), soft_wrap=True)


def note(text: str) -> None:
    """Something worth knowing."""
    console.print(Text.assemble(("!", "yellow"), " ", text), soft_wrap=True)


class Step:
    """A step that is being shown; `tell` says how far it is."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._began = self._told = time.monotonic()
        self._status = console.status(Text(title)) if console.is_terminal else None

    def tell(self, detail: str = "") -> None:
        """Shows the time that has passed, and `detail`."""
        now = time.monotonic()
        text = Text.assemble(f"{self.title} ({now - self._began:.0f} s) ", (detail, "dim"))
        if self._status is not None:
            self._status.update(text)
        elif now - self._told >= QUIET_INTERVAL_S:
            self._told = now
            console.print(Text.assemble("  ", text), soft_wrap=True)

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.monotonic() - self._began

    def __enter__(self) -> Step:
        if self._status is not None:
            self._status.start()
        else:
            console.print(f"  {self.title} ...", soft_wrap=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()


def run_step(
    title: str, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> None:
    """Runs a program with its output in `log`, showing its last line meanwhile. Raises `Failure` with
    the end of the output when it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output, Step(title) as step:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        )
        try:
            while process.poll() is None:
                time.sleep(0.1)
                step.tell(_last_line(log))
        finally:
            end(process, STEP_STOP_S)
    if process.returncode != 0:
        raise Failure(f"{title}: it failed.", *_advice(log), *tail(log), f"(all of it: {log})")
    done(f"{title} ({step.seconds:.0f} s)")


def end(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Ends a program, if it runs, which has so many seconds for it."""
    with suppress(PermissionError):  # what sudo started is root's
        process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()


def tail(log: Path, lines: int = TAIL_LINES) -> list[str]:
    """The last lines of a log, where it can be read."""
    try:
        return log.read_text(errors="replace").splitlines()[-lines:]
    except OSError:
        return []


@contextmanager
def failures_shown() -> Iterator[None]:
    """Ends the program with code 1, after showing what failed."""
    try:
        yield
    except (Failure, WrongSettings, PortalError, SQLAlchemyError, psutil.Error, OSError) as error:
        failure_of(error).show()
        sys.exit(1)


def failure_of(error: Exception) -> Failure:
    """What to show for what may go wrong outside of this program."""
    match error:
        case Failure():
            return error
        case WrongSettings():
            return Failure(str(error), *error.lines())
        case psutil.AccessDenied():
            return Failure(f"Process {error.pid} is another user's.", "Do this as that user, or as root.")
        case SQLAlchemyError():
            return Failure(
                f"The database cannot be used: {str(getattr(error, 'orig', None) or error).strip()}"
            )
        case OSError():
            return Failure(f"{error.filename or 'The system'}: {error.strerror or error}.")
        case _:
            return Failure(str(error))


def _last_line(log: Path) -> str:
    lines = tail(log, 1)
    return lines[0].strip()[:80] if lines else ""


def _advice(log: Path) -> list[str]:
    text = log.read_text(errors="replace")
    if "No space left" in text:
        return ["The disk is full: make room and run this again."]
    signs = (
        "NewConnectionError",
        "name resolution",
        "Max retries",
        "Could not connect",
    )
    if any(sign in text for sign in ("ECONNREFUSED", "ENOTFOUND", "EAI_AGAIN", "ETIMEDOUT")):
        return [
            "The npm registry cannot be reached. Check the network; behind a proxy or mirror set",
            "https_proxy or npm_config_registry. Then run this again: what is there already is kept.",
        ]
    if any(sign in text for sign in signs):
        return [
            "The package index cannot be reached. Check the network; behind a proxy or mirror set",
            "https_proxy or PIP_INDEX_URL. Then run this again: what is there already is kept.",
        ]
    if "No matching distribution" in text:
        return [  # pip may say no more than this
            "The package index cannot be reached, or has no such package for this system and this Python,",
            "as on Alpine. Behind a proxy or mirror set https_proxy or PIP_INDEX_URL, and run this again.",
        ]
    return []
