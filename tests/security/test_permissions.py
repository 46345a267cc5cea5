"""Who may do what: every role at every route, and over MQTT."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext

import httpx
import pytest

from app.access import PERMISSIONS, Role
from app.events import new_id
from app.mqtt.topics import VERBS
from app.services.policies import SHIPPED_ROLES, read_roles
from tests.security.routes import NOBODYS, PUBLIC, ROUTES, SIGNED_IN, TOPICS, call, operations, problem
from tests.support import GameClient, Mosquitto, Portal, token_of

SHIPPED = read_roles(SHIPPED_ROLES)
NONE = "nothing"
NAMES = [*SHIPPED, NONE]


@pytest.fixture(scope="module")
def people(fake_portal: Portal) -> Iterator[dict[str, httpx.Client]]:
    """Somebody of each role, and of one that may nothing."""
    with fake_portal.client("root", role="admin") as admin:
        assert admin.put(f"/api/admin/roles/{NONE}", json={"permissions": []}).status_code == 200
        opened = {name: fake_portal.client(f"is-{name}", role=name) for name in NAMES}
        clients = {name: context.__enter__() for name, context in opened.items()}
        yield clients
        for context in opened.values():
            context.__exit__(None, None, None)


def allows(role: str, permission: str) -> bool:
    definition = SHIPPED.get(role, Role(permissions=frozenset()))
    return permission == SIGNED_IN or definition.allows(permission)


def test_the_table_is_the_routes_that_there_are(fake_portal: Portal) -> None:
    document = httpx.get(f"{fake_portal.url}/openapi.json").json()
    assert set(operations(document)) == set(ROUTES)
    needed = {route.needs for route in ROUTES.values()} - {PUBLIC, SIGNED_IN}
    needed |= {permission for permission, _ in TOPICS.values()}
    assert {topic.partition("/")[0] for topic in TOPICS} == {*VERBS} - {"session"}
    assert needed == set(PERMISSIONS), "every permission is for something"


@pytest.mark.parametrize("role", NAMES)
@pytest.mark.parametrize("name", [name for name, route in ROUTES.items() if route.needs != PUBLIC])
def test_a_role_may_what_it_allows_and_nothing_else(
    people: dict[str, httpx.Client], fake_portal: Portal, role: str, name: str
) -> None:
    route, ids = ROUTES[name], {**NOBODYS, "session_id": f"s-{new_id()}"}
    with (
        fake_portal.client(f"once-{role}", role=role) if route.fresh else nullcontext(people[role]) as client
    ):
        answer = call(client, name, ids)
    if allows(role, route.needs):
        assert answer.status_code not in {401, 403}, answer.text
        assert answer.status_code < 500, answer.text
    else:
        status, code, message = problem(answer)
        assert (status, code) == (403, "forbidden")
        assert PERMISSIONS[route.needs] in message


@pytest.mark.parametrize("name", ROUTES)
def test_nobody_gets_in_without_showing_who_they_are(fake_portal: Portal, name: str) -> None:
    with httpx.Client(base_url=fake_portal.url) as nobody:
        answer = call(nobody, name)
    if ROUTES[name].needs != PUBLIC:
        assert problem(answer)[:2] == (401, "unauthenticated")


@pytest.mark.parametrize("role", NAMES)
def test_over_mqtt_a_role_may_the_same(
    people: dict[str, httpx.Client], mosquitto: Mosquitto, role: str
) -> None:
    session, everywhere = new_id(), ("assistant_response", "hint")
    game = GameClient(
        mosquitto.port, *(f"maze/{kind}/{name}" for kind in everywhere for name in (session, "all"))
    )
    for number, (topic, (permission, body)) in enumerate(TOPICS.items()):
        request_id = f"r{number}"
        asked = {**body, "token": token_of(people[role]), "requestId": request_id, "format": "json"}
        game.publish(f"maze/{topic.format(session_id=session)}", asked)
        marker = request_id.encode()
        game.wait_for(lambda marker=marker: any(marker in payload for _, payload, _ in game.received))  # type: ignore[misc]
        told = next(json.loads(payload) for _, payload, _ in game.received if marker in payload)
        code = told.get("error", {}).get("code")
        assert (code == "forbidden") != allows(role, permission), (topic, told)
    game.close()
