"""Sessions and their turns, as the doors see them.

A request is accepted when it is committed. The turns of one session run one at a time, those of
different sessions side by side, and every accepted turn gets exactly one ending.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from msgspec.structs import replace

from app.access import ANY, LOCAL, Identity
from app.errors import InvalidRequest, NotFound, Overloaded, PortalError, RateLimited
from app.events import GenerationOptions, Mark, TurnRequest, check_id, is_id, new_id
from app.logs import get_logger
from app.loop import LoopDoor
from app.options import chosen_tool, names_of
from app.services import turn_log
from app.services.acceptance import Acceptance
from app.services.admission import NO_TICKET, Admission, Ticket
from app.services.authorizer import Authorizer
from app.services.drain import Drain
from app.services.endings import Ended
from app.services.llm_client import LLMClient
from app.services.llm_server import Message
from app.services.model_defaults import ModelDefaults
from app.services.outbox import Delivery
from app.services.policies import Policies
from app.services.projects import Projects
from app.services.prompts import with_system
from app.services.redaction import redact, redacted_message
from app.services.rows import MessageRow, SessionRow
from app.services.runner import Runner
from app.services.store import EVERYBODY, Store
from app.services.templates import Templates
from app.services.turns import Turn, answer_of, unstored
from app.services.watchers import ListWatcher, Watcher

DEFAULT_PROJECT = "prompt_portal"

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class HistoryPage:
    """Messages of a session, oldest first. `is_first` when nothing is older than the page."""

    session: SessionRow
    messages: list[MessageRow]
    is_first: bool


class SessionManager:
    """Runs turns. Everything but `process_message` and `aprocess_message` belongs to the portal's
    own event loop."""

    def __init__(
        self,
        store: Store,
        runner: Runner,
        llm: LLMClient,
        templates: Templates,
        authorizer: Authorizer,
        policies: Policies,
        projects: Projects,
        admission: Admission,
        drain: Drain,
        defaults: ModelDefaults,
    ) -> None:
        self._store = store
        self._runner = runner
        self._projects = projects
        self._llm = llm
        self._templates = templates
        self._authorizer = authorizer
        self._policies = policies
        self._admission = admission
        self._drain = drain
        self._defaults = defaults
        self._accepting: set[asyncio.Task[Turn]] = set()

    def on_delivery(self, listener: Callable[[Delivery, Turn], None]) -> None:
        """Calls `listener` whenever a reply that the outbox owes is ready."""
        self._runner.on_delivery = listener

    # --- life ---

    async def open(self) -> None:
        """Lets plain Python in."""
        self._drain.active = lambda: len(self._accepting) + len(self._runner.here)
        self._door = LoopDoor(asyncio.get_running_loop())

    async def close(self) -> None:
        """Stops working; turns that are not done stay accepted, for whoever takes them up."""
        await asyncio.gather(*self._accepting, return_exceptions=True)
        await self._runner.close()

    # --- asking ---

    async def submit(self, request: TurnRequest) -> Turn:
        """Accepts a request: when this returns, it is committed. The turn may be one that the same
        request id has already made, and even ended.

        Raises `InvalidRequest`, `Forbidden`, `RateLimited`, `BudgetExceeded`, `Conflict` (the request id
        with another body; a busy session, where the last message is to be answered again), `NotFound` (there
        is no such message) or `Overloaded`, also as `StorageUnavailable` when the database takes nothing;
        then nothing was accepted.
        """
        check_id("session_id", request.session_id)
        if request.request_id is not None:
            check_id("request_id", request.request_id)
        if not request.message.strip() and not request.regenerate:
            raise InvalidRequest("message: it is empty")
        if "\0" in request.message:
            raise InvalidRequest("message: it holds a NUL character")
        request = await self._allowed(await self._placed(request))
        request = await self._with_prompt(request)
        # What is committed must be run, also when who asked is cancelled in between.
        accepting = asyncio.create_task(self._accept(request), name="accept")
        self._accepting.add(accepting)
        accepting.add_done_callback(self._accepting.discard)
        try:
            return await asyncio.shield(accepting)
        except asyncio.CancelledError:
            accepting.add_done_callback(self._runner.abandon)
            raise

    async def _placed(self, request: TurnRequest) -> TurnRequest:
        """The request with its project: of the session where there is one, of the key, or the default."""
        only = request.who.only_project
        project = request.project or only or DEFAULT_PROJECT
        if self._policies.has_projects or only is not None:
            session = await self._store.session(request.who.owner, request.session_id)
            project = session.project if session is not None else project
        return request if project == request.project else replace(request, project=project)

    async def _allowed(self, request: TurnRequest) -> TurnRequest:
        """The request as the role lets it through. Raises `Forbidden`, `InvalidRequest`."""
        who, options = request.who, request.options
        what = "session in the project of this key"
        await self._authorizer.check(who, "chat:use", project=request.project, what=what)
        await self._authorizer.check_tools(who, options.tools or ())
        if options.tool_choice is not None and options.tools is None:
            self._check_choice(request)
        if who.role.models != ANY:
            await self._authorizer.check_model(who, await self._llm.model_name(self._model(request)))
        default = partial(self._default_length, request)
        longest = self._admission.longest_reply(who, options.max_tokens, default)
        if longest != options.max_tokens:
            request = replace(request, options=options.model_copy(update={"max_tokens": longest}))
        if who.role.redaction:
            request = replace(request, message=redact(request.message))
        return request

    def _default_length(self, request: TurnRequest) -> int:
        """How long a reply may get where the request does not say it, in tokens."""
        of_project = self._projects.project(request.project).max_tokens if request.session_id else None
        return of_project or self._llm.default_max_tokens(self._model(request))

    def _model(self, request: TurnRequest) -> str | None:
        """The model that the request is for: it stays as it came, for whoever sends it again."""
        return self.model_for(request.who, request.options.model)

    def model_for(self, who: Identity, wanted: str | None = None) -> str | None:
        """The model to ask for when somebody wants this one, or none; None for the default for all."""
        return self._defaults.model(who.owner, who.role, wanted)

    def _with_model(self, request: TurnRequest) -> GenerationOptions:
        model = self._model(request)
        same = model == request.options.model
        return request.options if same else request.options.model_copy(update={"model": model})

    def _check_choice(self, request: TurnRequest) -> None:
        """Raises `InvalidRequest` when there is no tool to choose: of a state, those of its project count."""
        choice, project = request.options.tool_choice, self._projects.project(request.project)
        tools = project.tools_for(request.who.role.tools) if request.kind == "state" else []
        if choice not in ("auto", "none") and not tools:
            raise InvalidRequest("tool_choice: it needs tools to choose from")
        named = chosen_tool(choice)
        if named is not None and named not in names_of(tools):
            raise InvalidRequest(f"tool_choice: the project has no tool that is called {named}")

    async def _accept(self, request: TurnRequest) -> Turn:
        turn_id, model = new_id(), self._model(request)
        known = self._llm.known_model(model)
        ticket, refusal = await self._admit(request, turn_id, known)
        try:
            acceptance = await self._store.accept(
                request,
                turn_id=turn_id,
                instance=self._runner.instance,
                refusal=refusal or self._llm.full(model),
            )
        except BaseException:
            await self._admission.give_back(ticket)
            raise
        if acceptance.kind == "known":
            await self._admission.give_back(ticket)
        elif acceptance.kind == "again":
            ticket = await self._admission.rename(ticket, acceptance.turn.id)
        for ended in acceptance.superseded:
            self._cut_off_turn(ended)
        turn = self._taken_in(acceptance, request, ticket, known)
        if acceptance.delivery is not None and not acceptance.turn.is_active:
            self._runner.on_delivery(acceptance.delivery, turn)
        return turn

    async def _admit(
        self, request: TurnRequest, turn_id: str, model: str
    ) -> tuple[Ticket, PortalError | None]:
        """The ticket of a new turn, or why there is none: whoever repeats a request, to have the answer that
        there is, is not refused that. Raises why, where nothing of the kind was accepted before."""
        try:
            self._drain.check()
            longest = partial(self._default_length, request)
            return await self._admission.admit(request.who, request, turn_id, model, longest), None
        except (RateLimited, Overloaded) as error:
            if request.request_id is None:
                raise
            if not await self._store.has_request(request.who.owner, request.session_id, request.request_id):
                raise
            return NO_TICKET, error

    async def _with_prompt(self, request: TurnRequest) -> TurnRequest:
        """The request with the prompt that a new session begins with: its own, its template's, or its
        project's."""
        if request.template_id is None:
            default = self._projects.project(request.project).system_prompt
            return request if request.system_prompt is not None else replace(request, system_prompt=default)
        if request.system_prompt is not None:
            raise InvalidRequest("template_id: give either this or system_prompt")
        if await self._store.session(request.who.owner, request.session_id) is not None:
            return request
        version = await self._templates.get(request.who, request.template_id)
        prompt = version.render(request.variables)
        return replace(request, system_prompt=prompt, template_version=version.id)

    def _taken_in(self, acceptance: Acceptance, request: TurnRequest, ticket: Ticket, model: str) -> Turn:
        row = acceptance.turn
        if acceptance.kind == "known":
            live = self._runner.turns.get(row.id) if row.is_active else None
            return live or self._runner.elsewhere.turn(row, acceptance.session)
        turn = Turn(row, acceptance.session)
        # What is answered again, or stands elsewhere than at the end, is read with its own history.
        turn.question = None if acceptance.is_aside else request.message
        turn.ticket = ticket
        turn_log.accepted(turn, model)
        self._runner.enqueue(turn)
        return turn

    async def find(self, who: Identity, turn_id: str) -> Turn:
        """The turn, live or from the database. Raises `NotFound`, also for another owner's."""
        await self._authorizer.check(who, "sessions:read")
        live = self._runner.turns
        found = None if turn_id in live else await self._store.turn(turn_id)
        turn = live.get(turn_id)  # it may have begun here while the database was read
        session = turn.session if turn is not None else found[1] if found is not None else None
        if session is None:
            raise NotFound("There is no such turn.")
        await self._authorizer.check(
            who, "sessions:read", owner=session.owner, project=session.project, what="turn"
        )
        if turn is None:
            assert found is not None
            turn = self._runner.elsewhere.turn(*found)
        return turn

    async def chat(self, who: Identity, messages: Sequence[Message], options: GenerationOptions) -> Turn:
        """A turn without a session: nothing of it is stored, and it ends with its last follower. Raises
        what `submit` raises."""
        self._drain.check()
        text = "\n".join(str(message.get("content", "")) for message in messages)
        request = await self._allowed(await self._placed(TurnRequest(who, "", text, options=options)))
        if who.role.redaction:
            messages = [redacted_message(message) for message in messages]
        messages = with_system(messages, before=who.role.system_prompt)
        options = self._with_model(request)
        if (full := self._llm.full(options.model)) is not None:
            raise full
        turn_id, model = new_id(), self._llm.known_model(options.model)
        longest = partial(self._default_length, request)
        ticket = await self._admission.admit(who, request, turn_id, model, longest)
        turn = unstored(turn_id, who, request.project, text)
        turn.ticket = ticket
        turn_log.accepted(turn, model)
        self._runner.run_unstored(turn, messages, options)
        return turn

    def process_message(self, session_id: str, system_prompt: str, user_message: str, **options: Any) -> str:
        """Sends a message in one of plain Python's own sessions and returns the reply; `options` are
        `request_id` and those of `GenerationOptions`.

        May be called from any thread but the event loop's. Raises what `submit` raises and the
        error that the turn ended with.
        """
        return self._door.call(self._process(session_id, system_prompt, user_message, options))

    async def aprocess_message(
        self, session_id: str, system_prompt: str, user_message: str, **options: Any
    ) -> str:
        """`process_message`, to be awaited on any event loop."""
        return await self._door.acall(self._process(session_id, system_prompt, user_message, options))

    async def _process(
        self, session_id: str, system_prompt: str, user_message: str, options: dict[str, Any]
    ) -> str:
        request_id = options.pop("request_id", None)
        request = TurnRequest(
            who=LOCAL,
            session_id=session_id,
            message=user_message,
            request_id=request_id,
            system_prompt=system_prompt,
            options=GenerationOptions.of(options),
            detached=request_id is not None,
        )
        turn = await self.submit(request)
        return answer_of(await turn.ended()).response

    # --- sessions ---

    async def page(
        self, who: Identity, session_id: str, *, limit: int | None = None, before: str | None = None
    ) -> HistoryPage:
        """The newest `limit` messages, or those older than the message `before`. Raises `NotFound`."""
        session = await self.session(who, session_id)
        leaf: str | None = session.leaf_id
        if before is not None:
            parent = await self._store.message_parent(session.id, before)
            if parent is None:
                raise NotFound("before: there is no such message in this session.")
            leaf = parent[0]
        messages = await self._store.messages(leaf, limit=limit)
        is_first = not messages or messages[0].parent_id is None
        if before is None:
            messages += await self._store.waiting_messages(session.id)
        return HistoryPage(session, messages, is_first)

    async def clear(self, who: Identity, session_id: str, mark: Mark | None = None) -> None:
        """Deletes the messages of a session; its running turn is stopped and the waiting ones are
        dropped, each ending as cancelled. Not again for the same `mark`. Raises `NotFound`."""
        await self._check(who, "chat:use", session_id)
        partial = self._partial(who.owner, session_id)
        self._changed(who.owner, *await self._store.clear(who.owner, session_id, partial, mark))

    async def delete(
        self, who: Identity, session_id: str, mark: Mark | None = None, *, only_turn: str | None = None
    ) -> None:
        """Deletes a session, and stops and drops its turns; `restore` brings it back. Not again for the
        same `mark`, and not when it has another turn than `only_turn`, where that is given. Raises
        `NotFound` and `Conflict`."""
        await self._check(who, "sessions:write", session_id)
        partial = self._partial(who.owner, session_id)
        deleted = await self._store.delete_session(who.owner, session_id, partial, mark, only_turn)
        self._changed(who.owner, *deleted)

    async def set_prompt(
        self,
        who: Identity,
        session_id: str,
        prompt: str,
        *,
        project: str,
        reset: bool,
        mark: Mark | None = None,
    ) -> None:
        """Gives a session another system prompt, making it in `project` if it is new; with `reset` it is
        cleared too. Not again for the same `mark`. Raises `InvalidRequest`."""
        check_id("session_id", session_id)
        if "\0" in prompt:
            raise InvalidRequest("template: it holds a NUL character")
        await self._authorizer.check(who, "sessions:write", project=project, what="session")
        is_new = await self.project_of(who, session_id) is None
        if not is_new:
            await self._check(who, "sessions:write", session_id)
        partial = self._partial(who.owner, session_id)
        changed = await self._store.set_prompt(
            who.owner, session_id, prompt, project=project, reset=reset, partial=partial, mark=mark
        )
        self._changed(who.owner, *changed, is_new=is_new)

    async def set_prompts(self, who: Identity, project: str, prompt: str) -> None:
        """Gives every session of who asks in a project another system prompt, and clears it."""
        await self._authorizer.check(who, "sessions:write", project=project, what="project")
        for owner, name in await self._store.names_in_project(project, who.owner):
            partial = self._partial(owner, name)
            changed = self._store.set_prompt(
                owner, name, prompt, project=project, reset=True, partial=partial
            )
            self._changed(owner, *await changed)

    async def clear_all(self, who: Identity, project: str, *, delete: bool = False) -> int:
        """Clears, or with `delete` deletes, every session of a project: everybody's, or, asked by those who
        have no account, theirs. Returns how many. Raises `Forbidden`."""
        await self._authorizer.check(who, "projects:clear", project=project, what="project")
        owner = EVERYBODY if who.user is not None or who.owner == LOCAL.owner else who.owner
        names = await self._store.names_in_project(project, owner)
        change = self._store.delete_session if delete else self._store.clear
        for of, name in names:
            with suppress(NotFound):  # it went in the meantime
                self._changed(of, *await change(of, name, self._partial(of, name)))
        return len(names)

    async def once(self, mark: Mark, change: Callable[[], Awaitable[None]]) -> None:
        """Carries out a change of more than one session, but not again for the same `mark`. It is noted at
        the end: what was done in part is done again."""
        if not await self._store.was_taken(mark):
            await change()
            await self._store.take(mark)

    def _partial(self, owner: str, session_id: str) -> dict[str, str]:
        """What the live turns of a session have answered so far."""
        return {turn.id: "".join(turn.response) for turn in self._live(owner, session_id)}

    def _live(self, owner: str, session_id: str) -> list[Turn]:
        live = [turn for turn in self._runner.turns.values() if turn.session.session_id == session_id]
        return [turn for turn in live if turn.session.owner == owner]

    def _changed(self, owner: str, session: str, all_ended: Sequence[Ended], *, is_new: bool = False) -> None:
        """A session was changed in the database, and its turns were ended: tells them so, and who watches."""
        for ended in all_ended:
            self._cut_off_turn(ended)
        self._runner.forget_history(session)
        self._runner.watchers.change(owner, session, is_new=is_new)

    def _cut_off_turn(self, ended: Ended) -> None:
        turn = self._runner.turns.get(ended.turn_id)
        if turn is None or not self._runner.is_here(turn):
            self._runner.elsewhere.tell_ended(ended.turn_id)
        if turn is not None:
            self._runner.cut_off(turn, ended)

    async def choose(self, who: Identity, session_id: str, message_id: str) -> str:
        """Lets the history of a session go through a message, and on to the newest one behind it, whose id
        is returned. Raises `NotFound`, `Conflict` while a turn of the session is active."""
        session = await self._session(who, "sessions:write", session_id)
        leaf = await self._store.choose(who.owner, session_id, message_id)
        self._runner.forget_history(session.id)
        return leaf

    async def branches(self, who: Identity, session_id: str) -> list[list[str]]:
        """The places of a session where there is more than one message. Raises `NotFound`."""
        return await self._store.branches(await self.session(who, session_id))

    async def restore(self, who: Identity, session_id: str) -> SessionRow:
        """Brings back a deleted session. Raises `NotFound`, or `Conflict` when its id is in use again."""
        await self._authorizer.check(who, "sessions:write")
        session = await self._store.restore_session(who.owner, session_id, who.only_project)
        self._runner.watchers.change(session.owner, session.id, is_new=True)
        return session

    async def rename(self, who: Identity, session_id: str, title: str) -> SessionRow:
        """Gives a session another title. Raises `NotFound`."""
        session = await self._session(who, "sessions:write", session_id)
        await self._store.rename_session(session.id, title)
        self._runner.watchers.change(session.owner, session.id)
        return replace(session, title=title)

    async def search(
        self, who: Identity, text: str = "", *, limit: int = 50, offset: int = 0
    ) -> tuple[list[SessionRow], int]:
        """The sessions of who asks with `text` in the title, those used last first, and how many there
        are."""
        await self._authorizer.check(who, "sessions:read")
        return await self._store.sessions_of(
            who.owner, text, project=who.only_project, limit=limit, offset=offset
        )

    async def stop(self, who: Identity, session_id: str, request_id: str | None = None) -> str | None:
        """Stops the running turn, or that of the request, also while it waits. Returns its id once it has
        ended; None when there is none. Raises `NotFound`."""
        session = await self._session(who, "chat:use", session_id)
        active = await self._store.active_turns(session.id)
        wanted = [row for row in active if request_id in {None, row.request_id}]
        if request_id is None:
            wanted = [row for row in wanted if row.state == "running"]
        if not wanted:
            return None
        row = wanted[0]
        turn = self._runner.turns.get(row.id)
        if turn is not None and self._runner.is_here(turn):
            self._runner.interrupt(turn, "stop")
            await turn.ended()
        else:
            await self._runner.elsewhere.stop(row, session)
        return row.id

    async def may_watch(self, who: Identity, session_id: str) -> None:
        """Returns when who asks may watch the session, which need not be there yet. Raises `InvalidRequest`,
        `Forbidden`, `NotFound`."""
        check_id("session_id", session_id)
        await self._authorizer.check(who, "sessions:read")
        if who.only_project is not None and await self.project_of(who, session_id) is not None:
            await self.session(who, session_id)

    def watch(self, who: Identity, session_id: str, watcher: Watcher) -> AbstractContextManager[None]:
        """Tells `watcher` of the turns of a session that this process has."""
        return self._runner.watchers.watch(who.owner, session_id, watcher)

    async def may_watch_list(self, who: Identity) -> None:
        """Returns when who asks may watch the list of their sessions. Raises `Forbidden`."""
        await self._authorizer.check(who, "sessions:read")

    def watch_list(self, who: Identity, watcher: ListWatcher) -> AbstractContextManager[None]:
        """Tells `watcher` of all sessions of who asks."""
        return self._runner.watchers.watch_list(who.owner, watcher)

    def notice(self, who: Identity, session_id: str, by: Watcher, what: str) -> None:
        """Tells the others who watch a session what who asks does there."""
        self._runner.watchers.notice(who.owner, session_id, by, what)

    def live_turns(self, who: Identity, session_id: str) -> list[Turn]:
        """The turns of a session that wait or run in this process, in their order."""
        return sorted(self._live(who.owner, session_id), key=lambda turn: turn.row.position)

    async def question_of(self, turn: Turn) -> tuple[str, float]:
        """The user message of a turn, empty when it was cleared, and when it came (Unix time)."""
        if turn.question is None:
            found = await self._store.content_of(turn.row.message_id)
            return found or ("", turn.row.created_at)
        return turn.question, turn.asked_at

    async def session(self, who: Identity, session_id: str) -> SessionRow:
        """The session that who asks calls so. Raises `NotFound`, also for another owner's."""
        return await self._session(who, "sessions:read", session_id)

    async def project_of(self, who: Identity, session_id: str) -> str | None:
        """The project of the session that who asks calls so, if there is one."""
        session = await self._store.session(who.owner, session_id) if is_id(session_id) else None
        return None if session is None else session.project

    async def _check(self, who: Identity, permission: str, session_id: str) -> None:
        """As `_session`, but it looks at the session only for keys of a project: what changes a session
        stays in the order of the calls."""
        await self._authorizer.check(who, permission)
        if who.only_project is not None:
            await self._session(who, permission, session_id)

    async def _session(self, who: Identity, permission: str, session_id: str) -> SessionRow:
        session = await self._store.session(who.owner, session_id) if is_id(session_id) else None
        project = None if session is None else session.project
        await self._authorizer.check(who, permission, project=project, what="session")
        if session is None:
            raise NotFound("There is no such session.")
        return session
