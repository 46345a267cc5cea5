"""The project's checks and tests, as contributors and CI run them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from app.cli.console import console, done
from app.cli.stack import ROOT
from app.config import BACKEND_DIR, child_environment

CHECKS: tuple[tuple[str, Path, tuple[str, ...]], ...] = (
    ("Style", ROOT, ("ruff", "check", ".")),
    ("Format", ROOT, ("ruff", "format", "--check", ".")),
    ("Types", ROOT, ("mypy",)),
    ("Imports", BACKEND_DIR, ("lint-imports", "--config", "../pyproject.toml")),
)


def run_checks(pytest_arguments: Sequence[str]) -> int:
    """Runs the checks, then pytest; returns the exit code of the first that fails. With arguments for
    pytest only the tests they name are run."""
    if not pytest_arguments:
        for title, directory, command in CHECKS:
            tool = shutil.which(command[0], path=Path(sys.executable).parent)
            code = _run(Path(tool or command[0]), *command[1:], directory=directory)
            if code:
                console.print(f"[red]✗[/red] {title}")
                return code
            done(title)
    return _run(Path(sys.executable), "-m", "pytest", *pytest_arguments, directory=ROOT)


def _run(program: Path, *arguments: str, directory: Path) -> int:
    environment = child_environment({})
    return subprocess.run([program, *arguments], check=False, cwd=directory, env=environment).returncode
