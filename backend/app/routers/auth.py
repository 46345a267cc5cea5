"""`/api/auth`: accounts, and signing in and out."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Cookie, Form, Request, Response
from pydantic import BaseModel, EmailStr, Field, model_validator

from app.dependencies import AccountsDep, CurrentUser
from app.errors import Unauthenticated
from app.services.accounts import Identity, Tokens

router = APIRouter(prefix="/api/auth", tags=["auth"])

COOKIE = "portal_refresh"
COOKIE_PATH = "/api/auth"

RefreshCookie = Annotated[str, Cookie(alias=COOKIE, description="The refresh token")]


class Registration(BaseModel):
    """A new account."""

    username: Annotated[str, Field(min_length=2, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
    email: EmailStr
    password: Annotated[str, Field(min_length=8, max_length=256)]


class Login(BaseModel):
    """The username or the email address, and the password."""

    username: Annotated[str, Field(min_length=1, max_length=254, description="Username or email")]
    password: Annotated[str, Field(min_length=1, max_length=256)]


class TokenForm(BaseModel):
    """A request to an OAuth2 token endpoint (RFC 6749, sections 4.3.2 and 6)."""

    grant_type: Literal["password", "refresh_token"] = "password"
    username: Annotated[str, Field(max_length=254, description="Username or email")] = ""
    password: Annotated[str, Field(max_length=256)] = ""
    refresh_token: str = ""

    @model_validator(mode="after")
    def _whole(self) -> TokenForm:
        needed = ("username", "password") if self.grant_type == "password" else ("refresh_token",)
        missing = [name for name in needed if not getattr(self, name)]
        if missing:
            raise ValueError(f"grant_type {self.grant_type} needs {' and '.join(missing)}")
        return self


class AccessToken(BaseModel):
    """An access token; `expires_in` in seconds."""

    access_token: str
    token_type: Literal["bearer"] = "bearer"  # noqa: S105 - its name in OAuth2
    expires_in: int

    @classmethod
    def of(cls, tokens: Tokens) -> AccessToken:
        """The part of a sign-in's tokens that scripts of a page may see."""
        return cls(access_token=tokens.access_token, expires_in=tokens.expires_in)


class OAuth2Token(AccessToken):
    """The answer of an OAuth2 token endpoint (RFC 6749, section 5.1)."""

    refresh_token: str


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
async def login(body: Login, request: Request, response: Response, accounts: AccountsDep) -> AccessToken:
    """Signs in with a username or an email address. The refresh token comes as a cookie that no script
    can read; programs without cookies sign in at `/api/auth/token`."""
    tokens = await accounts.sign_in(body.username, body.password, _user_agent(request))
    _keep(request, response, tokens)
    return AccessToken.of(tokens)


@router.post("/token")
async def token(request: Request, form: Annotated[TokenForm, Form()], accounts: AccountsDep) -> OAuth2Token:
    """OAuth2's token endpoint: with `username` and `password`, or with `grant_type=refresh_token` and
    `refresh_token`, which is used up by that."""
    if form.grant_type == "refresh_token":
        tokens = await accounts.renew(form.refresh_token)
    else:
        tokens = await accounts.sign_in(form.username, form.password, _user_agent(request))
    return OAuth2Token(
        access_token=tokens.access_token, expires_in=tokens.expires_in, refresh_token=tokens.refresh_token
    )


@router.post("/refresh")
async def refresh(
    request: Request, response: Response, accounts: AccountsDep, refresh_token: RefreshCookie = ""
) -> AccessToken:
    """A new access token for whoever has the cookie of a sign-in; the cookie is renewed."""
    if not refresh_token:
        raise Unauthenticated("Nobody is signed in here.")
    tokens = await accounts.renew(refresh_token)
    _keep(request, response, tokens)
    return AccessToken.of(tokens)


@router.post("/logout", status_code=204)
async def logout(response: Response, accounts: AccountsDep, refresh_token: RefreshCookie = "") -> None:
    """Ends the sign-in of the cookie; its access tokens are no longer good."""
    await accounts.sign_out(refresh_token)
    response.delete_cookie(COOKIE, path=COOKIE_PATH, httponly=True, samesite="strict")


@router.get("/me")
async def me(identity: CurrentUser) -> Account:
    """Who I am."""
    return Account.of(identity)


def _keep(request: Request, response: Response, tokens: Tokens) -> None:
    """Gives the refresh token to the browser: for this site's own requests to `/api/auth` only."""
    response.set_cookie(
        COOKIE,
        tokens.refresh_token,
        max_age=tokens.refresh_expires_in,
        path=COOKIE_PATH,
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )


def _user_agent(request: Request) -> str:
    return request.headers.get("user-agent", "")
