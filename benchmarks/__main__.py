"""`python -m benchmarks`: what the portal costs, beside what it is compared with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from app.cli.console import console
from app.cli.stack import DEFAULT_STATE


def main(
    row: Annotated[list[str] | None, typer.Option(help="Measure this row only; may be repeated")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How many values of each, in turn")] = 3,
    seconds: Annotated[float, typer.Option(min=0.5, help="How long load is put on for one value")] = 5.0,
    peers: Annotated[bool, typer.Option(help="Measure what it is compared with too, installing it")] = True,
    profile: Annotated[bool, typer.Option(help="Record where the time goes")] = False,
    out: Annotated[Path, typer.Option(help="Where the results go")] = DEFAULT_STATE / "bench" / "results",
    show_list: Annotated[bool, typer.Option("--list", help="Name the rows, and measure nothing")] = False,
) -> None:
    """Measures what the portal costs, beside what it is compared with: a table, JSON and plots."""
    # Needs what is installed for the tests; the help is there before.
    from benchmarks.rows import ROWS
    from benchmarks.run import run

    names = row or []
    if show_list:
        for known in ROWS:
            console.print(f"{known.name:16} {known.title}")
        return
    unknown = set(names) - {known.name for known in ROWS}
    if unknown:
        console.print(f"There is no row {', '.join(sorted(unknown))}; --list names them.")
        sys.exit(2)
    sys.exit(run(names, rounds, seconds, out, peers=peers, profiled=profile))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
    app.command()(main)
    app(prog_name="./setup_llm.sh bench")
