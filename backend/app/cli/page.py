"""Builds the page, with the Node.js that is there or one from the Python package index."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from app.cli.console import Failure, note, run_step
from app.cli.install import install_packages
from app.cli.stack import ROOT, Stack
from app.config import child_environment

FRONTEND = ROOT / "frontend"
DIST = FRONTEND / "dist"
BUILD_STAMP = DIST / ".stamp"
MODULES_STAMP = FRONTEND / "node_modules" / ".stamp"
NODE_VERSION = (22, 22)


def build_page(stack: Stack) -> None:
    """Builds the page, unless that was done already from the same sources. Raises `Failure`."""
    wanted = _digest(_sources())
    if _read(BUILD_STAMP) == wanted:
        return
    install_modules(stack)
    run_step("Building the page", npm(stack, "run", "build"), stack.logs / "page.log", npm_environment())
    BUILD_STAMP.write_text(wanted)


def build_page_if_possible(stack: Stack) -> None:
    """The same; where it cannot be done it says why, and that all else works."""
    try:
        build_page(stack)
    except Failure as failure:
        failure.show()
        note("Without the page the portal serves its API alone; `install` tries again to build it.")


def install_modules(stack: Stack) -> None:
    """Installs what the page is built from, unless that was done already."""
    wanted = _digest([FRONTEND / "package-lock.json"])
    if _read(MODULES_STAMP) == wanted:
        return
    run_step(
        "Fetching the packages of the page", npm(stack, "ci"), stack.logs / "page.log", npm_environment()
    )
    MODULES_STAMP.write_text(wanted)


def npm(stack: Stack, *arguments: str) -> list[str]:
    """The command that runs npm on the page; Node.js is installed into Python's environment where there
    is none that is new enough."""
    program = shutil.which("npm") if _is_new_enough(shutil.which("node")) else None
    if program is None:
        install_packages(stack, "requirements-node.txt", "Node.js, which builds the page (60 MB)")
        program = shutil.which("npm", path=Path(sys.executable).parent)
    if program is None:
        raise Failure("Node.js was installed without npm.", "Install Node.js 22 or newer and run this again.")
    return [program, "--prefix", str(FRONTEND), *arguments]


def npm_environment() -> dict[str, str]:
    """The environment for npm, whose programs look for `node` on the PATH."""
    return child_environment({}, first_on_path=Path(sys.executable).parent)


def _is_new_enough(node: str | None) -> bool:
    if node is None:
        return False
    answer = subprocess.run([node, "--version"], check=False, capture_output=True, text=True)
    version = answer.stdout.strip().removeprefix("v").split(".")[:2]
    return all(part.isdecimal() for part in version) and tuple(map(int, version)) >= NODE_VERSION


def _sources() -> Iterator[Path]:
    """Every file that the built page depends on."""
    for name in (
        "package-lock.json",
        "package.json",
        "index.html",
        "docs.html",
        "vite.config.ts",
        "tsconfig.json",
    ):
        yield FRONTEND / name
    for folder in ("src", "public"):
        yield from sorted(path for path in (FRONTEND / folder).rglob("*") if path.is_file())


def _digest(files: Iterator[Path] | list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(FRONTEND).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _read(stamp: Path) -> str:
    return stamp.read_text() if stamp.exists() else ""
