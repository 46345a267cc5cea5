"""Server-side request forgery: what a person's URL must not reach."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

import pytest
from aiohttp import web
from pydantic import SecretStr
from structlog.testing import capture_logs

from app.config import Settings
from app.container import open_container
from app.errors import InvalidRequest
from app.services.outbound import MOST_ANSWER_BYTES, Outbound, OutboundFailed, is_public, plain_url
from app.services.webhooks import Webhook
from tests.support import SECRET


@dataclass
class Canary:
    """A server on loopback that should hear nothing, or what it is told to."""

    port: int = 0
    heard: list[bytes] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    location: str = ""
    answer: bytes = b"ok"
    change: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle(self, request: web.Request) -> web.Response:
        self.heard.append(await request.read())
        self.change.set()
        headers = {"Location": self.location} if self.location else {}
        return web.Response(
            status=self.statuses.pop(0) if self.statuses else 200, headers=headers, body=self.answer
        )

    async def until(self, number: int) -> None:
        async with asyncio.timeout(10):
            while len(self.heard) < number:
                self.change.clear()
                await self.change.wait()


@pytest.fixture
async def canary() -> AsyncIterator[Canary]:
    bird = Canary()
    app = web.Application()
    app.router.add_route("*", "/{any:.*}", bird.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    listening = [_listener(socket.AF_INET, "127.0.0.1", 0)]
    bird.port = listening[0].getsockname()[1]
    with suppress(OSError):  # a machine without IPv6
        listening.append(_listener(socket.AF_INET6, "::1", bird.port))
    for sock in listening:
        await web.SockSite(runner, sock).start()
    yield bird
    await runner.cleanup()


def _listener(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    sock = socket.socket(family)
    sock.bind((host, port))
    return sock


NAMES = {
    "loopback.example": ["127.0.0.1"],
    "loopback6.example": ["::1"],
    "localhost.": ["127.0.0.1"],
    "mixed.example": ["93.184.215.14", "127.0.0.1"],
    "mapped.example": ["::ffff:127.0.0.1"],
    "nat64.example": ["64:ff9b::7f00:1"],
    "metadata.example": ["169.254.169.254"],
    "nobody.example": [],
}


async def lookup(host: str, port: int) -> list[str]:
    """Names with an owner who means harm; all others as the system has them."""
    if host in NAMES:
        return NAMES[host]
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


SPELLINGS = [
    # loopback, spelled out
    "http://127.0.0.1:{port}/",
    "http://127.0.0.2:{port}/",
    "http://127.255.255.254:{port}/",
    "http://localhost:{port}/",
    "http://LOCALHOST:{port}/",
    "http://localhost.:{port}/",
    "http://127.0.0.1.:{port}/",
    "http://[::1]:{port}/",
    "http://[0:0:0:0:0:0:0:1]:{port}/",
    "http://0.0.0.0:{port}/",
    "http://0:{port}/",
    "http://[::]:{port}/",
    # loopback in numbers
    "http://2130706433:{port}/",
    "http://0x7f000001:{port}/",
    "http://0x7f.0.0.1:{port}/",
    "http://017700000001:{port}/",
    "http://0177.0.0.1:{port}/",
    "http://127.1:{port}/",
    "http://127.0.1:{port}/",
    "http://127.0x1:{port}/",
    "http://1\uff127.0.0.1:{port}/",
    "http://①②⑦.⓪.⓪.①:{port}/",
    "http://127。0。0。1:{port}/",
    "http://%31%32%37.0.0.1:{port}/",
    # loopback inside of other addresses
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://[::ffff:7f00:1]:{port}/",
    "http://[::127.0.0.1]:{port}/",
    "http://[64:ff9b::127.0.0.1]:{port}/",
    "http://[64:ff9b:1::7f00:1]:{port}/",
    "http://[2002:7f00:1::]:{port}/",
    "http://[2001:0:7f00:1::80ff:fffe]:{port}/",
    "http://[fe80::1%25lo]:{port}/",
    # names
    "http://loopback.example:{port}/",
    "http://LOOPBACK.example:{port}/",
    "http://loopback6.example:{port}/",
    "http://mixed.example:{port}/",
    "http://mapped.example:{port}/",
    "http://nat64.example:{port}/",
    "http://ⓛoopback.example:{port}/",
    # readers that disagree
    "http://example.org@127.0.0.1:{port}/",
    "http://user:secret@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}\\@example.org/",
    "http://example.org\\@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}#@example.org/",
    "http:\\\\127.0.0.1:{port}\\",
    "http:127.0.0.1:{port}/",
    "http:///127.0.0.1:{port}/",
    "//127.0.0.1:{port}/",
    "http://example.org\r\nHost: 127.0.0.1:{port}/",
    "http://127.0.0.1\t:{port}/",
    " http://127.0.0.1:{port}/",
    "http://[127.0.0.1]:{port}/",
    "http://127.0.0.1:{port}:80/",
    # other schemes
    "ftp://127.0.0.1:{port}/",
    "file:///etc/passwd",
    "gopher://127.0.0.1:{port}/_x",
    "unix:///var/run/docker.sock",
    "javascript:alert(1)",
    "",
    # elsewhere inside
    "http://169.254.169.254/latest/meta-data/",
    "http://metadata.example/",
    "http://168.63.129.16/",
    "http://100.100.100.200/",
    "http://[fd00:ec2::254]/",
    "http://10.0.0.1/",
    "http://192.168.1.1/",
    "http://172.16.0.1/",
    "http://100.64.0.1/",
    "http://224.0.0.1/",
    "http://255.255.255.255/",
    "http://[ff02::1]/",
    "http://[fc00::1]/",
    "http://93.184.215.14:0/",
    "http://93.184.215.14:99999/",
]


@pytest.mark.parametrize("spelling", SPELLINGS)
async def test_no_spelling_leads_inside(canary: Canary, spelling: str) -> None:
    url = spelling.replace("{port}", str(canary.port))
    with pytest.raises(InvalidRequest, match=r"^url: ") as refused:
        await Outbound(lookup=lookup, timeout=5).post(url, b"{}")
    assert canary.heard == []
    assert "127" not in refused.value.message, "what a name resolves to is nobody's business"


@pytest.mark.parametrize(
    "url",
    [
        "http://user:secret@example.org/",
        "http://user@example.org/",
        "http://@example.org/",
        "http://a.example\\@example.org/",
        "http://example.org\\.a.example/",
        "http://example.org /",
        "http://example.org/a b",
        "http://example.org/\r\nX: y",
        "http://ex%61mple.org/",
        "http://example.org:http/",
        "http://example.org::80/",
        "http:example.org/",
        "HTTP//example.org/",
        "http://example.org/" + "a" * 2048,
    ],
)
def test_what_two_readers_may_read_differently_is_no_url(url: str) -> None:
    with pytest.raises(InvalidRequest):
        plain_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/a?b=c#d",
        "http://example.org:8080",
        "https://bücher.example/",
        "http://[2606::1]/",
    ],
)
def test_plain_urls_are_taken(url: str) -> None:
    assert plain_url(url).fragment == ""


@pytest.mark.parametrize(
    "address",
    [
        "93.184.215.14",
        "1.1.1.1",
        "2606:4700:4700::1111",
        "::ffff:1.1.1.1",
        "64:ff9b::101:101",
        "2002:101:101::1",
    ],
)
def test_what_everybody_reaches_is_public(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize("entry", ["127.0.0.0/8", "127.0.0.1", "Loopback.Example", "loopback.example."])
async def test_what_the_admin_trusts_is_reached(canary: Canary, entry: str) -> None:
    url = f"http://loopback.example:{canary.port}/hook"
    answer = await Outbound([entry], lookup=lookup).post(url, b'{"a":1}')
    assert (answer.status, answer.body, canary.heard) == (200, b"ok", [b'{"a":1}'])


@pytest.mark.parametrize("entry", ["10.0.0.0/8", "other.example", "example", "::1", "127.0.0.2"])
async def test_trust_goes_no_further_than_it_says(canary: Canary, entry: str) -> None:
    with pytest.raises(InvalidRequest):
        await Outbound([entry], lookup=lookup).post(f"http://loopback.example:{canary.port}/", b"")
    assert canary.heard == []


async def test_a_name_that_changes_in_between_changes_nothing(canary: Canary) -> None:
    """127.0.0.9 stands for a server outside; nothing listens there, and the name is then the canary's."""
    answers = [["127.0.0.9"], ["127.0.0.1"], ["127.0.0.1"]]
    asked = []

    async def rebinding(host: str, _port: int) -> list[str]:
        asked.append(host)
        return answers[len(asked) - 1]

    with pytest.raises(OutboundFailed):
        await Outbound(["127.0.0.9"], lookup=rebinding).post(f"http://rebind.example:{canary.port}/", b"")
    assert asked == ["rebind.example"]
    assert canary.heard == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_not_followed(canary: Canary, status: int) -> None:
    canary.statuses, canary.location = [status], f"http://127.0.0.1:{canary.port}/secret"
    answer = await Outbound(["127.0.0.1"]).post(f"http://127.0.0.1:{canary.port}/", b"first")
    assert (answer.status, canary.heard) == (status, [b"first"])


async def test_environment_proxies_are_not_used(canary: Canary, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{canary.port}")
    with pytest.raises(OutboundFailed):
        await Outbound(["127.0.0.9"]).post("http://127.0.0.9:9/", b"", "text/plain")
    assert canary.heard == []


async def test_of_a_large_answer_only_the_beginning_is_read(canary: Canary) -> None:
    canary.answer = b"x" * 50_000_000
    answer = await Outbound(["127.0.0.1"]).post(f"http://127.0.0.1:{canary.port}/", b"")
    assert len(answer.body) == MOST_ANSWER_BYTES


async def test_a_server_that_says_nothing_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        async with asyncio.timeout(5):
            with pytest.raises(OutboundFailed, match="too long"):
                await Outbound(["127.0.0.1"], timeout=0.2).post(f"http://127.0.0.1:{port}/", b"")


async def test_a_name_that_nobody_has_is_no_fault_of_the_portal() -> None:
    with pytest.raises(OutboundFailed, match="no such host"):
        await Outbound(lookup=lookup).post("http://nobody.example/", b"")


# --- the webhook ---------------------------------------------------------------------------------

HOOK = "kanarienvogel-hook-secret"


async def _run(webhook: Webhook, until: Any) -> None:
    task = asyncio.create_task(webhook.run())
    try:
        await until
    finally:
        task.cancel()


async def test_a_webhook_is_tried_again_and_its_address_is_in_no_log(canary: Canary) -> None:
    canary.statuses = [500, 429, 200]
    webhook = Webhook(f"http://127.0.0.1:{canary.port}/{HOOK}", Outbound(["127.0.0.1"]), (0.01, 0.01, 0.01))
    webhook.tell({"n": 1})
    webhook.tell({"n": 2})
    with capture_logs() as logs:
        await _run(webhook, canary.until(4))
    assert [json.loads(body)["n"] for body in canary.heard] == [1, 1, 1, 2]
    assert [entry["reason"] for entry in logs] == ["status 500", "status 429"]
    assert HOOK not in str(logs)


async def test_a_webhook_that_refuses_is_left_alone_and_one_that_leads_inside_is_never_called(
    canary: Canary,
) -> None:
    canary.statuses = [404, 200]
    webhook = Webhook(f"http://127.0.0.1:{canary.port}/", Outbound(["127.0.0.1"]), (0.01,))
    inside = Webhook(f"http://127.0.0.1:{canary.port}/", Outbound(), (0.01,))
    for hook in (inside, webhook):
        hook.tell({"n": 1})
        hook.tell({"n": 2})
    both = asyncio.create_task(inside.run())
    await _run(webhook, canary.until(2))
    both.cancel()
    assert [json.loads(body)["n"] for body in canary.heard] == [1, 2]


async def test_whoever_raises_an_alert_never_waits_for_the_webhook() -> None:
    webhook = Webhook("http://127.0.0.1:9/", Outbound())
    with capture_logs() as logs:
        for number in range(101):
            webhook.tell({"n": number})
    assert [entry["event"] for entry in logs] == ["a webhook message was dropped: too many wait"]


async def test_a_spent_budget_reaches_the_webhook(
    canary: Canary, settings_for: Callable[..., Settings]
) -> None:
    settings = settings_for(
        alert_webhook_url=SecretStr(f"http://127.0.0.1:{canary.port}/{HOOK}"), outbound_allow="127.0.0.1"
    )
    async with open_container(settings) as portal:
        await portal.alerts.look("user:1", "daily_tokens", "2026-11-21", spent=85, added=10, amount=100)
        await canary.until(1)
    told = json.loads(canary.heard[0])
    assert (told["type"], told["subject"], told["percent"]) == ("budget.alert", "user:1", 80)
    assert (told["spent"], told["amount"], told["at"][-1]) == (85, 100, "Z")
    assert SECRET not in str(told)
