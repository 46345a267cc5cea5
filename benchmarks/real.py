"""Rows with the real model, with a large database, and with the setup as people run it."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import insert, select

from app.cli.install import starter_model
from app.cli.stack import Stack
from app.database import create_portal_engine
from app.events import new_id
from app.models.tables import messages, sessions, turns, users
from benchmarks.load import share
from benchmarks.stage import Bridge, Impossible, bridge, upstream
from tests.support import ROOT, LlamaServer, free_port

SESSIONS = 8
REPLY_TOKENS = 96
CHAT_TURNS = 200
CHAT_BUDGET = 1400
CHAT_REPLY_TOKENS = 48
READING_S = 3.0
"""How long the person of the long chat takes to read a reply and to write the next message: the replies have
some 36 words, which take more than twice as long to read. In this time a new prefix is warmed."""

STORED = 100_000
IN_USE = 1_000
STORED_MESSAGES = (1_000, 10)
SESSIONS_FOR_CPU = 60
TURNS_FOR_CPU = 5
TRIM_TURNS = 40
TURNS_TO_FILL = 30
"""Turns after which the budget is surely used up: a turn has at least 60 tokens."""

Piece = Callable[[dict[str, Any]], str | None]
"""What an event of a stream adds to the reply."""

_series: dict[str, list[float]] = {}


@contextmanager
def llama(context: int = 2048, slots: int = SESSIONS) -> Iterator[LlamaServer]:
    """llama.cpp with the starter model."""
    with tempfile.TemporaryDirectory() as directory:
        server = LlamaServer(starter_model(Stack()), Path(directory), slots=slots, context=context)
        try:
            yield server
        finally:
            server.stop()


# --- tokens a second through the bridge and straight ----------------------------------------------


def throughput(column: str, seconds: float) -> float:  # noqa: ARG001
    """Tokens a second of eight sessions through the portal, over the same straight at llama.cpp."""
    with llama() as server, bridge("portal", server.port, settings={"LLM_MAX_CONCURRENCY": "8"}) as there:
        straight_url = f"{server.url}/v1/chat/completions"
        headers = {"Authorization": f"Bearer {there.token}"}
        through_url = f"http://127.0.0.1:{there.port}/api/llm/chat/session"

        def straight(client: httpx.Client, number: int) -> int:
            body = {"messages": [_question(number)], "max_tokens": REPLY_TOKENS, "seed": number}
            answer = client.post(straight_url, json=body).raise_for_status().json()
            return int(answer["usage"]["completion_tokens"])

        def through(client: httpx.Client, number: int) -> int:
            body = {"session_id": new_id(), "message": _question(number)["content"], "seed": number}
            answer = client.post(through_url, json={**body, "max_tokens": REPLY_TOKENS}, headers=headers)
            return int(answer.raise_for_status().json()["usage"]["completion_tokens"])

        _tokens_per_s(straight)  # the first run pays for what llama.cpp sets up
        return _tokens_per_s(through) / _tokens_per_s(straight)


def _question(number: int) -> dict[str, str]:
    return {"role": "user", "content": f"Tell a long story about a maze with {number} doors."}


def _tokens_per_s(ask: Any) -> float:
    began = time.perf_counter()
    with httpx.Client(timeout=120) as client, ThreadPoolExecutor(SESSIONS) as pool:
        tokens = sum(pool.map(lambda number: ask(client, number), range(SESSIONS * 2)))
    return float(tokens / (time.perf_counter() - began))


# --- time to first token over a long conversation -------------------------------------------------


def ttft(column: str, seconds: float) -> float:  # noqa: ARG001
    """Mean time to first token over 200 turns at the history's budget, over that of a client that drops
    its oldest exchange at every turn. The person reads for `READING_S` before each of the turns that count.
    The trim's turns are all alike, so fewer of them are enough; a server that nobody asks anything while the
    person reads makes nothing of that time, so there is none."""
    with llama(slots=1) as server:
        with bridge("portal", server.port, settings={"LLM_MAX_HISTORY_TOKENS": str(CHAT_BUDGET)}) as there:
            _series["portal"] = _chat_through(there)
        _series["sliding trim"] = _chat_trimmed(server.url)
    portal, trimmed = _series["portal"], _series["sliding trim"]
    return _mean(portal) / _mean(trimmed)


def ttft_p95(column: str, seconds: float) -> float:
    """The same of the 95th percentiles, of the chats that `ttft` had where it was measured before."""
    if len(_series) < 2:
        ttft(column, seconds)
    return share(_series["portal"], 0.95) / share(_series["sliding trim"], 0.95)


def ttft_series() -> dict[str, list[float]]:
    """Every turn's time to first token in seconds, once `ttft` has run."""
    return _series


def _line(number: int) -> str:
    return (
        f"Turn {number}: the hero opens door {number * 7 % 100} of the maze. What is behind it? "
        + "Hm. " * 12
    )


def _chat_through(there: Bridge) -> list[float]:
    url = f"http://127.0.0.1:{there.port}/api/llm/chat/session/stream"
    headers = {"Authorization": f"Bearer {there.token}"}
    with httpx.Client(timeout=120, headers=headers) as client:
        took = []
        for number in range(CHAT_TURNS + TURNS_TO_FILL):
            if number >= TURNS_TO_FILL:
                time.sleep(READING_S)
            body = {"session_id": "long", "message": _line(number), "max_tokens": CHAT_REPLY_TOKENS}
            took.append(_first_token(client, url, body, _portal_piece)[0])
    return took[TURNS_TO_FILL:]


def _chat_trimmed(url: str) -> list[float]:
    history: list[dict[str, str]] = []
    took = []
    # llama.cpp ends a connection after some requests; a new one costs nothing beside a first token.
    fresh = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(timeout=120, limits=fresh) as client:
        for number in range(TRIM_TURNS + TURNS_TO_FILL):
            history.append({"role": "user", "content": _line(number)})
            while _prompt_tokens(client, url, history) > CHAT_BUDGET:
                del history[:2]
            body = {
                "messages": history,
                "stream": True,
                "max_tokens": CHAT_REPLY_TOKENS,
                "cache_prompt": True,
            }
            seconds, text = _first_token(client, f"{url}/v1/chat/completions", body, _openai_piece)
            took.append(seconds)
            history.append({"role": "assistant", "content": text})
    return took[TURNS_TO_FILL:]


def _prompt_tokens(client: httpx.Client, url: str, history: list[dict[str, str]]) -> int:
    answer = client.post(f"{url}/v1/chat/completions/input_tokens", json={"messages": history})
    return int(answer.raise_for_status().json()["input_tokens"])


def _first_token(client: httpx.Client, url: str, body: dict[str, Any], of: Piece) -> tuple[float, str]:
    """Seconds to the first piece of the reply, and the reply."""
    began = time.perf_counter()
    first, text = 0.0, ""
    with client.stream("POST", url, json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            piece = of(json.loads(line[5:])) if line.startswith("data: {") else None
            if piece:
                first = first or time.perf_counter() - began
                text += piece
    if not text:
        raise Impossible("a turn had no answer")
    return first, text


def _portal_piece(event: dict[str, Any]) -> str | None:
    return event["content"] if event["type"] == "token" else None


def _openai_piece(chunk: dict[str, Any]) -> str | None:
    return chunk["choices"][0]["delta"].get("content") if chunk["choices"] else None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


# --- large histories, many sessions ---------------------------------------------------------------


def long_history(column: str, seconds: float) -> float:  # noqa: ARG001
    """CPU time of a turn in a session of 1,000 messages, over one of 10."""
    with upstream() as port, bridge("portal", port) as there:
        for length in STORED_MESSAGES:
            _store(there, [f"length-{length}-{n}" for n in range(SESSIONS_FOR_CPU)], length)
        cost = [_cpu_of_turns(there, f"length-{length}") for length in STORED_MESSAGES]
        return cost[0] / cost[1]


def _cpu_of_turns(there: Bridge, prefix: str) -> float:
    """Of a few turns in each of many sessions: one session's history would grow beyond its length."""
    sessions_here = [f"{prefix}-{number}" for number in range(SESSIONS_FOR_CPU)]
    with _client(there) as client:
        for session in sessions_here:
            _turn(client, session)  # reads the history for the first time
        before = there.cpu_seconds()
        for session in sessions_here * TURNS_FOR_CPU:
            _turn(client, session)
        return there.cpu_seconds() - before


def stored_sessions(column: str, seconds: float) -> float:  # noqa: ARG001
    """Megabytes that the portal grows when 1,000 of 100,000 stored sessions are used."""
    with upstream(chunks=8) as port, bridge("portal", port) as there:
        names = [f"stored-{number}" for number in range(STORED)]
        _store(there, names, 2)
        with _client(there) as client:
            for number in range(20):
                _turn(client, f"warm-{number}")
            before = there.resident_mb()
            for name in names[:: STORED // IN_USE]:
                _turn(client, name)
            return there.resident_mb() - before


def _client(there: Bridge) -> httpx.Client:
    headers = {"Authorization": f"Bearer {there.token}"}
    return httpx.Client(base_url=f"http://127.0.0.1:{there.port}", headers=headers, timeout=60)


def _turn(client: httpx.Client, session: str) -> None:
    client.post("/api/llm/chat/session", json={"session_id": session, "message": "go on"}).raise_for_status()


def _store(there: Bridge, names: list[str], length: int) -> None:
    """Writes sessions with so many messages each straight into the portal's database."""
    assert there.portal is not None
    engine = create_portal_engine(f"sqlite:///{there.portal.directory / 'portal.db'}")
    with engine.begin() as connection:
        owner = f"user:{connection.execute(select(users.c.id)).scalar_one()}"
        made = [_session(owner, name, length) for name in names]
        connection.execute(insert(sessions), [session for session, _, _ in made])
        connection.execute(insert(turns), [turn for _, of_session, _ in made for turn in of_session])
        connection.execute(insert(messages), [message for _, _, said in made for message in said])
    engine.dispose()


def _session(owner: str, name: str, length: int) -> tuple[dict[str, Any], list[Any], list[Any]]:
    """The rows of a session whose turns have all ended."""
    now, session = time.time(), new_id()
    said: list[dict[str, Any]] = []
    happened = []
    for position in range(length // 2):
        turn = new_id()
        for role in ("user", "assistant"):
            text = f"{role} says something about door {position} of the maze"
            parent = said[-1]["id"] if said else None
            said.append(_message(session, turn, role, text, parent, now))
        happened.append(_ended_turn(session, turn, position, said[-2]["id"], now))
    row = {
        "id": session,
        "owner": owner,
        "session_id": name,
        "project": "prompt_portal",
        "system_prompt": "",
        "leaf_id": said[-1]["id"],
        "version": 1,
        "next_position": length // 2,
        "title": name,
        "created_at": now,
        "updated_at": now,
    }
    return row, happened, said


def _message(
    session: str, turn: str, role: str, content: str, parent: str | None, now: float
) -> dict[str, Any]:
    return {
        "id": new_id(),
        "session": session,
        "parent_id": parent,
        "turn_id": turn,
        "role": role,
        "content": content,
        "created_at": now,
    }


def _ended_turn(session: str, turn: str, position: int, message: str, now: float) -> dict[str, Any]:
    return {
        "id": turn,
        "session": session,
        "position": position,
        "fingerprint": "",
        "message_id": message,
        "options": {},
        "detached": False,
        "state": "final",
        "attempt": 1,
        "instance": "bench",
        "created_at": now,
        "ended_at": now,
    }


# --- the setup as people run it -------------------------------------------------------------------


def warm_start(column: str, seconds: float) -> float:  # noqa: ARG001
    """Seconds from the command to ready and proven, where everything is installed."""
    with tempfile.TemporaryDirectory() as directory:
        _up(ROOT, Path(directory))
        return _up(ROOT, Path(directory))


def bare(column: str, seconds: float) -> float:  # noqa: ARG001
    """Seconds from the command in a fresh clone to the first answers. Programs of the system that are
    there already are not installed again."""
    with tempfile.TemporaryDirectory() as directory:
        clone = Path(directory) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        return _up(clone, clone / ".portal")


def _up(root: Path, state: Path) -> float:
    ports = [
        option for name in ("port", "llm-port", "mqtt-port") for option in (f"--{name}", str(free_port()))
    ]
    setup, there = str(root / "setup_llm.sh"), ["--state", str(state)]
    began = time.perf_counter()
    try:
        subprocess.run([setup, "up", "--detach", *there, *ports], check=True, capture_output=True)
        return time.perf_counter() - began
    finally:
        subprocess.run([setup, "down", *there], check=False, capture_output=True)
