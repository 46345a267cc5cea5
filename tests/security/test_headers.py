"""What answers tell browsers to refuse."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from app import hardening
from tests.fake_llm import FakeLLM
from tests.support import MakePortal, Portal

pytestmark = pytest.mark.slow

STRICT = {name.lower(): value for name, value in hardening.HEADERS.items()}


def test_the_headers_are_strict() -> None:
    assert STRICT["content-security-policy"] == (
        "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )
    assert STRICT["x-content-type-options"] == "nosniff"
    assert STRICT["referrer-policy"] == "no-referrer"
    assert STRICT["cross-origin-opener-policy"] == STRICT["cross-origin-resource-policy"] == "same-origin"
    assert {"camera=()", "geolocation=()"} <= set(STRICT["permissions-policy"].split(", "))


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health/live", 200),
        ("GET", "/api/auth/me", 401),
        ("GET", "/api/nope", 404),
        ("PUT", "/api/llm/chat", 405),
        ("POST", "/api/auth/login", 422),
        ("POST", "/api/auth/logout", 204),
        ("GET", "/openapi.json", 200),
        ("GET", "/asyncapi.json", 200),
    ],
)
def test_every_answer_has_them(target: Portal, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, target.url + path)
    assert answer.status_code == status
    assert {name: answer.headers.get(name) for name in STRICT} == STRICT
    assert "strict-transport-security" not in answer.headers
    assert ("no-store" in answer.headers.get("cache-control", "")) == path.startswith("/api/")


def test_refused_bodies_and_streams_have_them_too(target: Portal, mallory: httpx.Client) -> None:
    packed = httpx.post(f"{target.url}/api/llm/chat", headers={"Content-Encoding": "gzip"})
    body = {"messages": [{"role": "user", "content": "hi"}]}
    stream = mallory.post("/api/llm/chat/stream", json=body)
    assert (packed.status_code, stream.status_code) == (415, 200)
    for answer in (packed, stream):
        assert {name: answer.headers.get(name) for name in STRICT} == STRICT
        assert answer.headers["cache-control"] == "no-store"


def test_what_the_portal_answers_to_its_own_defects_has_them_too() -> None:
    """In the process: no known request fails."""
    import asyncio

    from starlette.types import Message, Receive, Scope, Send

    sent: list[Message] = []

    async def broken(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise RuntimeError("a defect")

    async def run() -> None:
        from app.config import Settings
        from app.main import create_app

        app = create_app(Settings(_env_file=None))
        app.router.default = broken
        scope: Scope = {"type": "http", "method": "GET", "path": "/x", "headers": [], "scheme": "http"}
        scope["query_string"], scope["root_path"] = b"", ""

        async def send(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            return {"type": "http.request"}

        with pytest.raises(RuntimeError):  # Starlette answers, and raises it for the server's log
            await app(scope, receive, send)

    asyncio.run(run())
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    assert sent[0]["status"] == 500
    assert {name: headers.get(name) for name in STRICT} == STRICT


def test_over_https_browsers_are_told_to_stay_there(
    make_portal: MakePortal, tmp_path: Path, fake_thread: FakeLLM
) -> None:
    settings = {"LLM_SERVER_URL": fake_thread.url, "TRUSTED_PROXIES": "127.0.0.1"}
    portal = make_portal(tmp_path, **settings, CORS_ORIGINS="https://other.example").start()
    forwarded = {"X-Forwarded-Proto": "https", "X-Forwarded-For": "192.0.2.1"}
    answer = httpx.get(f"{portal.url}/health/live", headers=forwarded)
    assert answer.headers["strict-transport-security"] == "max-age=31536000"
    assert "strict-transport-security" not in httpx.get(f"{portal.url}/health/live").headers
    # Refusals too can be read by the pages that may call the portal, and by no others.
    for origin, allowed in (("https://other.example", "https://other.example"), ("https://x.example", None)):
        headers = {"Origin": origin, "Content-Encoding": "gzip"}
        refused = httpx.post(f"{portal.url}/api/llm/chat", headers=headers)
        assert refused.status_code == 415
        assert refused.headers.get("access-control-allow-origin") == allowed


def test_nobody_is_believed_to_come_over_https_who_is_no_trusted_proxy(target: Portal) -> None:
    answer = httpx.get(f"{target.url}/health/live", headers={"X-Forwarded-Proto": "https"})
    assert "strict-transport-security" not in answer.headers


def test_the_page_keeps_its_own_policy(target: Portal) -> None:
    from app.routers.page import PAGE_DIR

    answer = httpx.get(target.url, headers={"Accept": "text/html"})
    policies = answer.headers.get_list("content-security-policy")
    assert len(policies) == 1
    if (PAGE_DIR / "index.html").is_file():
        assert "script-src 'self'" in policies[0]
        assert answer.headers.get_list("referrer-policy") == ["same-origin"]
