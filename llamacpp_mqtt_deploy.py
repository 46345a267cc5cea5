#!/usr/bin/env python3
"""Runs the MQTT side of Prompt Portal alone. Try: python llamacpp_mqtt_deploy.py --help"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
INSTALL = r".\setup_llm.bat install" if sys.platform == "win32" else "./setup_llm.sh install"


def run() -> int:
    """Hands over to the portal's code, in the project's own environment where this one lacks packages."""
    if sys.version_info < (3, 11):  # noqa: UP036 - whatever is called python here
        return elsewhere("Python 3.11 or newer is needed")
    sys.path.insert(0, str(ROOT / "backend"))
    try:
        from app.cli.deploy import main
    except ModuleNotFoundError as missing:
        return elsewhere(f"the Python package {missing.name} is missing")
    return main()


def elsewhere(reason: str) -> int:
    """Runs this program again with the Python of `.venv`."""
    if not PYTHON.exists() or Path(sys.prefix).resolve() == VENV.resolve():
        sys.exit(f"llamacpp_mqtt_deploy.py: {reason}. Run {INSTALL} once, and then this again.")
    command = [str(PYTHON), str(ROOT / "llamacpp_mqtt_deploy.py"), *sys.argv[1:]]
    if sys.platform == "win32":
        return subprocess.call(command)
    return os.execv(command[0], command)  # noqa: S606 - the same program, with another Python


if __name__ == "__main__":
    sys.exit(run())
