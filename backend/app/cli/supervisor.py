"""Keeps the parts of a stack running, and says how they are in a file that other commands read."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Literal

import msgspec
import psutil

from app.cli.console import Failure, note, tail
from app.cli.parts import STOP_S, Part, check_ports
from app.cli.stack import Stack
from app.config import child_environment

BACKOFF_FIRST_S, BACKOFF_MOST_S = 0.2, 10.0
HEALTHY_S = 30.0
"""A part that ran so long before it died is started again without a pause."""

START_TIMEOUT_S = 600.0
"""A large model may take minutes to load."""

START_TRIES = 3
READY_POLL_S = 0.1

WATCH_S = 5.0
"""How often a part that was ready is looked at."""

LOG_MOST_BYTES = 10_000_000
"""A log that is longer is begun anew; the one before is kept."""

State = Literal["starting", "ready", "unresponsive", "waiting"]


class PartState(msgspec.Struct):
    """A part as the state file tells of it. A process is its id with when it was born: ids alone are used
    again."""

    title: str
    address: str
    state: State = "starting"
    pid: int = 0
    created: float = 0.0
    restarts: int = 0
    since: float = 0.0
    stop_s: float = STOP_S


class StackState(msgspec.Struct):
    """The state file. `boot` is that of the system."""

    pid: int
    created: float
    started: float
    url: str
    broker: str
    llm: str = ""
    boot: str = ""
    ready: bool = False
    parts: dict[str, PartState] = {}

    @property
    def is_running(self) -> bool:
        """Whether the supervisor lives."""
        return process(self.pid, self.created) is not None


def read_state(stack: Stack) -> StackState | None:
    """The state file, if there is one of processes that may still live."""
    try:
        found = msgspec.json.decode(_state_file(stack).read_bytes(), type=StackState)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None
    return found if found.boot == _boot() else None


def process(pid: int, created: float) -> psutil.Process | None:
    """The process, if it still is the one that was born then."""
    try:
        found = psutil.Process(pid)
        return found if pid and abs(born(pid) - created) < 1 and _lives(found) else None
    except (psutil.Error, OSError):
        return None


def born(pid: int) -> float:
    """When a process began, which tells it from others of its id. Raises `psutil.Error` or `OSError`."""
    if sys.platform == "linux":
        # psutil adds the time of the boot, and that is another one once the clock was set.
        return float(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    return float(psutil.Process(pid).create_time())


def _boot() -> str:
    """Which boot of the system this is, where it tells."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _lives(found: psutil.Process) -> bool:
    return bool(found.status() != psutil.STATUS_ZOMBIE)


def _state_file(stack: Stack) -> Path:
    return stack.state / "supervisor.json"


def stop_leftovers(stack: Stack) -> int:
    """Stops the parts that a supervisor left behind when it was killed; tells how many."""
    state = read_state(stack)
    if state is None or state.is_running:
        return 0
    found = [(process(part.pid, part.created), part.stop_s) for part in reversed(state.parts.values())]
    living = [(part, seconds) for part, seconds in found if part is not None]
    for part, seconds in living:
        with contextlib.suppress(psutil.Error):
            part.terminate()
            if psutil.wait_procs([part], timeout=seconds)[1]:
                part.kill()
    return len(living)


class Supervisor:
    """Runs parts until it is told to stop. `report` is told of every part that is ready, and once,
    with None, when all are."""

    def __init__(self, stack: Stack, parts: Sequence[Part], report: Callable[[Part | None], None]) -> None:
        self._stack = stack
        self._parts = parts
        self._report = report
        self._stop = asyncio.Event()
        self._failure: Failure | None = None
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        me = os.getpid()
        began = (me, born(me), time.time())
        self._state = StackState(*began, stack.url, stack.broker_address, stack.llm_address, _boot())
        self._is_written = False
        self._state.parts = {part.name: _state_of(part) for part in parts}

    async def run(self) -> None:
        """Runs until SIGINT or SIGTERM; a second one hurries the parts. Raises `Failure` when a part does
        not start."""
        with _lock(self._stack):
            stop_leftovers(self._stack)
            check_ports(self._parts)
            self._write()
            if not self._is_written:
                raise Failure(f"{self._stack.state} cannot be written.", "Perhaps the disk is full.")
            for part in self._parts:
                part.prepare()
            on_signals(self._told_to_stop)
            tasks = [asyncio.create_task(self._keep(part), name=part.name) for part in self._parts]
            tasks.append(asyncio.create_task(self._await_ready(), name="ready"))
            try:
                await self._stop.wait()
            finally:
                await self._stop_all(tasks)
            _state_file(self._stack).unlink(missing_ok=True)
            if self._failure is not None:
                raise self._failure

    async def _keep(self, part: Part) -> None:
        """Starts a part again and again."""
        state = self._state.parts[part.name]
        log = self._stack.logs / f"{part.name}.log"
        rotate(log)
        backoff = BACKOFF_FIRST_S
        while True:
            began = time.monotonic()
            ending = await self._run_once(part, state, log)
            if not self._state.ready and state.restarts + 1 >= START_TRIES:
                self._fail(f"The {part.title} does not start: it {ending}.", log)
                return
            backoff = BACKOFF_FIRST_S if time.monotonic() - began > HEALTHY_S else backoff
            with _heard_or_not():
                now = time.strftime("%Y-%m-%d %H:%M:%S")
                note(f"{now} The {part.title} {ending}; it is started again in {backoff:g} s.")
            rotate(log, LOG_MOST_BYTES)
            state.state, state.pid, state.since = "waiting", 0, time.time()
            state.restarts += 1
            self._write()
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, BACKOFF_MOST_S)

    async def _run_once(self, part: Part, state: PartState, log: Path) -> str:
        """Runs a part until it dies; returns how it ended."""
        try:
            with log.open("ab") as output:
                running = await asyncio.create_subprocess_exec(
                    *part.command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=child_environment(part.settings),
                    start_new_session=True,  # Ctrl-C is for the supervisor, which stops them in order
                )
        except OSError as error:
            return f"could not be run: {error}"
        self._processes[part.name] = running
        state.state, state.pid, state.since = "starting", running.pid, time.time()
        with contextlib.suppress(psutil.Error, OSError):
            state.created = born(running.pid)
        self._write()
        ready = asyncio.create_task(self._await_part(part, state, log), name=f"{part.name} ready")
        try:
            return f"ended with code {await running.wait()}"
        finally:
            ready.cancel()

    async def _await_part(self, part: Part, state: PartState, log: Path) -> None:
        """Notes when a part is ready, and looks after it from then on. Its port was free before, so who
        answers there is this part."""
        while not await asyncio.to_thread(part.is_ready):
            await asyncio.sleep(READY_POLL_S)
        self._note(state, "ready")
        with _heard_or_not():
            self._report(part)
        while True:
            await asyncio.sleep(WATCH_S)
            is_ready = not part.is_watched or await asyncio.to_thread(part.is_ready)
            self._note(state, "ready" if is_ready else "unresponsive")
            await asyncio.to_thread(cut, log)

    def _note(self, state: PartState, found: State) -> None:
        if state.state != found or not self._is_written:
            state.state = found
            self._write()

    async def _await_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while any(state.state != "ready" for state in self._state.parts.values()):
            if time.monotonic() > deadline:
                slow = next(state for state in self._state.parts.values() if state.state != "ready")
                self._fail(f"The {slow.title} is not ready after {START_TIMEOUT_S:.0f} s.", None)
                return
            await asyncio.sleep(READY_POLL_S)
        self._state.ready = True
        self._write()
        with _heard_or_not():
            self._report(None)

    def _fail(self, problem: str, log: Path | None) -> None:
        end = (
            [*tail(log), f"(all of it: {log})"]
            if log is not None
            else [f"See the logs in {self._stack.logs}."]
        )
        self._failure = self._failure or Failure(problem, *end)
        self._stop.set()

    def _told_to_stop(self) -> None:
        if self._stop.is_set():
            for running in self._processes.values():
                if running.returncode is None:
                    running.terminate()
        self._stop.set()

    async def _stop_all(self, tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for part in reversed(self._parts):
            running = self._processes.get(part.name)
            if running is not None and running.returncode is None:
                await _stop(running, part.stop_s)

    def _write(self) -> None:
        """Replaces the state file at once, so that nobody reads half of it; later, while the disk is full."""
        file = _state_file(self._stack)
        new = file.with_suffix(".new")
        try:
            new.write_bytes(msgspec.json.format(msgspec.json.encode(self._state)))
            new.replace(file)
        except OSError:
            self._is_written = False
        else:
            self._is_written = True


def _state_of(part: Part) -> PartState:
    return PartState(part.title, part.address, stop_s=part.stop_s)


async def _stop(running: asyncio.subprocess.Process, seconds: float) -> None:
    with contextlib.suppress(ProcessLookupError):
        running.terminate()
        try:
            async with asyncio.timeout(seconds):
                await running.wait()
        except TimeoutError:
            running.kill()
            await running.wait()


@contextlib.contextmanager
def _heard_or_not() -> Iterator[None]:
    """For what is told: that nobody takes it is no reason to end."""
    with contextlib.suppress(OSError, SystemExit):  # rich exits when a pipe is closed
        yield


def rotate(log: Path, beyond: int = 0) -> None:
    """Begins a log that is longer than that anew, if it can be done, and keeps the one before. Who appends to
    it goes on in the new one."""
    with contextlib.suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.exists() and log.stat().st_size > beyond:
            shutil.copyfile(log, log.with_suffix(".old.log"))
            os.truncate(log, 0)


def cut(log: Path) -> None:
    """Begins a log that has grown too long anew, while a program appends to it."""
    if sys.platform != "win32":  # there the program would write on at its old place, after a hole
        rotate(log, LOG_MOST_BYTES)


@contextlib.contextmanager
def stopped_as_by_ctrl_c() -> Iterator[None]:
    """Has what service managers send end what is done here as Ctrl-C does, and with it the programs that it
    runs."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def on_signals(stop: Callable[[], None]) -> None:
    """Has `stop` called on the running loop by Ctrl-C and by what service managers send."""
    loop = asyncio.get_running_loop()
    if sys.platform == "win32":
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop))
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Under `nohup` a closing terminal is to be ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, stop)


def check_not_running(stack: Stack) -> None:
    """Raises `Failure` when there is a supervisor."""
    with _lock(stack):
        pass


@contextlib.contextmanager
def _lock(stack: Stack) -> Iterator[None]:
    """Holds the stack's lock: there is at most one supervisor. The system lets go of it when the
    process dies, however it dies."""
    with (stack.state / "supervisor.lock").open("a") as file:
        try:
            lock_file(file)
        except OSError:
            state = read_state(stack)
            where = f" at {state.url}" if state else ""
            raise Failure(
                f"It is running already{where}.", "See it with `status`, stop it with `down`."
            ) from None
        yield


def lock_file(file: IO[str]) -> None:
    """Takes the lock of an open file, for as long as it is open. Raises `OSError` when it is taken."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
