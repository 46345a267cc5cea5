from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx
import pytest
from jose import jwt

from app.config import Settings
from app.database import Database, migrate
from app.errors import Unauthenticated
from app.services import accounts as accounts_module
from app.services.accounts import Accounts
from tests.support import SECRET, Portal

ACCOUNT = {"username": "ada", "email": "ada@example.org", "password": "correct horse"}
COOKIE = "portal_refresh"


@pytest.fixture
def browser(portal: Portal) -> Iterator[httpx.Client]:
    """A client that keeps cookies, with an account."""
    with httpx.Client(base_url=portal.url) as client:
        client.post("/api/auth/register", json=ACCOUNT)
        yield client


def _sign_in(client: httpx.Client) -> str:
    answer = client.post("/api/auth/login", json=ACCOUNT)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["access_token"])


def _me(client: httpx.Client, token: str) -> int:
    return client.get("/api/auth/me", headers={"Authorization": f"Bearer {token}"}).status_code


def test_the_refresh_token_is_a_cookie_that_scripts_cannot_read(browser: httpx.Client) -> None:
    answer = browser.post("/api/auth/login", json=ACCOUNT)
    assert "refresh" not in answer.text
    attributes = {part.strip().lower() for part in answer.headers["set-cookie"].split(";")}
    assert {"httponly", "samesite=strict", "path=/api/auth"} <= attributes


def test_a_renewal_gives_an_access_token_and_another_cookie(browser: httpx.Client) -> None:
    _sign_in(browser)
    before = browser.cookies[COOKIE]
    renewed = browser.post("/api/auth/refresh")
    assert renewed.status_code == 200
    assert _me(browser, renewed.json()["access_token"]) == 200
    assert browser.cookies[COOKIE] != before


def test_without_a_cookie_nobody_is_signed_in(portal: Portal) -> None:
    answer = httpx.post(f"{portal.url}/api/auth/refresh")
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "unauthenticated"


def test_signing_out_ends_the_access_token_too(browser: httpx.Client) -> None:
    token = _sign_in(browser)
    cookie = browser.cookies[COOKIE]
    assert browser.post("/api/auth/logout").status_code == 204
    assert COOKIE not in browser.cookies
    assert _me(browser, token) == 401
    assert browser.post("/api/auth/refresh", headers={"Cookie": f"{COOKIE}={cookie}"}).status_code == 401
    assert browser.post("/api/auth/logout").status_code == 204


def test_a_refresh_token_used_again_ends_the_sign_in(browser: httpx.Client) -> None:
    other = _sign_in(browser)
    token = _sign_in(browser)
    stolen = browser.cookies[COOKIE]
    browser.post("/api/auth/refresh")
    browser.post("/api/auth/refresh")
    assert browser.post("/api/auth/refresh", headers={"Cookie": f"{COOKIE}={stolen}"}).status_code == 401
    assert browser.post("/api/auth/refresh").status_code == 401
    assert _me(browser, token) == 401
    assert _me(browser, other) == 200


def test_oauth2_programs_get_and_renew_their_tokens_without_cookies(portal: Portal) -> None:
    with httpx.Client(base_url=portal.url) as client:
        client.post("/api/auth/register", json=ACCOUNT)
        given = client.post("/api/auth/token", data={"username": "ada", "password": "correct horse"}).json()
        assert not client.cookies
        form = {"grant_type": "refresh_token", "refresh_token": given["refresh_token"]}
        renewed = client.post("/api/auth/token", data=form).json()
        assert _me(client, renewed["access_token"]) == 200
        incomplete = client.post("/api/auth/token", data={"grant_type": "refresh_token"})
        assert incomplete.status_code == 422
        assert "refresh_token" in incomplete.json()["detail"]


def test_an_access_token_is_no_refresh_token(browser: httpx.Client) -> None:
    token = _sign_in(browser)
    assert browser.post("/api/auth/refresh", headers={"Cookie": f"{COOKIE}={token}"}).status_code == 401
    refresh = browser.cookies[COOKIE]
    assert _me(browser, refresh) == 401


def test_a_token_of_no_sign_in_is_refused(browser: httpx.Client) -> None:
    claims = jwt.get_unverified_claims(_sign_in(browser))
    del claims["sid"]
    assert _me(browser, jwt.encode(claims, SECRET, algorithm="HS256")) == 401


async def test_two_tabs_may_renew_at_once_but_not_later(
    settings_for: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for()
    migrate(settings.sqlalchemy_url)
    database = Database(settings.sqlalchemy_url)
    await database.open()
    accounts = Accounts(settings, database)
    await accounts.register(**ACCOUNT)
    first = (await accounts.sign_in("ada", "correct horse")).refresh_token
    one, two = (await accounts.renew(first)).refresh_token, (await accounts.renew(first)).refresh_token
    await accounts.renew(one)
    newest = (await accounts.renew(two)).refresh_token
    monkeypatch.setattr(accounts_module, "RENEWAL_GRACE_S", -1.0)
    with pytest.raises(Unauthenticated):
        await accounts.renew(two)
    with pytest.raises(Unauthenticated):
        await accounts.renew(newest)
    await database.close()
