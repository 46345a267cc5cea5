"""The project's checks and tests, as contributors and CI run them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.text import Text

from app.cli.console import console, done
from app.cli.page import npm, npm_environment
from app.cli.stack import ROOT, Stack
from app.config import BACKEND_DIR, child_environment

IN_PROCESSES = ["-n", "3", "--dist", "loadfile", "--no-loadscope-reorder"]
"""For the whole of the tests: each file runs in one of three processes, which have servers of their own. As
tests wait much, three are faster than two on two cores. The files that take longest come first."""

Check = tuple[str, Path, list[str]]


def _checks(stack: Stack) -> list[Check]:
    """The title, the directory and the command of everything that is run before pytest."""
    return [
        ("Style", ROOT, [_tool("ruff"), "check", "."]),
        ("Format", ROOT, [_tool("ruff"), "format", "--check", "."]),
        ("Types", ROOT, [_tool("mypy")]),
        ("Imports", BACKEND_DIR, [_tool("lint-imports"), "--config", "../pyproject.toml"]),
        ("The page's style and types", ROOT, npm(stack, "run", "check")),
        ("The page's tests", ROOT, npm(stack, "test")),
    ]


def _tool(name: str) -> str:
    return shutil.which(name, path=Path(sys.executable).parent) or name


def run_checks(stack: Stack, pytest_arguments: Sequence[str]) -> int:
    """Runs the checks, two at a time, then pytest; returns the exit code of the first that fails. With
    arguments for pytest only the tests they name are run."""
    checks = [] if pytest_arguments else _checks(stack)
    with ThreadPoolExecutor(2) as pool:
        for (title, _, _), run in zip(checks, pool.map(_run_quietly, checks), strict=True):
            sys.stdout.write(run.stdout)
            if run.returncode:
                console.print(Text.assemble(("✗", "red"), " ", title))
                pool.shutdown(cancel_futures=True)
                return run.returncode
            done(title)
    return _run([sys.executable, "-m", "pytest", *(pytest_arguments or IN_PROCESSES)], ROOT)


def run_benchmarks(arguments: Sequence[str]) -> int:
    """Runs the benchmarks; returns their exit code."""
    environment = child_environment({"PYTHONPATH": os.pathsep.join([str(BACKEND_DIR), str(ROOT)])})
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, check=False, cwd=ROOT, env=environment).returncode


def _run_quietly(check: Check) -> subprocess.CompletedProcess[str]:
    """With what it says kept, so that two do not speak at once."""
    _, directory, command = check
    return subprocess.run(
        command,
        check=False,
        cwd=directory,
        env=npm_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )


def _run(command: list[str], directory: Path) -> int:
    return subprocess.run(command, check=False, cwd=directory, env=npm_environment()).returncode
