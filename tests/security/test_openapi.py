"""Every operation of the OpenAPI document with values that a machine made up, as everybody there is.

Nothing is left out. What an operation does to those who ask (signing out, using up tries) is undone by a
sign-in and an address of its own for each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from http.cookiejar import DefaultCookiePolicy
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks

from app.events import new_id
from tests.fake_llm import FakeLLM
from tests.support import PASSWORD, Portal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

EXAMPLES: dict[GenerationMode, dict[str | None, int]] = {
    GenerationMode.POSITIVE: {"admin": 4, "author": 2, "player": 2, "viewer": 2, "auditor": 2, None: 2},
    GenerationMode.NEGATIVE: {"admin": 4, None: 2},
}
"""How many values of each operation are sent as whom. Wrong ones are looked at before the role is, so they
are sent as those who may do everything and nothing."""

CHECKS = [
    checks.response_schema_conformance,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
]

_addresses = (f"10.{n >> 16 & 255}.{n >> 8 & 255}.{n & 255}" for n in itertools.count(1))


@pytest.fixture(scope="module")
def fuzzed(model: FakeLLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Portal]:
    """A portal behind what it takes for a proxy, so that each request can come from another address."""
    directory = tmp_path_factory.mktemp("fuzzed")
    running = Portal(directory, LLM_SERVER_URL=model.url, TRUSTED_PROXIES="127.0.0.1").start()
    yield running
    running.stop()


@pytest.fixture
def session() -> Iterator[requests.Session]:
    """Keeps its connection, and no cookie: who asks is told by the token alone."""
    with requests.Session() as opened:
        opened.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        yield opened


@pytest.fixture(scope="module")
def schema(fuzzed: Portal) -> Any:
    return schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")


def maker(path: str, found: str, body: Callable[[], dict[str, str]]) -> Callable[[httpx.Client], str]:
    """What makes a thing by a POST and tells its id; one that nobody has where it may not be made."""

    def make(client: httpx.Client) -> str:
        return str(client.post(path, json=body()).json().get(found, "none"))

    return make


def guest() -> dict[str, str]:
    return {"username": new_id(), "email": f"{new_id()}@example.org", "password": PASSWORD}


def turn() -> dict[str, str]:
    return {"session_id": new_id(), "message": "hi"}


make_user = maker("/api/auth/register", "id", guest)

MAKERS: dict[str, Callable[[httpx.Client], str]] = {
    "session_id": maker("/api/llm/chat/session", "session_id", turn),
    "turn_id": maker("/api/llm/chat/session", "turn_id", turn),
    "response_id": maker("/v1/responses", "id", lambda: {"input": "hi"}),
    "model": lambda _: "fake-1",
    "message_id": maker("/api/llm/chat/session", "message_id", turn),
    "template_id": maker("/api/templates", "id", lambda: {"title": "t", "content": "{{ a }}"}),
    "version": lambda _: "1",
    "key_id": maker("/api/keys", "id", lambda: {"name": "k"}),
    "link_id": maker("/api/admin/invitations", "id", lambda: {"role": "viewer"}),
    "user_id": make_user,
    "sign_in_id": lambda _: "none",
    "name": lambda _: f"role-{new_id()[-8:]}",
    "subject": lambda client: f"user:{make_user(client)}",
}


class Person:
    """Somebody of a role, or nobody; as another one after each sign-out."""

    def __init__(self, portal: Portal, role: str | None) -> None:
        self.portal = portal
        self.role = role
        self._headers: dict[str, str] = {}

    def headers(self) -> dict[str, str]:
        """Those of a sign-in that is good."""
        if self.role is None:
            return {}
        me = httpx.get(f"{self.portal.url}/api/auth/me", headers=self._headers)
        if me.status_code == 401:
            with self.portal.client(f"{self.role}-{new_id()[-8:]}", self.role) as client:
                self._headers = {"Authorization": client.headers["Authorization"]}
        return self._headers

    def things(self, names: set[str], headers: dict[str, str]) -> dict[str, str]:
        """What these parameters of a path can name: real things of this person where the role may make
        them."""
        headers = {**headers, "X-Forwarded-For": next(_addresses)}
        with httpx.Client(base_url=self.portal.url, headers=headers, timeout=30) as client:
            return {name: MAKERS[name](client) for name in sorted(names)}


def operations(schema: Any) -> Iterator[Any]:
    for found in schema.get_all_operations():
        yield found.ok()


@pytest.mark.parametrize("mode", EXAMPLES, ids=lambda mode: mode.value)
def test_no_made_up_request_fails_the_portal_or_is_answered_otherwise_than_documented(
    fuzzed: Portal, schema: Any, session: requests.Session, mode: GenerationMode
) -> None:
    people, problems, asked = [Person(fuzzed, role) for role in EXAMPLES[mode]], [], 0
    for operation in operations(schema):
        asked += 1
        try:
            _ask(operation, mode, people, session)
        except Unsatisfiable:  # there are no wrong values for what takes none, or takes any text
            assert mode is GenerationMode.NEGATIVE, operation.label
            assert not operation.body, operation.label
        except (AssertionError, BaseExceptionGroup) as error:  # all of them at the end
            problems.append(f"{operation.label}: {_told(error)}"[:2000])
    assert not problems, f"{len(problems)} of {asked}:\n" + "\n\n".join(problems)


def _told(error: BaseException) -> str:
    inner = _told(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else str(error)
    return "\n".join([inner, *getattr(error, "__notes__", [])])


def _ask(operation: Any, mode: GenerationMode, people: list[Person], session: requests.Session) -> None:
    """Makes up values once, which costs more than to send them, and sends them as everybody."""
    headers = [person.headers() for person in people]
    named = {parameter.name for parameter in operation.path_parameters}
    things: list[dict[str, str]] = []
    if named and mode is GenerationMode.POSITIVE:
        things = [person.things(named, known) for person, known in zip(people, headers, strict=True)]
    made_up, failed = itertools.count(), list[Any]()

    @settings(
        max_examples=max(EXAMPLES[mode].values()),
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode, path_parameters=things[0] if things else None))
    def one(case: Any) -> None:
        number = 0 if failed else next(made_up)  # what went wrong is looked at again, as everybody
        for place, person in enumerate(people):
            if number >= EXAMPLES[mode][person.role]:
                continue
            if things:
                case.path_parameters = things[place]
            told = {**headers[place], "X-Forwarded-For": next(_addresses)}
            response = case.call(base_url=person.portal.url, headers=told, session=session, timeout=30)
            try:
                # 503 is what `/health/ready` and a turn without its LLM server are documented to answer.
                assert response.status_code < 500, f"{response.text} {case.as_curl_command()}"
                case.validate_response(response, checks=CHECKS)
            except (AssertionError, BaseExceptionGroup) as error:
                error.add_note(f"as {person.role or 'nobody'}")
                failed.append(case)
                raise

    one()
