"""What the MQTT door does with a request: finds out who asks, and calls the middle."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from msgspec.structs import replace

from app.access import Identity
from app.config import Settings
from app.database import insist
from app.errors import Forbidden, NotFound, Unauthenticated
from app.events import Mark, TurnRequest
from app.mqtt.answers import new_session, notice
from app.mqtt.contract import Ask, Command, ForeignReplyTopic, Refusal, TargetBody, TemplateBody
from app.services.accounts import Accounts
from app.services.authorizer import Authorizer
from app.services.devices import Devices
from app.services.projects import Projects
from app.services.session_manager import SessionManager
from app.services.turns import Turn

T = TypeVar("T")


class Requests:
    """Carries out the requests of all projects."""

    def __init__(
        self,
        settings: Settings,
        sessions: SessionManager,
        projects: Projects,
        accounts: Accounts,
        authorizer: Authorizer,
        devices: Devices,
    ) -> None:
        self._settings = settings
        self._sessions = sessions
        self._projects = projects
        self._accounts = accounts
        self._authorizer = authorizer
        self._devices = devices

    async def carry_out(self, command: Command) -> Turn | bytes | None:
        """Does what is asked for: the turn that answers, the payload of the answer, or nothing where the
        answer comes by itself. It is done when this returns, also through a database that is away for a
        while. Raises `PortalError`."""
        who = await self._who(command)
        if command.verb in {"user_input", "state"}:
            return await self._ask(command, who)
        if command.verb == "session":
            return new_session(command)
        if command.verb == "template":
            return await self._set_prompt(command, who)
        if command.verb == "cancel":
            return await self._cancel(command, who)
        return await self._clear(command, who)

    async def refused(self, refusal: Refusal) -> None:
        """Writes down what somebody tried, where it was no slip."""
        if isinstance(refusal.error, ForeignReplyTopic):
            address = refusal.address
            who = self._devices.identity(address.device, address.project) if address.device else None
            asker = who or self._accounts.anonymous(address.project)
            await self._authorizer.deny(asker, "reply topic of another")

    async def _who(self, command: Command) -> Identity:
        address, token = command.address, command.token
        if address.device is not None:
            device = self._devices.identity(address.device, address.project)
            if device is None:
                raise Forbidden(f"There is no device {address.device!r} in the project {address.project!r}.")
            return device
        if token:
            return await insist(lambda: self._accounts.identify(token, door="mqtt"))
        if not self._settings.anonymous_mqtt:
            raise Unauthenticated("token: messages without one are not answered here.")
        return self._accounts.anonymous(address.project)

    async def _ask(self, command: Command, who: Identity) -> Turn:
        body = command.body
        assert isinstance(body, Ask)
        request = TurnRequest(
            who=who,
            session_id=command.key or "",
            message=command.text,
            kind="state" if command.verb == "state" else "message",
            request_id=command.request_id,
            system_prompt=body.prompt,
            project=command.address.project,
            options=body,
            deadline=command.deadline,
            reply_to=command.target,
        )
        if command.request_id:
            return await insist(lambda: self._sessions.submit(request))
        return await _insist(command.mark, lambda mark: self._sessions.submit(replace(request, mark=mark)))

    async def _set_prompt(self, command: Command, who: Identity) -> bytes:
        body, project, key = command.body, command.address.project, command.key
        assert isinstance(body, TemplateBody)
        prompt = body.prompt
        if key is not None and not command.is_for_all:
            await _insist(
                command.mark,
                lambda mark: self._sessions.set_prompt(
                    who, key, prompt, project=project, reset=body.reset, mark=mark
                ),
            )
        else:

            async def change_all() -> None:
                await self._projects.set_prompt(who, project, prompt)
                if body.reset:
                    await self._sessions.set_prompts(who, project, prompt)

            await _insist(command.mark, lambda mark: self._sessions.once(mark, change_all))
        return notice(command.target, "Template updated", command.request_id)

    async def _clear(self, command: Command, who: Identity) -> bytes:
        key, project, deletes = command.key, command.address.project, command.verb == "delete_session"
        assert isinstance(command.body, TargetBody)
        if key is None or command.is_for_all:

            async def clear_all() -> None:
                await self._sessions.clear_all(who, project, delete=deletes)

            await _insist(command.mark, lambda mark: self._sessions.once(mark, clear_all))
        else:
            change = self._sessions.delete if deletes else self._sessions.clear
            with suppress(NotFound):  # it is as empty as it should be
                await _insist(command.mark, lambda mark: change(who, key, mark))
        if command.address.verb == "user_input":
            return notice(command.target, "Session cleared", command.request_id)
        done = "Session deleted" if deletes else "History cleared"
        return notice(command.target, done, command.request_id)

    async def _cancel(self, command: Command, who: Identity) -> bytes | None:
        key, is_named = command.key or "", command.body.request_id is not None
        stopped = None
        with suppress(NotFound):
            stopped = await insist(lambda: self._sessions.stop(who, key, command.request_id))
            if stopped is None and command.request_id is not None and not is_named:
                # The correlation data were those of the cancel, and name no turn.
                stopped = await insist(lambda: self._sessions.stop(who, key))
        if stopped is not None:
            return None  # whoever asked for the turn is told that it is cancelled
        return notice(command.target, "Nothing to cancel", command.request_id)


async def _insist(mark: Mark, change: Callable[[Mark], Awaitable[T]]) -> T:
    """Repeats what the database cannot take now. It may have been taken, and nobody heard of the commit."""
    again = mark if mark.again else replace(mark, again=True, since=time.time())

    async def next_try() -> T:
        nonlocal mark
        tried, mark = mark, again
        return await change(tried)

    return await insist(next_try)
