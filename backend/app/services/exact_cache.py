"""Answers that are given again: to the very same question, of the same owner, at temperature 0.

Off by default (`LLM_CACHE_MB`). See docs/decisions/0018-exact-cache.md.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec

from app.config import Settings
from app.events import GenerationOptions
from app.services.llm_server import Message
from app.services.places import Meter
from app.services.prompts import encode_body
from app.services.replies import Completion, Done, Piece, Update
from app.services.routing import Route

OVERHEAD = 512
"""Bytes of an entry beside its texts, at most."""


@dataclass(frozen=True, slots=True)
class Question:
    """What an answer is kept under, and the model that must have given it."""

    key: bytes
    model: str


class ExactCache:
    """At most so many bytes of answers, those used last."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._most = settings.llm_cache_mb << 20
        self._answers: OrderedDict[bytes, Completion] = OrderedDict()
        self.size = 0

    def question(
        self, route: Route, owner: str, messages: Sequence[Message], options: GenerationOptions
    ) -> Question | None:
        """The question, if its answer may be kept: at temperature 0, without tools, to a model whose servers
        tell which version it is."""
        settings, model = self._settings, route.found()
        entry = route.entry.options.given()
        effective = {
            "temperature": settings.llm_temperature,
            "top_p": settings.llm_top_p,
            "max_tokens": settings.llm_max_tokens,
            **entry,
            **options.given(),
        }
        if effective["temperature"] != 0 or effective.get("tools") or model is None:
            return None
        versions = sorted({found.version for server in route.pool.servers if (found := route.found(server))})
        if not versions or not all(versions):
            return None
        asked = [owner, route.pool.upstream.name, model.id, versions, settings.llm_skip_thinking]
        decides: list[Any] = [*asked, entry, effective]
        key = hashlib.sha256(msgspec.json.encode(decides, order="deterministic"))
        key.update(encode_body(messages))
        return Question(key.digest(), route.name_of(model))

    async def answer(
        self, question: Question, updates: AsyncGenerator[Update, None], meter: Meter
    ) -> AsyncGenerator[Update, None]:
        """The kept answer, or what `updates` bring, which is kept if it is whole. `updates` are not begun
        when there is one."""
        known = self._answers.get(question.key)
        if known is not None:
            self._answers.move_to_end(question.key)
            meter.model = question.model
            for update in _again(known):
                yield update
            return
        completion = Completion()
        async with aclosing(updates):
            async for update in updates:
                completion.add(update)
                if isinstance(update, Done) and update.usage is not None and meter.model == question.model:
                    self._keep(question.key, completion)
                yield update

    def _keep(self, key: bytes, completion: Completion) -> None:
        if completion.finish_reason != "stop" or completion.tool_calls:
            return
        size = _size(completion)
        if size > self._most:
            return
        self._forget(key)
        self._answers[key] = completion
        self.size += size
        while self.size > self._most:
            self._forget(next(iter(self._answers)))

    def _forget(self, key: bytes) -> None:
        known = self._answers.pop(key, None)
        self.size -= 0 if known is None else _size(known)


def _again(known: Completion) -> list[Update]:
    usage = msgspec.structs.replace(known.usage, tokens_per_second=None, cache_hit=True)
    texts = [Piece("thinking", known.thinking), Piece("text", known.response)]
    return [*(piece for piece in texts if piece.content), Done(known.finish_reason, usage, [])]


def _size(completion: Completion) -> int:
    return len(completion.response.encode()) + len(completion.thinking.encode()) + OVERHEAD
