"""Measures: rounds of all columns in turn, so that what changes on the machine changes for all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from subprocess import SubprocessError

import httpx

from app.cli.console import Failure, console
from benchmarks.profiling import profile
from benchmarks.report import BUSY_LOAD, Result, figure, machine, save, show
from benchmarks.rows import ROWS
from benchmarks.stage import Impossible, can_pin

OWN = ("portal", "straight")

PROBLEMS = (Impossible, Failure, AssertionError, OSError, RuntimeError, httpx.HTTPError, SubprocessError)
"""What may go wrong with one cell without ending the others."""


def run(names: Sequence[str], rounds: int, seconds: float, out: Path, *, peers: bool, profiled: bool) -> int:
    """Measures the rows with these names, or all, and reports into `out`. `seconds` is how long load is
    put on for one value. Returns 0, or 1 when the portal could not be measured in some row."""
    chosen = [row for row in ROWS if not names or row.name in names]
    where = machine()
    if not can_pin():
        console.print("One core, or no way to pin: the figures include what the load itself costs.")
    if (where["load_before"] or 0) > BUSY_LOAD:
        console.print(f"This machine is busy (load {where['load_before']:.1f}): the figures will be low.")
    results = []
    try:
        for row in chosen:
            results.append(Result(row))
            _measure(results[-1], rounds, seconds, peers=peers)
            save(out, where, results)
    except KeyboardInterrupt:
        console.print("Stopped; this is what there is so far.")
    show(console, results)
    save(out, where, results)
    if profiled:
        profile(out, seconds)
    console.print(f"All of it: {out}")
    return 1 if any(result.met is None for result in results) else 0


def _measure(result: Result, rounds: int, seconds: float, *, peers: bool) -> None:
    row = result.row
    columns = [column for column in row.columns if peers or column in OWN]
    for number in range(row.rounds or rounds):
        for column in columns:
            if column in result.problems:
                continue
            try:
                value = row.measure(column, seconds)
            except PROBLEMS as problem:
                result.problems[column] = f"{type(problem).__name__}: {problem}"[:300]
                console.print(f"  {row.name} {column}: {result.problems[column]}", style="yellow")
                continue
            result.samples.setdefault(column, []).append(value)
            console.print(f"  {row.name}, round {number + 1}, {column}: {figure(value)} {row.unit}")
