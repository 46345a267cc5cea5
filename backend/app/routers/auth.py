"""`/api/auth`: accounts and access tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends
from fastapi.security import OAuth2PasswordRequestForm
from pydantic import BaseModel, EmailStr, Field

from app.dependencies import AccountsDep, CurrentUser
from app.services.accounts import Accounts, Identity

router = APIRouter(prefix="/api/auth", tags=["auth"])


class Registration(BaseModel):
    """A new account."""

    username: Annotated[str, Field(min_length=2, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
    email: EmailStr
    password: Annotated[str, Field(min_length=8, max_length=256)]


class Login(BaseModel):
    """The username or the email address, and the password."""

    username: Annotated[str, Field(min_length=1, max_length=254, description="Username or email")]
    password: Annotated[str, Field(min_length=1, max_length=256)]


class AccessToken(BaseModel):
    """An access token; `expires_in` in seconds."""

    access_token: str
    token_type: Literal["bearer"] = "bearer"  # noqa: S105 - its name in OAuth2
    expires_in: int


class Account(BaseModel):
    """Who is signed in."""

    id: str
    username: str
    email: str
    is_admin: bool
    created_at: float

    @classmethod
    def of(cls, identity: Identity) -> Account:
        """The account of an identity."""
        return cls(
            id=identity.owner.removeprefix("user:"),
            username=identity.username,
            email=identity.email,
            is_admin=identity.is_admin,
            created_at=identity.created_at,
        )


@router.post("/register", status_code=201)
async def register(body: Registration, accounts: AccountsDep) -> Account:
    """Makes an account. The first one made is an admin's."""
    return Account.of(await accounts.register(body.username, body.email, body.password))


@router.post("/login")
async def login(body: Login, accounts: AccountsDep) -> AccessToken:
    """Signs in with a username or an email address."""
    return await _sign_in(accounts, body.username, body.password)


@router.post("/token")
async def token(form: Annotated[OAuth2PasswordRequestForm, Depends()], accounts: AccountsDep) -> AccessToken:
    """Signs in with an OAuth2 password form."""
    return await _sign_in(accounts, form.username, form.password)


@router.get("/me")
async def me(identity: CurrentUser) -> Account:
    """Who I am."""
    return Account.of(identity)


async def _sign_in(accounts: Accounts, name: str, password: str) -> AccessToken:
    access_token = await accounts.login(name, password)
    return AccessToken(access_token=access_token, expires_in=accounts.token_seconds)
