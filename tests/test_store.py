"""The store's promises, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
from sqlalchemy import Connection, text

from app.database import Database, create_portal_engine, migrate
from app.errors import Conflict, ErrorInfo, NotFound, Overloaded
from app.events import (
    Cancelled,
    ExpiredEvent,
    Failed,
    Final,
    GenerationOptions,
    ReplyTarget,
    TurnRequest,
    Usage,
    new_id,
)
from app.services import acceptance as acceptance_module
from app.services import endings
from app.services.acceptance import Acceptance
from app.services.endings import Reply
from app.services.leases import FORGET_S, Leases
from app.services.memory import Memory
from app.services.outbox import Outbox
from app.services.rows import MessageRow, SessionRow, locked_session, make_session
from app.services.store import StaleAttempt, Store
from tests.support import person

ADA, BO = person("1"), person("2")


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    await asyncio.to_thread(migrate, database_url)
    opened = Database(database_url)
    await opened.open()
    yield opened
    await opened.close()


@pytest.fixture
def store(database: Database) -> Store:
    return Store(database)


@pytest.fixture
def memory(database: Database) -> Memory:
    return Memory(database)


@pytest.fixture
def leases(database: Database) -> Leases:
    return Leases(database)


@pytest.fixture
def outbox(database: Database) -> Outbox:
    return Outbox(database)


def request(message: str = "hi", **changes: Any) -> TurnRequest:
    return TurnRequest(**{"who": ADA, "session_id": "s", "message": message, **changes})


async def accept(store: Store, asked: TurnRequest, instance: str = "a") -> Acceptance:
    return await store.accept(asked, turn_id=new_id(), instance=instance)


def final(acceptance: Acceptance, response: str = "yes") -> tuple[Final, Reply]:
    usage = Usage(5, 1)
    reply = Reply(new_id(), response, [], usage, "stop")
    return Final(acceptance.turn.id, response, "stop", usage, [], 1, 1, reply.message_id), reply


async def finish(store: Store, acceptance: Acceptance, response: str = "yes") -> None:
    ending, reply = final(acceptance, response)
    await store.end(acceptance.turn, ending, reply=reply)


async def contents(store: Store) -> list[tuple[str, str, str]]:
    session = await store.session("user:1", "s")
    assert session is not None
    return [(row.role, row.content, row.status) for row in await store.messages(session.leaf_id)]


async def test_a_turn_is_stored_and_ends_with_its_reply(store: Store) -> None:
    accepted = await accept(store, request("hi", system_prompt="Be kind.", options=GenerationOptions(seed=3)))
    assert (accepted.kind, accepted.turn.state, accepted.turn.attempt) == ("new", "running", 1)
    assert accepted.turn.options == {"seed": 3}
    assert accepted.session.system_prompt == "Be kind."
    assert await contents(store) == [("user", "hi", "pending")]
    await finish(store, accepted)
    assert await contents(store) == [("user", "hi", "complete"), ("assistant", "yes", "complete")]


async def test_the_second_turn_waits_and_is_claimed_after_the_first(store: Store) -> None:
    first, second = await accept(store, request("one")), await accept(store, request("two"))
    assert (first.turn.state, second.turn.state) == ("running", "waiting")
    assert await store.claim(second.turn, "a") is None
    await finish(store, first)
    assert await store.claim(second.turn, "b") is None, "it waits for another instance"
    claimed = await store.claim(second.turn, "a")
    assert claimed is not None
    assert await store.claim(second.turn, "a") == claimed, "once more, when the answer was lost"
    await finish(store, second, "no")
    assert [content for _, content, _ in await contents(store)] == ["one", "yes", "two", "no"]


async def test_a_request_id_makes_one_turn(store: Store) -> None:
    first, again = await asyncio.gather(*(accept(store, request(request_id="r")) for _ in range(2)))
    assert {first.kind, again.kind} == {"new", "known"}
    assert first.turn.id == again.turn.id
    with pytest.raises(Conflict):
        await accept(store, request("else", request_id="r"))
    with pytest.raises(Conflict):
        await accept(store, request(request_id="r", options=GenerationOptions(temperature=1)))
    elsewhere = await accept(store, request(request_id="r", session_id="t"))
    assert elsewhere.kind == "new"
    somebody = await accept(store, request(request_id="r", who=BO))
    assert somebody.kind == "new"


async def test_a_request_id_is_remembered_across_a_clear_but_not_for_ever(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await accept(store, request(request_id="r"))
    await finish(store, first)
    await store.clear("user:1", "s", {})
    again = await accept(store, request(request_id="r"))
    assert (again.kind, again.turn.id, again.turn.state) == ("known", first.turn.id, "final")
    monkeypatch.setattr(acceptance_module, "RETRY_WINDOW_S", -1)
    later = await accept(store, request("else", request_id="r"))
    assert later.kind == "new"


@pytest.mark.parametrize("cleared", [False, True])
async def test_a_retryable_failure_is_tried_again_at_the_end_of_the_history(
    store: Store, cleared: bool
) -> None:
    failed = await accept(store, request("one", request_id="r"))
    await store.end(failed.turn, Failed(failed.turn.id, ErrorInfo("llm_unavailable", "away", True)))
    if cleared:
        await store.clear("user:1", "s", {})
    await finish(store, await accept(store, request("two")))
    again = await accept(store, request("one", request_id="r"))
    assert (again.kind, again.turn.id, again.turn.attempt) == ("again", failed.turn.id, 2)
    await finish(store, again, "at last")
    told = [content for _, content, _ in await contents(store)]
    assert told == ["two", "yes", "one", "at last"]


async def test_a_final_failure_is_replayed(store: Store) -> None:
    failed = await accept(store, request("one", request_id="r"))
    await store.end(failed.turn, Failed(failed.turn.id, ErrorInfo("llm_error", "no", False)))
    again = await accept(store, request("one", request_id="r"))
    assert (again.kind, again.turn.state) == ("known", "error")
    assert await contents(store) == [("user", "one", "failed")]


async def test_the_first_ending_wins(store: Store) -> None:
    accepted = await accept(store, request())
    ending, reply = final(accepted)
    stopped = Cancelled(accepted.turn.id, "y", None)
    one, two = await asyncio.gather(
        store.end(accepted.turn, ending, reply=reply), store.end(accepted.turn, stopped)
    )
    assert (one.first, two.first) == (True, False)
    assert two.ending == ending
    assert [role for role, _, _ in await contents(store)] == ["user", "assistant"]


@contextmanager
def beside(url: str) -> Iterator[Connection]:
    """A transaction of another process; what it has done is committed at the end."""
    engine = create_portal_engine(url)
    with engine.begin() as connection:
        yield connection
    engine.dispose()


async def waits(connection: Connection) -> None:
    """Returns once somebody waits for a lock."""
    locks = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
    while not connection.execute(locks).scalar_one():
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("change", ["stop", "clear", "adopt"])
async def test_an_ending_that_waits_for_another_process_comes_after_it(
    store: Store, database_url: str, change: str
) -> None:
    accepted = await accept(store, request())
    turn = accepted.turn
    ending, reply = final(accepted)
    with beside(database_url) as connection:
        session = locked_session(connection, turn.session)
        if change == "stop":
            endings.end(connection, turn, Cancelled(turn.id, "", None), None, None, None, None)
        elif change == "clear":
            endings.clear(connection, session, {})
        else:
            connection.execute(text("UPDATE turns SET attempt = 2, state = 'waiting', instance = 'b'"))
        late = asyncio.create_task(store.end(turn, ending, reply=reply))
        await waits(connection)
    if change == "adopt":
        with pytest.raises(StaleAttempt):
            await late
        return
    told = await late
    assert (told.first, type(told.ending)) == (False, Cancelled)
    assert "assistant" not in [role for role, _, _ in await contents(store)]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_a_session_is_not_brought_back_beside_a_new_one_that_is_being_made(
    store: Store, database_url: str
) -> None:
    await finish(store, await accept(store, request()))
    await store.delete_session(ADA.owner, "s", {})
    with beside(database_url) as connection:
        make_session(connection, ADA.owner, "s", project="")
        late = asyncio.create_task(store.restore_session(ADA.owner, "s"))
        await waits(connection)
    with pytest.raises(Conflict):
        await late


async def test_the_time_of_a_turn_runs_out_only_where_it_waits(store: Store, leases: Leases) -> None:
    await leases.acquire("instance:a", "e1", -1)
    first, second = await accept(store, request("one")), await accept(store, request("two"))
    await store.end(first.turn, Cancelled(first.turn.id, "", None))
    ((adopted, _),) = await store.adopt("b", overdue=True)
    assert await store.claim(adopted, "b")
    with pytest.raises(StaleAttempt):
        await store.end(second.turn, ExpiredEvent(second.turn.id))
    assert (await store.end(adopted, ExpiredEvent(adopted.id))).first


async def test_sixteen_turns_may_wait(store: Store) -> None:
    for _ in range(17):
        await accept(store, request())
    with pytest.raises(Overloaded):
        await accept(store, request())
    assert (await accept(store, request(session_id="t"))).turn.state == "running"


async def test_one_failing_operation_does_not_take_its_group_with_it(
    store: Store, database: Database
) -> None:
    def fail(connection: Any) -> None:
        connection.execute(text("UPDATE sessions SET project = 'spoilt'"))
        raise ValueError

    asked = [accept(store, request(session_id=f"g{n}")) for n in range(5)]
    results = await asyncio.gather(*asked[:3], database.write(fail), *asked[3:], return_exceptions=True)
    assert [type(result) for result in results].count(ValueError) == 1
    stored = [await store.session("user:1", f"g{n}") for n in range(5)]
    assert [session.project for session in stored if session] == [""] * 5


async def test_a_waiting_turn_that_ends_stays_in_the_history_out_of_the_way(store: Store) -> None:
    first, second = await accept(store, request("one")), await accept(store, request("two"))
    await store.end(second.turn, Cancelled(second.turn.id, "", None))
    await finish(store, first)
    await finish(store, await accept(store, request("three")))
    told = [(content, status) for _, content, status in await contents(store)]
    assert told == [
        ("two", "cancelled"),
        ("one", "complete"),
        ("yes", "complete"),
        ("three", "complete"),
        ("yes", "complete"),
    ]


async def test_clear_ends_what_is_active_and_empties_the_history(store: Store) -> None:
    first = await accept(store, request("one"))
    second = await accept(store, request("two"))
    _, ended = await store.clear("user:1", "s", {first.turn.id: "part"})
    assert [(e.turn_id, e.ending) for e in ended] == [
        (first.turn.id, Cancelled(first.turn.id, "part", None)),
        (second.turn.id, Cancelled(second.turn.id, "", None)),
    ]
    ending, reply = final(first)
    late = await store.end(first.turn, ending, reply=reply)
    assert not late.first
    assert isinstance(late.ending, Cancelled)
    assert await contents(store) == []


async def test_turns_of_a_dead_instance_are_adopted_once(store: Store, leases: Leases) -> None:
    await leases.acquire("instance:a", "e1", -1)
    await leases.acquire("instance:b", "e2", 60)
    running, waiting = await accept(store, request("one")), await accept(store, request("two"))
    alive = await accept(store, request(session_id="t"), instance="b")
    assert await store.has_orphans("b", overdue=True)
    assert not await store.has_orphans("b", overdue=False), "it has not given its lease back"
    assert await store.adopt("b", overdue=False) == []
    one, two = await asyncio.gather(*(store.adopt("b", overdue=True) for _ in range(2)))
    adopted = one or two
    assert not (one and two)
    assert [(turn.id, turn.attempt, turn.state) for turn, _ in adopted] == [
        (running.turn.id, 2, "waiting"),
        (waiting.turn.id, 1, "waiting"),
    ]
    assert alive.turn.id not in {turn.id for turn, _ in adopted}
    ending, reply = final(running)
    with pytest.raises(StaleAttempt):
        await store.end(running.turn, ending, reply=reply)
    (again, _), (next_one, _) = adopted
    assert await store.claim(next_one, "b") is None
    assert await store.claim(running.turn, "b") is None, "this attempt is void"
    assert await store.claim(again, "b") is not None
    assert not await store.has_orphans("b", overdue=True)


async def test_what_was_given_back_is_adopted_at_once(store: Store, leases: Leases) -> None:
    await leases.acquire("instance:a", "e1", 60)
    await accept(store, request())
    await leases.release("instance:a", "e1")
    assert await store.has_orphans("b", overdue=False)
    assert len(await store.adopt("b", overdue=False)) == 1


async def test_an_instance_adopts_its_own_turns_that_it_has_lost(store: Store, leases: Leases) -> None:
    await leases.acquire("instance:a", "e1", 60)
    accepted = await accept(store, request())
    assert await store.adopt("a", overdue=True) == []
    assert await store.adopt("b", [accepted.turn.id], overdue=True) == [], "it is not that one's"
    assert len(await store.adopt("a", await store.active_of("a"), overdue=True)) == 1


async def test_leases_of_those_who_do_not_come_back_are_forgotten(
    store: Store, leases: Leases, database: Database
) -> None:
    await leases.acquire("instance:gone", "e1", -2 * FORGET_S)
    await leases.acquire("instance:here", "e2", -60)
    await store.forget_old()
    assert await database.read(lambda c: c.execute(text("SELECT name FROM leases")).scalars().all()) == [
        "instance:here"
    ]


async def test_leases_are_held_by_one(leases: Leases) -> None:
    assert await leases.acquire("x", "one", 60)
    assert not await leases.acquire("x", "two", 60)
    assert await leases.acquire("x", "one", 60), "renewed"
    assert await leases.acquire("x", "one", -1), "and over"
    assert await leases.acquire("x", "two", 60)
    assert await leases.acquire("x", "one", 60, force=True)
    await leases.release("x", "two")
    assert not await leases.acquire("x", "two", 60)
    await leases.release("x", "one")
    assert await leases.acquire("x", "two", 60)


async def test_a_reply_is_owed_from_the_turns_end_until_it_is_delivered(store: Store, outbox: Outbox) -> None:
    target = ReplyTarget("maze", "maze/assistant_response/s", "s", form="json")
    asked = request(request_id="r", reply_to=target)
    accepted = await accept(store, asked)
    assert accepted.delivery is not None
    assert await outbox.ready("maze") == []
    ending, reply = final(accepted)
    ended = await store.end(accepted.turn, ending, reply=reply)
    assert ended.deliveries == (accepted.delivery,)
    assert await outbox.ready("maze") == [accepted.delivery]
    assert await outbox.ready("racing") == []
    repeated = await accept(store, asked)
    assert repeated.delivery is not None
    await outbox.delivered([accepted.delivery])
    assert await outbox.ready("maze") == [repeated.delivery], "who asks again is answered again"
    await outbox.delivered([repeated.delivery])
    assert await outbox.ready("maze") == []
    repeated = await accept(store, asked)
    assert await outbox.ready("maze") == [repeated.delivery]


async def test_replies_are_owed_in_the_order_of_their_turns(store: Store, outbox: Outbox) -> None:
    target = ReplyTarget("maze", "maze/assistant_response/s", "s")
    asked = [request(str(number), request_id=str(number), reply_to=target) for number in range(5)]
    accepted = [await accept(store, one) for one in asked]
    for one in accepted[:3]:
        await finish(store, one)
    await accept(store, asked[1])
    await accept(store, asked[3])
    for one in accepted[3:]:
        await finish(store, one)
    owed = [delivery.turn_id for delivery in await outbox.ready("maze")]
    assert owed == [one.turn.id for one in accepted], "whoever asks again gets no reply before its time"


async def test_a_new_attempt_owes_its_own_reply(store: Store, outbox: Outbox) -> None:
    asked = request(request_id="r", reply_to=ReplyTarget("maze", "maze/assistant_response/s", "s"))
    first = await accept(store, asked)
    failed = Failed(first.turn.id, ErrorInfo("llm_unavailable", "away", True))
    ended = await store.end(first.turn, failed)
    again = await accept(store, asked)
    assert again.kind == "again"
    await outbox.delivered(ended.deliveries)
    ending, reply = final(again)
    assert len((await store.end(again.turn, ending, reply=reply)).deliveries) == 1


async def test_an_answer_is_made_again_beside_the_old_one(store: Store) -> None:
    asked = await accept(store, request("q"))
    await finish(store, asked, "one")
    again = await accept(store, request("", regenerate=True, request_id="r"))
    assert (again.kind, again.turn.state) == ("new", "running")
    assert again.turn.message_id == asked.turn.message_id
    assert [text for _, text, _ in await contents(store)] == ["q", "one"], "until there is a new answer"
    await finish(store, again, "two")
    assert [text for _, text, _ in await contents(store)] == ["q", "two"]
    assert (await accept(store, request("", regenerate=True, request_id="r"))).kind == "known"
    await finish(store, await accept(store, request("next")), "three")
    assert [text for _, text, _ in await contents(store)] == ["q", "two", "next", "three"]


async def test_what_cannot_be_answered_again_is_refused(store: Store) -> None:
    with pytest.raises(NotFound):
        await accept(store, request("", regenerate=True))
    assert await store.session("user:1", "s") is None
    running = await accept(store, request("q"))
    with pytest.raises(Conflict):
        await accept(store, request("", regenerate=True))
    await finish(store, running)
    await store.clear("user:1", "s", {})
    with pytest.raises(NotFound):
        await accept(store, request("", regenerate=True))


async def test_a_retry_of_what_was_answered_over_is_taken_up_where_it_was(store: Store) -> None:
    await finish(store, await accept(store, request("first")), "one")
    retried = request("q", request_id="r")
    failing = await accept(store, retried)
    failed = Failed(failing.turn.id, ErrorInfo("llm_unavailable", "away", True))
    await store.end(failing.turn, failed)
    await finish(store, await accept(store, request("", regenerate=True)), "two")
    again = await accept(store, retried)
    assert (again.kind, again.is_aside) == ("again", True)
    ((row, _),) = await store.adopt("a", await store.active_of("a"), overdue=False)
    assert await store.claim(row, "a") is not None
    assert [text for _, text, _ in await contents(store)] == ["first", "one", "q", "two"]
    await finish(store, msgspec.structs.replace(again, turn=row), "three")
    assert [text for _, text, _ in await contents(store)] == ["first", "one", "q", "three"]


@pytest.mark.parametrize("between", [[], ["q3"]])
async def test_a_retry_that_never_ran_stands_before_the_running_message(
    store: Store, between: list[str]
) -> None:
    await finish(store, await accept(store, request("q1")), "a1")
    retried = request("q2", request_id="r")
    failing = await accept(store, retried)
    failed = Failed(failing.turn.id, ErrorInfo("llm_unavailable", "away", True))
    await store.end(failing.turn, failed)
    for message in between:
        await finish(store, await accept(store, request(message)), "a")
    running = await accept(store, request("q4"))
    again = await accept(store, retried)
    assert (again.kind, again.turn.state) == ("again", "waiting")
    await store.end(again.turn, ExpiredEvent(again.turn.id))
    await finish(store, running, "a4")
    session = await store.session("user:1", "s")
    assert session is not None
    path = await store.messages(session.leaf_id, limit=20)
    answered = [text for message in between for text in (message, "a")]
    assert [row.content for row in path] == ["q1", "a1", *answered, "q2", "q4", "a4"]


async def test_what_is_refused_makes_no_session(store: Store) -> None:
    refused = Overloaded("The queue is full.", retry_after=2)
    with pytest.raises(Overloaded, match="full"):
        await store.accept(request("q"), turn_id=new_id(), instance="a", refusal=refused)
    assert await store.session("user:1", "s") is None


async def test_an_answer_that_is_made_again_is_taken_up_and_tried_again_where_it_was(store: Store) -> None:
    await finish(store, await accept(store, request("first")), "one")
    asked = await accept(store, request("q"))
    await finish(store, asked, "two")
    anew = request("", regenerate=True, request_id="r")
    again = await accept(store, anew)
    ((row, _),) = await store.adopt("a", await store.active_of("a"), overdue=False)
    session = await store.claim(row, "a")
    assert session is not None
    assert [text for _, text, _ in await contents(store)] == ["first", "one", "q", "two"]
    failed = Failed(again.turn.id, ErrorInfo("llm_unavailable", "away", True))
    partial = Reply(new_id(), "tw", [], None, None)
    await store.end(row, failed, reply=partial)
    assert [text for _, text, _ in await contents(store)] == ["first", "one", "q", "two"], "as it was"
    retried = await accept(store, anew)
    assert retried.kind == "again"
    await finish(store, retried, "new")
    assert [text for _, text, _ in await contents(store)] == ["first", "one", "q", "new"]


async def test_pages_of_a_long_history(store: Store) -> None:
    for number in range(5):
        await finish(store, await accept(store, request(f"q{number}")), f"a{number}")
    session = await store.session("user:1", "s")
    assert session is not None
    page = await store.messages(session.leaf_id, limit=3)
    assert [row.content for row in page] == ["a3", "q4", "a4"]
    parent = await store.message_parent(session.id, page[0].id)
    assert parent is not None
    assert [row.content for row in await store.messages(parent[0], limit=2)] == ["a2", "q3"]
    assert await store.message_parent(session.id, "nope") is None
    begun = await store.messages(session.leaf_id, last=page[1].id)
    assert [row.content for row in begun] == ["q4", "a4"]


# --- what outlives a cut ---


async def test_pins_are_found_on_the_path_before_the_window(store: Store, memory: Memory) -> None:
    turns = []
    for number in range(4):
        accepted = await accept(store, request(f"q{number}"))
        await finish(store, accepted, f"a{number}")
        turns.append(accepted.turn)
    session = turns[0].session
    version = (await store.session(ADA.owner, "s") or raising()).version
    assert await memory.pin(session, turns[1].message_id, pinned=True)
    assert (await store.session(ADA.owner, "s") or raising()).version == version + 1
    parent = await store.message_parent(session, turns[3].message_id)
    assert parent is not None
    assert parent[0] is not None
    kept = await memory.before(session, await message(store, turns[3].message_id))
    assert [(row.content, row.pinned) for row in kept.pinned] == [("q1", True), ("a1", False)]
    # Before the pinned one there is nothing that is pinned.
    assert (await memory.before(session, await message(store, turns[1].message_id))).pinned == []
    assert [row.content for row in await memory.exchange(session, turns[1].message_id)] == ["q1", "a1"]
    assert await memory.exchange("another", turns[1].message_id) == []
    assert not await memory.pin(session, new_id(), pinned=True)
    assert await memory.pin(session, turns[1].message_id, pinned=False)
    assert await memory.pinned(session, parent[0]) == []


async def test_a_summary_is_found_on_the_path_that_it_was_made_of(store: Store, memory: Memory) -> None:
    old = []
    for number in range(4):
        accepted = await accept(store, request(f"q{number}"))
        await finish(store, accepted, f"a{number}")
        old.append(await message(store, accepted.turn.message_id))
    session = accepted.turn.session
    version = (await store.session(ADA.owner, "s") or raising()).version
    assert await memory.summarise(session, version, "notes", old[2].id, lambda _: None)
    edited = await accept(store, request("Q1", edits=old[1].id))
    await finish(store, edited, "A1")
    new = []
    for number in range(2, 4):
        accepted = await accept(store, request(f"Q{number}"))
        await finish(store, accepted, f"A{number}")
        new.append(await message(store, accepted.turn.message_id))
    for start in old[2:]:
        kept = await memory.before(session, start)
        assert (kept.summary, kept.until) == ("notes", old[2].id)
    for start in [old[1], *new]:
        kept = await memory.before(session, start)
        assert (kept.summary, kept.until) == (None, None)


async def message(store: Store, id: str) -> MessageRow:
    """A stored message."""
    (row,) = await store.messages(id, limit=1)
    return row


async def test_an_exchange_has_the_answer_that_was_made_again(store: Store, memory: Memory) -> None:
    asked = await accept(store, request("q"))
    await finish(store, asked, "one")
    again = await accept(store, request("", regenerate=True))
    await finish(store, again, "two")
    session = await store.session("user:1", "s")
    assert session is not None
    assert session.leaf_id is not None
    question, answer = await store.messages(session.leaf_id)
    old = await memory.exchange(session.id, question.id)
    assert [row.content for row in old] == ["q", "two"], "the newest"
    assert [row.content for row in await memory.exchange(session.id, answer.id)] == ["q", "two"]
    await memory.pin(session.id, answer.id, pinned=True)
    await finish(store, await accept(store, request("next")), "three")
    session = await store.session("user:1", "s")
    assert session is not None
    pinned = await memory.pinned(session.id, session.leaf_id or "")
    assert [row.content for row in pinned] == ["q", "two"]


async def test_a_summary_is_kept_only_for_the_version_that_it_is_of(store: Store, memory: Memory) -> None:
    accepted = await accept(store, request())
    await finish(store, accepted)
    row = await store.session(ADA.owner, "s") or raising()
    assert await memory.summarise(row.id, row.version, "first", accepted.turn.message_id, lambda _: None)
    assert not await memory.summarise(row.id, row.version, "late", accepted.turn.message_id, lambda _: None)
    cut = msgspec.structs.replace(row, window_start=accepted.turn.message_id)
    assert await memory.summaries([cut, row]) == {row.id: "first"}
    assert await memory.summaries([row]) == {}, "nothing is cut, and all is sent"
    row = await store.session(ADA.owner, "s") or raising()
    assert await memory.summarise(row.id, row.version, "second", accepted.turn.message_id, lambda _: None)
    assert await memory.summaries([cut]) == {row.id: "second"}
    await store.clear(ADA.owner, "s", {})
    assert await memory.summaries([cut]) == {}


def raising() -> SessionRow:
    raise AssertionError("there is no session")
