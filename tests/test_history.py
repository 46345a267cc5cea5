"""What is sent to the model: a state machine of conversations that checks what always holds, and how rarely
the beginning of a prompt changes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from app.errors import InvalidRequest
from app.events import Kind, Usage
from app.services.exchanges import exchanges_in
from app.services.history import History, Room
from app.services.prompts import Prompt, encode_body
from app.services.rows import MessageRow

T = TypeVar("T")
Messages = list[Mapping[str, Any]]
SYSTEM = {"role": "system", "content": "s" * 10}


def size(messages: Sequence[Mapping[str, Any]]) -> int:
    """A server that counts a token a character and four a message."""
    return sum(len(m["content"]) + 4 + len(json.dumps(m.get("tool_calls", ""))) for m in messages)


async def count(messages: Sequence[Mapping[str, Any]]) -> int | None:
    return size(messages)


async def cannot_count(messages: Sequence[Mapping[str, Any]]) -> int | None:
    return None


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that waits for nothing: event loops would take most of the time."""
    try:
        coroutine.send(None)
    except StopIteration as ended:
        result: T = ended.value
        return result
    raise AssertionError("it waits for something")


def ask(history: History, question: str, kind: Kind = "message", *, budget: int = 10_000) -> Prompt:
    return run(history.fit(question, kind, Room(budget), count))


# --- conversations ---


@dataclass
class Stored:
    """A turn as it is stored: its rows, and what the model may be sent of it."""

    rows: list[MessageRow]
    question: str
    kind: Kind
    is_answered: bool = True
    pinned: bool = False
    name: str = field(default="")


class Conversation(RuleBasedStateMachine):
    """One session: what is said in it, with and without tools, states, failures, pins, restarts, and servers
    that have less room than they say."""

    @initialize(budget=st.integers(400, 2000), messages=st.just(0) | st.integers(2, 20), counts=st.booleans())
    def begin(self, budget: int, messages: int, counts: bool) -> None:
        self.room = Room(budget, messages)
        self.counts = counts
        self.history = History(SYSTEM["content"])
        self.turns: list[Stored] = []
        self.window_start: str | None = None
        self.summary: tuple[str, str] | None = None
        self.last: Messages | None = None
        self.numbers = itertools.count()

    # --- what is done ---

    @rule(asked=st.integers(5, 90), answered=st.integers(0, 90))
    def say(self, asked: int, answered: int) -> None:
        self.turn(f"{next(self.numbers):04}".ljust(asked, "q"), "message", "a" * answered)

    @rule(state=st.sampled_from(["north", "south"]), answered=st.integers(5, 90))
    def send_a_state(self, state: str, answered: int) -> None:
        self.turn(state, "state", "h" * answered)

    @rule(asked=st.integers(5, 60), calls=st.integers(1, 3), results=st.integers(0, 3))
    def use_tools(self, asked: int, calls: int, results: int) -> None:
        """A turn with calls, of which not all may have come back, by another process."""
        name, parent = f"{next(self.numbers):04}", self.leaf
        made = [{"id": f"{name}-{n}", "function": {"name": "look", "arguments": "{}"}} for n in range(calls)]
        rows = [row(f"{name}q", parent, name, "user", name.ljust(asked, "q"))]
        rows.append(row(f"{name}c", rows[-1].id, name, "assistant", "I look.", made))
        for n in range(results):
            answers = [{"id": f"{name}-{n}"}]
            rows.append(row(f"{name}r{n}", rows[-1].id, name, "tool", "a wall", answers))
        rows.append(row(f"{name}a", rows[-1].id, name, "assistant", "I see a wall."))
        self.turns.append(Stored(rows, rows[0].content, "message", name=name))
        self.restart()

    @rule()
    def fail(self) -> None:
        name = f"{next(self.numbers):04}"
        parent = self.leaf
        failed = row(f"{name}q", parent, name, "user", f"{name} fails", state="error")
        partial = row(f"{name}a", failed.id, name, "assistant", "this bro", state="error")
        self.turns.append(Stored([failed, partial], failed.content, "message", is_answered=False, name=name))

    @rule(which=st.integers(0, 50))
    def pin(self, which: int) -> None:
        can = [turn for turn in self.turns if turn.is_answered and turn.kind == "message"]
        if not can:
            return
        chosen = can[which % len(can)]
        pinned = [turn for turn in self.turns if turn.pinned and turn is not chosen]
        if sum(size(sent(turn.rows)) for turn in [*pinned, chosen]) > self.room.budget // 4:
            return
        chosen.pinned = not chosen.pinned
        chosen.rows[0] = row_with(chosen.rows[0], chosen.pinned)
        self.restart()

    @rule()
    def summarise(self) -> None:
        if self.history.is_cut and self.window_start is not None:
            self.summary = ("what was said", self.window_start)
            self.history.summarise(*self.summary)
            self.last = None

    @rule()
    def restart(self) -> None:
        """What is stored is read again."""
        path = [stored for turn in self.turns for stored in turn.rows]
        ids = [stored.id for stored in path]
        cut = ids.index(self.window_start) if self.window_start in ids else 0
        self.history = History.from_rows(SYSTEM["content"], path[cut:])
        if cut:
            pinned = {turn.name for turn in self.turns if turn.pinned}
            before = [stored for stored in path[:cut] if stored.turn_id in pinned]
            self.history.remember(before, *(self.summary or (None, None)))
        states = [turn.question for turn in self.turns if turn.kind == "state"]
        if states:
            self.history.begin_after(states[-1])
        self.last = None

    @rule(asked=st.integers(5, 60), limit=st.integers(150, 900))
    def overflow(self, asked: int, limit: int) -> None:
        """The server has less room than was thought."""
        question = f"{next(self.numbers):04}".ljust(asked, "q")
        tried = run(self.history.fit(question, "message", self.room, self.counter))
        again = self.history.refit(
            question,
            "message",
            Room(limit),
            self.counter,
            sent=tried,
            size=size(tried) if self.counts else None,
        )
        prompt = run(again)
        if prompt is None:
            assert len(tried) == 2, "nothing was left to leave out"
            return
        assert len(prompt) < len(tried)
        assert prompt[0] == SYSTEM
        assert prompt[-1]["content"] == question
        self.check_tools(list(prompt))
        if self.counts:
            assert size(prompt) <= limit or len(prompt) == 2
        self.window_start = self.history.window_start or self.window_start
        self.restart()

    # --- how ---

    @property
    def counter(self) -> Any:
        return count if self.counts else cannot_count

    @property
    def leaf(self) -> str | None:
        return self.turns[-1].rows[-1].id if self.turns else None

    def turn(self, question: str, kind: Kind, answer: str) -> None:
        name = f"{next(self.numbers):04}"
        was_cut_before = self.history.is_cold
        prompt = list(run(self.history.fit(question, kind, self.room, self.counter)))
        self.check(prompt, question, kind, may_differ=was_cut_before)
        if kind == "state" and self.turns and self.turns[-1].kind == "state":
            self.turns.pop()  # a state takes the place of a state
        usage = Usage(size(prompt), len(answer)) if self.counts else None
        rows = [row(f"{name}q", self.leaf, name, "user", question, kind=kind)]
        rows.append(row(f"{name}a", rows[0].id, name, "assistant", answer, kind=kind, usage=usage))
        self.turns.append(Stored(rows, question, kind, name=name))
        self.history.add(rows[0].id, question, answer, usage, kind)
        self.history.make_room(self.room)
        assert any(question in m["content"] for m in self.history.prompt("next")), "the newest stays"
        self.window_start = self.history.window_start or self.window_start
        self.last = prompt

    def check(self, prompt: Messages, question: str, kind: Kind, may_differ: bool) -> None:
        assert prompt[0] == SYSTEM
        assert question in prompt[-1]["content"]
        assert prompt[-1]["role"] == "user"
        self.check_tools(prompt)
        states = [m for m in prompt[:-1] if str(m["content"]).startswith("The state of the game")]
        assert len(states) <= (0 if kind == "state" else 1)
        in_tokens = size if self.counts else estimate
        assert in_tokens(prompt) <= self.room.budget or len(prompt) == 2
        said = [m["content"][:4] for m in prompt if m["role"] == "user" and m["content"][:4].isdecimal()]
        assert said == sorted(said), "in order"
        pinned = [turn.question for turn in self.turns if turn.pinned]
        least = [SYSTEM, prompt[-1], *(m for turn in self.turns if turn.pinned for m in sent(turn.rows))]
        longest = max((len(sent(turn.rows)) for turn in self.turns), default=0)
        most = self.room.messages or len(prompt) + len(least) + longest
        assert len(prompt) <= max(most, 2 + longest)
        if in_tokens(least) <= self.room.budget and len(least) + longest <= most:
            assert set(pinned) <= {m["content"] for m in prompt}
        if self.last is not None and not states and kind == "message":
            kept = prompt[: len(self.last)] == self.last
            cut = len(prompt) < len(self.last) + 2
            assert kept or cut or may_differ or self.had_state(), "between cuts the beginning stays the same"

    def had_state(self) -> bool:
        return any(turn.kind == "state" for turn in self.turns)

    @staticmethod
    def check_tools(prompt: Messages) -> None:
        """No result without its call, and no call without its result."""
        open_calls: set[str] = set()
        for message in prompt:
            if message["role"] == "tool":
                assert message["tool_call_id"] in open_calls
                open_calls.remove(message["tool_call_id"])
            else:
                assert not open_calls
                open_calls = {call["id"] for call in message.get("tool_calls", ())}
        assert not open_calls


def estimate(messages: Messages) -> int:
    return len(encode_body(list(messages))) // 3


def sent(rows: Sequence[MessageRow]) -> Messages:
    return [
        message
        for _, _, exchange in exchanges_in(rows)
        for message in json.loads(b"[" + exchange.json + b"]")
    ]


def row(
    id: str,
    parent: str | None,
    turn: str,
    role: str,
    content: str,
    calls: list[dict[str, Any]] | None = None,
    *,
    kind: Kind = "message",
    state: str = "final",
    usage: Usage | None = None,
) -> MessageRow:
    return MessageRow(id, parent, turn, role, content, calls, usage, 0.0, state, kind)


def row_with(stored: MessageRow, pinned: bool) -> MessageRow:
    values = {name: getattr(stored, name) for name in stored.__struct_fields__}
    return MessageRow(**{**values, "pinned": pinned})


Conversation.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestConversations = Conversation.TestCase


# --- how rarely it is cut ---


def converse(history: History, turns: int, *, budget: int, length: int = 40) -> list[Messages]:
    """The prompts of a conversation whose questions and answers have this length."""
    prompts = []
    for number in range(turns):
        question = f"{number:04}".ljust(length, "q")
        prompt = ask(history, question, budget=budget)
        prompts.append(list(prompt))
        history.add(f"m{number}", question, "a" * length, Usage(size(prompt), length))
        history.make_room(Room(budget))
    return prompts


def test_it_is_cut_rarely_and_in_big_steps() -> None:
    prompts = converse(History("s"), 200, budget=2000)
    cuts = [
        number
        for number, (before, after) in enumerate(itertools.pairwise(prompts))
        if after[: len(before)] != before
    ]
    assert 0 < len(cuts) <= 20
    assert all(size(prompts[number + 1]) <= 0.6 * 2000 for number in cuts)


def test_it_is_cut_after_the_answer_and_not_before_the_next() -> None:
    history = History("s")
    for number in range(50):
        start = history.window_start
        question = f"{number:04}".ljust(40, "q")
        prompt = ask(history, question, budget=2000)
        assert history.window_start == start
        history.add(f"m{number}", question, "a" * 40, Usage(size(prompt), 40))
        history.make_room(Room(2000))


def test_with_a_long_system_prompt_half_of_what_is_left_is_kept() -> None:
    prompts = converse(History("s" * 1200), 60, budget=2000)
    fewest = min(len(prompt) for prompt in prompts[20:])
    assert fewest >= 2 + 2 * 3
    cuts = sum(after[: len(before)] != before for before, after in itertools.pairwise(prompts))
    assert cuts <= 15


async def test_the_server_is_asked_only_near_the_budget() -> None:
    asked = 0

    async def counting(messages: Sequence[Mapping[str, Any]]) -> int | None:
        nonlocal asked
        asked += 1
        return size(messages)

    history = History("s")
    for number in range(10):
        prompt = await history.fit("q" * 20, "message", Room(1000), counting)
        history.add(f"m{number}", "q" * 20, "a" * 20, Usage(size(prompt), 20))
    assert asked == 0


def test_the_number_of_messages_can_be_bounded() -> None:
    history = History("")
    for number in range(30):
        prompt = run(history.fit(f"{number}", "message", Room(10_000, messages=10), count))
        assert len(prompt) <= 10
        history.add(f"m{number}", f"{number}", "a", None)
        history.make_room(Room(10_000, messages=10))


@pytest.mark.parametrize("messages", range(1, 12))
@pytest.mark.parametrize("pins", range(5))
@pytest.mark.parametrize("system_prompt", ["", "s"])
def test_the_newest_exchange_stays_however_few_messages_there_may_be(
    messages: int, pins: int, system_prompt: str
) -> None:
    room = Room(10_000, messages)
    stored = [
        row_with(row(f"p{n}{role}", None, f"t{n}", role, f"pin {n}"), pinned=True)
        for n in range(pins)
        for role in ("user", "assistant")
    ]
    history = History.from_rows(system_prompt, stored)
    for number in range(12):
        prompt = list(run(history.fit(f"{number}", "message", room, count)))
        least = len(prompt[:1] if system_prompt else ()) + 2 + 1
        assert len(prompt) <= max(messages, least)
        assert prompt[-1]["content"] == f"{number}"
        if number:
            assert [m["content"] for m in prompt[-3:-1]] == [f"{number - 1}", "a"]
        history.add(f"m{number}", f"{number}", "a", None)
        history.make_room(room)
        assert history.window_start is not None


def test_what_is_left_of_many_messages_stays_however_long_it_is() -> None:
    history, room = History("s"), Room(100, messages=6)
    for number in range(4):
        history.add(f"m{number}", f"{number}", "a" * 400 * (number == 3), None)
        history.make_room(room)
    assert history.window_start == "m3"


async def test_a_message_longer_than_the_context_is_refused_and_nothing_forgotten() -> None:
    history = History("")
    history.add("m1", "early", "answer", None)
    with pytest.raises(InvalidRequest, match=r"message: .*506.*100"):
        await history.fit("q" * 500, "message", Room(80, context=100), count)
    assert len(history.prompt("next")) == 3


def test_a_prompt_is_what_is_sent() -> None:
    prompt = Prompt(b'{"role":"user","content":"a"}', b'{"role":"user","content":"b"}', 2)
    assert encode_body({"messages": prompt}) == b'{"messages":' + prompt.json + b"}"
    assert json.loads(prompt.json) == list(prompt)
    assert len(prompt) == 2


def test_a_message_that_leaves_no_room_for_pins_leaves_them_out_once() -> None:
    history = History("s")
    stored = row_with(row("p", None, "t", "user", "p" * 50), pinned=True)
    history.remember([stored, row("a", "p", "t", "assistant", "a" * 50)], "notes", "x")
    assert len(ask(history, "short", budget=400)) == 6
    long = ask(history, "q" * 250, budget=400)
    assert [m["role"] for m in long] == ["system", "user", "assistant", "user"], "the pins are there"
    longer = ask(history, "q" * 350, budget=400)
    assert [m["role"] for m in longer] == ["system", "user"]
    history.add("m", "q" * 350, "a", Usage(size(longer), 1))
    assert history.window_start == "m"
    assert [m["role"] for m in ask(history, "short", budget=900)][:5] == [
        "system",
        *["user", "assistant"] * 2,
    ]
