"""What the portal is compared with. Each runs in a Python environment of its own."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from app.cli.console import run_step
from app.cli.stack import DEFAULT_STATE

HERE = Path(__file__).parent
ENVIRONMENTS = DEFAULT_STATE / "bench"

KEY = "sk-7f3a9c52e8d14b06a7c1"
"""What requests to peers carry; those that check keys know it."""

LITELLM_CONFIG = """\
general_settings:
  master_key: {key}
model_list:
  - model_name: mock
    litellm_params:
      model: openai/mock
      api_base: http://127.0.0.1:{upstream}/v1
      api_key: none
litellm_settings:
  telemetry: false
"""


@dataclass(frozen=True, slots=True)
class Peer:
    """A program with the packages that it needs. Programs of this folder are called with their port (for
    MQTT: the broker's) and the upstream's."""

    name: str
    packages: tuple[str, ...]

    @property
    def python(self) -> Path:
        """The Python of its environment."""
        return ENVIRONMENTS / self.name / "bin" / "python"

    def install(self) -> None:
        """Makes its environment, unless that was done already. Raises `Failure`."""
        directory = ENVIRONMENTS / self.name
        stamp = directory / ".stamp"
        wanted = "\n".join(self.packages)
        if stamp.exists() and stamp.read_text() == wanted:
            return
        log = ENVIRONMENTS / f"{self.name}.log"
        run_step(
            f"Making an environment for {self.name}", [sys.executable, "-m", "venv", str(directory)], log
        )
        pip = [str(self.python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar=off"]
        run_step(f"Installing {self.name}", [*pip, *self.packages], log)
        stamp.write_text(wanted)

    def command(self, port: int, upstream: int, directory: Path) -> list[str]:
        """The command that runs it."""
        if self.name != "litellm":
            program = HERE / f"{self.name.replace('-', '_')}.py"
            return [str(self.python), str(program), str(port), str(upstream)]
        config = directory / "litellm.yaml"
        config.write_text(LITELLM_CONFIG.format(upstream=upstream, key=KEY))
        litellm = str(self.python.with_name("litellm"))
        return [litellm, "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]


WEB = ("fastapi==0.165.0", "uvicorn[standard]==0.54.0")

PEERS = {
    peer.name: peer
    for peer in (
        Peer("litellm", ("litellm[proxy]==1.106.0",)),
        Peer("fastapi-sdk", (*WEB, "openai==3.52.0")),
        Peer("fastapi-aiohttp", (*WEB, "aiohttp==3.14.5")),
        Peer("paho-sdk", ("paho-mqtt==2.2.0", "openai==3.52.0")),
    )
}
