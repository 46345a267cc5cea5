"""Rate limits, budgets and turns at once, through the doors."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.events import new_id
from tests.fake_llm import FakeLLM, Script, text
from tests.support import (
    GameClient,
    MakePortal,
    Mosquitto,
    Portal,
    Redis,
    ask,
    owner_of,
    token_of,
    wait_until,
)

USAGE = {"prompt_tokens": 30, "completion_tokens": 20, "total_tokens": 50}


@pytest.fixture(autouse=True)
def script(module_fake: FakeLLM) -> Script:
    module_fake.script = Script(usage=USAGE)
    return module_fake.script


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    """A Redis of the test's own, which it may stop."""
    running = Redis(tmp_path)
    yield running
    running.resume()
    running.stop()


def limit(admin: httpx.Client, subject: str, **limits: float) -> None:
    answer = admin.put(f"/api/admin/limits/{subject}", json=limits)
    assert answer.status_code == 200, answer.text


def code(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["code"])


# --- windows -------------------------------------------------------------------------------------


def test_a_person_has_so_many_messages_an_hour(client: httpx.Client, admin: httpx.Client) -> None:
    limit(admin, owner_of(client), requests_per_hour=2)
    first = ask(client)
    assert first.headers["RateLimit-Policy"] == '"person";q=2;w=3600'
    assert first.headers["RateLimit"] in {'"person";r=1;t=3600', '"person";r=1;t=3599'}
    assert ask(client).status_code == 200
    refused = ask(client)
    assert (refused.status_code, code(refused)) == (429, "rate_limited")
    assert 3500 < int(refused.headers["Retry-After"]) <= 3600
    assert refused.headers["RateLimit"].startswith('"person";r=0;t=3')
    assert "at most 2 messages in an hour" in refused.json()["detail"]
    for path in ("/api/llm/chat", "/api/llm/chat/stream"):
        answer = client.post(path, json={"messages": [{"role": "user", "content": "hi"}]})
        assert answer.status_code == 429, path
    assert ask(admin).status_code == 200, "others are not concerned"


def test_a_session_has_so_many_messages_a_minute(client: httpx.Client, admin: httpx.Client) -> None:
    limit(admin, owner_of(client), requests_per_session_minute=1)
    session = new_id()
    assert ask(client, session).status_code == 200
    assert ask(client, session).status_code == 429
    assert ask(client).status_code == 200


def test_what_is_repeated_is_answered_again_and_not_counted(
    client: httpx.Client, admin: httpx.Client
) -> None:
    limit(admin, owner_of(client), requests_per_hour=2)
    session = new_id()
    first = ask(client, session, request_id="r")
    again = [ask(client, session, request_id="r") for _ in range(4)]
    assert {answer.json()["message_id"] for answer in again} == {first.json()["message_id"]}
    assert ask(client).status_code == 200, "the repetitions took nothing"
    assert ask(client).status_code == 429
    assert ask(client, session, request_id="r").json() == first.json(), "not even now"


def test_what_had_failed_begins_again_only_within_the_limits(
    client: httpx.Client, admin: httpx.Client, module_fake: FakeLLM
) -> None:
    session = new_id()
    module_fake.script = Script(status=500)
    for number in range(2):
        assert ask(client, session, request_id=f"r{number}").status_code == 502
    module_fake.script = Script(usage=USAGE)
    answered = ask(client, session, request_id="answered")
    limit(admin, owner_of(client), daily_tokens=10, requests_per_hour=1)
    before = len(module_fake.requests)
    assert [ask(client, session, request_id=f"r{number}").status_code for number in range(2)] == [429, 429]
    assert ask(client, session, request_id="answered").json() == answered.json()
    limit(admin, owner_of(client), daily_tokens=1000, requests_per_hour=1)
    assert [ask(client, session, request_id=f"r{number}").status_code for number in range(2)] == [200, 429]
    assert len(module_fake.requests) == before + 1


def test_what_is_refused_for_another_reason_takes_nothing(client: httpx.Client, admin: httpx.Client) -> None:
    limit(admin, owner_of(client), requests_per_hour=2)
    session = new_id()
    ask(client, session, request_id="r")
    assert ask(client, session, request_id="r", message="other").status_code == 409
    assert ask(client).status_code == 200


@pytest.mark.parametrize("subject", ["all", "project:racing"])
def test_everybody_together_and_a_project_have_limits(
    client: httpx.Client, admin: httpx.Client, subject: str
) -> None:
    limit(admin, subject, requests_per_hour=1)
    try:
        assert ask(client, "in-racing", project="racing").status_code == 200
        assert ask(admin, project="racing").status_code == 429
        assert ask(client, "in-racing").status_code == 429, "a session stays in its project"
        other = ask(client, project="maze")
        assert other.status_code == (429 if subject == "all" else 200)
    finally:
        admin.delete(f"/api/admin/limits/{subject}")
    assert ask(client, project="racing").status_code == 200


@pytest.mark.parametrize(
    ("subject", "where"),
    [
        ("user:ada", "GET /api/admin/users"),
        ("key:none", "GET /api/admin/users/{id}/keys"),
        ("device:none", "GET /api/admin/devices"),
        ("project:none", "racing"),
        ("anon:none", "racing"),
    ],
)
def test_limits_that_would_limit_nobody_are_refused(admin: httpx.Client, subject: str, where: str) -> None:
    refused = admin.put(f"/api/admin/limits/{subject}", json={"daily_tokens": 1})
    assert (refused.status_code, code(refused)) == (404, "not_found")
    assert where in refused.json()["detail"]
    assert subject not in {one["subject"] for one in admin.get("/api/admin/limits").json()["limits"]}


def test_a_revoked_key_has_no_limits(client: httpx.Client, admin: httpx.Client) -> None:
    key = client.post("/api/keys", json={"name": "k"}).json()["id"]
    limit(admin, f"key:{key}", requests_per_hour=1)
    client.delete(f"/api/keys/{key}")
    assert admin.put(f"/api/admin/limits/key:{key}", json={}).status_code == 404


def test_a_key_has_limits_of_its_own(client: httpx.Client, admin: httpx.Client, fake_portal: Portal) -> None:
    keys = [client.post("/api/keys", json={"name": f"k{n}"}).json() for n in range(2)]
    limit(admin, f"key:{keys[0]['id']}", requests_per_hour=1)
    one, two = (
        httpx.Client(base_url=fake_portal.url, headers={"Authorization": f"Bearer {key['secret']}"})
        for key in keys
    )
    assert [ask(one).status_code, ask(one).status_code, ask(two).status_code] == [200, 429, 200]
    limit(admin, owner_of(client), requests_per_hour=1)
    assert ask(two).status_code == 200
    assert [ask(two).status_code, ask(client).status_code] == [429, 429], (
        "all keys of a person are that person"
    )
    for opened in (one, two):
        opened.close()


def test_the_settings_hold_for_people_and_not_for_games(
    make_portal: MakePortal, tmp_path: Path, module_fake: FakeLLM, mosquitto: Mosquitto
) -> None:
    portal = make_portal(
        tmp_path,
        LLM_SERVER_URL=module_fake.url,
        MQTT_BROKER_URL=mosquitto.url,
        MQTT_PROJECTS="driving",
        RATE_LIMIT_PER_HOUR="2",
        RATE_LIMIT_SESSION_PER_MINUTE="1",
    ).start()
    with portal.client() as client:
        session = new_id()
        assert [ask(client, session).status_code for _ in range(2)] == [200, 429]
        assert [ask(client).status_code for _ in range(2)] == [200, 429]
        game = GameClient(mosquitto.port, "driving/assistant_response/#")
        body = {"message": "hi", "format": "json"}
        for number in range(4):
            game.publish("driving/user_input/g", body)
            assert json.loads(game.reply("driving/assistant_response/g", number + 1))["type"] == "final"
        game.publish("driving/user_input/mine", {**body, "token": token_of(client), "requestId": "q"})
        refused = json.loads(game.reply("driving/assistant_response/mine"))
        assert (refused["error"]["code"], refused["requestId"]) == ("rate_limited", "q")
        assert refused["error"]["retry_after"] > 3000
        for device in ("cab-7", "of-my-own-invention"):
            key = client.post("/api/keys", json={"name": "k", "device": device}).json()
            game.publish(f"driving/user_input/{device}", {**body, "token": key["secret"]})
            refused = json.loads(game.reply(f"driving/assistant_response/{device}"))
            assert refused["error"]["code"] == "rate_limited", "whoever has a key is a person"
        game.close()


# --- budgets -------------------------------------------------------------------------------------


def test_a_budget_is_reserved_before_and_settled_after(client: httpx.Client, admin: httpx.Client) -> None:
    limit(admin, owner_of(client), daily_tokens=200)
    refused = ask(client, max_tokens=500)
    assert (refused.status_code, code(refused)) == (429, "budget_exceeded")
    assert refused.json()["error"]["details"] == {"budget": "daily_tokens"}
    assert 0 < int(refused.headers["Retry-After"]) <= 86400
    for _ in range(3):
        assert ask(client, max_tokens=40).status_code == 200
    budget = client.get("/api/stats").json()["budgets"]
    assert budget == [{"budget": "daily_tokens", "spent": 150, "amount": 200}], "what was used, not reserved"
    assert ask(client, max_tokens=60).status_code == 429
    assert ask(client, max_tokens=40).status_code == 200


@pytest.mark.parametrize("reserved", [False, True], ids=["at rest", "while a turn runs"])
def test_a_budget_that_was_taken_away_for_a_time_counts_what_was_spent_meanwhile(
    client: httpx.Client, admin: httpx.Client, module_fake: FakeLLM, reserved: bool
) -> None:
    owner, gate = owner_of(client), threading.Event()
    limit(admin, owner, daily_tokens=200)
    if not reserved:
        gate.set()
    module_fake.script = Script(usage=USAGE, gate=gate)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, client, max_tokens=40)
        wait_until(lambda: module_fake.running or first.done(), what="the generation")
        module_fake.script = Script(usage=USAGE)
        assert admin.delete(f"/api/admin/limits/{owner}").status_code == 204
        for _ in range(2):
            assert ask(client, max_tokens=40).status_code == 200
        limit(admin, owner, daily_tokens=200)
        gate.set()
        assert first.result().status_code == 200
    assert ask(client, max_tokens=40).status_code == 200
    assert code(ask(client, max_tokens=40)) == "budget_exceeded", "four times 50 tokens"


def test_as_much_is_reserved_as_the_model_may_write(
    make_portal: MakePortal, tmp_path: Path, fake_thread: FakeLLM
) -> None:
    (tmp_path / "models.toml").write_text("[models.fake-1]\noptions = { max_tokens = 500 }\n")
    limits = {"LLM_MAX_TOKENS": "10", "DAILY_TOKEN_BUDGET": "200"}
    portal = make_portal(tmp_path, LLM_SERVER_URL=fake_thread.url, LLM_MODEL="fake-1", **limits).start()
    with portal.client() as client:
        refused = ask(client)
        assert (refused.status_code, code(refused)) == (429, "budget_exceeded")
        assert ask(client, max_tokens=40).status_code == 200


def test_what_runs_at_once_cannot_share_what_is_left(
    client: httpx.Client, admin: httpx.Client, module_fake: FakeLLM
) -> None:
    limit(admin, owner_of(client), monthly_tokens=100)
    module_fake.script = Script(usage=USAGE, before_first=0.3)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(client, max_tokens=60).status_code, range(8)))
    assert answers.count(200) == 1


def test_what_is_only_reserved_is_soon_free(
    client: httpx.Client, admin: httpx.Client, module_fake: FakeLLM
) -> None:
    limit(admin, owner_of(client), daily_tokens=130)
    module_fake.script = Script(usage=USAGE, gate=threading.Event())
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, client, max_tokens=60)
        wait_until(lambda: module_fake.running, what="the generation")
        refused = ask(client, max_tokens=70)
        assert module_fake.script.gate is not None
        module_fake.script.gate.set()
        assert running.result().status_code == 200
    assert (refused.status_code, code(refused)) == (429, "rate_limited")
    assert refused.json()["detail"] == (
        "The daily budget of 130 tokens (person) is reserved by turns that run; wait for one to end."
    )
    assert int(refused.headers["Retry-After"]) < 10
    assert ask(client, max_tokens=70).status_code == 200
    refused = ask(client, max_tokens=70)
    assert (refused.status_code, code(refused)) == (429, "budget_exceeded")
    assert "has 30 left" in refused.json()["detail"]


def test_a_stopped_turn_is_charged_for_what_it_used(
    client: httpx.Client, admin: httpx.Client, module_fake: FakeLLM
) -> None:
    limit(admin, owner_of(client), daily_tokens=10_000)
    module_fake.script = Script(pieces=text(*["word "] * 1000), between=0.005, usage=USAGE)
    session = new_id()
    with client.stream(
        "POST",
        "/api/llm/chat/session/stream",
        json={"session_id": session, "message": "count", "request_id": "r"},
    ) as stream:
        lines = (line for line in stream.iter_lines() if line.startswith("event: token"))
        for _ in range(20):
            next(lines)
        client.post(f"/api/llm/chat/session/{session}/stop")
    stats = client.get("/api/stats").json()
    assert 20 <= stats["today"]["completion_tokens"] < 1000
    assert stats["today"]["gpu_seconds"] > 0
    assert (
        stats["budgets"][0]["spent"] == stats["today"]["completion_tokens"] + stats["today"]["prompt_tokens"]
    )


def test_a_failed_turn_gives_back_what_was_reserved(
    client: httpx.Client, admin: httpx.Client, module_fake: FakeLLM
) -> None:
    limit(admin, owner_of(client), daily_tokens=600, concurrent_turns=1)
    module_fake.script = Script(status=500)
    for _ in range(3):
        assert ask(client, max_tokens=500).status_code == 502
    module_fake.script = Script(usage=USAGE)
    assert ask(client, max_tokens=500).status_code == 200


def test_a_budget_outlasts_a_restart_and_a_turn_that_died_with_it(
    make_portal: MakePortal, tmp_path: Path, fake_thread: FakeLLM
) -> None:
    portal = make_portal(tmp_path, LLM_SERVER_URL=fake_thread.url, DAILY_TOKEN_BUDGET="200").start()
    fake_thread.script = Script(usage=USAGE)
    with portal.client() as client:
        assert ask(client, max_tokens=100).status_code == 200
        _die_while_it_answers(portal, fake_thread, client, request_id="dies", max_tokens=100)
    fake_thread.script = Script(usage=USAGE)
    portal.start()
    with portal.client() as client:

        def spent() -> float:
            return float(client.get("/api/stats").json()["budgets"][0]["spent"])

        wait_until(lambda: spent() == 100, what="the turn that was taken up")
        assert ask(client, max_tokens=120).status_code == 429
        assert ask(client, max_tokens=60).status_code == 200


def _die_while_it_answers(portal: Portal, llm: FakeLLM, client: httpx.Client, **asked: Any) -> None:
    """Asks something, and kills the portal in the middle of the answer."""
    llm.script = Script(usage=USAGE, before_first=30)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, client, **asked)
        wait_until(lambda: llm.running, what="the generation")
        portal.kill()
        with pytest.raises(httpx.HTTPError):
            answer.result()


def test_what_ends_while_redis_is_away_is_counted_when_it_is_back(
    make_portal: MakePortal, tmp_path: Path, fake_thread: FakeLLM, redis: Redis
) -> None:
    limits = {"MAX_TURNS_PER_USER": "2", "DAILY_TOKEN_BUDGET": "200", "REDIS_URL": redis.url}
    portal = make_portal(tmp_path, LLM_SERVER_URL=fake_thread.url, **limits).start()
    gate = threading.Event()
    fake_thread.script = Script(usage=USAGE, gate=gate)
    with portal.client() as client, ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(ask, client, max_tokens=40) for _ in range(2)]
        wait_until(lambda: fake_thread.running == 2, what="two generations")
        redis.pause()
        gate.set()
        assert [answer.result().status_code for answer in asked] == [200, 200]
        refused = ask(client)
        assert (refused.status_code, code(refused)) == (503, "overloaded")
        redis.resume()
        wait_until(lambda: ask(client, max_tokens=40).status_code == 200, what="the ledger")
        assert ask(client, max_tokens=40).status_code == 200, "four times 50 tokens"
        assert code(ask(client, max_tokens=40)) == "budget_exceeded", "each was counted, and once"


def test_what_runs_while_redis_begins_anew_is_counted(
    make_portal: MakePortal, tmp_path: Path, fake_thread: FakeLLM, redis: Redis
) -> None:
    limits = {"DAILY_TOKEN_BUDGET": "200", "REDIS_URL": redis.url}
    portal = make_portal(tmp_path, LLM_SERVER_URL=fake_thread.url, **limits).start()
    gate = threading.Event()
    fake_thread.script = Script(usage=USAGE, gate=gate)
    with portal.client() as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, client, max_tokens=40)
        wait_until(lambda: fake_thread.running, what="the generation")
        redis.stop()
        redis.start()
        fake_thread.script = Script(usage=USAGE)
        wait_until(lambda: ask(client, max_tokens=40).status_code == 200, what="the ledger")
        gate.set()
        assert first.result().status_code == 200
        assert [ask(client, max_tokens=40).status_code for _ in range(2)] == [200, 200]
        assert code(ask(client, max_tokens=40)) == "budget_exceeded", "four times 50 tokens"


def test_a_turn_that_began_again_and_is_taken_up_is_counted_once(
    make_portal: MakePortal, tmp_path: Path, fake_thread: FakeLLM, redis: Redis
) -> None:
    limits = {"MAX_TURNS_PER_USER": "1", "REDIS_URL": redis.url}
    portal = make_portal(tmp_path, LLM_SERVER_URL=fake_thread.url, **limits).start()
    session = new_id()
    with portal.client() as client:
        fake_thread.script = Script(status=500)
        assert ask(client, session, request_id="r").status_code == 502
        _die_while_it_answers(portal, fake_thread, client, session=session, request_id="r")
    fake_thread.script = Script(usage=USAGE)
    portal.start()
    with portal.client() as client:
        wait_until(lambda: ask(client, session, request_id="r").status_code == 200, what="the turn")
        assert ask(client).status_code == 200


def test_cost_and_gpu_time_are_budgets_too(
    make_portal: MakePortal, tmp_path: Path, fake_thread: FakeLLM
) -> None:
    (tmp_path / "models.toml").write_text(
        '[models."fake-*".price]\ninput = 100.0\ncached = 10.0\noutput = 1000.0\ngpu_second = 0.5\n'
    )
    portal = make_portal(tmp_path, LLM_SERVER_URL=fake_thread.url).start()
    used = {**USAGE, "prompt_tokens_details": {"cached_tokens": 10}}
    fake_thread.script = Script(usage=used, before_first=0.2)
    with portal.client() as client, portal.client("root", role="admin") as admin:
        ask(client)
        today = client.get("/api/stats").json()["today"]
        price = (20 * 100 + 10 * 10 + 20 * 1000) / 1_000_000
        assert today["gpu_seconds"] == pytest.approx(0.2, abs=0.15)
        assert today["cost"] == pytest.approx(price + 0.5 * today["gpu_seconds"], abs=1e-4)
        limit(admin, owner_of(client), daily_cost=today["cost"])
        assert code(ask(client)) == "budget_exceeded"
        limit(admin, owner_of(client), daily_gpu_seconds=2.1)
        assert code(ask(client)) == "budget_exceeded", "two seconds are reserved for a turn"
        limit(admin, owner_of(client), daily_gpu_seconds=100)
        assert ask(client).status_code == 200


def test_an_alert_is_raised_once_when_a_threshold_is_crossed(
    client: httpx.Client, admin: httpx.Client
) -> None:
    owner = owner_of(client)
    limit(admin, owner, daily_tokens=120)
    for _ in range(3):
        ask(client, max_tokens=10)
    raised = admin.get("/api/admin/alerts").json()["alerts"]
    mine = [alert for alert in raised if alert["subject"] == owner]
    assert {alert["percent"] for alert in mine} == {80, 100}
    assert all(alert["budget"] == "daily_tokens" and alert["amount"] == 120 for alert in mine)
    assert len(mine) == 2


def test_the_last_alert_is_raised_when_nothing_fits_any_more(
    client: httpx.Client, admin: httpx.Client
) -> None:
    owner = owner_of(client)

    def raised() -> list[tuple[int, float]]:
        alerts = admin.get("/api/admin/alerts").json()["alerts"]
        return sorted((alert["percent"], alert["spent"]) for alert in alerts if alert["subject"] == owner)

    limit(admin, owner, daily_tokens=600)
    assert ask(client, max_tokens=512).status_code == 200
    assert ask(client, max_tokens=100_000).status_code == 429
    assert raised() == [], "others would fit"
    assert ask(client).status_code == 200
    assert ask(client).status_code == 429
    assert ask(client, message="much " * 1000, max_tokens=20).status_code == 429
    assert raised() == [(80, 100), (100, 100)]
    assert ask(client, max_tokens=20).status_code == 200


# --- at once, and too long -----------------------------------------------------------------------


def test_a_person_has_so_many_turns_at_once(
    client: httpx.Client, admin: httpx.Client, module_fake: FakeLLM
) -> None:
    limit(admin, owner_of(client), concurrent_turns=2)
    module_fake.script = Script(usage=USAGE, before_first=0.5)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: ask(client), range(6)))
    assert sorted(answer.status_code for answer in answers) == [200] * 2 + [429] * 4
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert "turns may wait or run at once" in refused.json()["detail"]
    assert ask(client).status_code == 200, "they are free again"


def test_turns_that_a_clear_drops_are_no_longer_counted(
    client: httpx.Client, admin: httpx.Client, module_fake: FakeLLM
) -> None:
    limit(admin, owner_of(client), concurrent_turns=2)
    module_fake.script = Script(usage=USAGE, before_first=5)
    session = new_id()
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(ask, client, session, request_id=f"r{n}") for n in range(2)]
        history = f"/api/llm/chat/session/{session}/history"
        wait_until(lambda: len(client.get(history).json().get("messages", [])) == 2, what="two turns")
        assert ask(client).status_code == 429
        client.delete(f"/api/llm/chat/session/{session}")
        assert [answer.result().json()["finish_reason"] for answer in asked] == ["cancelled"] * 2
    module_fake.script = Script(usage=USAGE)
    wait_until(lambda: ask(client).status_code == 200, what="the end of the generation")
    with ThreadPoolExecutor(2) as pool:
        assert [answer.status_code for answer in pool.map(lambda _: ask(client), range(2))] == [200, 200]


def test_a_reply_has_a_longest_length(
    client: httpx.Client, admin: httpx.Client, module_fake: FakeLLM
) -> None:
    limit(admin, owner_of(client), max_tokens=64)
    refused = ask(client, max_tokens=65)
    assert (refused.status_code, code(refused)) == (422, "invalid_request")
    assert refused.json()["detail"] == "max_tokens: at most 64 for you"
    assert ask(client).status_code == 200
    assert module_fake.requests[-1]["max_tokens"] == 64
    assert ask(client, max_tokens=8).status_code == 200
    assert module_fake.requests[-1]["max_tokens"] == 8


def test_a_runaway_generation_is_cut_off(client: httpx.Client, module_fake: FakeLLM) -> None:
    module_fake.script = Script(pieces=text(*["again "] * 5000), between=0.002)
    answer = ask(client, max_tokens=20).json()
    assert answer["finish_reason"] == "length"
    assert 40 <= len(answer["response"].split()) < 200
    wait_until(lambda: module_fake.running == 0, what="the end of the request upstream")


# --- a flood -------------------------------------------------------------------------------------


def test_a_flood_of_one_leaves_the_others_their_time(
    fake_portal: Portal, client: httpx.Client, module_fake: FakeLLM
) -> None:
    """Replies of different lengths, as real ones have: 8 places, and one person asks 60 times at once. Other
    programs on the machine may slow one measurement or two, and an unfair portal slows each."""
    module_fake.script = Script(random=True, lengths=(10, 30), between=0.02)
    measured: list[tuple[float, float]] = []
    with fake_portal.client(f"bo-{new_id()[-6:]}") as other:
        while len(measured) < 3 and not any(beside <= 1.5 * alone for alone, beside in measured):
            measured.append(alone_and_beside_a_flood(client, other, module_fake))
    assert any(beside <= 1.5 * alone for alone, beside in measured), measured


def alone_and_beside_a_flood(flooder: httpx.Client, other: httpx.Client, llm: FakeLLM) -> tuple[float, float]:
    """How long the other waits for a reply, in seconds: the median before and during a flood."""

    def median(times: int = 15) -> float:
        taken = []
        for _ in range(times):
            began = time.monotonic()
            assert ask(other).status_code == 200
            taken.append(time.monotonic() - began)
        return sorted(taken)[len(taken) // 2]

    alone = median()
    flooding = threading.Event()
    flooding.set()

    async def flood() -> None:
        async with httpx.AsyncClient(
            base_url=flooder.base_url, headers=flooder.headers, timeout=60, limits=httpx.Limits()
        ) as many:

            async def go_on(number: int) -> None:
                await asyncio.sleep(number * 0.02)  # people do not ask in step
                while flooding.is_set():
                    body = {"session_id": f"flood-{number}", "message": "hi"}
                    await many.post("/api/llm/chat/session", json=body)

            await asyncio.gather(*(go_on(number) for number in range(60)))

    thread = threading.Thread(target=lambda: asyncio.run(flood()))
    thread.start()
    try:
        wait_until(lambda: llm.running >= 8, what="the flood")
        beside = median()
    finally:
        flooding.clear()
        thread.join()
    return alone, beside
