"""Ways around limits: another address in every request, many sessions, many keys, many names."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.config import Settings
from app.container import Container, open_container
from app.errors import RateLimited, Unauthenticated
from app.services import accounts
from app.services.audit import AuditFilter
from app.services.ledger import MemoryLedger
from tests.fake_llm import FakeLLM
from tests.server import quicken_passwords
from tests.support import MakePortal

LIMIT = 10
FORGED = ["X-Forwarded-For", "Forwarded", "X-Real-IP", "X-Client-IP", "True-Client-IP", "CF-Connecting-IP"]


def forged_headers(number: int) -> dict[str, str]:
    """Another client's address, told in one of many ways."""
    name = FORGED[number % len(FORGED)]
    address = [f"10.0.0.{number}", f"2001:db8::{number:x}", f"10.0.0.{number}, 127.0.0.1", "unknown", ""][
        number % 5
    ]
    return {name: f"for={address}" if name == "Forwarded" else address, "User-Agent": f"agent {number}"}


@pytest.mark.slow
def test_no_address_session_or_key_gives_more_messages_an_hour(
    make_portal: MakePortal, tmp_path: Path, fake_thread: FakeLLM
) -> None:
    portal = make_portal(tmp_path, LLM_SERVER_URL=fake_thread.url, RATE_LIMIT_PER_HOUR=str(LIMIT)).start()
    with portal.client() as client, portal.client("other") as other:
        secrets = [client.post("/api/keys", json={"name": f"k{n}"}).json()["secret"] for n in range(5)]
        again = client.post("/api/auth/login", json={"username": "ada", "password": "correct horse"})
        tokens = [*secrets, again.json()["access_token"], client.headers["Authorization"].split()[1]]
        answers = []
        for number in range(100):
            headers = {"Authorization": f"Bearer {tokens[number % len(tokens)]}", **forged_headers(number)}
            body = {"session_id": f"s{number}", "message": "hi", "request_id": f"r{number}"}
            answers.append(client.post("/api/llm/chat/session", json=body, headers=headers))
        statuses = [answer.status_code for answer in answers]
        assert statuses == [200] * LIMIT + [429] * (100 - LIMIT)
        assert len(fake_thread.requests) == LIMIT
        refused = answers[-1]
        assert 1 <= int(refused.headers["retry-after"]) <= 3600
        assert refused.headers["ratelimit-policy"] == f'"person";q={LIMIT};w=3600'
        assert refused.headers["ratelimit"].startswith('"person";r=0;t=')
        one = {"session_id": "s", "message": "hi"}
        assert other.post("/api/llm/chat/session", json=one).status_code == 200, "others are not slowed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trusted", "forwarded", "counted"),
    [
        ("", "192.0.2.7", "127.0.0.1"),
        ("10.9.9.9", "192.0.2.7", "127.0.0.1"),
        ("127.0.0.1", "192.0.2.7", "192.0.2.7"),
        ("127.0.0.1", "6.6.6.6, 192.0.2.7", "192.0.2.7"),
        ("127.0.0.1,10.0.0.0/8", "6.6.6.6, 192.0.2.7, 10.1.2.3", "192.0.2.7"),
    ],
)
def test_only_a_trusted_proxy_is_believed_and_only_the_address_that_it_saw(
    make_portal: MakePortal, tmp_path: Path, trusted: str, forwarded: str, counted: str
) -> None:
    portal = make_portal(tmp_path, TRUSTED_PROXIES=trusted).start(ready=False)
    with portal.client("auditor", "auditor") as client:
        guess = {"username": "nobody", "password": "wrong horse"}
        httpx.post(f"{portal.url}/api/auth/login", json=guess, headers={"X-Forwarded-For": forwarded})
        (entry,) = client.get("/api/admin/audit", params={"outcome": "denied"}).json()["entries"]
    assert entry["details"]["address"] == counted


# --- passwords -----------------------------------------------------------------------------------


@pytest.fixture
def quick_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries are counted here, and there are many."""
    for name in ("_hasher", "_DECOY"):
        monkeypatch.setattr(accounts, name, getattr(accounts, name))  # put back in the end
    quicken_passwords()


def test_a_name_that_nobody_has_takes_the_same_time() -> None:
    """The hash that is looked at then has the parameters of those that are made."""
    matches, better = accounts._hasher.verify_and_update("no account has this password", accounts._DECOY)
    assert (matches, better) == (True, None)


class Guesser:
    """Tries passwords, at a time that it sets."""

    def __init__(self, portal: Container) -> None:
        self._portal = portal
        self.now = 1_000_000.0
        self._accounts: Any = portal.accounts
        self._accounts._ledger = MemoryLedger(lambda: self.now)

    async def try_one(self, name: str, password: str = "wrong horse", address: str = "192.0.2.1") -> str:
        """How it ends: `in`, `wrong`, or after how many seconds to come again."""
        try:
            await self._accounts.sign_in(name, password, address=address)
        except Unauthenticated:
            return "wrong"
        except RateLimited as refused:
            return f"wait {refused.retry_after:.0f}"
        return "in"


async def people(portal: Container, *names: str) -> None:
    await asyncio.gather(
        *(portal.accounts.register(name, f"{name}@example.org", "correct horse") for name in names)
    )


@pytest.mark.usefixtures("quick_passwords")
async def test_guessing_at_an_account_is_slowed_and_then_stopped_from_wherever_it_comes(
    settings_for: Callable[..., Settings],
) -> None:
    async with open_container(settings_for()) as portal:
        await people(portal, "ada", "bob")
        guesser, tried = Guesser(portal), 0
        for minute in range(4):
            for _ in range(5):
                tried += 1
                assert await guesser.try_one("ada", address=f"10.0.{minute}.{tried}") == "wrong"
            assert await guesser.try_one("ada@example.org") == "wait 60", "slowed"
            guesser.now += 61
        said = await guesser.try_one("ada", "correct horse")
        assert said.startswith("wait 3"), "stopped for the rest of the hour"
        assert int(said.split()[1]) > 3000
        assert await guesser.try_one("bob", "correct horse") == "in", "others are not"
        guesser.now += 3600
        assert await guesser.try_one("ada", "correct horse") == "in"
        denied = await portal.audit.search(AuditFilter(action="auth.sign_in", outcome="denied"))
        assert len(denied) == tried, "each is in the audit log"


@pytest.mark.usefixtures("quick_passwords")
async def test_guessing_at_many_accounts_from_one_address_is_stopped_there_and_nowhere_else(
    settings_for: Callable[..., Settings],
) -> None:
    async with open_container(settings_for()) as portal:
        await people(portal, "ada")
        guesser = Guesser(portal)
        tries = await asyncio.gather(*(guesser.try_one(f"name{number}") for number in range(60)))
        assert set(tries) == {"wrong"}
        assert (await guesser.try_one("name60")).startswith("wait 9")
        assert (await guesser.try_one("ada", "correct horse")).startswith("wait 9")
        assert await guesser.try_one("ada", "correct horse", "192.0.2.2") == "in"
        guesser.now += 901
        assert await guesser.try_one("ada", "correct horse") == "in"


@pytest.mark.usefixtures("quick_passwords")
async def test_a_name_that_nobody_has_is_refused_as_others_are(settings_for: Callable[..., Settings]) -> None:
    async with open_container(settings_for()) as portal:
        await people(portal, "ada")
        guesser = Guesser(portal)

        async def told(name: str) -> list[str]:
            spellings = [name, name.upper(), name.title(), f"{name}@Example.org"]
            return [await guesser.try_one(spelling) for spelling in spellings for _ in range(6)]

        known, unknown = await told("ada"), await told("eve")
        assert known[:18] == unknown[:18] == ["wrong"] * 5 + ["wait 60"] * 13


@pytest.mark.usefixtures("quick_passwords")
async def test_an_address_of_ipv6_is_one_of_very_many(settings_for: Callable[..., Settings]) -> None:
    async with open_container(settings_for()) as portal:
        await people(portal, "ada")
        guesser = Guesser(portal)
        for number in range(60):
            address = f"2001:db8:1:2:{number:x}::{number:x}"
            assert await guesser.try_one(f"name{number}", address=address) == "wrong"
            mapped = f"::ffff:10.0.1.{number}"
            assert await guesser.try_one(f"other{number}", address=mapped) == "wrong"
        assert (await guesser.try_one("ada", "correct horse", "2001:db8:1:2::1")).startswith("wait 9")
        assert await guesser.try_one("ada", "correct horse", "2001:db8:1:3::1") == "in"
        assert await guesser.try_one("ada", "correct horse", "::ffff:10.0.2.1") == "in"


@pytest.mark.usefixtures("quick_passwords")
async def test_right_passwords_are_many_but_not_without_end(settings_for: Callable[..., Settings]) -> None:
    async with open_container(settings_for()) as portal:
        await people(portal, "ada", "bob", "cy", "di")
        guesser = Guesser(portal)

        async def tries(name: str, count: int) -> set[str]:
            said: set[str] = set()
            for _ in range(count // 5):  # no more at once: what is not known to be right yet counts as wrong
                said.update(await asyncio.gather(*(guesser.try_one(name, "correct horse") for _ in range(5))))
            return said

        assert await tries("ada", 300) == {"in"}
        assert (await guesser.try_one("ADA", "correct horse")).startswith("wait 3")
        for name, count in (("bob", 300), ("cy", 300), ("di", 100)):
            assert await tries(name, count) == {"in"}
        assert (await guesser.try_one("di", "correct horse")).startswith("wait 3"), "from this address"
        assert await guesser.try_one("di", "correct horse", "192.0.2.2") == "in"


async def test_many_guesses_at_once_are_no_way_around(settings_for: Callable[..., Settings]) -> None:
    async with open_container(settings_for()) as portal:
        await people(portal, "ada")
        guesser = Guesser(portal)
        tries = await asyncio.gather(*(guesser.try_one("ada", address=f"10.0.0.{n}") for n in range(40)))
        assert tries.count("wrong") == 5
        assert tries.count("wait 60") == 35


async def test_the_old_password_is_guarded_when_it_is_changed_too(
    settings_for: Callable[..., Settings],
) -> None:
    async with open_container(settings_for()) as portal:
        ada = await portal.accounts.register("ada", "ada@example.org", "correct horse")
        for _ in range(5):
            with pytest.raises(Exception, match="current_password"):
                await portal.accounts.change_password(
                    ada, "wrong horse", "battery staple", address="192.0.2.1"
                )
        with pytest.raises(RateLimited):
            await portal.accounts.change_password(ada, "correct horse", "battery staple", address="192.0.2.1")


async def test_strangers_do_not_keep_anybody_from_changing_the_password(
    settings_for: Callable[..., Settings],
) -> None:
    async with open_container(settings_for()) as portal:
        ada = await portal.accounts.register("ada", "ada@example.org", "correct horse")
        guesser = Guesser(portal)
        while await guesser.try_one("ada") == "wrong":
            pass
        await portal.accounts.change_password(ada, "correct horse", "battery staple", address="192.0.2.1")
        guesser.now += 61
        assert await guesser.try_one("ada", "battery staple") == "in"
