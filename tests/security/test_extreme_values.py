"""Values at the ends of what a field takes, which no generator can be relied on to find."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support import Portal

pytestmark = pytest.mark.slow

HUGE = str(10**30)
NUL = "%00"

GETS = [
    f"/api/sessions?offset={HUGE}",
    f"/api/sessions?offset={2**63}",
    f"/api/sessions?search={NUL}",
    f"/api/templates?offset={HUGE}",
    f"/api/templates/none/versions/{HUGE}",
    f"/api/templates/{{template}}/versions/{HUGE}",
    f"/api/templates/{{template}}/versions/-{HUGE}",
    f"/api/admin/users?offset={HUGE}",
    f"/api/admin/users?search={NUL}%ff",
    f"/api/stats?days={HUGE}",
    "/api/admin/usage?since=0001-01-01&until=9999-12-31",
    "/api/admin/usage?until=0001-01-01",
    "/api/admin/usage?until=0001-01-15&by=owner&by=owner&by=model&format=csv",
    "/api/admin/audit?since=0001-01-01T00:00:00%2B14:00",
    "/api/admin/audit?until=9999-12-31T23:59:59-14:00",
    f"/api/admin/audit?before={HUGE}",
    f"/api/admin/audit?actor={NUL}",
    f"/api/admin/audit/verify?head=999999999999999:{'0' * 64}",
    f"/api/llm/turns/none/events?after={HUGE}.{HUGE}",
    f"/api/llm/turns/{{turn}}/events?after={HUGE}.{HUGE}",
    "/api/llm/turns/{turn}/events?after=1.%D9%A1",
    "/api/llm/turns/{turn}/events?after=-1.-1",
    f"/api/llm/chat/session/none/history?before={NUL}",
]

CHAT = {"session_id": "extreme", "message": "hi"}

WRITES: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/api/llm/chat/session", {**CHAT, "seed": 10**30}),
    ("POST", "/api/llm/chat/session", {**CHAT, "max_tokens": 10**30}),
    ("POST", "/api/llm/chat/session", {**CHAT, "deadline_s": 5e-324}),
    ("POST", "/api/llm/chat/session", {**CHAT, "stop": ["\0"]}),
    ("POST", "/api/llm/chat/session", {**CHAT, "project": "\0"}),
    ("POST", "/api/llm/chat/session", {**CHAT, "tools": [{"seed": 10**400}]}),
    ("POST", "/api/llm/chat/session", {**CHAT, "template_id": "{template}", "variables": {"a": 10**400}}),
    ("POST", "/api/llm/chat", {"messages": [{}]}),
    ("POST", "/api/llm/chat", {"messages": [{"role": "user", "content": 10**400}]}),
    ("POST", "/api/llm/chat", {"messages": [{"role": "user", "content": {"a": [None]}}]}),
    ("PUT", "/api/templates/{template}", {"title": "t", "content": "x", "based_on": 10**30}),
    ("POST", "/api/templates/{template}/render", {"version": 10**30, "variables": {"a": 1}}),
    ("POST", "/api/templates/{template}/render", {"variables": {"a": 10**5000}}),
    ("POST", "/api/templates/preview", {"content": "{{ a }}", "variables": {"a": 10**4299}}),
    ("POST", "/api/templates/preview", {"content": "{{ a * 10**9 }}", "variables": {"a": "x"}}),
    ("POST", "/api/templates/preview", {"content": "{% for x in range(10**9) %}{% endfor %}"}),
    ("POST", "/api/templates/preview", {"content": "{{ " + "(" * 5000 + ")" * 5000 + " }}"}),
    ("POST", "/api/templates/preview", {"content": "{% if a %}" * 2000}),
    ("POST", "/api/keys", {"name": "k", "expires_at": "9999-12-31T23:59:59-14:00"}),
    ("POST", "/api/keys", {"name": "k", "expires_at": "0001-01-01T00:00:00+14:00"}),
    ("POST", "/api/keys", {"name": "\0", "scopes": ["\0"]}),
    ("POST", "/api/admin/invitations", {"role": "viewer", "days": 5e-324}),
    ("POST", "/api/admin/invitations", {"role": "\0", "days": 1}),
    ("PATCH", "/api/admin/users/none", {"role": "\0"}),
    ("PUT", "/api/admin/roles/extreme", {"permissions": [], "limits": {"daily_tokens": 10**400}}),
    ("PUT", "/api/admin/limits/project:general", {"daily_tokens": 10**30, "daily_cost": 1e308}),
    ("PUT", "/api/admin/limits/%00", {}),
]


@pytest.fixture(scope="module")
def boss(target: Portal) -> Iterator[tuple[httpx.Client, dict[str, str]]]:
    """An admin, with a template and a turn."""
    with target.client("boss", "admin") as client:
        template = client.post("/api/templates", json={"title": "t", "content": "{{ a }}"}).json()["id"]
        turn = client.post("/api/llm/chat/session", json={**CHAT, "request_id": "r"}).json()["turn_id"]
        yield client, {"template": template, "turn": turn}


def assert_answered(answer: httpx.Response) -> None:
    ran_out = answer.status_code == 504 and answer.json()["error"]["code"] == "expired"
    assert answer.status_code < 500 or ran_out, answer.text[:1000]
    if answer.status_code >= 400:
        assert set(answer.json()) == {"error", "detail"}


@pytest.mark.parametrize("path", GETS)
def test_what_is_asked_for(boss: tuple[httpx.Client, dict[str, str]], path: str) -> None:
    client, things = boss
    assert_answered(client.get(path.format(**things)))


@pytest.mark.parametrize(("method", "path", "body"), WRITES)
def test_what_is_sent(
    boss: tuple[httpx.Client, dict[str, str]], method: str, path: str, body: dict[str, Any]
) -> None:
    client, things = boss
    filled = {
        name: value.format(**things) if value == "{template}" else value for name, value in body.items()
    }
    content = _json(filled)
    headers = {"Content-Type": "application/json"}
    answer = client.request(method, path.format(**things), content=content, headers=headers)
    assert_answered(answer)


def _json(body: Any) -> str:
    """JSON, also of whole numbers that Python would rather not write out."""
    import json
    import sys

    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(body)
    finally:
        sys.set_int_max_str_digits(before)
