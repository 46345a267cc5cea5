"""`up`, in the foreground and detached."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from app.cli import install, page
from app.cli.console import Failure, Step, console, done, note
from app.cli.parts import Part, in_checkout, parts_of
from app.cli.people import invite_first_admin
from app.cli.proof import prove
from app.cli.stack import Stack
from app.cli.supervisor import Supervisor, check_not_running, read_state, rotate, stopped_as_by_ctrl_c
from app.config import Settings, child_environment

POLL_S = 0.1


@stopped_as_by_ctrl_c()
def prepare(stack: Stack) -> tuple[Stack, Path | None, str | None]:
    """Gets everything that the stack needs: the stack as it can be, its model, its broker's program."""
    stack.prepare()
    stack = stack.as_set()
    model = None
    if stack.llm_url is None:
        install.install_packages(stack, "requirements-llm.txt", "llama.cpp's server (35 MB)")
        model = stack.model or install.starter_model(stack)
        if stack.model is not None and _has_gpu():
            note("This llama.cpp runs on the CPU. For a server that uses the GPU: --llm-url URL.")
    broker = None
    if stack.broker_url is None:
        broker = install.mosquitto(stack)
        if broker is None:
            note("Without an MQTT broker the portal serves HTTP alone. To use one elsewhere: --broker URL.")
            stack = stack.without_broker()
        else:
            stack = stack.with_broker(broker)
    page.build_page_if_possible(stack)
    return stack, model, broker


def _has_gpu() -> bool:
    return Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


def run(stack: Stack, *, introduce: bool) -> None:
    """Runs the stack until Ctrl-C or SIGTERM; with `introduce` it proves it once it is ready, and tells
    where to go. Raises `Failure` when it does not start."""
    stack, model, broker = prepare(stack)
    settings = stack.portal_settings()
    asyncio.run(_supervise(stack, parts_of(stack, model, broker, settings), settings, introduce))


async def _supervise(stack: Stack, parts: Sequence[Part], settings: Settings, introduce: bool) -> None:
    began = time.monotonic()
    ready = asyncio.Event()

    def report(part: Part | None) -> None:
        if part is None:
            ready.set()
        elif not ready.is_set():
            done(part.title, f"{part.address} ({time.monotonic() - began:.1f} s)")

    async def announce() -> None:
        await ready.wait()
        if introduce:  # on a thread that Ctrl-C need not wait for
            words = (stack, settings, "Ctrl-C stops it.")
            threading.Thread(target=_introduce, args=words, daemon=True).start()

    announcing = asyncio.create_task(announce(), name="announce")
    try:
        await Supervisor(stack, parts, report).run()
    finally:
        announcing.cancel()
    console.print("Stopped.")


def _introduce(stack: Stack, settings: Settings, how_to_stop: str) -> bool:
    """Proves that it works, and tells where to go. What fails is told; the stack goes on running. Returns
    whether it works."""
    works = True
    try:
        prove(stack, settings)
    except Failure as failure:
        failure.show()
        works = False
    where_to_go(stack)
    console.print(how_to_stop)
    return works


def detach(stack: Stack, arguments: Sequence[str]) -> bool:
    """Runs this program with `arguments` in the background, and returns once the stack is ready: whether it
    works. Raises `Failure` when it does not start."""
    stack, _, _ = prepare(stack)
    settings = stack.portal_settings()
    check_not_running(stack)
    log = stack.logs / "supervisor.log"
    rotate(log)
    with log.open("ab") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "app.cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=child_environment({}),
            start_new_session=True,
        )
    with Step("Starting") as step:
        while not _is_ready(stack, child, log):
            time.sleep(POLL_S)
            step.tell()
    state = read_state(stack)
    for part in state.parts.values() if state else ():
        done(part.title, part.address)
    return _introduce(
        stack, settings, "It runs in the background: see `status` and `logs`, stop it with `down`."
    )


def _is_ready(stack: Stack, child: subprocess.Popen[bytes], log: Path) -> bool:
    if child.poll() is not None:
        raise _gone(log)
    state = read_state(stack)
    return state is not None and state.pid == child.pid and state.ready


def _gone(log: Path) -> Failure:
    """The failure that the supervisor showed before it ended."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    shown = next((number for number, line in enumerate(lines) if line.startswith("✗")), 0)
    problem, *remedies = lines[shown:] or ["It ended without a word."]
    return Failure(problem.removeprefix("✗ "), *remedies)


def where_to_go(stack: Stack) -> None:
    """Prints the addresses."""
    console.print()
    console.print(Text.assemble("  Portal      ", (stack.url, "bold")))
    console.print(f"  API         {stack.url}/docs")
    console.print(f"  LLM server  {stack.llm_address}")
    console.print(f"  MQTT        {', '.join(stack.mqtt_addresses) or 'none'}")
    console.print(f"  Settings    {in_checkout(stack.env_file)}")
    console.print(f"  Logs        {in_checkout(stack.logs)}")
    link = invite_first_admin(stack.env_file)
    if link is not None:
        console.print(Text.assemble("  First admin ", (f"{stack.url}{link.path}", "bold")), soft_wrap=True)
        console.print("              makes the admin's account, once, within a week.")
    console.print()
