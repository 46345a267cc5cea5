"""`/metrics`, as Prometheus reads it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from app.events import new_id
from tests.fake_llm import FakeLLM, Script, text
from tests.proxy import Proxy
from tests.support import ROOT, GameClient, MakePortal, Mosquitto, Portal, ask, owner_of, wait_until

pytestmark = pytest.mark.slow

CANARY = "canary-7f3a91"


def scrape(client: httpx.Client) -> list[Sample]:
    """All samples that the portal shows now."""
    answer = client.get("/metrics")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return [sample for family in text_string_to_metric_families(answer.text) for sample in family.samples]


def value(samples: list[Sample], name: str, **labels: str) -> float:
    """The sum of a metric over the series with these labels."""
    return sum(
        sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items()
    )


def test_a_turn_is_counted_with_its_times_and_tokens(
    admin: httpx.Client, client: httpx.Client, llm: FakeLLM
) -> None:
    llm.script = Script(
        text("a", "b", "c"),
        before_first=0.06,
        between=0.03,
        usage={
            "prompt_tokens": 40,
            "completion_tokens": 3,
            "total_tokens": 43,
            "prompt_tokens_details": {"cached_tokens": 30},
        },
    )
    before = scrape(admin)
    assert ask(client).status_code == 200
    after = scrape(admin)

    def more(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert more("portal_turns_total", door="http", model="fake-1", outcome="final") == 1
    assert more("portal_turns_total") == 1
    assert more("portal_prompt_tokens_total", model="fake-1") == 40
    assert more("portal_cached_prompt_tokens_total", model="fake-1") == 30
    assert more("portal_completion_tokens_total", model="fake-1") == 3
    assert more("portal_time_to_first_token_seconds_count", model="fake-1") == 1
    assert more("portal_time_to_first_token_seconds_bucket", le="0.05") == 0
    assert more("portal_time_to_first_token_seconds_sum") >= 0.06
    assert more("portal_time_between_tokens_seconds_count", model="fake-1") == 1
    assert 0.015 < more("portal_time_between_tokens_seconds_sum") < 1
    assert more("portal_turn_duration_seconds_count", door="http", model="fake-1") == 1
    assert more("portal_turn_duration_seconds_bucket", le="0.1") == 0
    assert more("portal_turn_duration_seconds_sum") > 0.1
    assert more("portal_database_write_seconds_count") >= 2, "it was accepted and ended"


def test_outcomes_and_refusals(admin: httpx.Client, client: httpx.Client, llm: FakeLLM) -> None:
    before = scrape(admin)
    llm.script = Script(status=400)
    assert ask(client).status_code == 502
    llm.script = Script(text("a"), before_first=30)
    session = new_id()
    with client.stream("POST", "/api/llm/chat/session/stream", json={"session_id": session, "message": "hi"}):
        wait_until(lambda: llm.running == 1, what="the generation")
        client.post(f"/api/llm/chat/session/{session}/stop")
    wait_until(lambda: llm.running == 0, what="its end")
    after = scrape(admin)
    for outcome in ("error", "cancelled"):
        count = value(after, "portal_turns_total", door="http", model="fake-1", outcome=outcome)
        assert count == value(before, "portal_turns_total", outcome=outcome) + 1
    refusals = {"door": "http", "code": "llm_error"}
    assert value(after, "portal_refusals_total", **refusals) == 1 + value(
        before, "portal_refusals_total", **refusals
    )


def test_places_queue_and_active_turns(fake_thread: FakeLLM, tmp_path: Path, make_portal: MakePortal) -> None:
    portal = make_portal(tmp_path, LLM_SERVER_URL=fake_thread.url, LLM_MAX_CONCURRENCY="2").start()
    with portal.client("admin", role="admin") as admin:
        idle = scrape(admin)
        assert value(idle, "portal_llm_places_free", server="default-1") == 2
        assert value(idle, "portal_llm_server_state", server="default-1", state="ok") == 1
        assert value(idle, "portal_llm_server_state", server="default-1") == 1, "it is in one state only"
        assert value(idle, "portal_turns_active") == 0
        fake_thread.script = Script(text("a"), before_first=30)
        for number in range(3):
            body = {"session_id": f"s{number}", "message": "hi", "request_id": "r"}
            with admin.stream("POST", "/api/llm/chat/session/stream", json=body):
                pass
        wait_until(lambda: value(scrape(admin), "portal_llm_queue", provider="default") == 1, what="a queue")
        busy = scrape(admin)
        assert value(busy, "portal_llm_places_taken", server="default-1") == 2
        assert value(busy, "portal_llm_places_free") == 0
        assert value(busy, "portal_turns_active", state="running") == 3
    portal.kill()


def test_mqtt_and_its_outbox(
    fake_portal: Portal, mosquitto: Mosquitto, admin: httpx.Client, llm: FakeLLM, session: str
) -> None:
    topic = f"maze/assistant_response/{session}"
    game = GameClient(mosquitto.port, topic)
    before = scrape(admin)
    game.publish(f"maze/user_input/{session}", {"message": "hi"})
    game.reply(topic)
    after = scrape(admin)
    assert (
        value(after, "portal_turns_total", door="mqtt")
        == value(before, "portal_turns_total", door="mqtt") + 1
    )
    assert value(after, "portal_mqtt_connected", project="maze") == 1
    wait_until(
        lambda: value(scrape(admin), "portal_mqtt_outbox", project="maze") == 0, what="an empty outbox"
    )
    assert any(sample.name == "portal_mqtt_in_flight" for sample in after)
    game.publish("maze/user_input/bad id", {"message": "hi"})
    wait_until(
        lambda: value(scrape(admin), "portal_refusals_total", door="mqtt", code="invalid_request") >= 1,
        what="the refusal",
    )
    game.close()


def test_the_process(admin: httpx.Client, llm: FakeLLM) -> None:
    samples = scrape(admin)
    assert value(samples, "process_resident_memory_bytes") > 10_000_000
    assert value(samples, "process_open_fds") > 5
    assert value(samples, "portal_info") == 1


def test_nothing_that_clients_choose_is_a_name(
    fake_portal: Portal, admin: httpx.Client, client: httpx.Client, llm: FakeLLM
) -> None:
    for body in (
        {"model": CANARY},
        {"session": f"{CANARY}-s", "message": CANARY, "request_id": f"{CANARY}-r"},
    ):
        ask(client, **body)
    client.get(f"/api/{CANARY}")
    shown = admin.get("/metrics").text
    assert CANARY not in shown
    assert owner_of(client).removeprefix("user:") not in shown
    names = {tuple(sorted(sample.labels)) for sample in scrape(admin)}
    known = {"door", "model", "outcome", "code", "state", "server", "provider", "project", "version", "le"}
    assert {label for labels in names for label in labels} == known


def test_a_model_by_a_pattern_is_other(fake_thread: FakeLLM, tmp_path: Path, make_portal: MakePortal) -> None:
    """A provider whose models are not listed takes any name."""
    (tmp_path / "models.toml").write_text(
        f'[providers.big]\nkind = "openai"\nurl = "{fake_thread.url}"\nkey = "k"\n'
        '[models."big-*"]\nprovider = "big"\n[models.big-1]\nprovider = "big"\n'
    )
    portal = make_portal(tmp_path, LLM_SERVER_URL=fake_thread.url).start()
    with portal.client("admin", role="admin") as admin:
        for model in ("big-1", *(f"big-{CANARY}-{number}" for number in range(3))):
            assert ask(admin, model=model).status_code == 200
        samples = scrape(admin)
    assert value(samples, "portal_turns_total", model="big-1") == 1
    assert value(samples, "portal_turns_total", model="other") == 3
    assert not any(CANARY in label for sample in samples for label in sample.labels.values())
    portal.kill()


def test_who_may_read_them(fake_portal: Portal, admin: httpx.Client, client: httpx.Client) -> None:
    assert httpx.get(f"{fake_portal.url}/metrics").status_code == 401
    assert client.get("/metrics").status_code == 403
    made = admin.post("/api/keys", json={"name": "prometheus", "scopes": ["metrics:read"]}).json()
    with httpx.Client(
        base_url=fake_portal.url, headers={"Authorization": f"Bearer {made['secret']}"}
    ) as prometheus:
        assert scrape(prometheus)
        assert prometheus.get("/api/sessions").status_code == 403, "the key is good for nothing else"


def test_they_tell_of_an_outage_of_the_database(
    postgres_url: str, fake_thread: FakeLLM, tmp_path: Path, make_portal: MakePortal
) -> None:
    between = Proxy(urlsplit(postgres_url).port or 0)
    url = postgres_url.replace(f":{urlsplit(postgres_url).port}/", f":{between.port}/")
    portal = make_portal(tmp_path, LLM_SERVER_URL=fake_thread.url, DATABASE_URL=url).start()
    with portal.client("admin", role="admin") as admin:
        keys = [admin.post("/api/keys", json={"name": name, "scopes": ["metrics:read"]}) for name in "ab"]
    known, unknown = ({"Authorization": f"Bearer {made.json()['secret']}"} for made in keys)
    with httpx.Client(base_url=portal.url, timeout=30) as prometheus:
        prometheus.headers.update(known)
        scrape(prometheus)
        between.close()
        wait_until(lambda: prometheus.get("/api/sessions").status_code == 503, 30, "the outage")
        assert value(scrape(prometheus), "portal_refusals_total", code="overloaded") >= 1
        assert prometheus.get("/metrics", headers=unknown).status_code == 503
        assert prometheus.get("/metrics", headers={"Authorization": "Bearer x"}).status_code == 401


def metrics_in(text: str) -> set[str]:
    """The metrics that an expression, or a page of the docs, names."""
    return set(re.findall(r"\b(?:portal|process)_[a-z_]+[a-z]\b", text))


def test_the_dashboard_and_the_docs_name_only_what_there_is(
    admin: httpx.Client, client: httpx.Client, llm: FakeLLM
) -> None:
    assert ask(client).status_code == 200
    assert client.get("/metrics").status_code == 403
    there = {sample.name for sample in scrape(admin)}
    dashboard = json.loads((ROOT / "docs/operations/grafana-dashboard.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    shown = metrics_in(" ".join(target["expr"] for panel in panels for target in panel["targets"]))
    assert shown <= there
    page = (ROOT / "docs/operations.md").read_text()
    alerts = page[page.index("### Alerts worth having") : page.index("## When something is wrong")]
    assert metrics_in(alerts) <= there
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in there if name.startswith("portal_")}
    table = page[page.index("| metric | labels |") : page.index("### Alerts worth having")]
    assert metrics_in(table) - {"portal_key"} == families, "the docs tell of each"
    assert {re.sub(r"_(bucket|count|sum)$", "", name) for name in shown} >= families
    places = [panel["gridPos"] for panel in panels]
    assert all(place["x"] + place["w"] <= 24 for place in places)
