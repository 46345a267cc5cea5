"""Where the portal's time goes under load, by py-spy."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Literal

from app.cli.console import console
from benchmarks.load import Order
from benchmarks.peers import Peer
from benchmarks.rows import LANES, TOKENS
from benchmarks.stage import Bridge, bridge, load, upstream

PY_SPY = Peer("py-spy", ("py-spy==0.4.3",))
RATE = 400
SHOWN = 25


def profile(out: Path, seconds: float) -> None:
    """Writes a flame graph, the stacks behind it, and a list of where the time goes, of HTTP, streams and
    MQTT each. Needs the right to look into other processes."""
    if sys.platform == "win32":
        console.print("Profiles need py-spy's raw format on Linux or macOS.")
        return
    PY_SPY.install()
    kinds: tuple[Literal["whole", "burst", "mqtt"], ...] = ("whole", "burst", "mqtt")
    for kind in kinds:
        with upstream(chunks=TOKENS) as port, bridge("portal", port, mqtt=kind == "mqtt") as there:
            target = there.mqtt_port if kind == "mqtt" else there.port
            order = Order(kind, target, LANES, seconds + 4, there.shape, there.token, TOKENS)
            loading = threading.Thread(target=load, args=(order,), daemon=True)
            loading.start()
            stacks = out / f"profile-{kind}.txt"
            _record(there, "raw", stacks, seconds / 2)
            _record(there, "flamegraph", out / f"profile-{kind}.svg", seconds / 2)
            loading.join()
        (out / f"profile-{kind}-top.txt").write_text(top(stacks.read_text()))


def _record(there: Bridge, kind: str, file: Path, seconds: float) -> None:
    assert there.process is not None
    program = str(PY_SPY.python.with_name("py-spy"))
    command = [program, "record", "--rate", str(RATE), "--format", kind, "--output", str(file)]
    command += ["--duration", str(max(1, round(seconds))), "--pid", str(there.process.pid), "--nonblocking"]
    subprocess.run(command, check=True, capture_output=True)


def top(stacks: str) -> str:
    """The functions with the largest share of samples: by themselves, and with what they call."""
    own: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    for line in stacks.splitlines():
        path, _, count = line.rpartition(" ")
        frames = [frame.split(" (")[0] + " (" + _file(frame) for frame in path.split(";")]
        own[frames[-1]] += int(count)
        for frame in set(frames):
            whole[frame] += int(count)
    total = sum(own.values()) or 1
    lines = []
    for title, counted in (("by themselves", own), ("with what they call", whole)):
        lines += [title, *(f"{100 * n / total:5.1f} %  {name}" for name, n in counted.most_common(SHOWN)), ""]
    return "\n".join(lines)


def _file(frame: str) -> str:
    place = frame.rpartition(" (")[2].rpartition(":")[0]
    return "/".join(Path(place).parts[-2:]) + ")"
