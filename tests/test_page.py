"""The page as it is served, and the client that is generated for it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import httpx
import pytest

from app.cli.page import FRONTEND, build_page, install_modules, npm, npm_environment
from app.cli.stack import Stack
from app.openapi import document
from tests.support import Portal

HTML = {"Accept": "text/html,application/xhtml+xml"}


@pytest.fixture(scope="module")
def served(portal: Portal) -> str:
    build_page(Stack())
    return portal.url


def test_the_client_is_generated_from_the_openapi_as_it_is(tmp_path: Path) -> None:
    install_modules(Stack())
    source, made = tmp_path / "openapi.json", tmp_path / "schema.d.ts"
    source.write_text(document())
    command = npm(Stack(), "run", "generate", "--", str(source), "--output", str(made))
    subprocess.run(command, check=True, capture_output=True, env=npm_environment())
    committed = (FRONTEND / "src" / "client" / "schema.d.ts").read_text()
    assert made.read_text() == committed, "run `make generate`"


def test_every_address_of_the_page_gives_the_page_under_a_policy_of_its_own(served: str) -> None:
    nonces = set()
    for path in ("/", "/chat", "/chat/some-session", "/templates/new", "/no/such/page"):
        answer = httpx.get(served + path, headers=HTML)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        found = re.search(r"'nonce-([^']+)'", policy)
        assert found is not None
        assert f'nonce="{found[1]}"' in answer.text
        assert "CSP_NONCE" not in answer.text
        assert answer.headers["cache-control"] == "no-store"
        nonces.add(found[1])
    assert len(nonces) == 5


def test_its_files_may_be_kept_for_ever(served: str) -> None:
    page = httpx.get(served, headers=HTML).text
    for path in re.findall(r'(?:src|href)="(/assets/[^"]+)"', page):
        answer = httpx.get(served + path)
        assert answer.status_code == 200
        assert "immutable" in answer.headers["cache-control"]
        assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path",
    [
        "/../package.json",
        "/%2e%2e/package.json",
        "/..%2fpackage.json",
        "//etc/passwd",
        "/%2fetc/passwd",
        "/assets/%00",
        "/.stamp/x",
    ],
)
def test_nothing_else_on_the_disk_is_served(served: str, path: str) -> None:
    answer = httpx.get(served + path)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


def test_what_is_no_page_gets_an_error(served: str) -> None:
    for path in ("/api/none", "/nothing"):
        assert httpx.get(served + path).json()["error"]["code"] == "not_found"
    assert httpx.post(served + "/api/none", headers=HTML).status_code == 404
    assert httpx.get(served + "/api/auth/login", headers=HTML).status_code == 405


def test_whoever_looks_whether_it_is_there_finds_it(served: str) -> None:
    asset = re.findall(r'src="(/assets/[^"]+)"', httpx.get(served).text)[0]
    for path in ("/", "/docs", asset, "/health/live", "/health/ready", "/api/llm/health", "/openapi.json"):
        answer = httpx.head(served + path)
        assert (answer.status_code, answer.content) == (200, b""), path
        assert httpx.get(served + path).headers["content-type"] == answer.headers["content-type"]
