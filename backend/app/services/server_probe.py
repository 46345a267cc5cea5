"""Asks an LLM server how it is and what it serves: `/v1/models`, and what its kind tells beside."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from app.errors import LLMError, PortalError
from app.services.catalog import DEFAULT
from app.services.dialects import OWNERS
from app.services.llm_server import LOOK_AGAIN_S, LLMServer, ModelInfo, NotOffered, Silent
from app.services.model_facts import ALWAYS_LOADED, NO_PROPS, UNKNOWN, Facts, facts_of, loaded_at, props_of
from app.services.replies import NO_JSON
from app.services.slots import Slots

WATCH_INTERVAL_S = 5.0
FRESH_S = 1.0
"""An answer younger than this is not asked for again."""

TELLING = {*OWNERS.values(), "localai"}
"""Kinds of servers, by what their models say of their owner, that tell more than OpenAI's API has."""


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
    status: Any = None

    @property
    def is_loaded(self) -> bool | None:
        """What llama.cpp says where it loads and unloads several models; None elsewhere."""
        value = self.status.get("value") if isinstance(self.status, dict) else None
        return None if value is None else value == "loaded"


class _Models(msgspec.Struct):
    data: list[_Model] | None = None


_decode_models = msgspec.json.Decoder(_Models).decode


class Probe:
    """Asks one server, and keeps in it what it answered."""

    def __init__(self, server: LLMServer) -> None:
        self._server = server
        self._told: list[Any] = []
        self._facts: Mapping[str, Facts] = {}
        self._facts_of_all = UNKNOWN
        self._build = ""
        self._asked_at = float("-inf")
        self._lock = asyncio.Lock()
        self._silent = 0

    async def watch(self) -> None:
        """Asks every few seconds, and at once after a failure. Runs until cancelled."""
        server = self._server
        while True:
            async with self._lock:
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

    async def anew(self) -> None:
        """Asks for everything, also for what was told already. Raises nothing."""
        async with self._lock:
            self._told = []
            await self._ask()

    async def _ask(self) -> None:
        server = self._server
        began = time.monotonic()
        problem: PortalError | None = None
        try:
            models = await self._models()
            latency = round((time.monotonic() - began) * 1000)
            told = [[*self._identity(model), model.is_loaded] for model in models]
            if told != self._told or server.state.problem:
                await self._read_facts(models)
            loaded = await loaded_at(server, self._kind(models))
            self._told, server.latency_ms = told, latency
            server.models = [self._info(model, loaded) for model in models]
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

    async def _read_facts(self, models: list[_Model]) -> None:
        """What the server tells of its models, and how many slots it has. Raises `Loading`."""
        server, kind = self._server, self._kind(models)
        props = await props_of(server) if kind == "llamacpp" else NO_PROPS
        server.contexts.clear()
        slots = props.total_slots if props.total_slots > 1 else 0
        if slots != server.slots.count or server.state.problem is not None:  # else turns hold some of them
            server.slots = Slots(slots)
        server.spare_time.most = props.total_slots or None
        self._build = _digest([props.build_info, props.model_path, props.chat_template])
        self._facts_of_all = props.facts if len(models) == 1 else UNKNOWN
        self._facts = await facts_of(server, kind, [model.id for model in models])

    def _kind(self, models: list[_Model]) -> str:
        """The kind of the server: as `models.toml` says, or as it tells itself by the owners of its models.
        Ollama calls only those of its own library so."""
        owners = [self._owner(model) for model in models]
        return next((owner for owner in owners if owner in TELLING), owners[0] if owners else "")

    def _owner(self, model: _Model) -> str:
        kind = self._server.upstream.kind
        return OWNERS.get(kind) or model.owned_by or (kind if kind == "localai" else "")

    def _identity(self, model: _Model) -> list[Any]:
        owner = self._owner(model)
        # Of Ollama it is when the model was last changed; of the others, when they were asked.
        return [model.id, owner, model.root, model.meta, model.created if owner == "library" else 0]

    def _info(self, model: _Model, loaded: Mapping[str, int | None] | None) -> ModelInfo:
        owner, facts = self._owner(model), self._facts.get(model.id, self._facts_of_all)
        context = model.max_model_len or (model.meta.n_ctx if model.meta else None) or facts.context
        is_loaded = model.is_loaded
        if loaded is not None:
            is_loaded, context = model.id in loaded, loaded.get(model.id) or context
        elif is_loaded is None and owner in ALWAYS_LOADED:
            is_loaded = True
        return ModelInfo(
            model.id,
            owner,
            context,
            _digest([*self._identity(model), self._build]),
            tools=facts.tools,
            vision=facts.vision,
            thinking=facts.thinking,
            loaded=is_loaded,
        )


def _digest(told: list[Any]) -> str:
    return hashlib.sha256(msgspec.json.encode(told)).hexdigest()[:16]
