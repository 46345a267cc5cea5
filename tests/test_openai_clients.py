"""Clients of others, as they are published, against a running portal: LiteLLM, LangChain, Simon Willison's
llm, and OpenAI's SDK for Node.js. Each is a program that says what it was told.

They are installed once, into `.portal/clients`, from pinned lists: what they need does not go together with
what the portal needs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.cli.page import npm, npm_environment
from app.cli.stack import Stack
from app.config import child_environment
from tests.fake_llm import USAGE, FakeLLM, Script, text
from tests.support import ROOT, Portal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

HERE = ROOT / "tests" / "clients"
INSTALLED = ROOT / ".portal" / "clients"
PYTHON = INSTALLED / "venv" / "bin" / "python"
LISTS = ("requirements.txt", "package.json", "package-lock.json", ".npmrc")

MODELS = """
[models.big]
id = "fake-1"
aliases = ["smart"]
"""

CALLS = [{"tool_calls": [{"index": 0, "id": "call_a", "function": {"name": "go", "arguments": '{"x": 1}'}}]}]
CALL = ["go", '{"x": 1}']


@pytest.fixture(scope="module")
def installed() -> Path:
    """Where they are, installed unless they are there already."""
    wanted = hashlib.sha256(b"\0".join((HERE / name).read_bytes() for name in LISTS)).hexdigest()
    stamp = INSTALLED / "stamp"
    if not stamp.is_file() or stamp.read_text() != wanted:
        shutil.rmtree(INSTALLED, ignore_errors=True)
        INSTALLED.mkdir(parents=True)
        _install_packages()
        for name in LISTS:
            shutil.copy(HERE / name, INSTALLED)
        _run([npm(Stack())[0], "ci", "--silent"], env=npm_environment(), cwd=INSTALLED)
        stamp.write_text(wanted)
    return INSTALLED


def _install_packages() -> None:
    """By uv, which takes seconds; by pip where uv cannot reach a registry that pip is set up for."""
    wanted = ["--requirement", str(HERE / "requirements.txt")]
    _run([sys.executable, "-m", "venv", str(INSTALLED / "venv")])
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", str(PYTHON), *wanted]
    if subprocess.run(uv, check=False).returncode:
        _run([str(PYTHON), "-m", "pip", "install", "--quiet", "--no-deps", *wanted])


def _run(command: list[str], **how: Any) -> str:
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command, check=False, capture_output=True, text=True, **how
    )
    assert done.returncode == 0, f"{command}: {done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def door(module_fake: FakeLLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Portal]:
    directory = tmp_path_factory.mktemp("clients")
    (directory / "models.toml").write_text(MODELS)
    running = Portal(directory, LLM_SERVER_URL=module_fake.url, LLM_SKIP_THINKING="false").start()
    module_fake.script = Script(
        pieces=[{"reasoning_content": "Hm."}, *text("Hello", " you")], calls=CALLS, usage=USAGE
    )
    yield running
    running.stop()


@pytest.fixture(scope="module")
def ada(door: Portal) -> Iterator[httpx.Client]:
    with door.client("ada") as client:
        yield client


@pytest.fixture(scope="module")
def key(ada: httpx.Client) -> str:
    """An API key, as programs have it."""
    return str(ada.post("/api/keys", json={"name": "clients"}).json()["secret"])


def run(installed: Path, program: str, door: Portal, key: str, **environment: str) -> Any:
    """What the program says that it was told."""
    if program.endswith(".py"):
        command, env = [str(PYTHON), str(HERE / program)], child_environment(environment)
    else:
        shutil.copy(HERE / program, installed)  # Node.js looks for packages beside the program
        command, env = ["node", str(installed / program)], npm_environment()
    return json.loads(_run([*command, door.url, key], env=env).splitlines()[-1])


def asked_in(ada: httpx.Client, session: str) -> list[str]:
    history = ada.get(f"/api/llm/chat/session/{session}/history").json()["messages"]
    return [message["content"] for message in history if message["role"] != "assistant"]


def test_litellm(installed: Path, door: Portal, ada: httpx.Client, key: str) -> None:
    told = run(installed, "litellm_client.py", door, key, LITELLM_LOCAL_MODEL_COST_MAP="True")
    refused = told.pop("refused")
    assert "fake-1" in refused
    assert told == {
        "whole": "Hello you",
        "thoughts": "Hm.",
        "tokens": 29,
        "streamed": "Hello you",
        "streamed_tokens": 29,
        "reasons": ["tool_calls", "tool_calls"],
        "calls": [CALL, CALL],
        "kept_out": True,
        "vectors": [[3.0, 0.5], [5.0, 0.5]],
        "response": "Hello you",
    }
    assert asked_in(ada, "litellm") == ["Hello", "Hello"]


def test_langchain(installed: Path, door: Portal, ada: httpx.Client, key: str) -> None:
    assert run(installed, "langchain_client.py", door, key) == {
        "whole": "Hello you",
        "tokens": 29,
        "cached": 15,
        "streamed": "Hello you",
        "calls": [["go", {"x": 1}]] * 2,
        "responses": ["Hello you", "Hello you"],
        "vectors": [[3.0, 0.5], [5.0, 0.5]],
    }
    assert asked_in(ada, "langchain") == ["Be brief.", "One", "Two"]


def test_node(installed: Path, door: Portal, ada: httpx.Client, key: str) -> None:
    assert run(installed, "node_client.js", door, key) == {
        "whole": "Hello you",
        "streamed": "Hello you",
        "tokens": 29,
        "calls": [CALL],
        "responses": ["Hello you", "response.completed"],
        "refused": "temperature",
        "models": ["big", "fake-1", "smart"],
        "vectors": [[3.0, 0.5]],
    }
    assert asked_in(ada, "node") == ["Hello", "Hello"]


def test_llm(installed: Path, door: Portal, ada: httpx.Client, key: str, tmp_path: Path) -> None:
    model = {
        "model_id": "portal",
        "model_name": "smart",
        "api_base": f"{door.url}/v1",
        "api_key_name": "portal",
    }
    models = [{**model, "headers": {"X-Session-Id": "llm"}}]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))  # JSON is YAML
    (tmp_path / "keys.json").write_text(json.dumps({"portal": key}))
    env = child_environment({"LLM_USER_PATH": str(tmp_path)})
    command = [str(PYTHON.parent / "llm"), "prompt", "-m", "portal"]
    assert _run([*command, "--system", "Be brief.", "One"], env=env).strip() == "Hello you"
    assert _run([*command, "--continue", "--no-stream", "Two"], env=env).strip() == "Hello you"
    assert asked_in(ada, "llm") == ["Be brief.", "One", "Two"]
