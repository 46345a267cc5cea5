"""`/v1`: OpenAI's API, for every client that speaks it. The Responses API is in `openai_responses`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Header, Request, Response
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

from app.access import Identity
from app.dependencies import CurrentUser, EmbeddingsDep, LLMDep, ModelsDep, SessionsDep
from app.errors import InvalidRequest, NotFound
from app.events import GenerationOptions, TurnRequest
from app.hardening import StrictRoute
from app.options import Objects
from app.routers.streaming import SSE, FormedStream, json_response, while_connected, whole_answer
from app.services.llm_client import LLMClient
from app.services.model_list import ModelList
from app.services.openai_chat import ChatChunks, chat_completion
from app.services.openai_messages import NOT_IN_SESSION, chat_messages, new_message
from app.services.session_manager import SessionManager
from app.services.turns import Turn

MOST_TEXTS = 2048
"""Texts in one request for embeddings, as at OpenAI."""

SessionHeader = Annotated[
    str | None, Header(alias="X-Session-Id", description="Makes it a turn of this session, which remembers")
]
KeyHeader = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="In a session: the request id, which makes it safe to send the request again",
    ),
]


class OpenAIError(BaseModel):
    """What went wrong; `param` is the field that is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIErrorBody(BaseModel):
    """The body of every error below `/v1`."""

    error: OpenAIError


router = APIRouter(
    prefix="/v1",
    tags=["openai"],
    route_class=StrictRoute,
    responses={"default": {"model": OpenAIErrorBody, "description": "An error"}},
)

STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with `stream` as server-sent events.",
        "content": {
            SSE: {
                "schema": {
                    "type": "object",
                    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
                    "required": ["data"],
                }
            }
        },
    }
}


# --- bodies --------------------------------------------------------------------------------------


def _refuse(reason: str) -> BeforeValidator:
    def check(value: object) -> None:
        if value not in (None, False, "none", []):
            raise ValueError(reason)

    return BeforeValidator(check)


def _one(value: int | None) -> int | None:
    if value not in (None, 1):
        raise ValueError("a request gets one reply; send as many requests as you want replies")
    return value


def _texts(value: object) -> object:
    texts = value if isinstance(value, list) else [value]
    if not 1 <= len(texts) <= MOST_TEXTS or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(
            f"a text, or a list of 1 to {MOST_TEXTS}, is needed, none empty; tokens are not taken"
        )
    return value


class StreamOptions(BaseModel):
    """What a stream tells."""

    include_usage: Annotated[bool | None, Field(description="Whether a last chunk tells the usage")] = None


class ChatRequest(GenerationOptions):
    """OpenAI's request for a chat completion. Fields that are not named here are ignored."""

    messages: Annotated[Objects, Field(min_length=1, description="Messages in OpenAI's form")]
    max_completion_tokens: Annotated[
        int | None, Field(ge=1, le=1_000_000, description="The newer name of max_tokens, and goes before it")
    ] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int | None, AfterValidator(_one), Field(description="1")] = None
    logprobs: Annotated[None, _refuse("it is not served; leave it out")] = None
    functions: Annotated[None, _refuse("it is served as tools only")] = None
    function_call: Annotated[None, _refuse("it is served as tool_choice only")] = None

    @property
    def options(self) -> GenerationOptions:
        """How to generate."""
        if self.max_completion_tokens is None:
            return self
        return self.model_copy(update={"max_tokens": self.max_completion_tokens})


class PromptDetails(BaseModel):
    """Of the tokens of the prompt."""

    cached_tokens: int


class CompletionDetails(BaseModel):
    """Of the tokens of the reply."""

    reasoning_tokens: int


class CompletionUsage(BaseModel):
    """Tokens of a completion."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class CompletionMessage(BaseModel):
    """The reply; `reasoning_content` where the model's thinking is shown."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class CompletionChoice(BaseModel):
    """The one choice that there is."""

    index: int
    message: CompletionMessage
    logprobs: None
    finish_reason: Literal["stop", "length", "tool_calls", "content_filter"]


class ChatCompletion(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: CompletionUsage


class EmbeddingRequest(BaseModel):
    """OpenAI's request for embeddings. Fields that are not named here are ignored."""

    input: Annotated[
        str | list[str],
        BeforeValidator(_texts),
        Field(description="A text, or up to 2048, none of them empty"),
    ]
    model: Annotated[str | None, Field(max_length=256)] = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int | None, Field(ge=1, le=100_000)] = None


class EmbeddingUsage(BaseModel):
    """Tokens of the texts."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """An embedding for each text."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    model: str
    usage: EmbeddingUsage


class OpenAIModel(BaseModel):
    """A model. When it was made is not known: `created` is 0."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str


class OpenAIModelList(BaseModel):
    """The models that I may ask for."""

    object: Literal["list"] = "list"
    data: list[OpenAIModel]


# --- routes --------------------------------------------------------------------------------------


@router.post("/chat/completions", response_model=ChatCompletion, responses=STREAMED)
async def chat_completions(
    body: ChatRequest,
    request: Request,
    user: CurrentUser,
    sessions: SessionsDep,
    llm: LLMDep,
    session_id: SessionHeader = None,
    idempotency_key: KeyHeader = None,
) -> Response:
    """A chat completion. Nothing of it is kept, but with `X-Session-Id`: then the last message is said in
    that session, which remembers the earlier ones itself; what the system says counts when it is new."""
    await check_served(llm, body.model)
    messages, options = chat_messages(body.messages), body.options
    if session_id is None:
        turn = await sessions.chat(user, messages, options)
    else:
        prompt, message = new_message(messages, "messages", NOT_IN_SESSION)
        asked = TurnRequest(user, session_id, message, system_prompt=prompt, options=options)
        turn = await submit(sessions, asked, idempotency_key)
    model = llm.known_model(sessions.model_for(user, body.model))
    if body.stream:
        include_usage = body.stream_options is not None and body.stream_options.include_usage is True
        chunks = ChatChunks(turn, model, include_usage=include_usage)
        return FormedStream(request, turn, chunks, headers_of(turn))
    return json_response(chat_completion(turn, await whole_answer(request, turn), model), headers_of(turn))


@router.post("/embeddings", response_model=EmbeddingList)
async def embeddings(
    body: EmbeddingRequest, request: Request, user: CurrentUser, made_by: EmbeddingsDep, llm: LLMDep
) -> Response:
    """Embeddings, as the LLM server makes them."""
    await check_served(llm, body.model)
    texts = [body.input] if isinstance(body.input, str) else body.input
    asked = body.model_dump(include={"encoding_format", "dimensions"}, exclude_none=True)
    made, turn = await while_connected(request, made_by.embed(user, texts, body.model, asked))
    usage = {"prompt_tokens": made.tokens, "total_tokens": made.tokens}
    shown = {"object": "list", "data": made.data, "model": turn.meter.model, "usage": usage}
    return json_response(shown, turn.ticket.headers)


@router.get("/models")
async def openai_models(user: CurrentUser, models: ModelsDep) -> OpenAIModelList:
    """The models that I may ask for, by each of their names."""
    return OpenAIModelList(data=list(_models(models, user)))


@router.get("/models/{model:path}")
async def openai_model(model: str, user: CurrentUser, models: ModelsDep) -> OpenAIModel:
    """One of these models."""
    for found in _models(models, user):
        if found.id == model:
            return found
    raise NotFound("model: there is no such model for you")


def _models(models: ModelList, user: Identity) -> Iterator[OpenAIModel]:
    served = [model for model in models.all(user).models if model.health.servers]
    owners = {name: model.provider for model in served for name in (model.name, *model.aliases)}
    for name in sorted(owners):
        yield OpenAIModel(id=name, owned_by=owners[name])


# --- what both APIs do ---------------------------------------------------------------------------


async def check_served(llm: LLMClient, model: str | None) -> None:
    """Raises `NotFound` for a model that is not served: clients know that from OpenAI."""
    if model:
        try:
            await llm.model_name(model)
        except InvalidRequest as error:
            raise NotFound(error.message) from None


def request_id_of(key: str) -> str:
    """The request id of an idempotency key, which the draft of the IETF (draft-ietf-httpapi-idempotency-key-
    header) puts in quotes."""
    return key.strip('"')


async def submit(sessions: SessionManager, asked: TurnRequest, key: str | None) -> Turn:
    """A turn of a session. With an idempotency key it outlives the connection."""
    request_id = None if key is None else request_id_of(key)
    return await sessions.submit(
        msgspec.structs.replace(asked, request_id=request_id, detached=request_id is not None)
    )


def headers_of(turn: Turn) -> dict[str, str]:
    """The headers of an answer: how the limits stand, and where it is kept."""
    session = turn.session.session_id
    kept = {"X-Session-Id": session, "X-Turn-Id": turn.id} if session else {}
    return {**turn.ticket.headers, **kept}
