"""Proves a running stack: one chat over HTTP, one over MQTT, each with the model's real answer."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec

from app.cli.console import Failure, Step, done
from app.cli.parts import PROBE_TIMEOUT_S, answers, fetch
from app.cli.stack import HOST, Stack
from app.config import Settings
from app.events import new_id
from app.mqtt.connection import Broker, request_once
from app.mqtt.topics import ASSISTANT_RESPONSE
from app.services.accounts import operator_token

SESSION = "setup-check"
QUESTION = "Say hello in one short sentence."
MAX_TOKENS = 24
TIMEOUT_S = 120.0
READY_S = 20.0
POLL_S = 0.05


def prove(stack: Stack, settings: Settings) -> None:
    """Chats over each protocol that the stack serves. Raises `Failure`."""
    _await_ready(stack)
    token = operator_token(settings)
    _show("HTTP", lambda: _over_http(stack, token))
    if stack.broker_address:
        _show("MQTT", lambda: _over_mqtt(stack, settings, token))
    _ask_http(stack, token, "DELETE", f"/api/llm/chat/session/{SESSION}", None)


def _await_ready(stack: Stack) -> None:
    """Waits until the portal can serve. Raises `Failure` naming what it still lacks after a while."""
    url = f"http://{HOST}:{stack.port}/health/ready"
    deadline = time.monotonic() + READY_S
    with Step("Waiting for the portal to be ready") as step:
        while not answers(url):
            if time.monotonic() > deadline:
                raise Failure(
                    f"It runs, but cannot serve yet: {_lacks(url)}.",
                    f"The LLM server is {stack.llm_address}, the broker {stack.broker_address or 'none'}.",
                    "The portal goes on looking, and serves as soon as they are there.",
                )
            time.sleep(POLL_S)
            step.tell()


def _lacks(url: str) -> str:
    try:
        fetch(url, PROBE_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        parts: dict[str, str] = msgspec.json.decode(error.read())
        del parts["status"]
        return ", ".join(f"{name} is {state}" for name, state in parts.items() if state not in {"ok", "off"})
    except OSError as error:
        return str(error)
    return "it was ready just now"


def _show(protocol: str, ask: Callable[[], str]) -> None:
    with Step(f"Asking the model over {protocol}") as step:
        began = time.monotonic()
        try:
            reply = ask()
        except (OSError, KeyError, ValueError, msgspec.MsgspecError) as error:
            raise Failure(f"No answer over {protocol}: {error}", "See `logs`.") from None
        seconds = time.monotonic() - began
        step.tell()
    done(f"{protocol}: “{' '.join(reply.split())[:80]}”", f"({seconds:.1f} s)")


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
        return msgspec.json.decode(fetch(request, TIMEOUT_S))
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
            replace(Broker.of(settings), url=stack.broker_address),
            f"{project}/user_input/{SESSION}",
            f"{project}/{ASSISTANT_RESPONSE}/{SESSION}",
            msgspec.json.encode(body),
            timeout=TIMEOUT_S,
        )
    )
    if reply.get("type") != "final":
        raise OSError(reply["error"]["message"])
    return str(reply["response"])
