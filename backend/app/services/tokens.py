"""Signed tokens: JWTs (RFC 7519) signed with HS256 and no other algorithm.

Every claim that is relied on is required to be there, which python-jose does not do by itself. A token
names the key that signed it (`kid`), so keys can be changed while tokens of the one before are still good.
"""

from __future__ import annotations

import hashlib
import time
from typing import Any, Literal

from jose import JWTError, jwt

from app.config import Settings
from app.errors import Unauthenticated
from app.events import new_id

ALGORITHM = "HS256"
ISSUER = "prompt-portal"
AUDIENCE = "prompt-portal"
REQUIRED_CLAIMS = ("exp", "sub", "iss", "aud", "jti")
LONGEST_TOKEN = 4096

Kind = Literal["access", "refresh"]


def sign(settings: Settings, kind: Kind, subject: str, seconds: float, **claims: Any) -> str:
    """A token for `subject` that is good for so many seconds."""
    now = int(time.time())
    all_claims = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": subject,
        "iat": now,
        "exp": now + int(seconds),
        "jti": new_id(),
        "typ": kind,
        **claims,
    }
    secret = settings.secret_key.get_secret_value()
    return jwt.encode(all_claims, secret, algorithm=ALGORITHM, headers={"kid": key_id(secret)})


def key_id(secret: str) -> str:
    """The public name of a key."""
    return hashlib.sha256(b"kid:" + secret.encode()).hexdigest()[:8]


def _secret_of(settings: Settings, token: str) -> str:
    """The key that the token says it was signed with, if it is one of ours."""
    keys = (settings.secret_key, *settings.secret_key_previous)
    by_id = {key_id(key.get_secret_value()): key.get_secret_value() for key in keys}
    return by_id[str(jwt.get_unverified_header(token).get("kid"))]


def verify(settings: Settings, kind: Kind, token: str) -> dict[str, Any]:
    """The claims of a token. Raises `Unauthenticated` when it is forged, of another kind, or has run
    out."""
    options = {f"require_{claim}": True for claim in REQUIRED_CLAIMS}
    if len(token) > LONGEST_TOKEN:
        raise Unauthenticated(f"This is no {kind} token.")
    try:
        claims: dict[str, Any] = jwt.decode(
            token,
            _secret_of(settings, token),
            algorithms=[ALGORITHM],
            audience=AUDIENCE,
            issuer=ISSUER,
            options=options,
        )
    except (
        JWTError,
        KeyError,
        ValueError,
        RecursionError,
    ):  # jose parses the header before it checks anything
        raise Unauthenticated(f"The {kind} token is wrong or has run out; sign in again.") from None
    if claims.get("typ") != kind:
        raise Unauthenticated(f"This is no {kind} token.")
    return claims
