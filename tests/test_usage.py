"""What was used: by turn, by day, for oneself and for admins."""

from __future__ import annotations

import asyncio
import csv
import json
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Connection

from app.database import Database, migrate
from app.events import new_id
from app.services.accounting import close_books
from app.services.usage import TurnUsage, UsageBook, day_of, write
from tests.fake_llm import FakeLLM, Script
from tests.support import GameClient, MakePortal, Mosquitto, ask, owner_of, token_of, wait_until

USAGE = {
    "prompt_tokens": 30,
    "completion_tokens": 20,
    "prompt_tokens_details": {"cached_tokens": 10},
    "completion_tokens_details": {"reasoning_tokens": 5},
}
COUNTS = {"prompt_tokens": 30, "completion_tokens": 20, "cached_tokens": 10, "reasoning_tokens": 5}


@pytest.fixture(autouse=True)
def script(module_fake: FakeLLM) -> None:
    module_fake.script = Script(usage=USAGE)


def report(admin: httpx.Client, owner: str, *by: str, **params: str) -> list[dict[str, Any]]:
    answer = admin.get("/api/admin/usage", params={"owner": owner, "by": list(by), **params})
    assert answer.status_code == 200, answer.text
    lines: list[dict[str, Any]] = answer.json()["lines"]
    return lines


def test_each_turn_counts_by_its_door_key_project_and_model(
    client: httpx.Client, admin: httpx.Client, mosquitto: Mosquitto
) -> None:
    owner = owner_of(client)
    ask(client, project="racing")
    key = client.post("/api/keys", json={"name": "k"}).json()
    headers = {"Authorization": f"Bearer {key['secret']}"}
    with httpx.Client(base_url=client.base_url, headers=headers) as program:
        ask(program)
    client.post("/api/llm/chat", json={"messages": [{"role": "user", "content": "hi"}]})
    game = GameClient(mosquitto.port, "maze/assistant_response/#")
    body = {"message": "hi", "format": "json", "token": token_of(client)}
    game.publish(f"maze/user_input/{owner.partition(':')[2]}", body)
    assert json.loads(game.reply(f"maze/assistant_response/{owner.partition(':')[2]}"))["type"] == "final"
    game.close()
    lines = report(admin, owner, "door", "api_key", "project", "model")
    groups = sorted((line["door"], line["api_key"], line["project"], line["model"]) for line in lines)
    assert groups == [
        ("http", "", "prompt_portal", "fake-1"),
        ("http", "", "racing", "fake-1"),
        ("http", key["id"], "prompt_portal", "fake-1"),
        ("mqtt", "", "maze", "fake-1"),
    ]
    (total,) = report(admin, owner, "owner")
    assert total["turns"] == 4
    assert {name: total[name] for name in COUNTS} == {name: 4 * count for name, count in COUNTS.items()}


def test_a_repeated_request_is_counted_once(client: httpx.Client) -> None:
    session = new_id()
    for _ in range(3):
        ask(client, session, request_id="r")
    assert client.get("/api/stats").json()["today"]["turns"] == 1


def test_what_came_to_no_model_costs_nothing(client: httpx.Client, module_fake: FakeLLM) -> None:
    module_fake.script = Script(status=500)
    assert ask(client).status_code == 502
    today = client.get("/api/stats").json()["today"]
    assert (today["turns"], today["completion_tokens"]) == (1, 0)


def test_a_server_that_does_not_count_is_estimated(client: httpx.Client, module_fake: FakeLLM) -> None:
    module_fake.script = Script(usage=None)
    assert ask(client).json()["usage"]["estimated"] is True
    assert client.get("/api/stats").json()["today"]["completion_tokens"] > 0


def test_a_cleared_turn_is_counted_too(client: httpx.Client, module_fake: FakeLLM) -> None:
    module_fake.script = Script(pieces=[{"content": "word "}] * 1000, between=0.005)
    session = new_id()
    body = {"session_id": session, "message": "hi", "request_id": "r"}
    with client.stream("POST", "/api/llm/chat/session/stream", json=body) as stream:
        lines = stream.iter_lines()
        for _ in range(10):
            while not next(lines).startswith("event: token"):
                pass
        client.delete(f"/api/llm/chat/session/{session}")
        assert "event: cancelled" in list(lines)

    def counted() -> dict[str, Any]:
        return dict(client.get("/api/stats").json()["today"])

    wait_until(lambda: counted()["turns"] == 1, what="the count, when the generation is closed")
    today = counted()
    assert 10 <= today["completion_tokens"] < 1000


def test_my_own_by_day_and_model(client: httpx.Client) -> None:
    ask(client)
    stats = client.get("/api/stats", params={"days": 1}).json()
    (line,) = stats["days"]
    assert (line["day"], line["model"], line["turns"]) == (day_of(datetime.now(UTC).timestamp()), "fake-1", 1)
    assert stats["today"] == stats["month"]
    assert stats["budgets"] == []


def test_a_report_is_of_its_days(client: httpx.Client, admin: httpx.Client) -> None:
    ask(client)
    today = datetime.now(UTC).date()
    yesterday = (today - timedelta(days=1)).isoformat()
    assert report(admin, owner_of(client), "day", since="2020-01-01", until=yesterday) == []
    assert len(report(admin, owner_of(client), "day", since=today.isoformat())) == 1


def test_a_report_as_csv(client: httpx.Client, admin: httpx.Client) -> None:
    ask(client, project="=cmd|' /C calc'!A0")
    params = {"owner": owner_of(client), "by": ["day", "project"], "format": "csv"}
    answer = admin.get("/api/admin/usage", params=params)
    assert answer.headers["content-type"].startswith("text/csv")
    header, row = list(csv.reader(answer.text.splitlines()))
    assert header[:4] == ["day", "project", "turns", "prompt_tokens"]
    assert row[1] == "'=cmd|' /C calc'!A0", "no spreadsheet takes it for a formula"
    assert row[2:4] == ["1", "30"]


def test_only_who_may_sees_what_everybody_used(client: httpx.Client) -> None:
    for path in ("usage", "alerts", "limits"):
        assert client.get(f"/api/admin/{path}").status_code == 403


async def test_processes_that_count_for_the_same_owners_do_not_wait_for_each_other(postgres_url: str) -> None:
    url = postgres_url.replace("postgresql://", "postgresql+psycopg://")
    await asyncio.to_thread(migrate, url)
    one, two = (Database(url, before_commit=close_books) for _ in range(2))
    have_begun = threading.Barrier(2)

    def count(connection: Connection, first: str, second: str) -> None:
        write(connection, used_by(first), "2026-11-21")
        have_begun.wait(20)
        write(connection, used_by(second), "2026-11-21")

    for database in (one, two):
        await database.open()
    await asyncio.gather(
        one.write(lambda c: count(c, "ada", "bo")), two.write(lambda c: count(c, "bo", "ada"))
    )
    for owner in ("ada", "bo"):
        spent = await UsageBook(one).spent(owner, "2026-11-21")
        assert (spent.turns, spent.prompt_tokens, spent.cost) == (2, 60, 1.0)
    for database in (one, two):
        await database.close()


def used_by(owner: str) -> TurnUsage:
    """What a turn has used that came from somebody."""
    return TurnUsage(
        turn_id=new_id(),
        attempt=1,
        at=0.0,
        owner=owner,
        api_key="",
        project="p",
        model="m",
        door="http",
        outcome="final",
        **COUNTS,
        estimated=False,
        gpu_seconds=0.5,
        cost=0.5,
        ttft_ms=None,
        elapsed_ms=9,
    )


def test_usage_is_whole_after_kill(make_portal: MakePortal, tmp_path: Path, fake_thread: FakeLLM) -> None:
    fake_thread.script = Script(usage=USAGE)
    portal = make_portal(tmp_path, LLM_SERVER_URL=fake_thread.url).start()
    with portal.client() as client:
        for _ in range(5):
            ask(client)
        portal.kill()
    portal.start()
    with portal.client() as client:
        today = client.get("/api/stats").json()["today"]
        assert (today["turns"], today["prompt_tokens"]) == (5, 150)
