"""What is sent to the model of a long conversation, through the doors: cuts that are warmed while nobody
speaks, pins, summaries, and servers that have no room."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.events import new_id
from tests.fake_llm import FakeLLM, Script, size_of
from tests.support import LlamaServer, MakePortal, Portal, ask, wait_until

BUDGET = 600
ANSWER = "a" * 60
WORDS = [{"content": ANSWER}]
EXCHANGE = 128
"""Tokens of a question and its answer."""

Messages = list[dict[str, Any]]
Start = Callable[..., Portal]


@pytest.fixture
def llamacpp(llm: FakeLLM) -> Iterator[FakeLLM]:
    """The fake server, as one whose prefix cache is one's own."""
    llm.owner, llm.script = "llamacpp", Script(pieces=WORDS, counts=True)
    yield llm
    llm.owner, llm.context = "test", None


@pytest.fixture
def start(make_portal: MakePortal, llm: FakeLLM, tmp_path: Path) -> Start:
    """Starts a portal with little room for history."""

    def started(**settings: str) -> Portal:
        values = {"LLM_SERVER_URL": llm.url, "LLM_MAX_HISTORY_TOKENS": str(BUDGET), **settings}
        return make_portal(tmp_path, **values).start()

    return started


def turns(llm: FakeLLM) -> list[Messages]:
    """The prompts of turns."""
    return [request["messages"] for request in llm.requests if request["max_tokens"] != 1]


def warmings(llm: FakeLLM) -> list[Messages]:
    return [request["messages"] for request in llm.requests if request["max_tokens"] == 1]


def say(client: httpx.Client, session: str, number: int, **body: Any) -> dict[str, Any]:
    answer = ask(client, session, message=f"{number:03}".ljust(60, "q"), **body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def history_of(client: httpx.Client, session: str) -> Messages:
    found: Messages = client.get(f"/api/llm/chat/session/{session}/history").json()["messages"]
    return found


def fill(client: httpx.Client, llm: FakeLLM, session: str) -> int:
    """Speaks until the history is cut and warmed; returns the number of turns."""
    for number in range(20):
        say(client, session, number, system_prompt="Be kind.")
        if is_full(llm):
            wait_until(lambda: warmings(llm) and llm.running == 0, what="the warming")
            return number + 1
    raise AssertionError("it was never full")


def is_full(llm: FakeLLM) -> bool:
    """Whether the last answer has filled the history, which is then cut and warmed."""
    return size_of(turns_of(llm)[-1]) + len(ANSWER) + 4 + EXCHANGE > BUDGET


def numbers(messages: Messages) -> list[int]:
    """Which of the questions are among the messages."""
    return [int(m["content"][:3]) for m in messages if m["role"] == "user" and m["content"][:3].isdecimal()]


# --- cutting and warming ---


def test_the_history_is_cut_right_after_the_answer_that_filled_it_and_warmed(
    start: Start, llamacpp: FakeLLM, session: str
) -> None:
    with start().client() as client:
        asked = fill(client, llamacpp, session)
        assert all(size_of(prompt) <= BUDGET for prompt in turns(llamacpp))
        (warmed,) = warmings(llamacpp)
        assert warmed[0] == {"role": "system", "content": "Be kind."}
        assert numbers(warmed)[-1] == asked - 1
        assert size_of(warmed) <= 0.6 * BUDGET
        say(client, session, asked)
        assert turns(llamacpp)[-1][:-1] == warmed[:-1], "the next turn begins with what was warmed"
        assert client.get("/api/stats").json()["today"]["turns"] == asked + 1, "a warming is no turn"


def test_a_warming_is_given_up_when_the_session_speaks(start: Start, llamacpp: FakeLLM, session: str) -> None:
    with start().client() as client:
        hang_in_warming(client, llamacpp, session)
        dropped = llamacpp.dropped
        say(client, session, 100)
        assert llamacpp.most_running <= 2
        wait_until(lambda: llamacpp.dropped == dropped + 1, what="the end of the warming")


def hang_in_warming(client: httpx.Client, llm: FakeLLM, session: str) -> None:
    """Speaks until a warming is under way that takes for ever."""
    llm.script = Script(pieces=WORDS, counts=True, before_warming=60)
    for number in range(20):
        say(client, session, number, system_prompt="Be kind.")
        if is_full(llm):
            wait_until(lambda: warmings(llm) and llm.running == 1, what="the warming")
            return
    raise AssertionError("it was never warmed")


def test_nobody_waits_for_a_warming(start: Start, llamacpp: FakeLLM, session: str) -> None:
    with start(LLM_MAX_CONCURRENCY="1").client() as client:
        hang_in_warming(client, llamacpp, session)
        dropped = llamacpp.dropped
        body = {"session_id": new_id(), "message": "hi"}
        with client.stream("POST", "/api/llm/chat/session/stream", json=body) as response:
            events = [line for line in response.iter_lines() if line.startswith("event:")]
        assert events == ["event: accepted", "event: token", "event: final"], "it was never queued"
        wait_until(lambda: llamacpp.dropped == dropped + 1, what="the end of the warming")


def test_a_busy_server_is_not_asked_to_warm(start: Start, llamacpp: FakeLLM, session: str) -> None:
    with start(LLM_MAX_CONCURRENCY="1").client() as client:
        llamacpp.script = Script(pieces=WORDS, counts=True, before_first=0.2)
        for number in range(8):
            # Others wait whenever an answer comes to its end.
            other = {"session_id": new_id(), "message": "x", "request_id": "r"}
            body = {"session_id": session, "message": f"{number:03}".ljust(60, "q")}
            with (
                client.stream("POST", "/api/llm/chat/session/stream", json=body) as mine,
                client.stream("POST", "/api/llm/chat/session/stream", json=other) as theirs,
            ):
                mine.read()
                theirs.read()
        mine_last = [prompt for prompt in turns(llamacpp) if prompt[-1]["content"] != "x"][-1]
        assert numbers(mine_last)[0] > 0, "it was cut"
        assert warmings(llamacpp) == []


@pytest.mark.parametrize("owner", ["openai", "library", ""])
def test_others_than_ones_own_servers_are_not_warmed(
    start: Start, llamacpp: FakeLLM, session: str, owner: str
) -> None:
    llamacpp.owner = owner
    with start().client() as client:
        for number in range(12):
            say(client, session, number)
        assert len(turns(llamacpp)) == len(llamacpp.requests) == 12
        assert all(size_of(prompt) <= BUDGET for prompt in turns(llamacpp))
        assert numbers(turns(llamacpp)[-1])[0] > 0, "it was cut"


def test_a_cut_holds_across_a_restart(start: Start, llamacpp: FakeLLM, session: str) -> None:
    portal = start()
    with portal.client() as client:
        asked = fill(client, llamacpp, session)
        portal.stop()
        portal.start()
    with portal.client() as client:
        say(client, session, asked)
        assert turns(llamacpp)[-1][:-1] == warmings(llamacpp)[-1][:-1]


# --- a server that has no room ---

OVERFLOWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "llama.cpp": lambda room: {
        "code": 400,
        "type": "exceed_context_size_error",
        "message": "request exceeds the available context size, try increasing it",
        "n_prompt_tokens": 0,
        "n_ctx": room,
    },
    "OpenAI": lambda room: {
        "code": "context_length_exceeded",
        "message": f"This model's maximum context length is {room} tokens. However, your messages resulted "
        "in 9 tokens. Please reduce the length of the messages.",
    },
    "vLLM": lambda room: {
        "code": 400,
        "message": f"This model's maximum context length is {room} tokens. However, you requested 900 tokens "
        "(800 in the messages, 100 in the completion).",
    },
    "without numbers": lambda room: {"code": 400, "message": "The prompt is too long."},
}


@pytest.mark.parametrize("server", OVERFLOWS)
def test_an_overflow_leads_to_one_cut_and_one_retry(
    start: Start, llm: FakeLLM, session: str, server: str
) -> None:
    room = 500
    llm.script = Script(pieces=WORDS, counts=True, room=room, overflow=OVERFLOWS[server](room))
    with start(LLM_MAX_HISTORY_TOKENS="9000", LLM_MAX_TOKENS="60").client() as client:
        overflowed = 0
        for number in range(10):
            before = len(llm.requests)
            say(client, session, number, system_prompt="Be kind.")
            sent = llm.requests[before:]
            assert len(sent) <= 2
            overflowed += len(sent) == 2
            assert sent[-1]["messages"][0] == {"role": "system", "content": "Be kind."}
            assert numbers(sent[-1]["messages"])[-1] == number
        assert overflowed == (1 if server != "without numbers" else 2), "what was learnt is heeded"
        asked = [m["content"][:3] for m in history_of(client, session) if m["role"] == "user"]
        assert asked == [f"{number:03}" for number in range(10)]
        assert {m["status"] for m in history_of(client, session)} == {"complete"}


def test_a_message_that_is_too_long_alone_is_an_invalid_request(
    start: Start, llm: FakeLLM, session: str
) -> None:
    llm.script = Script(pieces=WORDS, counts=True, room=200, overflow=OVERFLOWS["OpenAI"](200))
    with start().client() as client:
        say(client, session, 0)
        refused = ask(client, session, message="x" * 400)
        assert refused.status_code == 422
        assert refused.json()["error"]["code"] == "invalid_request"
        assert "200 tokens" in refused.json()["error"]["message"]
        say(client, session, 1)
        assert numbers(turns(llm)[-1])[-1] == 1


def test_messages_without_a_session_that_are_too_long_are_an_invalid_request(
    client: httpx.Client, llm: FakeLLM
) -> None:
    llm.script = Script(room=200, overflow=OVERFLOWS["llama.cpp"](200))
    refused = client.post("/api/llm/chat", json={"messages": [{"role": "user", "content": "x" * 400}]})
    assert refused.status_code == 422
    assert refused.json()["error"]["code"] == "invalid_request"
    assert len(llm.requests) == 1


# --- pins ---


def test_a_pinned_exchange_survives_cuts_and_restarts(start: Start, llamacpp: FakeLLM, session: str) -> None:
    portal = start()
    with portal.client() as client:
        first = say(client, session, 0, system_prompt="Be kind.")
        pinned = client.post(f"/api/sessions/{session}/messages/{first['message_id']}/pin")
        assert pinned.status_code == 200, pinned.text
        assert pinned.json()["most_tokens"] == BUDGET // 4
        assert 0 < pinned.json()["pinned_tokens"] <= BUDGET // 4
        shown = [m["pinned"] for m in history_of(client, session) if m["role"] != "system"]
        assert shown == [False, True], "the message that was pinned"
        for number in range(1, 14):
            say(client, session, number)
            assert numbers(turns(llamacpp)[-1])[0] == 0
        assert numbers(turns(llamacpp)[-1])[1] > 1, "others were cut"
        portal.stop()
        portal.start()
    with portal.client() as client:
        say(client, session, 14)
        prompt = turns(llamacpp)[-1]
        assert [m["role"] for m in prompt[:3]] == ["system", "user", "assistant"]
        assert numbers(prompt)[0] == 0
        path = f"/api/sessions/{session}/messages/{first['message_id']}/pin"
        assert client.delete(path).status_code == 204
        say(client, session, 15)
        assert 0 not in numbers(turns(llamacpp)[-1])
        assert not any(m["pinned"] for m in history_of(client, session))


def test_only_so_much_can_be_pinned(start: Start, llamacpp: FakeLLM, session: str) -> None:
    with start().client() as client:
        said = [say(client, session, number)["message_id"] for number in range(2)]
        assert client.post(f"/api/sessions/{session}/messages/{said[0]}/pin").status_code == 200
        refused = client.post(f"/api/sessions/{session}/messages/{said[1]}/pin")
        assert refused.status_code == 422
        assert f"at most {BUDGET // 4}" in refused.json()["error"]["message"]
        assert client.post(f"/api/sessions/{session}/messages/{said[0]}/pin").status_code == 200, "again"


def test_what_is_never_sent_cannot_be_pinned(fake_portal: Portal, client: httpx.Client, llm: FakeLLM) -> None:
    session = new_id()
    say(client, session, 0)
    llm.script = Script(status=500)
    ask(client, session, message="fails")
    llm.script = Script()
    failed = history_of(client, session)[-1]
    assert failed["status"] == "failed"
    path = f"/api/sessions/{session}/messages"
    assert client.post(f"{path}/{failed['id']}/pin").status_code == 409
    assert client.post(f"{path}/nothing/pin").status_code == 404
    state = {"session_id": session, "state": {"x": 1}}
    assert client.post("/api/mqtt/publish_state", json=state).status_code == 202
    wait_until(lambda: history_of(client, session)[-1]["role"] == "assistant", what="the hint")
    assert client.post(f"{path}/{history_of(client, session)[-1]['id']}/pin").status_code == 409
    assert client.delete(f"{path}/nothing/pin").status_code == 404


# --- summaries ---

SUMMARY = "Ada likes tea."


def summaries(llm: FakeLLM) -> list[dict[str, Any]]:
    return [r for r in llm.requests if "keep the notes" in r["messages"][0]["content"]]


@pytest.fixture
def notes(llamacpp: FakeLLM) -> FakeLLM:
    """The server, which answers a request for notes with notes."""
    llamacpp.script = Script(pieces=WORDS, counts=True, notes=SUMMARY)
    return llamacpp


def test_a_summary_takes_the_place_of_what_was_cut(start: Start, notes: FakeLLM, session: str) -> None:
    portal = start(LLM_HISTORY_SUMMARY="100")
    with portal.client() as client:
        asked = fill(client, notes, session)
        (request,) = summaries(notes)
        assert request["max_tokens"] == 100
        assert numbers_in(request["messages"][1]["content"]) == list(range(len(missing(notes, asked))))
        warmed = warmings(notes)[-1]
        assert [m["role"] for m in warmed[:3]] == ["system", "user", "assistant"]
        assert SUMMARY in warmed[1]["content"]
        assert client.get(f"/api/sessions/{session}").json()["summary"] == SUMMARY
        say(client, session, asked)
        assert turns_of(notes)[-1][:-1] == warmed[:-1]
        today = client.get("/api/stats").json()["today"]
        assert today["turns"] == asked + 1, "a summary is no turn"
        sizes = sum(size_of(prompt) for prompt in turns_of(notes)) + size_of(request["messages"])
        assert today["prompt_tokens"] == sizes, "and it is paid for"
        portal.stop()
        portal.start()
    with portal.client() as client:
        say(client, session, asked + 1)
        assert turns_of(notes)[-1][:3] == warmed[:3]
        assert client.delete(f"/api/llm/chat/session/{session}").status_code == 200
        assert client.get(f"/api/sessions/{session}").json()["summary"] is None
        say(client, session, 0)
        assert len(turns_of(notes)[-1]) == 2


def test_a_summary_stays_in_its_branch(start: Start, notes: FakeLLM, session: str) -> None:
    portal = start(LLM_HISTORY_SUMMARY="100")
    with portal.client() as client:
        asked = fill(client, notes, session)
        say(client, session, asked)
        assert SUMMARY in str(turns_of(notes)[-1])
        old, early = history_of(client, session)[-1], history_of(client, session)[1]
        notes.script.notes_status = 500
        say(client, session, 100, edits=early["id"])
        for number in range(101, 101 + asked):
            say(client, session, number)
            assert SUMMARY not in str(turns_of(notes)[-1])
        assert 100 not in numbers(turns_of(notes)[-1]), "it was cut, and has no summary"
        portal.stop()
        portal.start()
    with portal.client() as client:
        say(client, session, 200)
        assert 100 not in numbers(turns_of(notes)[-1])
        assert SUMMARY not in str(turns_of(notes)[-1])
        assert client.get(f"/api/sessions/{session}").json()["summary"] is None
        assert client.post(f"/api/sessions/{session}/messages/{old['id']}/choose").status_code == 200
        say(client, session, asked + 1)
        say(client, session, asked + 2)
        portal.stop()
        portal.start()
    with portal.client() as client:
        say(client, session, asked + 3)
        assert 0 not in numbers(turns_of(notes)[-1])
        assert SUMMARY in str(turns_of(notes)[-1]), "and where it was made, it is still there"
        assert client.get(f"/api/sessions/{session}").json()["summary"] == SUMMARY


def turns_of(llm: FakeLLM) -> list[Messages]:
    asked_for_notes = [request["messages"] for request in summaries(llm)]
    return [prompt for prompt in turns(llm) if prompt not in asked_for_notes]


def missing(llm: FakeLLM, asked: int) -> set[int]:
    """The questions that are sent no more."""
    return set(range(asked)) - set(numbers(warmings(llm)[-1]))


def numbers_in(text: str) -> list[int]:
    return [int(line.removeprefix("User: ")[:3]) for line in text.splitlines() if line.startswith("User: ")]


def test_without_a_summary_it_goes_on(start: Start, notes: FakeLLM, session: str) -> None:
    notes.script.notes_status = 500
    with start(LLM_HISTORY_SUMMARY="100").client() as client:
        asked = fill(client, notes, session)
        say(client, session, asked)
        assert len(summaries(notes)) == 1
        assert client.get(f"/api/sessions/{session}").json()["summary"] is None


def test_who_has_spent_the_budget_gets_no_summary(start: Start, notes: FakeLLM, session: str) -> None:
    limits = {"DAILY_TOKEN_BUDGET": "1380", "LLM_MAX_TOKENS": "60"}
    with start(LLM_HISTORY_SUMMARY="100", **limits).client() as client:
        fill(client, notes, session)
        assert client.get("/api/stats").json()["budgets"][0]["spent"] == 4 * 60 + 76 + 204 + 332 + 460
        assert summaries(notes) == []


def test_there_is_no_summary_by_default(start: Start, notes: FakeLLM, session: str) -> None:
    with start().client() as client:
        fill(client, notes, session)
    assert summaries(notes) == []


# --- with llama.cpp ---


def test_after_a_cut_the_real_server_has_the_new_prefix(
    llama: LlamaServer, make_portal: MakePortal, tmp_path: Path, session: str
) -> None:
    values = {"LLM_SERVER_URL": llama.url, "LLM_MAX_HISTORY_TOKENS": "500", "LOG_LEVEL": "debug"}
    portal = make_portal(tmp_path, **values).start()

    def is_warm() -> bool:
        return "a prompt is warm" in portal.log.read_text()

    with portal.client() as client, closing(sqlite3.connect(tmp_path / "portal.db")) as database:

        def start() -> str:
            return str(database.execute("SELECT window_start FROM sessions").fetchone()[0])

        begins = ""
        for number in range(20):
            line = f"Turn {number}: the hero opens door {number * 7 % 100} of the maze. What is behind it?"
            body = {"message": line, "system_prompt": "You tell a story.", "max_tokens": 24}
            usage = ask(client, session, **body).json()["usage"]
            if is_warm():
                break
            begins = begins or start()
            if start() != begins:
                wait_until(is_warm, seconds=60, what="the warming")
        assert usage["prompt_tokens"] <= 0.7 * 500, "it was cut"
        # All but the newest message, and what the template puts around it, was read before.
        assert usage["cached_tokens"] >= usage["prompt_tokens"] - 50
        assert usage["cached_tokens"] > 100
