"""Tokens that nobody was given: 401 over HTTP, `unauthenticated` over MQTT."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from jose import jwt

from app.events import new_id
from app.services.tokens import key_id
from tests.support import PASSWORD, SECRET, GameClient, Mosquitto, Portal, token_of

pytestmark = pytest.mark.slow

Claims = dict[str, Any]
Forge = Callable[[Claims], str]

KID = key_id(SECRET)


def signed(claims: Any, secret: str = SECRET, algorithm: str = "HS256", kid: Any = KID) -> str:
    return str(jwt.encode(claims, secret, algorithm=algorithm, headers={"kid": kid}))


def raw(header: Any, claims: Any, *, secret: str = SECRET) -> str:
    """A token with any header, and the signature that HS256 would give it."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    text = ".".join(_b64(part) for part in (head, json.dumps(claims).encode()))
    return f"{text}.{_b64(hmac.digest(secret.encode(), text.encode(), hashlib.sha256))}"


def unsigned(header: Any, claims: Any) -> str:
    return raw(header, claims).rsplit(".", 1)[0] + "."


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def without(name: str) -> Forge:
    return lambda claims: signed({key: value for key, value in claims.items() if key != name})


def altered(**changes: Any) -> Forge:
    return lambda claims: signed({**claims, **changes})


def _swapped(claims: Claims) -> str:
    """Another person's claims with one's own signature."""
    head, _, signature = signed(claims).split(".")
    return f"{head}.{_b64(json.dumps({**claims, 'sub': 'local'}).encode())}.{signature}"


def _rs256(claims: Claims) -> str:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return signed(claims, pem.decode(), "RS256")


OTHER_SECRET = "Zp4xW8sQ1nC6vB3mK9jH5gF2dT7rY0uE"

FORGERIES: dict[str, Forge] = {
    "no algorithm": lambda claims: unsigned({"alg": "none", "typ": "JWT", "kid": KID}, claims),
    "no algorithm, oddly spelled": lambda claims: unsigned({"alg": "nOnE", "kid": KID}, claims),
    "no algorithm, signed": lambda claims: raw({"alg": "none", "kid": KID}, claims),
    "an empty signature": lambda claims: unsigned({"alg": "HS256", "kid": KID}, claims),
    "HS512": lambda claims: signed(claims, algorithm="HS512"),
    "HS384": lambda claims: signed(claims, algorithm="HS384"),
    "RS256 with the secret for its key": lambda claims: raw({"alg": "RS256", "kid": KID}, claims),
    "RS256 with a key of one's own": _rs256,
    "another secret": lambda claims: signed(claims, OTHER_SECRET),
    "another secret and its name": lambda claims: signed(claims, OTHER_SECRET, kid=key_id(OTHER_SECRET)),
    "no key name": lambda claims: raw({"alg": "HS256"}, claims),
    "a path for a key name": lambda claims: signed(claims, kid="../../dev/null"),
    "a list for a key name": lambda claims: signed(claims, kid=[KID]),
    "an embedded key": lambda claims: raw(
        {"alg": "HS256", "jwk": {"kty": "oct", "k": _b64(OTHER_SECRET.encode())}}, claims, secret=OTHER_SECRET
    ),
    **{f"no {name}": without(name) for name in ("exp", "sub", "iss", "aud", "jti", "typ", "sid")},
    "another audience": altered(aud="somebody-else"),
    "another issuer": altered(iss="somebody-else"),
    "another type": altered(typ="JWT"),
    "a refresh token": altered(typ="refresh", gen=1),
    "run out": altered(exp=1_600_000_000),
    "running out some time": altered(exp="soon"),
    "good only later": altered(nbf=4_000_000_000),
    "another person": altered(sub="0" * 28),
    "a number for a person": altered(sub=1),
    "another sign-in": altered(sid="0" * 28),
    "claims that were swapped": _swapped,
    "claims that are a list": lambda _: raw({"alg": "HS256", "kid": KID}, ["sub", "local"]),
    "a header of 10,000 levels": lambda claims: raw(b"[" * 10_000 + b"]" * 10_000, claims),
    "a header of 2,900 levels": lambda claims: raw(b"[" * 2900, {}),
    "a header that is no text": lambda claims: raw(b"\xff\xfe", claims),
    "two parts": lambda claims: signed(claims).rsplit(".", 1)[0],
    "five parts": lambda claims: f"{signed(claims)}.e30.e30",
    "garbage": lambda _: "Ω" * 50,
    "dots": lambda _: "..",
    "65,536 characters": lambda _: "a" * 65_536,
    "an API key that is none": lambda _: "pp_" + "a" * 43,
}


@pytest.fixture(scope="module")
def claims(mallory: httpx.Client) -> Claims:
    """Those of a token that is good."""
    return dict(jwt.get_unverified_claims(token_of(mallory)))


@pytest.fixture(scope="module")
def game(target: Portal, mosquitto: Mosquitto) -> Iterator[GameClient]:
    client = GameClient(mosquitto.port, "siege/assistant_response/#")
    yield client
    client.close()


def over_http(target: Portal, token: str) -> httpx.Response:
    headers = {b"Authorization": b"Bearer " + token.encode()}
    return httpx.get(f"{target.url}/api/auth/me", headers=headers)


def over_mqtt(game: GameClient, token: str) -> dict[str, Any]:
    session = new_id()
    game.publish(f"siege/user_input/{session}", {"message": "hi", "format": "json", "token": token})
    return dict(json.loads(game.reply(f"siege/assistant_response/{session}")))


def test_the_same_claims_signed_rightly_are_good(target: Portal, game: GameClient, claims: Claims) -> None:
    assert over_http(target, signed(claims)).json()["username"] == "mallory"
    assert over_mqtt(game, signed(claims))["type"] == "final"


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES.keys())
def test_a_forged_token_opens_no_door(target: Portal, game: GameClient, claims: Claims, forge: Forge) -> None:
    token = forge({**claims, "exp": int(time.time()) + 600})
    answer = over_http(target, token)
    # Where the server itself refuses a header that is too long, it is as good.
    assert answer.status_code == 401 or (len(token) > 60_000 and answer.status_code in {400, 431})
    if answer.status_code == 401:
        assert answer.json()["error"]["code"] == "unauthenticated"
    assert over_mqtt(game, token)["error"]["code"] == "unauthenticated"


def test_an_access_token_renews_nothing_and_a_refresh_token_reads_nothing(target: Portal) -> None:
    with target.client("trudy") as client:
        form = {"username": "trudy", "password": PASSWORD}
        given = client.post("/api/auth/token", data=form).json()
        renewal = {"grant_type": "refresh_token", "refresh_token": given["access_token"]}
        assert client.post("/api/auth/token", data=renewal).status_code == 401
        assert over_http(target, given["refresh_token"]).status_code == 401
        assert over_http(target, given["access_token"]).status_code == 200
