"""The session manager against a model of plain lists: whatever is done in whatever order, with restarts in
between, every session holds what was said in it, once and in order."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from pydantic import SecretStr

from app.access import Identity
from app.config import Settings
from app.container import Container, open_container
from app.errors import Conflict, NotFound, PortalError
from app.events import Final, TurnRequest
from app.loop import BackgroundLoop
from tests.fake_llm import FakeLLM, Script, serve
from tests.support import SECRET, UNLIMITED, person

T = TypeVar("T")

PEOPLE = {name: person(name) for name in ("ada", "bo")}
who = st.sampled_from(sorted(PEOPLE))
session_ids = st.sampled_from(["s", "t"])
messages = st.sampled_from(["one", "two", "three"])
request_ids = st.one_of(st.none(), st.sampled_from(["q", "r"]))


@dataclass
class Said:
    """A session as it should be: what was asked, in order, and the request ids that it knows."""

    asked: list[str] = field(default_factory=list)
    known: dict[str, str] = field(default_factory=dict)


class Sessions(RuleBasedStateMachine):
    """Two people, each with sessions of the same names."""

    def __init__(self) -> None:
        super().__init__()
        self.background = BackgroundLoop()
        self.directory = tempfile.TemporaryDirectory()
        self.stack = AsyncExitStack()
        self.live: dict[tuple[str, str], Said] = {}
        self.deleted: dict[tuple[str, str], Said] = {}

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.background.loop).result(20)

    @initialize()
    def begin(self) -> None:
        self.fake: FakeLLM = self.run(self.stack.enter_async_context(serve(FakeLLM(Script(echo=True)))))
        self.portal: Container = self.run(self.open())

    async def open(self) -> Container:
        self.opened = open_container(
            Settings(
                _env_file=None,
                llm_server_url=self.fake.url,
                database_url=f"sqlite:///{Path(self.directory.name) / 'portal.db'}",
                secret_key=SecretStr(SECRET),
                instance="one",
                **UNLIMITED,  # type: ignore[arg-type]
            )
        )
        return await self.opened.__aenter__()

    async def close(self) -> None:
        await self.opened.__aexit__(None, None, None)

    def teardown(self) -> None:
        self.run(self.close())
        self.run(self.stack.aclose())
        self.background.stop()
        self.directory.cleanup()

    def identity(self, name: str) -> Identity:
        return PEOPLE[name]

    def expect(self, coroutine: Coroutine[Any, Any, Any], error: type[PortalError] | None) -> Any:
        """The result, or the error that is expected."""
        try:
            result = self.run(coroutine)
        except PortalError as raised:
            assert error is not None, raised
            assert isinstance(raised, error), raised
            return None
        assert error is None, f"{error.__name__} was expected"
        return result

    async def ask(self, name: str, session: str, message: str, request_id: str | None) -> Final:
        request = TurnRequest(self.identity(name), session, message, request_id=request_id)
        ending = await (await self.portal.sessions.submit(request)).ended()
        assert isinstance(ending, Final)
        return ending

    @rule(name=who, session=session_ids, message=messages, request_id=request_ids)
    def say(self, name: str, session: str, message: str, request_id: str | None) -> None:
        said = self.live.setdefault((name, session), Said())
        before = said.known.get(request_id or "")
        error = Conflict if before not in {None, message} else None
        final = self.expect(self.ask(name, session, message, request_id), error)
        if error is not None:
            return
        assert final.response == f"echo: {message}"
        if before is None:
            said.asked.append(message)
            if request_id is not None:
                said.known[request_id] = message

    @rule(name=who, session=session_ids, message=messages)
    def say_while_it_restarts(self, name: str, session: str, message: str) -> None:
        """What was accepted is answered by the process that comes after."""
        self.fake.script = Script(echo=True, before_first=30)
        request = TurnRequest(self.identity(name), session, message)
        turn = self.run(self.portal.sessions.submit(request))
        self.run(self.close())
        self.fake.script = Script(echo=True)
        self.portal = self.run(self.open())
        self.live.setdefault((name, session), Said()).asked.append(message)

        async def ended() -> Any:
            return await (await self.portal.sessions.find(self.identity(name), turn.id)).ended()

        ending = self.run(ended())
        assert isinstance(ending, Final)
        assert ending.response == f"echo: {message}"

    @rule()
    def restart(self) -> None:
        self.run(self.close())
        self.portal = self.run(self.open())

    @rule(name=who, session=session_ids)
    def clear(self, name: str, session: str) -> None:
        there = self.live.get((name, session))
        clearing = self.portal.sessions.clear(self.identity(name), session)
        self.expect(clearing, None if there else NotFound)
        if there:
            there.asked.clear()  # and the request ids stay known

    @rule(name=who, session=session_ids)
    def delete(self, name: str, session: str) -> None:
        there = self.live.pop((name, session), None)
        deleting = self.portal.sessions.delete(self.identity(name), session)
        self.expect(deleting, None if there else NotFound)
        if there:
            self.deleted[name, session] = there

    @rule(name=who, session=session_ids)
    def restore(self, name: str, session: str) -> None:
        key = (name, session)
        error = Conflict if key in self.live else None if key in self.deleted else NotFound
        self.expect(self.portal.sessions.restore(self.identity(name), session), error)
        if error is None:
            self.live[key] = self.deleted.pop(key)

    @invariant()
    def every_session_holds_what_was_said(self) -> None:
        for name in PEOPLE:
            for session in ("s", "t"):
                said = self.live.get((name, session))
                page = self.expect(
                    self.portal.sessions.page(self.identity(name), session), None if said else NotFound
                )
                if said is None:
                    continue
                contents = [message.content for message in page.messages]
                assert contents == [text for asked in said.asked for text in (asked, f"echo: {asked}")]
                assert all(message.status == "complete" for message in page.messages)


Sessions.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=25,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestSessions = Sessions.TestCase
