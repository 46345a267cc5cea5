"""Asks an LLM server how it is and what it serves: `/v1/models`, and of llama.cpp `/props`."""

from __future__ import annotations

import asyncio
import hashlib
import time
from typing import Any

import msgspec

from app.errors import LLMError, PortalError
from app.services.catalog import DEFAULT
from app.services.dialects import OWNERS
from app.services.llm_server import LOOK_AGAIN_S, LLMServer, ModelInfo, NotOffered, Silent
from app.services.replies import NO_JSON
from app.services.slots import Slots

WATCH_INTERVAL_S = 5.0
FRESH_S = 1.0
"""An answer younger than this is not asked for again."""


class _ModelMeta(msgspec.Struct):
    n_ctx: int | None = None
    n_params: int | None = None
    n_embd: int | None = None
    n_vocab: int | None = None
    size: int | None = None


class _Model(msgspec.Struct):
    id: str
    root: str | None = None
    created: int = 0
    owned_by: str | None = ""
    max_model_len: int | None = None
    meta: _ModelMeta | None = None


class _Models(msgspec.Struct):
    data: list[_Model] | None = None


class _TemplateCaps(msgspec.Struct):
    supports_tools: bool = True


class _Props(msgspec.Struct):
    """The part of llama.cpp's `/props` that tells of the chat template and the slots."""

    chat_template: str = ""
    chat_template_caps: _TemplateCaps | None = None
    total_slots: int = 0
    build_info: str = ""
    model_path: str = ""

    @property
    def knows_tools(self) -> bool:
        if self.chat_template_caps is not None:
            return self.chat_template_caps.supports_tools
        return not self.chat_template or "tools" in self.chat_template


_decode_props = msgspec.json.Decoder(_Props).decode
_decode_models = msgspec.json.Decoder(_Models).decode


class Probe:
    """Asks one server, and keeps in it what it answered."""

    def __init__(self, server: LLMServer) -> None:
        self._server = server
        self._knows_tools = True
        self._build = ""
        self._asked_at = float("-inf")
        self._lock = asyncio.Lock()
        self._silent = 0

    async def watch(self) -> None:
        """Asks every few seconds, and at once after a failure. Runs until cancelled."""
        server = self._server
        while True:
            await self._ask()
            pause = WATCH_INTERVAL_S if server.state.problem is None else LOOK_AGAIN_S
            server.look_again.clear()
            try:
                async with asyncio.timeout(pause):
                    await server.look_again.wait()
                await asyncio.sleep(LOOK_AGAIN_S / 4)
            except TimeoutError:
                pass

    async def if_stale(self) -> None:
        """Asks, unless that was done within the last second. Raises nothing."""
        async with self._lock:
            if time.monotonic() - self._asked_at >= FRESH_S:
                await self._ask()

    async def _ask(self) -> None:
        server = self._server
        began = time.monotonic()
        problem: PortalError | None = None
        try:
            models = await self._models()
            if [model.id for model in models] != [
                known.id for known in server.models
            ] or server.state.problem:
                await self._read_props(models)
            server.models = [self._info(model) for model in models]
            server.latency_ms = round((time.monotonic() - began) * 1000)
        except PortalError as error:
            problem = error
        self._silent = self._silent + 1 if isinstance(problem, Silent) else 0
        if server.state.problem is not None or self._silent != 1:  # once, it may be busy with its work
            server.state.note(problem)
        if problem is not None:
            server.look_again.set()
        self._asked_at = time.monotonic()

    async def _models(self) -> list[_Model]:
        """What it serves. A server of `models.toml`, where the models are named, need not be able to tell."""
        server = self._server
        must_tell = server.upstream.name == DEFAULT
        try:
            models = _decode_models(await server.get(f"{server.base}/models")).data or []
        except NO_JSON:
            raise LLMError("What answers there is no OpenAI-compatible server.") from None
        except NotOffered:
            if must_tell:
                raise
            return []
        if not models and must_tell:
            raise LLMError("The LLM server serves no model.")
        return models

    async def _read_props(self, models: list[_Model]) -> None:
        """Whether the chat template of a llama.cpp server knows tools: it leaves them out without a word
        where it does not. And how many slots it has. Of other servers nothing is known."""
        self._knows_tools, self._server.slots, self._build = True, Slots(), ""
        self._server.contexts.clear()
        self._server.spare_time.most = None
        if not models or self._owner(models[0]) != "llamacpp":
            return
        try:
            props = _decode_props(await self._server.get(f"{self._server.root}/props"))
        except (PortalError, *NO_JSON):
            return
        self._knows_tools = props.knows_tools
        self._server.spare_time.most = props.total_slots or None
        self._build = _digest([props.build_info, props.model_path, props.chat_template])
        if props.total_slots > 1:
            self._server.slots = Slots(props.total_slots)

    def _owner(self, model: _Model) -> str:
        return OWNERS.get(self._server.upstream.kind) or model.owned_by or ""

    def _info(self, model: _Model) -> ModelInfo:
        context = model.max_model_len or (model.meta.n_ctx if model.meta else None)
        owner = self._owner(model)
        # Of Ollama it is when the model was last changed; of the others, when they were asked.
        told = [model.id, owner, model.root, model.meta, model.created if owner == "library" else 0]
        return ModelInfo(model.id, owner, context, self._knows_tools, _digest([*told, self._build]))


def _digest(told: list[Any]) -> str:
    return hashlib.sha256(msgspec.json.encode(told)).hexdigest()[:16]
