"""Whatever an LLM server does wrong: a typed error in time, what there was of a reply, nothing left over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from urllib.parse import urlsplit

import psutil
import pytest

from app.config import Settings
from app.container import Container, open_container
from app.events import Failed, Final, TurnRequest
from app.services.turns import Turn
from app.services.usage import today
from tests.fake_llm import FakeLLM, Script, text
from tests.support import person

ADA = person()
LIMITS = {
    "llm_connect_timeout": 0.5,
    "llm_first_token_timeout": 1.0,
    "llm_idle_timeout": 0.6,
    "llm_timeout": 2.0,
}
TOLERANCE_S = 1.0
MOST_GROWTH = 32 << 20

PIECES = text("One", " two", " three")
BEGUN = b'data: {"choices":[{"delta":{"content":"One"}}]}\n\n'
HTTP = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nConnection: close\r\n\r\n"
SSE = HTTP % b"text/event-stream"


@asynccontextmanager
async def portal_with(settings: Settings) -> AsyncIterator[Container]:
    async with open_container(settings) as container:
        async with asyncio.timeout(20):  # on a busy machine the first look may take longer than it may
            while (await container.llm.ahealth()).status != "ok":
                await asyncio.sleep(0.05)
        yield container


@pytest.fixture
async def portal(fake: FakeLLM, settings_for: Callable[..., Settings]) -> AsyncIterator[Container]:
    async with portal_with(settings_for(fake.url, **LIMITS)) as container:
        yield container


async def ask(portal: Container, message: str = "hi", session: str = "s") -> Turn:
    turn = await portal.sessions.submit(TurnRequest(who=ADA, session_id=session, message=message))
    await turn.ended()
    return turn


def connections(fake: FakeLLM) -> int:
    """How many connections to the LLM server are open here."""
    port = urlsplit(fake.url).port
    here = psutil.Process().net_connections("tcp")
    return len([c for c in here if c.raddr[1:] == (port,) and c.status == "ESTABLISHED"])


def running_turns() -> list[str]:
    return [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith(("turn", "chat"))]


async def assert_at_rest(portal: Container, fake: FakeLLM) -> None:
    """Nothing is held for what is over, and the next message is answered."""
    assert (portal.llm.places.taken, portal.llm.places.waiting) == (0, 0)
    await fake.until(lambda: fake.running == 0, 1.0)
    async with asyncio.timeout(1.0):
        while running_turns():
            await asyncio.sleep(0)
    fake.script = Script()
    again = (await ask(portal, "again")).ending
    if isinstance(again, Failed):  # a server that failed is given a rest, of which it is told how long
        assert isinstance(again.error.retry_after, float | int)
        await asyncio.sleep(again.error.retry_after)
        again = (await ask(portal, "and again")).ending
    assert isinstance(again, Final)
    assert connections(fake) <= 1, "one that is idle, to be used again"


FAULTS: dict[str, tuple[Script, str, bool, str]] = {
    "reset": (Script(wire=b""), "llm_unavailable", True, ""),
    "closed after the headers": (Script(wire=SSE), "llm_error", True, ""),
    "cut in the middle": (Script(pieces=PIECES, between=0.02, cut_after=2), "llm_error", True, "One two"),
    "half closed in the middle": (
        Script(pieces=PIECES, between=0.02, cut_after=1, then="eof"),
        "llm_error",
        True,
        "One",
    ),
    "no HTTP": (Script(wire=b"SSH-2.0-OpenSSH_9.2\r\n", then="hold"), "llm_error", False, ""),
    "headers without end": (
        Script(wire=SSE[:-2] + b"X-A: " + b"a" * 300_000, then="hold"),
        "llm_error",
        False,
        "",
    ),
    "a refusal that is no text": (
        Script(wire=b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n\xff\xfe", then="eof"),
        "llm_error",
        False,
        "",
    ),
    "a page": (Script(wire=HTTP % b"text/html" + b"<p>Hello</p>", then="eof"), "llm_error", True, ""),
    "an error for an answer": (
        Script(wire=HTTP % b"application/json" + b'{"error": {"message": "no"}}', then="eof"),
        "llm_error",
        True,
        "",
    ),
    "an error in the middle": (
        Script(raw=BEGUN + b'data: {"error": {"message": "out of memory"}}\n\n'),
        "llm_error",
        True,
        "One",
    ),
    "no UTF-8": (Script(raw=BEGUN + BEGUN.replace(b"One", b"\xff")), "llm_error", False, "One"),
    "half a surrogate pair": (Script(raw=BEGUN.replace(b"One", b"\\ud800")), "llm_error", False, ""),
    "deep JSON": (Script(raw=b'data: {"error":' + b"[" * 100_000 + b"\n\n"), "llm_error", False, ""),
    "no end of a line": (Script(flood=50 << 20), "llm_error", False, ""),
    "a redirection": (
        Script(status=302, headers={"Location": "/v2"}),
        "llm_error",
        False,
        "",
    ),
    "500": (Script(status=500), "llm_error", True, ""),
    "429": (Script(status=429, headers={"Retry-After": "1"}), "overloaded", True, ""),
    "never an answer": (Script(before_headers=60), "llm_timeout", True, ""),
    "never a first piece": (Script(before_first=60), "llm_timeout", True, ""),
    "silence in the middle": (Script(pieces=PIECES, cut_after=1, then="hold"), "llm_timeout", True, "One"),
    "drops": (Script(pieces=text(*["x"] * 500), between=0.1), "llm_timeout", True, "x"),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_has_its_error_and_leaves_nothing(fault: str, fake: FakeLLM, portal: Container) -> None:
    fake.script, code, retryable, partial = FAULTS[fault]
    memory = psutil.Process().memory_info().rss
    began = time.monotonic()
    turn = await ask(portal)
    took = time.monotonic() - began
    assert isinstance(turn.ending, Failed)
    assert (turn.ending.error.code, turn.ending.error.retryable) == (code, retryable)
    assert took < LIMITS["llm_timeout"] + TOLERANCE_S
    assert psutil.Process().memory_info().rss - memory < MOST_GROWTH
    messages = (await portal.sessions.page(ADA, "s")).messages
    assert {message.status for message in messages} == {"failed"}
    assert "".join(message.content for message in messages[1:]).rstrip("x") == partial.rstrip("x")
    assert len(messages) == (2 if partial else 1)
    await assert_at_rest(portal, fake)


async def tokens_of_ada(portal: Container) -> int:
    return (await portal.book.spent(ADA.owner, today())).tokens


@pytest.mark.parametrize(
    "script",
    [Script(status=401), Script(status=429), Script(status=500), Script(status=502), FAULTS["reset"][0]],
)
async def test_a_request_that_was_refused_costs_no_tokens(
    script: Script, fake: FakeLLM, portal: Container
) -> None:
    fake.script = script
    assert isinstance((await ask(portal)).ending, Failed)
    assert fake.requests
    assert await tokens_of_ada(portal) == 0


@pytest.mark.parametrize("fault", ["closed after the headers", "never an answer", "never a first piece"])
async def test_a_prompt_that_a_server_may_have_read_is_paid_for(
    fault: str, fake: FakeLLM, portal: Container
) -> None:
    fake.script = FAULTS[fault][0]
    assert isinstance((await ask(portal)).ending, Failed)
    assert await tokens_of_ada(portal) > 0


async def test_a_turn_that_is_stopped_while_its_prompt_is_read_pays_for_it(
    fake: FakeLLM, portal: Container
) -> None:
    fake.script = Script(before_headers=60)
    turn = await portal.sessions.submit(TurnRequest(who=ADA, session_id="s", message="hi"))
    await fake.until(lambda: fake.running == 1)
    await portal.sessions.stop(ADA, "s")
    await turn.ended()
    assert await tokens_of_ada(portal) > 0


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        (lambda: format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True), 20, 30),
        (lambda: "soon", 5, 5),
        (lambda: "99999999999999999999", 3600, 3600),
    ],
)
async def test_a_busy_server_says_when_in_seconds_or_by_a_date(
    fake: FakeLLM, portal: Container, header: Callable[[], str], least: float, most: float
) -> None:
    fake.script = Script(status=429, headers={"Retry-After": header()})
    ending = (await ask(portal)).ending
    assert isinstance(ending, Failed)
    assert isinstance(ending.error.retry_after, float | int)
    assert least <= ending.error.retry_after <= most


@pytest.mark.parametrize(
    ("limit", "script"),
    [
        ("llm_first_token_timeout", Script(before_headers=60)),
        ("llm_idle_timeout", Script(pieces=PIECES, cut_after=1, then="hold")),
        ("llm_timeout", Script(pieces=text(*["x"] * 1000), between=0.05)),
    ],
)
async def test_a_hundred_hangs_end_in_time_and_hold_no_place(
    fake: FakeLLM,
    settings_for: Callable[..., Settings],
    limit: str,
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("app.services.server_state.COOL_OFF_S", 0.5)  # for which the next message waits
    seconds = 2.0
    limits = {"llm_first_token_timeout": 60, "llm_idle_timeout": 60, "llm_timeout": 120, limit: seconds}
    # A hundred at once may take longer to connect than one alone.
    settings = settings_for(fake.url, **limits, llm_connect_timeout=seconds, llm_max_concurrency=100)
    async with portal_with(settings) as portal:
        fake.script = script

        async def one(number: int) -> float:
            """How long it took, from when the server fell silent where it did so in the middle."""
            turn = await ask(portal, session=f"s{number}")
            ended = time.monotonic()
            assert isinstance(turn.ending, Failed)
            assert turn.ending.error.code == "llm_timeout"
            silent = turn.first_token_at if limit == "llm_idle_timeout" else None
            return ended - (silent or turn.began)

        took = await asyncio.gather(*map(one, range(100)))
        assert seconds - 0.1 <= min(took)
        assert max(took) <= seconds + TOLERANCE_S
        assert fake.most_running == 100
        await assert_at_rest(portal, fake)
