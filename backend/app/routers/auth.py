"""`/api/auth`: accounts, and signing in and out."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, TypedDict

from fastapi import APIRouter, Cookie, Form, Request, Response
from pydantic import BaseModel, EmailStr, Field, model_validator

from app.access import PERMISSIONS, Identity, Limits, bearer_token
from app.dependencies import AccountsDep, AdmissionDep, CurrentUser, SignInsDep, TicketsDep
from app.errors import Unauthenticated
from app.hardening import StrictRoute
from app.routers.times import moment
from app.services.sign_ins import SignIn, Tokens
from app.services.tickets import GOOD_S

router = APIRouter(prefix="/api/auth", tags=["auth"], route_class=StrictRoute)

COOKIE = "portal_refresh"
COOKIE_PATH = "/api/auth"

RefreshCookie = Annotated[str, Cookie(alias=COOKIE, description="The refresh token")]


class Registration(BaseModel):
    """A new account."""

    username: Annotated[str, Field(min_length=2, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
    email: EmailStr
    password: Annotated[str, Field(min_length=8, max_length=256)]
    invitation: Annotated[str | None, Field(max_length=200, description="What an admin's link ends with")] = (
        None
    )


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


class Ticket(BaseModel):
    """Opens one WebSocket. `expires_in` in seconds."""

    ticket: str
    expires_in: int


class PasswordChange(BaseModel):
    """Another password for my account."""

    current_password: Annotated[str, Field(min_length=1, max_length=256)]
    new_password: Annotated[str, Field(min_length=8, max_length=256)]


class PasswordReset(BaseModel):
    """A new password, with an admin's link."""

    link: Annotated[str, Field(min_length=1, max_length=200, description="What the link ends with")]
    new_password: Annotated[str, Field(min_length=8, max_length=256)]


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
    role: str
    created_at: datetime

    @classmethod
    def of(cls, identity: Identity) -> Account:
        """The account of an identity."""
        return cls(
            id=identity.user or identity.owner,
            username=identity.username,
            email=identity.email,
            role=identity.role_name,
            created_at=moment(identity.created_at),
        )


class PermissionBody(BaseModel):
    """Something that can be allowed."""

    name: str
    description: str
    allowed: bool


class Permissions(BaseModel):
    """What I may. `limits` are those that hold for me; null or 0 is none."""

    role: str
    description: str
    permissions: list[PermissionBody]
    models: list[str]
    tools: list[str]
    limits: Limits


class SignInBody(BaseModel):
    """A sign-in; `current` is the one that asks."""

    id: str
    user_agent: str
    created_at: datetime
    last_used_at: datetime
    current: bool

    @classmethod
    def of(cls, sign_in: SignIn, who: Identity) -> SignInBody:
        """The body of a sign-in."""
        return cls(
            id=sign_in.id,
            user_agent=sign_in.user_agent,
            created_at=moment(sign_in.created_at),
            last_used_at=moment(sign_in.renewed_at),
            current=sign_in.id == who.sign_in,
        )


class SignInList(BaseModel):
    """Sign-ins."""

    sign_ins: list[SignInBody]


@router.post("/register", status_code=201)
async def register(body: Registration, request: Request, accounts: AccountsDep) -> Account:
    """Makes an account, with an invitation where one is needed."""
    identity = await accounts.register(
        body.username,
        body.email,
        body.password,
        invitation=body.invitation,
        address=_caller(request)["address"],
    )
    return Account.of(identity)


@router.post("/login")
async def login(body: Login, request: Request, response: Response, accounts: AccountsDep) -> AccessToken:
    """Signs in with a username or an email address. The refresh token comes as a cookie that no script
    can read; programs without cookies sign in at `/api/auth/token`."""
    tokens = await accounts.sign_in(body.username, body.password, **_caller(request))
    _keep(request, response, tokens)
    return AccessToken.of(tokens)


@router.post("/token")
async def token(
    request: Request, form: Annotated[TokenForm, Form()], accounts: AccountsDep, sign_ins: SignInsDep
) -> OAuth2Token:
    """OAuth2's token endpoint: with `username` and `password`, or with `grant_type=refresh_token` and
    `refresh_token`, which is used up by that."""
    if form.grant_type == "refresh_token":
        tokens = await sign_ins.renew(form.refresh_token)
    else:
        tokens = await accounts.sign_in(form.username, form.password, **_caller(request))
    return OAuth2Token(
        access_token=tokens.access_token, expires_in=tokens.expires_in, refresh_token=tokens.refresh_token
    )


@router.post("/refresh")
async def refresh(
    request: Request, response: Response, sign_ins: SignInsDep, refresh_token: RefreshCookie = ""
) -> AccessToken:
    """A new access token for whoever has the cookie of a sign-in; the cookie is renewed."""
    if not refresh_token:
        raise Unauthenticated("Nobody is signed in here.")
    tokens = await sign_ins.renew(refresh_token)
    _keep(request, response, tokens)
    return AccessToken.of(tokens)


@router.post("/logout", status_code=204)
async def logout(response: Response, sign_ins: SignInsDep, refresh_token: RefreshCookie = "") -> None:
    """Ends the sign-in of the cookie; its access tokens are no longer good."""
    await sign_ins.end_by_token(refresh_token)
    response.delete_cookie(COOKIE, path=COOKIE_PATH, httponly=True, samesite="strict")


@router.get("/me")
async def me(identity: CurrentUser) -> Account:
    """Who I am."""
    return Account.of(identity)


@router.put("/password", status_code=204)
async def change_password(
    body: PasswordChange, request: Request, identity: CurrentUser, accounts: AccountsDep
) -> None:
    """Changes my password, and ends all my sign-ins but this one."""
    address = _caller(request)["address"]
    await accounts.change_password(identity, body.current_password, body.new_password, address=address)


@router.post("/password-reset", status_code=204)
async def reset_password(body: PasswordReset, request: Request, accounts: AccountsDep) -> None:
    """Sets a new password with the link that an admin has made; all sign-ins of the account end."""
    await accounts.reset_password(body.link, body.new_password, address=_caller(request)["address"])


@router.post("/ws-ticket")
async def ws_ticket(request: Request, _identity: CurrentUser, tickets: TicketsDep) -> Ticket:
    """A ticket that opens one WebSocket (`?ticket=`), once, in the next seconds: for who cannot send a
    header, and must not write a token into an address."""
    token = bearer_token(request.headers.get("Authorization"))
    return Ticket(ticket=await tickets.issue(token), expires_in=GOOD_S)


@router.get("/permissions")
async def permissions(identity: CurrentUser, admission: AdmissionDep) -> Permissions:
    """What I may do here, and how much."""
    role = identity.role
    return Permissions(
        role=identity.role_name,
        description=role.description,
        permissions=[
            PermissionBody(name=name, description=text, allowed=identity.may(name))
            for name, text in PERMISSIONS.items()
        ],
        models=list(role.models),
        tools=list(role.tools),
        limits=admission.limits_of(identity),
    )


@router.get("/sign-ins")
async def list_sign_ins(identity: CurrentUser, sign_ins: SignInsDep) -> SignInList:
    """Where I am signed in, the newest first."""
    found = await sign_ins.open_ones(identity)
    return SignInList(sign_ins=[SignInBody.of(one, identity) for one in found])


@router.delete("/sign-ins", status_code=204)
async def end_sign_ins(identity: CurrentUser, sign_ins: SignInsDep) -> None:
    """Signs me out everywhere, here too."""
    await sign_ins.end_all(identity)


@router.delete("/sign-ins/{sign_in_id}", status_code=204)
async def end_sign_in(sign_in_id: str, identity: CurrentUser, sign_ins: SignInsDep) -> None:
    """Signs me out in one place."""
    await sign_ins.end(identity, sign_in_id)


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


class _Caller(TypedDict):
    address: str
    user_agent: str


def _caller(request: Request) -> _Caller:
    """Where a request comes from. Behind proxies the server has put their client's address there."""
    address = request.client.host if request.client else ""
    return {"address": address, "user_agent": request.headers.get("user-agent", "")}
