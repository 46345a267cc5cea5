"""Proves a running stack: one chat over HTTP, one over MQTT, each with the model's real answer."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import msgspec

from app.cli.console import Failure, Step, done
from app.cli.stack import HOST, Stack
from app.config import Settings
from app.events import new_id
from app.mqtt.connection import request_once
from app.mqtt.contract import ASSISTANT_RESPONSE, USER_INPUT
from app.services.accounts import operator_token

SESSION = "setup-check"
QUESTION = "Say hello in one short sentence."
MAX_TOKENS = 24
TIMEOUT_S = 120.0


def prove(stack: Stack, settings: Settings) -> None:
    """Chats over each protocol that the stack serves. Raises `Failure`."""
    token = operator_token(settings)
    _show("HTTP", lambda: _over_http(stack, token))
    if stack.broker_address:
        _show("MQTT", lambda: _over_mqtt(stack, settings, token))
    _ask_http(stack, token, "DELETE", f"/api/llm/chat/session/{SESSION}", None)


def _show(protocol: str, ask: Callable[[], str]) -> None:
    with Step(f"Asking the model over {protocol}") as step:
        began = time.monotonic()
        try:
            reply = ask()
        except (OSError, KeyError, ValueError, msgspec.MsgspecError) as error:
            raise Failure(f"No answer over {protocol}: {error}", "See `logs`.") from None
        seconds = time.monotonic() - began
        step.tell()
    done(f"{protocol}: “{' '.join(reply.split())[:80]}” [dim]({seconds:.1f} s)[/dim]")


def _over_http(stack: Stack, token: str) -> str:
    body = {"session_id": SESSION, "message": QUESTION, "max_tokens": MAX_TOKENS, "request_id": new_id()}
    return str(_ask_http(stack, token, "POST", "/api/llm/chat/session", body)["response"])


def _ask_http(stack: Stack, token: str, method: str, path: str, body: dict[str, Any] | None) -> Any:
    request = urllib.request.Request(
        f"http://{HOST}:{stack.port}{path}",
        method=method,
        data=None if body is None else msgspec.json.encode(body),
        headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:  # noqa: S310
            return msgspec.json.decode(response.read())
    except urllib.error.HTTPError as error:
        raise OSError(msgspec.json.decode(error.read())["detail"]) from None


def _over_mqtt(stack: Stack, settings: Settings, token: str) -> str:
    project = settings.mqtt_projects[0]
    body = {
        "message": QUESTION,
        "requestId": new_id(),
        "maxTokens": MAX_TOKENS,
        "format": "json",
        "token": token,
    }
    reply = msgspec.json.decode(
        request_once(
            stack.broker_address,
            f"{project}/{USER_INPUT}/{SESSION}",
            f"{project}/{ASSISTANT_RESPONSE}/{SESSION}",
            msgspec.json.encode(body),
            timeout=TIMEOUT_S,
            username=settings.mqtt_username,
            password=settings.mqtt_password.get_secret_value(),
        )
    )
    if reply.get("type") != "final":
        raise OSError(reply["error"]["message"])
    return str(reply["response"])
