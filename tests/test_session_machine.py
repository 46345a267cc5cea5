"""The session manager, in two processes on one database, against a model of plain trees: whatever is done in
whatever order, through whichever of the two, with restarts in between, every session holds what was said in
it, once and in its place, and the model is sent that and nothing else."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from pydantic import SecretStr

from app.config import Settings
from app.container import Container, open_container
from app.errors import Conflict, NotFound, PortalError
from app.events import Cancelled, Ending, Failed, Final, GenerationOptions, TurnRequest, new_id, type_of
from app.loop import BackgroundLoop
from app.services.turns import Turn
from tests.fake_llm import FakeLLM, Script, serve, text
from tests.support import SECRET, UNLIMITED, new_database, person

T = TypeVar("T")

PEOPLE = {name: person(name) for name in ("ada", "bo")}
NAMES = [(name, session) for name in PEOPLE for session in ("s", "t")]
keys = st.sampled_from(NAMES)
messages = st.sampled_from(["one", "two", "three"])
request_ids = st.one_of(st.none(), st.sampled_from(["q", "r"]))
portals = st.sampled_from([0, 1])
numbers = st.integers(0, 20)

ECHO = Script(echo=True)
NEVER = Script(echo=True, before_first=30)
SLOW = Script(pieces=text("half of", " it"), between=30)
BROKEN = Script(pieces=text("half of", " it"), cut_after=1)

BETWEEN = ["", "go on", "answer again"]
"""What happens before something that failed is tried again."""

MEANWHILE = ["", "stop the second", "clear", "restart"]
"""What happens while three messages wait in one session."""

Key = tuple[str, str]


@dataclass
class Said:
    """A message as it should be."""

    id: str
    parent: str | None
    role: str
    content: str
    status: str = "complete"

    @property
    def is_broken(self) -> bool:
        """Whether it is an answer that broke off: that takes the place of no other one."""
        return (self.role, self.status) == ("assistant", "failed")


@dataclass
class Talk:
    """A session as it should be: what was said, in that order, the newest message of the path that is shown,
    and the request ids that it knows, with what was asked."""

    said: dict[str, Said] = field(default_factory=dict)
    leaf: str | None = None
    known: dict[str, str] = field(default_factory=dict)

    def path(self, leaf: str | None) -> list[Said]:
        found: list[Said] = []
        while leaf is not None:
            found.append(self.said[leaf])
            leaf = found[-1].parent
        return found[::-1]

    @property
    def shown(self) -> list[Said]:
        return self.path(self.leaf)

    def questions(self) -> list[Said]:
        return [one for one in self.said.values() if one.role == "user"]

    def add(self, *said: Said) -> None:
        for one in said:
            assert one.id not in self.said
            self.said[one.id] = one
            self.leaf = one.id


def sent_of(path: Sequence[Said]) -> list[str]:
    """What the model is sent of a path: questions with their answers."""
    pairs = itertools.pairwise(path)
    answered = [pair for pair in pairs if [one.role for one in pair] == ["user", "assistant"]]
    return [one.content for pair in answered if pair[1].status != "failed" for one in pair]


class Sessions(RuleBasedStateMachine):
    """Two people, each with sessions of the same names."""

    made_by: Callable[[], str]
    """Makes the database that both portals have."""

    def __init__(self) -> None:
        super().__init__()
        self.database_url = self.made_by()
        self.background = BackgroundLoop()
        self.stack = AsyncExitStack()
        self.live: dict[Key, Talk] = {}
        self.deleted: dict[Key, Talk] = {}

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.background.loop).result(20)

    @initialize()
    def begin(self) -> None:
        self.fake: FakeLLM = self.run(self.stack.enter_async_context(serve(FakeLLM(ECHO))))
        self.opened: list[AbstractAsyncContextManager[Container]] = [self.container(0), self.container(1)]
        self.portals: list[Container] = [self.run(one.__aenter__()) for one in self.opened]

    def container(self, at: int) -> AbstractAsyncContextManager[Container]:
        return open_container(
            Settings(
                _env_file=None,
                llm_server_url=self.fake.url,
                database_url=self.database_url,
                secret_key=SecretStr(SECRET),
                instance=f"portal-{at}",
                **UNLIMITED,  # type: ignore[arg-type]
            )
        )

    def close(self, at: int) -> None:
        self.run(self.opened[at].__aexit__(None, None, None))

    def open_again(self, at: int) -> None:
        self.opened[at] = self.container(at)
        self.portals[at] = self.run(self.opened[at].__aenter__())

    def teardown(self) -> None:
        for at in (0, 1):
            self.close(at)
        self.run(self.stack.aclose())
        self.background.stop()

    # --- what is asked ---

    def expect(self, coroutine: Coroutine[Any, Any, T], error: type[PortalError] | None) -> T | None:
        """The result, or the error that is expected."""
        try:
            result = self.run(coroutine)
        except PortalError as raised:
            assert error is not None, raised
            assert isinstance(raised, error), raised
            return None
        assert error is None, f"{error.__name__} was expected"
        return result

    def request(self, key: Key, message: str, **more: Any) -> TurnRequest:
        name, session = key
        return TurnRequest(PEOPLE[name], session, message, **more)

    async def ending(self, at: int, request: TurnRequest) -> Ending:
        return await (await self.portals[at].sessions.submit(request)).ended()

    def ask(
        self, at: int, key: Key, message: str, error: type[PortalError] | None = None, **more: Any
    ) -> Final | None:
        ending = self.expect(self.ending(at, self.request(key, message, **more)), error)
        assert ending is None or isinstance(ending, Final), ending
        return ending

    def fail(self, at: int, request: TurnRequest) -> None:
        """A turn fails; and another one does not, so that the server is not left alone for a time."""
        self.fake.script = BROKEN
        assert isinstance(self.run(self.ending(at, request)), Failed)
        self.fake.script = ECHO

        async def chat() -> Ending:
            said = [{"role": "user", "content": "hello"}]
            turn = await self.portals[at].sessions.chat(request.who, said, GenerationOptions())
            return await turn.ended()

        assert isinstance(self.run(chat()), Final)

    def sent(self) -> list[str]:
        """What the model was sent last."""
        return [message["content"] for message in self.fake.requests[-1]["messages"]]

    def page(self, at: int, key: Key) -> list[Said] | None:
        name, session = key
        page = self.expect(
            self.portals[at].sessions.page(PEOPLE[name], session), None if key in self.live else NotFound
        )
        if page is None:
            return None
        return [Said(one.id, one.parent_id, one.role, one.content, one.status) for one in page.messages]

    def learn(self, at: int, key: Key, before: Sequence[Said], *new: tuple[str, str, str]) -> None:
        """The history is `before` and then `new` (role, content, status), whose ids are learned."""
        page = self.page(at, key)
        assert page is not None
        assert page[: len(before)] == list(before)
        told = page[len(before) :]
        assert [(one.role, one.content, one.status) for one in told] == list(new)
        self.live[key].add(*told)

    # --- rules ---

    @rule(at=portals, key=keys, message=messages, request_id=request_ids)
    def say(self, at: int, key: Key, message: str, request_id: str | None) -> None:
        talk = self.live.setdefault(key, Talk())
        before = talk.known.get(request_id or "")
        if before not in {None, message}:
            self.ask(at, key, message, Conflict, request_id=request_id)
            return
        final = self.ask(at, key, message, request_id=request_id)
        assert final is not None
        assert final.response == f"echo: {message}"
        if before is not None:
            return
        shown = talk.shown
        assert self.sent() == [*sent_of(shown), message]
        self.learn(at, key, shown, *answered(message))
        if request_id is not None:
            talk.known[request_id] = message

    @rule(key=keys, message=messages)
    def say_at_both(self, key: Key, message: str) -> None:
        """Two who speak at once are answered one after the other."""

        async def both() -> tuple[Ending, Ending]:
            return await asyncio.gather(
                self.ending(0, self.request(key, message)), self.ending(1, self.request(key, "another"))
            )

        talk = self.live.setdefault(key, Talk())
        endings = self.run(both())
        assert [isinstance(one, Final) and one.response for one in endings] == [
            f"echo: {message}",
            "echo: another",
        ]
        shown, page = talk.shown, self.page(0, key)
        assert page is not None
        first, second = (message, "another") if page[len(shown)].content == message else ("another", message)
        self.learn(1, key, shown, *answered(first), *answered(second))

    @rule(key=keys, message=messages)
    def say_the_same_at_both(self, key: Key, message: str) -> None:
        """A request that comes twice at once is answered once."""
        talk = self.live.setdefault(key, Talk())
        request_id = f"twice-{len(self.fake.requests)}"
        asked = len(self.fake.requests)

        async def both() -> tuple[Ending, Ending]:
            request = self.request(key, message, request_id=request_id)
            return await asyncio.gather(self.ending(0, request), self.ending(1, request))

        first, second = self.run(both())
        assert isinstance(first, Final)
        assert first == second
        assert len(self.fake.requests) == asked + 1
        self.learn(1, key, talk.shown, *answered(message))

    @rule(ats=st.tuples(portals, portals, portals), key=keys, then=st.sampled_from(MEANWHILE), by=portals)
    def say_three_in_a_row(self, ats: tuple[int, int, int], key: Key, then: str, by: int) -> None:
        """Those that wait are answered in their order, whichever process has them, and whatever happens."""
        talk, (name, session) = self.live.setdefault(key, Talk()), key
        ids = [f"{at}-{len(self.fake.requests)}" for at in ("first", "second", "third")]
        answers = threading.Event()
        self.fake.script = Script(echo=True, gate=answers)

        async def begin() -> list[str]:
            turns = []
            for at, id in zip(ats, ids, strict=True):
                request = self.request(key, id, request_id=id)
                turns.append((await self.portals[at].sessions.submit(request)).id)
            return turns

        turns = self.run(begin())
        sessions = self.portals[by].sessions
        if then == "stop the second":
            assert self.run(sessions.stop(PEOPLE[name], session, ids[1])) == turns[1]
        elif then == "clear":
            self.run(sessions.clear(PEOPLE[name], session))
        elif then == "restart":
            self.restart(by)
        answers.set()
        self.fake.script = ECHO

        async def ended() -> list[str]:
            found = [await self.portals[by].sessions.find(PEOPLE[name], id) for id in turns]
            return [type_of(await turn.ended()) for turn in found]

        first, second, third = map(answered, ids)
        told, shown = self.run(ended()), talk.shown
        if then == "clear":
            assert told == ["cancelled"] * 3
            talk.said, talk.leaf = {}, None
        elif then == "stop the second":
            assert told == ["final", "cancelled", "final"]
            self.learn(by, key, shown, ("user", ids[1], "cancelled"), *first, *third)
        else:
            assert told == ["final"] * 3
            self.learn(by, key, shown, *first, *second, *third)

    @rule(at=portals, key=keys)
    def answer_again(self, at: int, key: Key) -> None:
        talk = self.live.get(key)
        shown = [] if talk is None else talk.shown
        while shown and shown[-1].role != "user":
            shown.pop()
        self.ask(at, key, "", None if shown else NotFound, regenerate=True)
        if shown:
            question = shown[-1].content
            assert self.sent() == [*sent_of(shown), question]
            self.learn(at, key, shown, ("assistant", f"echo: {question}", "complete"))

    @rule(at=portals, key=keys, number=numbers, message=messages)
    def edit(self, at: int, key: Key, number: int, message: str) -> None:
        talk = self.live.get(key)
        if talk is None or not talk.said:
            self.ask(at, key, message, NotFound, edits="nothing")
            return
        questions = talk.questions()
        edited = questions[number % len(questions)]
        self.ask(at, key, message, edits=edited.id)
        before = talk.path(edited.parent)
        assert self.sent() == [*sent_of(before), message]
        self.learn(at, key, before, *answered(message))

    @rule(at=portals, key=keys, number=numbers)
    def choose(self, at: int, key: Key, number: int) -> None:
        talk = self.live.get(key)
        choosing = self.portals[at].sessions.choose
        name, session = key
        if talk is None or not talk.said:
            self.expect(choosing(PEOPLE[name], session, "nothing"), NotFound)
            return
        leaf = list(talk.said)[number % len(talk.said)]
        chosen = self.expect(choosing(PEOPLE[name], session, leaf), None)
        newest = {one.parent: one.id for one in sorted(talk.said.values(), key=lambda one: not one.is_broken)}
        while leaf in newest:
            leaf = newest[leaf]
        assert chosen == leaf
        talk.leaf = leaf

    @rule(at=portals, stopped_at=portals, key=keys, message=messages)
    def stop(self, at: int, stopped_at: int, key: Key, message: str) -> None:
        """What had come of the answer is kept, if the process that has it can be told."""
        talk = self.live.setdefault(key, Talk())
        self.fake.script = SLOW
        name, session = key

        async def stopped() -> Ending:
            turn = await self.portals[at].sessions.submit(self.request(key, message))
            async for _ in turn.follow():
                if turn.written:
                    break
            assert await self.portals[stopped_at].sessions.stop(PEOPLE[name], session) == turn.id
            return await turn.ended()

        assert isinstance(self.run(stopped()), Cancelled)
        self.fake.script = ECHO
        new = [("user", message, "cancelled")]
        if at == stopped_at or not self.database_url.startswith("sqlite"):
            new.append(("assistant", "half of", "cancelled"))
        self.learn(at, key, talk.shown, *new)

    @rule(at=portals, again_at=portals, key=keys, message=messages, between=st.sampled_from(BETWEEN))
    def fail_and_try_again(self, at: int, again_at: int, key: Key, message: str, between: str) -> None:
        """What failed is answered at the end of the history, or where it was answered in the meantime."""
        talk = self.live.setdefault(key, Talk())
        shown = talk.shown
        request = self.request(key, message, request_id=f"again-{len(self.fake.requests)}")
        self.fail(at, request)
        failed = (self.page(at, key) or [])[len(shown) :]
        assert [(one.content, one.status) for one in failed] == [(message, "failed"), ("half of", "failed")]
        if between == "go on":
            self.ask(again_at, key, "another")
            assert self.sent() == [*sent_of(shown), "another"]
        elif between == "answer again":
            self.ask(at, key, "", regenerate=True)
        first = (self.page(again_at, key) or [])[-1]
        assert isinstance(self.run(self.ending(again_at, request)), Final)
        if between == "go on":
            self.learn(at, key, shown, *answered("another"), *answered(message))
        else:
            self.learn(again_at, key, shown, *answered(message))
        if between == "answer again":
            newest = talk.said.popitem()
            talk.said |= {first.id: first, newest[0]: newest[1]}

    @rule(at=portals, key=keys)
    def fail_to_answer_again(self, at: int, key: Key) -> None:
        """The history stays as it was, where it had an answer."""
        talk = self.live.get(key)
        if talk is None or not talk.said:
            return
        name, session = key
        question = next(one for one in reversed(talk.shown) if one.role == "user")
        self.fail(at, self.request(key, "", regenerate=True))
        if question is talk.shown[-1]:
            self.learn(at, key, talk.shown, ("assistant", "half of", "failed"))
            return
        places = self.run(self.portals[at].sessions.branches(PEOPLE[name], session))
        (new,) = {id for place in places for id in place} - set(talk.said)
        talk.said[new] = Said(new, question.id, "assistant", "half of", "failed")

    @rule(at=portals, after=portals, key=keys, message=messages)
    def say_while_it_restarts(self, at: int, after: int, key: Key, message: str) -> None:
        """What was accepted is answered by the process that comes after, or by the other one."""
        talk = self.live.setdefault(key, Talk())
        self.fake.script = NEVER
        turn = self.run(self.portals[at].sessions.submit(self.request(key, message)))
        self.close(at)
        self.fake.script = ECHO
        self.open_again(at)

        async def ended() -> Ending:
            found: Turn = await self.portals[after].sessions.find(PEOPLE[key[0]], turn.id)
            return await found.ended()

        ending = self.run(ended())
        assert isinstance(ending, Final)
        assert ending.response == f"echo: {message}"
        self.learn(after, key, talk.shown, *answered(message))

    @rule(at=portals)
    def restart(self, at: int) -> None:
        self.close(at)
        self.open_again(at)

    @rule(at=portals, key=keys)
    def clear(self, at: int, key: Key) -> None:
        talk, (name, session) = self.live.get(key), key
        self.expect(self.portals[at].sessions.clear(PEOPLE[name], session), None if talk else NotFound)
        if talk:
            talk.said, talk.leaf = {}, None  # and the request ids stay known

    @rule(at=portals, key=keys)
    def delete(self, at: int, key: Key) -> None:
        talk, (name, session) = self.live.pop(key, None), key
        self.expect(self.portals[at].sessions.delete(PEOPLE[name], session), None if talk else NotFound)
        if talk:
            self.deleted[key] = talk

    @rule(at=portals, key=keys)
    def restore(self, at: int, key: Key) -> None:
        name, session = key
        error = Conflict if key in self.live else None if key in self.deleted else NotFound
        self.expect(self.portals[at].sessions.restore(PEOPLE[name], session), error)
        if error is None:
            self.live[key] = self.deleted.pop(key)

    @invariant()
    def both_show_what_was_said(self) -> None:
        for key in NAMES:
            talk = self.live.get(key)
            for at in (0, 1):
                assert self.page(at, key) == (None if talk is None else talk.shown)


def answered(message: str) -> list[tuple[str, str, str]]:
    return [("user", message, "complete"), ("assistant", f"echo: {message}", "complete")]


@pytest.fixture(params=["sqlite", "postgresql"])
def databases(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """Makes new databases."""
    if request.param == "sqlite":
        return lambda: f"sqlite:///{tmp_path / new_id()}.db"
    server: str = request.getfixturevalue("postgres_server")
    return lambda: new_database(server)


def test_both_show_what_was_said(databases: Callable[[], str]) -> None:
    class Shared(Sessions):
        made_by = staticmethod(databases)

    run_state_machine_as_test(
        Shared,
        settings=settings(
            max_examples=6,
            stateful_step_count=25,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
