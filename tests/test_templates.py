"""Templates and sessions made from them, over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from app.events import new_id
from tests.support import Portal

pytestmark = pytest.mark.slow

OPTIONAL = "{{ b }} {{ a }} {{ c | default('') }}"


@pytest.fixture
def client(portal: Portal) -> Iterator[httpx.Client]:
    """Somebody new, with no templates yet."""
    with portal.client(f"author-{new_id()[-8:]}") as signed_in:
        yield signed_in


def create(client: httpx.Client, **changes: Any) -> dict[str, Any]:
    body = {"title": "Guide", "content": "You guide {{ name }} through {{ place }}.", **changes}
    answer = client.post("/api/templates", json=body)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def error(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["message"]


def test_each_save_is_a_new_version_and_versions_stay(client: httpx.Client) -> None:
    first = create(client, description="A guide")
    assert (first["version"], first["variables"]) == (1, ["name", "place"])
    path = f"/api/templates/{first['id']}"
    save = {"title": "Guide", "description": "A guide", "content": "Be brief, {{ name }}.", "based_on": 1}
    second = client.put(path, json=save).json()
    assert (second["version"], second["variables"]) == (2, ["name"])
    assert client.put(path, json={**save, "based_on": 2}).json() == second, "nothing has changed"
    assert error(client.put(path, json={**save, "content": "x"})) == (
        409,
        "based_on: version 2 was saved since; look at it before you save yours",
    )
    versions = client.get(f"{path}/versions").json()["versions"]
    assert [version["version"] for version in versions] == [2, 1]
    assert client.get(f"{path}/versions/1").json() == first
    assert client.get(path).json() == second
    assert client.get(f"{path}/versions/3").status_code == 404


def test_rendering(client: httpx.Client) -> None:
    template = create(client)
    path = f"/api/templates/{template['id']}/render"
    variables = {"name": "Ada", "place": "the maze"}
    assert (
        client.post(path, json={"variables": variables}).json()["prompt"] == "You guide Ada through the maze."
    )
    assert error(client.post(path, json={"variables": {"name": "Ada"}})) == (422, "variables: missing place")
    preview = {"content": "Hi {{ x }}", "variables": {"x": 1}}
    shown = client.post("/api/templates/preview", json=preview).json()
    assert shown == {"variables": ["x"], "optional": [], "missing": [], "prompt": "Hi 1"}
    shown = client.post("/api/templates/preview", json={"content": OPTIONAL, "variables": {"b": ""}})
    assert shown.json() == {"variables": ["a", "b"], "optional": ["c"], "missing": ["a"], "prompt": None}
    assert create(client, content=OPTIONAL)["optional"] == ["c"]
    refused = client.post("/api/templates/preview", json={"content": "a\n{{ broken"})
    assert error(refused)[0] == 422
    assert error(refused)[1].startswith("content: line 2:")


def test_the_list_is_searched_and_paged(client: httpx.Client) -> None:
    made = [create(client, title=f"Guide {n}", description="100% odd" if n % 2 else "") for n in range(4)]
    made.append(create(client, title="Guide 4", content="You are a pirate."))
    listed = client.get("/api/templates", params={"limit": 2}).json()
    assert (listed["total"], [t["title"] for t in listed["templates"]]) == (5, ["Guide 4", "Guide 3"])
    rest = client.get("/api/templates", params={"limit": 10, "offset": 2}).json()["templates"]
    assert [template["title"] for template in rest] == ["Guide 2", "Guide 1", "Guide 0"]
    client.put(f"/api/templates/{made[0]['id']}", json={"title": "Renamed", "content": "x"})
    assert client.get("/api/templates").json()["templates"][0]["title"] == "Renamed"
    assert client.get("/api/templates", params={"search": "gUIDE"}).json()["total"] == 4
    assert client.get("/api/templates", params={"search": "100%"}).json()["total"] == 2
    assert client.get("/api/templates", params={"search": "Pirate"}).json()["total"] == 1


def test_a_deleted_template_can_be_restored(client: httpx.Client) -> None:
    template = create(client)
    path = f"/api/templates/{template['id']}"
    assert client.delete(path).status_code == 204
    assert client.delete(path).status_code == 404
    assert client.get(path).status_code == 404
    assert client.put(path, json={"title": "x", "content": "x"}).status_code == 404
    assert client.get("/api/templates").json()["total"] == 0
    assert client.post(f"{path}/restore").json() == template


def test_another_owners_template_is_not_found(portal: Portal, client: httpx.Client) -> None:
    template = create(client)
    path = f"/api/templates/{template['id']}"
    with portal.client("eve") as eve:
        for method, suffix, body in (
            ("GET", "", None),
            ("PUT", "", {"title": "x", "content": "x"}),
            ("DELETE", "", None),
            ("POST", "/restore", None),
            ("GET", "/versions", None),
            ("GET", "/versions/1", None),
            ("POST", "/render", {}),
        ):
            assert eve.request(method, path + suffix, json=body).status_code == 404, suffix
        body = {"session_id": "s", "message": "hi", "template_id": template["id"]}
        assert eve.post("/api/llm/chat/session", json=body).status_code == 404
    assert client.get(path).json() == template


def test_a_session_from_a_template_remembers_its_version(client: httpx.Client) -> None:
    template = create(client)
    ask = {"session_id": "made", "message": "hi", "max_tokens": 1, "template_id": template["id"]}
    assert error(client.post("/api/llm/chat/session", json=ask)) == (422, "variables: missing name, place")
    assert client.get("/api/sessions/made").status_code == 404, "nothing was made"
    variables = {"name": "Ada", "place": "the maze"}
    assert client.post("/api/llm/chat/session", json={**ask, "variables": variables}).status_code == 200
    client.put(f"/api/templates/{template['id']}", json={"title": "New", "content": "Something else."})
    assert client.post("/api/llm/chat/session", json=ask).status_code == 200, "it counts only at first"
    session = client.get("/api/sessions/made").json()
    assert session["template"] == {
        "id": template["id"],
        "version": template["version"],
        "version_id": template["version_id"],
        "title": template["title"],
    }
    assert session["system_prompt"] == "You guide Ada through the maze."
    both = {**ask, "system_prompt": "x"}
    assert error(client.post("/api/llm/chat/session", json=both))[1].startswith("template_id:")


def test_sessions_are_listed_renamed_deleted_and_restored(client: httpx.Client) -> None:
    for number in range(3):
        body = {"session_id": f"s{number}", "message": f"  Question\n{number} ", "max_tokens": 1}
        assert client.post("/api/llm/chat/session", json=body).status_code == 200
    listed = client.get("/api/sessions").json()
    assert (listed["total"], [s["title"] for s in listed["sessions"]]) == (
        3,
        ["Question 2", "Question 1", "Question 0"],
    )
    assert client.get("/api/sessions", params={"search": "tion 1"}).json()["total"] == 1
    assert client.patch("/api/sessions/s1", json={"title": "Mine"}).json()["title"] == "Mine"
    assert client.patch("/api/sessions/s1", json={"title": ""}).status_code == 422
    assert client.delete("/api/sessions/s1").status_code == 204
    for method, path in (
        ("GET", "/api/sessions/s1"),
        ("PATCH", "/api/sessions/s1"),
        ("DELETE", "/api/sessions/s1"),
        ("GET", "/api/llm/chat/session/s1/history"),
    ):
        assert client.request(method, path, json={"title": "x"}).status_code == 404
    assert client.post("/api/sessions/s1/restore").json()["title"] == "Mine"
    assert len(client.get("/api/llm/chat/session/s1/history").json()["messages"]) == 2
    client.delete("/api/sessions/s1")
    body = {"session_id": "s1", "message": "anew", "max_tokens": 1}
    assert client.post("/api/llm/chat/session", json=body).status_code == 200
    assert len(client.get("/api/llm/chat/session/s1/history").json()["messages"]) == 2
    assert client.post("/api/sessions/s1/restore").status_code == 409
