"""`/api/keys`: API keys of one's own."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter
from pydantic import AwareDatetime, BaseModel, Field

from app.dependencies import ApiKeysDep, CurrentUser
from app.hardening import StrictRoute
from app.routers.times import moment
from app.services.api_keys import ApiKey

router = APIRouter(prefix="/api/keys", tags=["keys"], route_class=StrictRoute)

Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]


class NewKey(BaseModel):
    """A key to make. Without `scopes` it may do all that a key of mine can."""

    name: Annotated[str, Field(min_length=1, max_length=100)]
    scopes: Annotated[list[str] | None, Field(max_length=50, description="Permissions")] = None
    project: Annotated[Name | None, Field(description="The only project it is good for")] = None
    device: Annotated[
        Name | None, Field(description="Makes it good in MQTT payloads of this device, and nowhere else")
    ] = None
    expires_at: Annotated[AwareDatetime | None, Field(lt=datetime(9999, 1, 1, tzinfo=UTC))] = None


class Key(BaseModel):
    """A key; `prefix` is how its secret begins."""

    id: str
    name: str
    prefix: str
    scopes: list[str]
    project: str | None
    device: str | None
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None

    @classmethod
    def of(cls, key: ApiKey) -> Key:
        """The body of a key."""
        return cls(
            id=key.id,
            name=key.name,
            prefix=key.prefix,
            scopes=list(key.scopes),
            project=key.project,
            device=key.device,
            created_at=moment(key.created_at),
            expires_at=moment(key.expires_at),
            last_used_at=moment(key.last_used_at),
        )


class MadeKey(Key):
    """A key that was made just now. `secret` is shown this once: only its hash is stored."""

    secret: str


class KeyList(BaseModel):
    """Keys, the newest first."""

    keys: list[Key]


@router.get("")
async def list_keys(user: CurrentUser, keys: ApiKeysDep) -> KeyList:
    """My keys that are not revoked."""
    return KeyList(keys=[Key.of(key) for key in await keys.mine(user)])


@router.post("", status_code=201)
async def make_key(body: NewKey, user: CurrentUser, keys: ApiKeysDep) -> MadeKey:
    """Makes a key. Its secret is in this answer and nowhere else."""
    key, secret = await keys.make(
        user,
        body.name,
        scopes=body.scopes,
        project=body.project,
        device=body.device,
        expires_at=None if body.expires_at is None else body.expires_at.timestamp(),
    )
    return MadeKey(**Key.of(key).model_dump(), secret=secret)


@router.delete("/{key_id}", status_code=204)
async def revoke_key(key_id: str, user: CurrentUser, keys: ApiKeysDep) -> None:
    """Makes a key worthless, at once and for ever."""
    await keys.revoke(user, key_id)
