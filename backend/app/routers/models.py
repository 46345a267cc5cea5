"""`/api/models`: the models that somebody may use, and which of them answers where none is named."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from app.dependencies import CurrentUser, DefaultsDep, ModelsDep
from app.hardening import StrictRoute
from app.routers.times import moment
from app.services import model_list
from app.services.prices import Price

router = APIRouter(tags=["models"], route_class=StrictRoute)


class Capabilities(BaseModel):
    """What a model takes and does, as its server tells; null where it does not."""

    model_config = ConfigDict(from_attributes=True)

    tools: Annotated[bool | None, Field(description="Without them, `LLM_TOOL_MODE` auto makes up for it")]
    vision: bool | None
    thinking: bool | None


class ModelHealth(BaseModel):
    """How the servers of a model are."""

    status: Literal["ok", "degraded", "down"]
    since: datetime | None
    latency_ms: Annotated[int | None, Field(description="Of the last answer to a question about itself")]
    servers: Annotated[int, Field(description="How many have the model")]
    queue: Annotated[int, Field(description="Requests that wait for them, or others of the provider")]


class Model(BaseModel):
    """A model that may be asked for by `name`, or by an alias."""

    name: str
    aliases: list[str]
    fallbacks: Annotated[list[str], Field(description="What answers where no server of it can")]
    provider: Annotated[str, Field(description="`default` for the servers of LLM_SERVER_URL")]
    context_length: int | None
    capabilities: Capabilities
    loaded: Annotated[bool | None, Field(description="Whether some server has it in its memory")]
    options: Annotated[dict[str, Any], Field(description="Where a request does not say otherwise")]
    price: Annotated[Price | None, Field(description="A million tokens, and a second")]
    health: ModelHealth
    is_default: bool
    is_default_for_all: bool

    @classmethod
    def of(cls, view: model_list.ModelView) -> Model:
        """What is shown of a model."""
        health = view.health
        return cls(
            name=view.name,
            aliases=view.aliases,
            fallbacks=view.fallbacks,
            provider=view.provider,
            context_length=view.context_length,
            capabilities=Capabilities.model_validate(view.capabilities),
            loaded=view.loaded,
            options=view.options,
            price=view.price,
            health=ModelHealth(
                status=health.status,
                since=None if health.since is None else moment(health.since),
                latency_ms=health.latency_ms,
                servers=health.servers,
                queue=health.queue,
            ),
            is_default=view.is_default,
            is_default_for_all=view.is_default_for_all,
        )


class Default(BaseModel):
    """The `model` that answers where a request names none."""

    model_config = ConfigDict(from_attributes=True)

    model: str | None
    chosen: Annotated[str | None, Field(description="What was chosen; null where nothing was")]
    note: Annotated[str | None, Field(description="Why it is not the one that was chosen")]


class Models(BaseModel):
    """The models that the asker's role may use."""

    models: list[Model]
    default: Annotated[Default, Field(description="For the asker")]
    default_for_all: Annotated[Default, Field(description="For those who have chosen none")]

    @classmethod
    def _fields(cls, found: model_list.Models) -> dict[str, Any]:
        return {
            "models": [Model.of(view) for view in found.models],
            "default": Default.model_validate(found.default),
            "default_for_all": Default.model_validate(found.default_for_all),
        }

    @classmethod
    def of(cls, found: model_list.Models) -> Models:
        """What is shown of the models."""
        return cls(**cls._fields(found))


class ModelChange(BaseModel):
    """What became of a model; `what` names what is another."""

    model_config = ConfigDict(from_attributes=True)

    model: str
    change: Literal["added", "removed", "changed"]
    what: list[str]


class SyncedModels(Models):
    """The models after all servers were asked anew, and what that has changed."""

    changes: list[ModelChange]

    @classmethod
    def after(cls, synced: model_list.Synced) -> SyncedModels:
        """What is shown of it."""
        changes = [ModelChange.model_validate(change) for change in synced.changes]
        return cls(**cls._fields(synced.found), changes=changes)


class ChosenModel(BaseModel):
    """A model's name or alias; null for no choice of one's own."""

    model: Annotated[str | None, Field(max_length=256)]


@router.get("/api/models")
async def list_models(user: CurrentUser, models: ModelsDep) -> Models:
    """The models that may be asked for, and how each is."""
    return Models.of(models.all(user))


@router.post("/api/models/sync")
async def sync_models(user: CurrentUser, models: ModelsDep) -> SyncedModels:
    """Asks all LLM servers anew what they serve, at most every two seconds."""
    return SyncedModels.after(await models.sync(user))


@router.put("/api/models/default")
async def choose_model(
    body: ChosenModel, user: CurrentUser, models: ModelsDep, defaults: DefaultsDep
) -> Default:
    """Chooses the model that answers the asker where a request names none."""
    await defaults.choose(user, body.model)
    return Default.model_validate(models.default(user))


@router.put("/api/admin/models/default")
async def choose_model_for_all(
    body: ChosenModel, user: CurrentUser, models: ModelsDep, defaults: DefaultsDep
) -> Default:
    """Chooses it for all who have chosen none; without a choice it is the model of LLM_MODEL."""
    await defaults.choose_for_all(user, body.model)
    return Default.model_validate(models.default_for_all(user))
