"""What was seen: a table for people, JSON for programs, and plots."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.rows import Row
from tests.support import ROOT

BUSY_LOAD = 0.7


@dataclass(slots=True)
class Result:
    """The samples of a row by column, and why a column has none."""

    row: Row
    samples: dict[str, list[float]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the portal's median is at the bar; None when it was not measured."""
        seen = self.samples.get("portal")
        return self.row.meets(median(seen)) if seen else None


def machine() -> dict[str, Any]:
    """Where and of what it was measured."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, check=False, capture_output=True, text=True)
    cpu = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []


def show(console: Console, results: list[Result]) -> None:
    """Prints a table: for each row the bar, and each column's median, with the lowest and the highest."""
    table = Table("", "median", "lowest", "highest", "", box=None, pad_edge=False)
    for column in ("median", "lowest", "highest"):
        next(c for c in table.columns if c.header == column).justify = "right"
    for result in results:
        row = result.row
        sign = "≥" if row.better == "more" else "≤"
        met = {True: Text("met", "green"), False: Text("not met", "red"), None: Text("not measured")}
        table.add_row(Text.assemble((row.name, "bold"), ": ", row.title), "", "", "", "")
        told = Text(f"  bar, {row.unit}", "dim")
        table.add_row(told, f"{sign} {row.bar:g}", "", "", met[result.met])
        for column in row.columns:
            seen = result.samples.get(column)
            if seen:
                shown = [figure(value) for value in (median(seen), min(seen), max(seen))]
                table.add_row(f"  {column}", *shown, "")
            elif column in result.problems:
                table.add_row(f"  {column}", "failed", "", "", "")
    console.print(table)
    for result in results:
        for column, problem in result.problems.items():
            console.print(f"{result.row.name}, {column}: {problem}", style="yellow")


def figure(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def save(directory: Path, where: dict[str, Any], results: list[Result]) -> None:
    """Writes `results.json`, `results.svg`, and for series of values an SVG each."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = {
        result.row.name: {
            "title": result.row.title,
            "unit": result.row.unit,
            "bar": result.row.bar,
            "better": result.row.better,
            "met": result.met,
            "samples": result.samples,
            "problems": result.problems,
            "series": result.row.series() if result.row.series else {},
        }
        for result in results
    }
    (directory / "results.json").write_text(json.dumps({"machine": where, "rows": rows}, indent=1))
    (directory / "results.svg").write_text(bars(results))
    for result in results:
        series = result.row.series() if result.row.series else {}
        if "portal" in series:
            (directory / f"{result.row.name}.svg").write_text(lines(result.row, series))


# --- plots -----------------------------------------------------------------------------------------

WIDTH = 860
LABEL = 330
COLOURS = ("#0a7566", "#c98a1b", "#5b6b9e", "#9e5b7f", "#7a7a7a")
STYLE = "font: 13px system-ui, sans-serif; fill: #222"


def bars(results: list[Result]) -> str:
    """For each row, how far each column is on the way to the bar: longer is better, the line is the bar."""
    parts, y = [], 30
    scale = (WIDTH - LABEL - 110) / 2.5
    for result in results:
        seen = {
            column: median(values)
            for column, values in result.samples.items()
            if values and column != "straight"
        }
        parts.append(f'<text x="8" y="{y + 14}" font-weight="600">{result.row.title}</text>')
        y += 22
        for place, (column, value) in enumerate(seen.items()):
            ratio = (
                value / result.row.bar if result.row.better == "more" else result.row.bar / max(value, 1e-9)
            )
            length = max(2.0, min(ratio, 2.5) * scale)
            colour = COLOURS[place % len(COLOURS)]
            parts.append(f'<text x="{LABEL - 8}" y="{y + 13}" text-anchor="end">{column}</text>')
            parts.append(
                f'<rect x="{LABEL}" y="{y}" width="{length:.0f}" height="16" rx="3" fill="{colour}"/>'
            )
            text = f"{figure(value)} {result.row.unit}"
            parts.append(f'<text x="{LABEL + length + 6:.0f}" y="{y + 13}">{text}</text>')
            y += 20
        y += 10
    bar = LABEL + scale
    line = f'<line x1="{bar:.0f}" x2="{bar:.0f}" y1="24" y2="{y}" stroke="#c33" stroke-dasharray="4 3"/>'
    label = "the bar (drawn to 2.5 times it)"
    head = f'<text x="{bar:.0f}" y="18" text-anchor="middle" fill="#c33">{label}</text>'
    return _svg(y + 10, [head, *parts, line])


def lines(row: Row, series: dict[str, list[float]]) -> str:
    """Each series of times in seconds, over the number of its turn."""
    drawn = {name: values for name, values in series.items() if len(values) > 2}
    top = max(max(values) for values in drawn.values())
    longest = max(len(values) for values in drawn.values())
    width, height, left = WIDTH - 90, 300, 60
    parts = [f'<text x="{left}" y="20" font-weight="600">{row.title}</text>']
    for step in range(5):
        y = 340 - height * step / 4
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{top * step / 4:.2g} s</text>')
    for place, (name, values) in enumerate(drawn.items()):
        points = [
            f"{left + width * n / longest:.1f},{340 - height * value / top:.1f}"
            for n, value in enumerate(values)
        ]
        colour = COLOURS[place]
        parts.append(f'<polyline fill="none" stroke="{colour}" points="{" ".join(points)}"/>')
        parts.append(f'<text x="{left + 10 + 160 * place}" y="375" style="fill: {colour}">{name}</text>')
    parts.append(f'<text x="{left + width}" y="358" text-anchor="end">turn {longest}</text>')
    return _svg(390, parts)


def _svg(height: int, parts: list[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" style="{STYLE}">\n<rect width="100%" height="100%" fill="#fff"/>\n'
        f"{body}\n</svg>\n"
    )
