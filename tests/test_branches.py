"""A history is a tree: answers made again, messages edited, and the path that is chosen."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from app.events import new_id
from tests.fake_llm import FakeLLM, Script, text
from tests.support import Portal, ask, wait_until

pytestmark = pytest.mark.slow


def shown(client: httpx.Client, session: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = client.get(f"/api/llm/chat/session/{session}/history").json()["messages"]
    return rows


def texts(client: httpx.Client, session: str) -> list[str]:
    return [row["content"] for row in shown(client, session)]


def sent(llm: FakeLLM) -> list[str]:
    return [message["content"] for message in llm.requests[-1]["messages"]]


def test_a_message_is_edited_and_the_old_path_chosen_again(
    client: httpx.Client, llm: FakeLLM, session: str
) -> None:
    llm.script = Script(echo=True)
    for message in ("one", "two", "three"):
        ask(client, session, message=message)
    old = shown(client, session)
    edited = ask(client, session, message="TWO", edits=old[2]["id"])
    assert edited.status_code == 200, edited.text
    assert sent(llm) == ["one", "echo: one", "TWO"]
    assert texts(client, session) == ["one", "echo: one", "TWO", "echo: TWO"]
    ask(client, session, message="four")
    assert sent(llm) == ["one", "echo: one", "TWO", "echo: TWO", "four"]

    new = shown(client, session)
    (place,) = client.get(f"/api/sessions/{session}/branches").json()["branches"]
    assert place == [old[2]["id"], new[2]["id"]]
    chosen = client.post(f"/api/sessions/{session}/messages/{old[2]['id']}/choose")
    assert chosen.json() == {"leaf_id": old[-1]["id"]}
    assert [row["id"] for row in shown(client, session)] == [row["id"] for row in old]
    ask(client, session, message="five")
    assert sent(llm)[-3:] == ["three", "echo: three", "five"], "the chosen path is what the model sees"


def test_the_first_message_is_edited(client: httpx.Client, llm: FakeLLM, session: str) -> None:
    llm.script = Script(echo=True)
    ask(client, session, message="one", system_prompt="Be kind.")
    first = shown(client, session)[1]
    ask(client, session, message="ONE", edits=first["id"])
    assert sent(llm) == ["Be kind.", "ONE"]
    assert texts(client, session) == ["Be kind.", "ONE", "echo: ONE"]


def test_an_answer_that_was_made_again_can_be_taken_back(
    client: httpx.Client, llm: FakeLLM, session: str
) -> None:
    ask(client, session, message="hi")
    old = shown(client, session)[-1]["id"]
    llm.script = Script(pieces=text("Good day"))
    client.post(f"/api/llm/chat/session/{session}/regenerate")
    assert texts(client, session) == ["hi", "Good day"]
    client.post(f"/api/sessions/{session}/messages/{old}/choose")
    assert texts(client, session) == ["hi", "Hello there"]
    ask(client, session, message="and?")
    assert sent(llm) == ["hi", "Hello there", "and?"]


def test_a_path_leads_to_no_answer_that_broke_off(client: httpx.Client, llm: FakeLLM, session: str) -> None:
    ask(client, session, message="hi")
    question, answer = shown(client, session)
    llm.script = Script(pieces=text("Good ", "day"), cut_after=1)
    assert client.post(f"/api/llm/chat/session/{session}/regenerate").status_code == 502
    ((_, broken),) = client.get(f"/api/sessions/{session}/branches").json()["branches"]
    chosen = client.post(f"/api/sessions/{session}/messages/{question['id']}/choose")
    assert chosen.json() == {"leaf_id": answer["id"]}
    chosen = client.post(f"/api/sessions/{session}/messages/{broken}/choose")
    assert chosen.json() == {"leaf_id": broken}, "where it is asked for"
    assert texts(client, session) == ["hi", "Good "]


def test_an_edit_is_made_once_and_tried_again_in_its_place(
    client: httpx.Client, llm: FakeLLM, session: str
) -> None:
    ask(client, session, message="one")
    ask(client, session, message="two")
    first = shown(client, session)[0]["id"]
    llm.script = Script(status=503)
    edit = {"message": "ONE", "edits": first, "request_id": "e"}
    assert ask(client, session, **edit).status_code == 503
    assert [row["status"] for row in shown(client, session)] == ["failed"]
    llm.script = Script(pieces=text("again"))
    answers = [ask(client, session, **edit).json() for _ in range(2)]
    assert answers[0]["message_id"] == answers[1]["message_id"]
    assert texts(client, session) == ["ONE", "again"]
    assert ask(client, session, message="ONE", request_id="e").status_code == 409, "it is another request"


def test_what_is_not_there_or_not_mine_is_not_changed(
    fake_portal: Portal, client: httpx.Client, llm: FakeLLM, session: str
) -> None:
    ask(client, session, message="one")
    question, answer = (row["id"] for row in shown(client, session))
    other = new_id()
    ask(client, other, message="elsewhere")
    assert ask(client, session, message="x", edits=new_id()).status_code == 404
    assert ask(client, session, message="x", edits=answer).status_code == 404, "an answer is not mine"
    assert ask(client, other, message="x", edits=question).status_code == 404
    assert ask(client, new_id(), message="x", edits=question).status_code == 404
    assert client.post(f"/api/sessions/{other}/messages/{question}/choose").status_code == 404
    with fake_portal.client(f"eve-{new_id()[-6:]}") as eve:
        ask(eve, session, message="mine")
        assert ask(eve, session, message="x", edits=question).status_code == 404
        assert eve.post(f"/api/sessions/{session}/messages/{question}/choose").status_code == 404
    assert texts(client, session) == ["one", "Hello there"]


def test_a_busy_session_stays_as_it_is(client: httpx.Client, llm: FakeLLM, session: str) -> None:
    ask(client, session, message="one")
    question = shown(client, session)[0]["id"]
    llm.script = Script(pieces=text("a", "b"), between=60)
    with client.stream(
        "POST", "/api/llm/chat/session/stream", json={"session_id": session, "message": "two"}
    ) as running:
        lines = running.iter_lines()  # kept: a stream that nobody reads any more is closed
        next(lines)
        assert ask(client, session, message="x", edits=question).status_code == 409
        assert client.post(f"/api/sessions/{session}/messages/{question}/choose").status_code == 409
    wait_until(lambda: llm.running == 0, what="the end of the turn")
