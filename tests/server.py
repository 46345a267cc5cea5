"""Starts the portal as `run_server.py` does, but that passwords cost next to nothing, and with other times
where the first words name them: `app.services.drain.LOOK_S=0.5`."""

from __future__ import annotations

import importlib
import sys

from pwdlib import PasswordHash
from pwdlib.hashers.argon2 import Argon2Hasher

import run_server
from app.services import accounts


def quicken_passwords() -> None:
    """Lets hashes be made, and looked at, in no time: those that the portal makes take a core for a quarter
    of a second, on purpose."""
    hasher = PasswordHash([Argon2Hasher(time_cost=1, memory_cost=8, parallelism=1)])
    accounts._hasher, accounts._DECOY = hasher, hasher.hash("no account has this password")


def set_time(word: str) -> None:
    """Gives a constant of a module another value. It must be there, and be a number."""
    name, value = word.split("=")
    module_name, _, constant = name.rpartition(".")
    module = importlib.import_module(module_name)
    assert isinstance(getattr(module, constant), float | int), name
    setattr(module, constant, float(value))


def main() -> int:
    quicken_passwords()
    while "=" in sys.argv[1]:
        set_time(sys.argv.pop(1))
    return run_server.main()


if __name__ == "__main__":
    sys.exit(main())
