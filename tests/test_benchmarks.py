"""The benchmarks run: no figure is looked at here, only that there are some."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli import install
from app.cli.__main__ import app
from app.config import BACKEND_DIR, child_environment
from tests.support import ROOT


def bench(*arguments: str, without: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the benchmarks; with modules in the place of others that must not be asked for."""
    places = [without, BACKEND_DIR, ROOT] if without else [BACKEND_DIR, ROOT]
    environment = child_environment({"PYTHONPATH": os.pathsep.join(map(str, places))})
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_rows_are_measured_and_reported(tmp_path: Path) -> None:
    rows = ["http", "burst", "mqtt", "memory", "sockets-shared"]
    chosen = [option for row in rows for option in ("--row", row)]
    done = bench(*chosen, "--rounds", "1", "--seconds", "0.5", "--no-peers", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["rows"]) == rows
    for name, row in results["rows"].items():
        assert row["samples"]["portal"][0] > 0, name
        assert row["problems"] == {}
        assert name in done.stdout
    assert results["rows"]["http"]["samples"]["straight"][0] > results["rows"]["http"]["samples"]["portal"][0]
    assert results["machine"]["cores"]
    assert ET.parse(tmp_path / "results.svg").getroot().tag.endswith("svg")


def test_its_help_wants_nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "httpx.py").write_text("raise ModuleNotFoundError")
    told = bench("--help", without=tmp_path)
    assert "--rounds" in told.stdout, told.stderr
    monkeypatch.setattr(install, "install_packages", lambda *_: pytest.fail("it installs something"))
    assert CliRunner().invoke(app, ["bench", "--help"]).exit_code == 0


def test_an_unknown_row_is_named_with_the_way_to_the_known_ones() -> None:
    done = bench("--row", "nothing")
    assert done.returncode == 2
    assert "no row nothing" in done.stdout
    assert "--list" in done.stdout
    assert "mqtt-latency" in bench("--list").stdout
