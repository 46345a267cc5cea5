from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from jose import jwt
from sqlalchemy import func, select

from app.access import LOCAL
from app.config import Settings
from app.container import open_container
from app.errors import Forbidden, InvalidRequest, Unauthenticated
from app.models import tables
from app.services import accounts as accounts_module
from app.services import sign_ins as sign_ins_module
from app.services.audit import AuditFilter
from app.services.sign_ins import Tokens
from tests.support import SECRET, MakePortal, Portal, token_of

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


def test_sign_ins_are_listed_and_ended_one_by_one(browser: httpx.Client) -> None:
    first = _sign_in(browser)
    browser.headers["User-Agent"] = "Netscape 4"
    mine = {"Authorization": f"Bearer {_sign_in(browser)}"}
    listed = browser.get("/api/auth/sign-ins", headers=mine).json()["sign_ins"]
    assert [one["current"] for one in listed][:2] == [True, False]
    assert listed[0]["user_agent"] == "Netscape 4"
    other = f"/api/auth/sign-ins/{listed[1]['id']}"
    assert browser.delete(other, headers=mine).status_code == 204
    assert _me(browser, first) == 401
    assert browser.delete(other, headers=mine).status_code == 404
    assert browser.delete("/api/auth/sign-ins", headers=mine).status_code == 204
    assert browser.get("/api/auth/me", headers=mine).status_code == 401
    assert browser.post("/api/auth/refresh").status_code == 401


def test_nobody_ends_somebody_elses_sign_in(browser: httpx.Client, portal: Portal) -> None:
    token = _sign_in(browser)
    listed = browser.get("/api/auth/sign-ins", headers={"Authorization": f"Bearer {token}"}).json()
    with portal.client("eve") as eve:
        assert eve.delete(f"/api/auth/sign-ins/{listed['sign_ins'][0]['id']}").status_code == 404
        eve.delete("/api/auth/sign-ins")
    assert _me(browser, token) == 200


def test_another_password_ends_all_other_sign_ins(portal: Portal) -> None:
    account = {"username": "bo", "email": "bo@example.org", "password": "correct horse"}
    with httpx.Client(base_url=portal.url) as client:
        client.post("/api/auth/register", json=account)
        elsewhere = client.post("/api/auth/login", json=account).json()["access_token"]
        here = client.post("/api/auth/login", json=account).json()["access_token"]
        mine = {"Authorization": f"Bearer {here}"}
        change = {"current_password": "wrong", "new_password": "battery staple"}
        refused = client.put("/api/auth/password", json=change, headers=mine)
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "invalid_request")
        change["current_password"] = "correct horse"
        assert client.put("/api/auth/password", json=change, headers=mine).status_code == 204
        assert _me(client, elsewhere) == 401
        assert _me(client, here) == 200
        assert client.post("/api/auth/login", json=account).status_code == 401
        account["password"] = "battery staple"
        assert client.post("/api/auth/login", json=account).status_code == 200


def test_guessing_is_slowed_by_name_however_it_is_written_and_from_wherever(
    make_portal: MakePortal, tmp_path: Path
) -> None:
    portal = make_portal(tmp_path).start(ready=False)
    with httpx.Client(base_url=portal.url) as client:
        client.post("/api/auth/register", json=ACCOUNT)

        def guess(name: str, address: str, password: str = "wrong horse") -> httpx.Response:
            body = {"username": name, "password": password}
            return client.post("/api/auth/login", json=body, headers={"X-Forwarded-For": address})

        names = ["ada", "ada@example.org", "ADA@example.org"]
        statuses = [guess(names[n % 3], f"10.0.0.{n}").status_code for n in range(8)]
        assert statuses == [401] * 5 + [429] * 3
        refused = guess("ada", "10.0.0.9", "correct horse")
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["error"]["code"] == "rate_limited"
        assert guess("somebody", "10.0.0.1").status_code == 401, "others are not slowed"


def test_right_passwords_are_not_counted(browser: httpx.Client) -> None:
    assert {browser.post("/api/auth/login", json=ACCOUNT).status_code for _ in range(8)} == {200}


def test_tokens_of_an_earlier_key_are_good_as_long_as_it_is_named(
    make_portal: MakePortal, tmp_path: Path
) -> None:
    other = "Zp4xW8sQ1nC6vB3mK9jH5gF2dT7rY0uE"
    portal = make_portal(tmp_path).start(ready=False)
    with portal.client() as client:
        token = token_of(client)
    for settings, status in ((f"SECRET_KEY_PREVIOUS={SECRET}", 200), ("", 401)):
        portal.stop()
        portal.env_file.write_text(f"SECRET_KEY={other}\n{settings}\n")
        portal.start(ready=False)
        with httpx.Client(base_url=portal.url) as client:
            assert _me(client, token) == status


async def test_two_tabs_may_renew_at_once_but_not_later(
    settings_for: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_container(settings_for()) as portal:
        sign_ins = portal.sign_ins
        await portal.accounts.register(**ACCOUNT)
        first = (await portal.accounts.sign_in("ada", ACCOUNT["password"], address="")).refresh_token
        one, two = (await sign_ins.renew(first)).refresh_token, (await sign_ins.renew(first)).refresh_token
        await sign_ins.renew(one)
        newest = (await sign_ins.renew(two)).refresh_token
        monkeypatch.setattr(sign_ins_module, "RENEWAL_GRACE_S", -1.0)
        with pytest.raises(Unauthenticated):
            await sign_ins.renew(two)
        with pytest.raises(Unauthenticated):
            await sign_ins.renew(newest)


class HeldHasher:
    """Looks at passwords as ever; what it has found is told once that is `released`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._real = accounts_module._hasher
        self.has_found = asyncio.Event()
        self.released = threading.Event()

    def hash(self, password: str) -> str:
        return self._real.hash(password)

    def verify(self, password: str, stored: str) -> bool:
        found = self._real.verify(password, stored)
        self._loop.call_soon_threadsafe(self.has_found.set)
        assert self.released.wait(20)
        return found


async def test_a_password_that_was_right_a_moment_ago_is_no_leave_to_change_it(
    settings_for: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_container(settings_for()) as portal:
        ada = await portal.accounts.register(**ACCOUNT)
        link = (await portal.people.password_link(LOCAL, ada.user or "")).secret
        hasher = HeldHasher(asyncio.get_running_loop())
        monkeypatch.setattr(accounts_module, "_hasher", hasher)
        changing = asyncio.create_task(
            portal.accounts.change_password(ada, ACCOUNT["password"], "battery staple", address="")
        )
        await hasher.has_found.wait()
        await portal.accounts.reset_password(link, "another horse", address="")
        hasher.released.set()
        with pytest.raises(InvalidRequest, match="current_password"):
            await changing
        await portal.accounts.sign_in("ada", "another horse", address="")


async def test_sign_ins_that_are_over_are_kept_no_longer_than_to_the_next(
    settings_for: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_container(settings_for()) as portal:

        async def sign_in() -> Tokens:
            return await portal.accounts.sign_in("ada", ACCOUNT["password"], address="")

        ada = await portal.accounts.register(**ACCOUNT)
        for _ in range(3):
            await portal.sign_ins.end_by_token((await sign_in()).refresh_token)
        first = await sign_in()
        await sign_in()
        count = select(func.count()).select_from(tables.sign_ins)
        assert await portal.database.read(lambda c: c.execute(count).scalar()) == 2
        assert (await portal.accounts.identify(first.access_token)).owner == ada.owner
        shown = await portal.sign_ins.open_ones(ada)
        monkeypatch.setattr(sign_ins_module, "MOST_SHOWN", 1)
        assert await portal.sign_ins.open_ones(ada) == shown[:1], "and of many the newest are shown"


@pytest.mark.parametrize("change", ["another password", "closed"])
async def test_no_sign_in_begins_with_what_was_right_a_moment_ago(
    database_url: str,
    settings_for: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
    change: str,
) -> None:
    async with open_container(settings_for(database_url=database_url)) as portal:
        ada = await portal.accounts.register(**ACCOUNT)
        link = (await portal.people.password_link(LOCAL, ada.user or "")).secret
        hasher = HeldHasher(asyncio.get_running_loop())
        monkeypatch.setattr(accounts_module, "_hasher", hasher)
        signing_in = asyncio.create_task(portal.accounts.sign_in("ada", ACCOUNT["password"], address=""))
        await hasher.has_found.wait()
        if change == "closed":
            await portal.people.change(LOCAL, ada.user or "", closed=True)
        else:
            await portal.accounts.reset_password(link, "another horse", address="")
        hasher.released.set()
        with pytest.raises(Forbidden if change == "closed" else Unauthenticated):
            await signing_in
        assert await portal.sign_ins.open_ones(ada) == []
        (denied,) = await portal.audit.search(AuditFilter(action="auth.sign_in"))
        assert (denied.target, denied.outcome) == (ada.owner, "denied")
