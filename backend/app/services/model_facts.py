"""What an LLM server tells of its models beside their names: whether they take tools and pictures, whether
they think, how long their context is, and which of them are loaded. What a server does not tell is null.

llama.cpp tells at `/props`, Ollama at `/api/show` and `/api/ps`, LocalAI at `/v1/models/capabilities` and
`/system`; vLLM has in its memory what it serves, and tells nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

import msgspec

from app.errors import PortalError
from app.services.llm_server import LLMServer
from app.services.replies import NO_JSON
from app.services.server_state import Loading

MOST_SHOWN = 200
"""Models of which Ollama is asked one by one."""

ALWAYS_LOADED = {"llamacpp", "vllm"}
"""Servers that begin to answer once their model is loaded."""

_NUM_CTX = re.compile(r"^\s*num_ctx\s+(\d+)", re.MULTILINE)

T = TypeVar("T")


class Facts(msgspec.Struct, frozen=True):
    """What is known of a model."""

    tools: bool | None = None
    vision: bool | None = None
    thinking: bool | None = None
    context: int | None = None


UNKNOWN = Facts()


# --- llama.cpp -----------------------------------------------------------------------------------


class _TemplateCaps(msgspec.Struct):
    supports_tools: bool = True
    supports_preserve_reasoning: bool = False
    supports_reasoning_effort: bool = False


class _Modalities(msgspec.Struct):
    vision: bool | None = None


class Props(msgspec.Struct):
    """The part of llama.cpp's `/props` that tells of the chat template and the slots."""

    chat_template: str = ""
    chat_template_caps: _TemplateCaps | None = None
    modalities: _Modalities | None = None
    total_slots: int = 0
    build_info: str = ""
    model_path: str = ""

    @property
    def facts(self) -> Facts:
        """What it tells of the model."""
        vision = None if self.modalities is None else self.modalities.vision
        return Facts(tools=self._knows_tools, vision=vision, thinking=self._thinks)

    @property
    def _knows_tools(self) -> bool | None:
        """Templates leave out without a word what they do not know."""
        if self.chat_template_caps is not None:
            return self.chat_template_caps.supports_tools
        return "tools" in self.chat_template if self.chat_template else None

    @property
    def _thinks(self) -> bool | None:
        """There are models that think with templates that say nothing of it."""
        caps = self.chat_template_caps or _TemplateCaps()
        told = caps.supports_preserve_reasoning or caps.supports_reasoning_effort
        return True if told or "enable_thinking" in self.chat_template else None


NO_PROPS = Props()

_decode_props = msgspec.json.Decoder(Props).decode


async def props_of(server: LLMServer) -> Props:
    """What a llama.cpp server tells of itself; nothing where it does not. Raises `Loading`: some of its
    versions name a model that they are still loading."""
    try:
        return _decode_props(await server.get(f"{server.root}/props"))
    except Loading:
        raise
    except (PortalError, *NO_JSON):
        return NO_PROPS


# --- Ollama --------------------------------------------------------------------------------------


class _Shown(msgspec.Struct):
    capabilities: list[str] | None = None
    parameters: str = ""
    model_info: dict[str, Any] = {}

    @property
    def facts(self) -> Facts:
        if self.capabilities is None:  # an older version
            return Facts(context=self._context)
        told = set(self.capabilities)
        return Facts("tools" in told, "vision" in told, "thinking" in told, self._context)

    @property
    def _context(self) -> int | None:
        """What the Modelfile sets, or else what the model was made for."""
        if (found := _NUM_CTX.search(self.parameters)) is not None:
            return int(found[1])
        values = (value for key, value in self.model_info.items() if key.endswith(".context_length"))
        return next((value for value in values if isinstance(value, int) and value > 0), None)


class _Running(msgspec.Struct):
    model: str
    context_length: int | None = None


class _AllRunning(msgspec.Struct):
    models: list[_Running] | None = None


async def _shown(server: LLMServer, models: Iterable[str]) -> dict[str, Facts]:
    found = {}
    for model in list(models)[:MOST_SHOWN]:
        try:
            answer = await server.ask(f"{server.root}/api/show", {"model": model})
            found[model] = msgspec.convert(answer, _Shown).facts
        except (PortalError, msgspec.ValidationError):
            continue
    return found


# --- LocalAI -------------------------------------------------------------------------------------


class _Capable(msgspec.Struct):
    id: str
    capabilities: list[str] = []
    input_modalities: list[str] = []

    @property
    def facts(self) -> Facts:
        # Of tools and thinking it has no word, so nothing is known of them.
        return Facts(vision="vision" in self.capabilities or "image" in self.input_modalities)


class _AllCapable(msgspec.Struct):
    data: list[_Capable] | None = None


class _Named(msgspec.Struct):
    id: str


class _System(msgspec.Struct):
    loaded_models: list[_Named] | None = None


# --- any -----------------------------------------------------------------------------------------


async def facts_of(server: LLMServer, kind: str, models: Collection[str]) -> Mapping[str, Facts]:
    """What a server that is asked model by model tells of them; those it says nothing of are left out."""
    if kind == "library":  # Ollama
        return await _shown(server, models)
    if kind == "localai":
        told = await _get(server, f"{server.base}/models/capabilities", _AllCapable)
        return {model.id: model.facts for model in (told and told.data) or ()}
    return {}


async def loaded_at(server: LLMServer, kind: str) -> Mapping[str, int | None] | None:
    """The models that a server has in its memory now, each with the length of its context where that is
    told; None where it does not tell which."""
    if kind == "library":
        running = await _get(server, f"{server.root}/api/ps", _AllRunning)
        return None if running is None else {one.model: one.context_length for one in running.models or ()}
    if kind == "localai":
        system = await _get(server, f"{server.root}/system", _System)
        return None if system is None else dict.fromkeys(one.id for one in system.loaded_models or ())
    return None


async def _get(server: LLMServer, url: str, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(await server.get(url), type=kind)
    except (PortalError, *NO_JSON):
        return None
