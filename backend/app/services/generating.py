"""The generation of a turn: what comes from the LLM server becomes its events, and at last its ending."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

import msgspec

from app.database import insist
from app.errors import ContextExceeded, Expired, PortalError
from app.events import Cancelled, Ending, ExpiredEvent, Failed, Final, GenerationOptions, Usage, new_id
from app.logs import get_logger
from app.services.endings import Reply
from app.services.llm_client import LLMClient
from app.services.llm_server import Message
from app.services.measures import estimated, share_of_thinking, told
from app.services.policies import Policies
from app.services.replies import Done, InQueue
from app.services.routing import OwnKey
from app.services.session_keys import SessionKeys
from app.services.turns import Turn

RUNAWAY_FACTOR = 2
LONGEST_TOKEN_CHARS = 64
"""A reply with this many times the tokens that were asked for, or longer than so many of the longest tokens
are, is cut off: its server does not heed `max_tokens`."""

log = get_logger(__name__)


class Generating:
    """Generates the replies of turns."""

    def __init__(self, llm: LLMClient, policies: Policies, keys: SessionKeys) -> None:
        self._llm = llm
        self._policies = policies
        self._keys = keys

    async def run(
        self,
        turn: Turn,
        prompting: Coroutine[Any, Any, Sequence[Message]],
        options: GenerationOptions,
        again: Callable[[ContextExceeded], Awaitable[Sequence[Message]]] | None = None,
    ) -> tuple[Ending | None, Reply | None]:
        """Makes the prompt and generates, with the turn's events, and tells how it ended. Where the server
        has no room for the prompt, the one that is made `again` is tried, once."""
        turn.interruptible = True
        try:
            if turn.interruption is not None:
                prompting.close()
                return _interrupted(turn)
            turn.prompt = await prompting
            try:
                done = await self._stream(turn, options)
            except ContextExceeded as refused:
                if again is None:
                    raise
                turn.prompt = await again(refused)
                done = await self._stream(turn, options)
            if done.usage is None:
                await self._measure(turn, options)
            else:
                turn.usage = told(turn, done.usage)
            return _finished(turn, done)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if turn.interruption is None or task is None:
                raise
            task.uncancel()
            if turn.interruption == "stop":
                await self._measure(turn, options)
            return _interrupted(turn)
        except Expired:
            return ExpiredEvent(turn.id), None
        except PortalError as error:
            await self._measure(turn, options)
            return Failed(turn.id, error.info), _reply_of(turn)
        finally:
            turn.interruptible = False

    async def _measure(self, turn: Turn, options: GenerationOptions) -> None:
        """Finds out what a turn has used that the server has not reported, as well as that can be told. The
        turn cannot be interrupted any more."""
        turn.interruptible = False
        if not turn.meter.has_read:
            return
        usage = await self._llm.count(turn.prompt, turn.written, options.model)
        if usage is None:
            usage = estimated(turn)
        else:
            reasoning = share_of_thinking(turn, usage.completion_tokens)
            usage = msgspec.structs.replace(usage, reasoning_tokens=reasoning)
        turn.usage = told(turn, usage)

    async def _stream(self, turn: Turn, options: GenerationOptions) -> Done:
        own_key: OwnKey | None = None
        if self._llm.own_key_providers and turn.session.id:
            own_key = await insist(lambda: self._keys.of(turn.session.id))
        updates = self._llm.stream(
            turn.prompt,
            options,
            deadline=turn.row.deadline,
            owner=turn.session.owner,
            session=turn.session.id or None,
            meter=turn.meter,
            own_key=own_key,
            allowed=self._policies.role(turn.row.role).models,
        )
        most, done = RUNAWAY_FACTOR * self._llm.max_tokens_of(options), None
        async with aclosing(updates):
            async for update in updates:
                if isinstance(update, InQueue):
                    turn.queued(update.position, update.eta_s)
                elif isinstance(update, Done):
                    done = update  # the updates go on to their end, which counts for the server
                elif update.kind == "text":
                    turn.token(update.content)
                else:
                    turn.thinking(update.content)
                if turn.pieces > most or turn.chars > most * LONGEST_TOKEN_CHARS:
                    log.warning("a runaway generation is cut off", turn=turn.id, pieces=turn.pieces)
                    return Done("length", None, [])
        assert done is not None, "a generation says how it ended"
        return done


def _interrupted(turn: Turn) -> tuple[Ending | None, Reply | None]:
    if turn.interruption == "expired":
        return ExpiredEvent(turn.id), None
    if turn.interruption != "stop":
        return None, None
    reply = _reply_of(turn)
    if reply is None:
        return Cancelled(turn.id, "", None, turn.usage), None
    stored = turn.row.message_id != ""
    return Cancelled(turn.id, reply.content, reply.message_id if stored else None, turn.usage), reply


def _reply_of(turn: Turn) -> Reply | None:
    """What there is of a reply that broke off."""
    response = "".join(turn.response)
    return Reply(new_id(), response, [], turn.usage, None) if response else None


def _finished(turn: Turn, done: Done) -> tuple[Final, Reply]:
    now = time.monotonic()
    response = "".join(turn.response)
    usage = turn.usage or Usage(estimated=True)
    reply = Reply(new_id(), response, done.tool_calls, usage, done.finish_reason)
    final = Final(
        turn.id,
        response=response,
        finish_reason=done.finish_reason,
        usage=usage,
        tool_calls=done.tool_calls,
        elapsed_ms=round((now - turn.began) * 1000),
        ttft_ms=usage.ttft_ms,
        message_id=reply.message_id if turn.row.message_id else None,
    )
    return final, reply
