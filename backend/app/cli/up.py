"""`up`, in the foreground and detached."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from app.cli import install, page
from app.cli.console import Failure, Step, console, done, note
from app.cli.parts import Part, in_checkout, parts_of
from app.cli.people import invite_first_admin
from app.cli.proof import prove
from app.cli.stack import Stack
from app.cli.supervisor import Supervisor, read_state
from app.config import Settings, child_environment

POLL_S = 0.1


def prepare(stack: Stack) -> tuple[Stack, Path | None, str | None]:
    """Gets everything that the stack needs: the stack as it can be, its model, its broker's program."""
    stack.prepare()
    stack = stack.as_set()
    model = None
    if stack.llm_url is None:
        install.install_packages(stack, "requirements-llm.txt", "llama.cpp's server (35 MB)")
        model = stack.model or install.starter_model(stack)
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
            done(f"{part.title} [dim]{part.address} ({time.monotonic() - began:.1f} s)[/dim]")

    async def announce() -> None:
        await ready.wait()
        if introduce:  # on a thread that Ctrl-C need not wait for
            threading.Thread(target=_introduce, args=(stack, settings), daemon=True).start()

    announcing = asyncio.create_task(announce(), name="announce")
    try:
        await Supervisor(stack, parts, report).run()
    finally:
        announcing.cancel()
    console.print("Stopped.")


def _introduce(stack: Stack, settings: Settings) -> None:
    """Proves that it works, and tells where to go. What fails is told; the stack goes on running."""
    try:
        prove(stack, settings)
    except Failure as failure:
        failure.show()
    where_to_go(stack)
    console.print("Ctrl-C stops it.")


def detach(stack: Stack, arguments: Sequence[str]) -> None:
    """Runs this program with `arguments` in the background, and returns once the stack is ready and
    proven. Raises `Failure`."""
    stack, _, _ = prepare(stack)
    settings = stack.portal_settings()
    log = stack.logs / "supervisor.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
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
        done(f"{part.title} [dim]{part.address}[/dim]")
    prove(stack, settings)
    where_to_go(stack)
    console.print("It runs in the background: see `status` and `logs`, stop it with `down`.")


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
    console.print(f"  Portal      [bold]{stack.url}[/bold]")
    console.print(f"  API         {stack.url}/docs")
    console.print(f"  LLM server  {stack.llm_address}")
    console.print(f"  MQTT        {', '.join(stack.mqtt_addresses) or 'none'}")
    console.print(f"  Settings    {in_checkout(stack.env_file)}")
    console.print(f"  Logs        {in_checkout(stack.logs)}")
    link = invite_first_admin(stack.env_file)
    if link is not None:
        console.print(f"  First admin [bold]{stack.url}{link.path}[/bold]", soft_wrap=True)
        console.print("              makes the admin's account, once, within a week.")
    console.print()
