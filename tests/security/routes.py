"""Every route of the portal, with what it takes and the permission it needs: what the tests of access are
made from. A route that is not here fails them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

PUBLIC = ""
SIGNED_IN = "signed in"


@dataclass(frozen=True)
class Route:
    """What to send, and the permission that is needed; `fresh` routes end the
    caller's sign-in."""

    needs: str
    body: Mapping[str, Any] | None = None
    form: Mapping[str, Any] | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    fresh: bool = False


CHAT = {"messages": [{"role": "user", "content": "hi"}]}
IN_SESSION = {"session_id": "{session_id}", "message": "hi"}
TEMPLATE = {"title": "T", "content": "Hello"}
ACCOUNT = {"username": "x", "email": "x@example.org", "password": "short"}

ROUTES: dict[str, Route] = {
    "POST /api/auth/register": Route(PUBLIC, ACCOUNT),
    "POST /api/auth/login": Route(PUBLIC, {"username": "nobody", "password": "x"}),
    "POST /api/auth/token": Route(PUBLIC, form={"username": "nobody", "password": "x"}),
    "POST /api/auth/refresh": Route(PUBLIC),
    "POST /api/auth/logout": Route(PUBLIC),
    "POST /api/auth/password-reset": Route(PUBLIC, {"link": "x", "new_password": "long enough"}),
    "GET /api/auth/me": Route(SIGNED_IN),
    "GET /api/auth/permissions": Route(SIGNED_IN),
    "POST /api/auth/ws-ticket": Route(SIGNED_IN),
    "PUT /api/auth/password": Route(
        "account:write", {"current_password": "correct horse", "new_password": "correct horse"}
    ),
    "GET /api/auth/sign-ins": Route("account:write"),
    "DELETE /api/auth/sign-ins": Route("account:write", fresh=True),
    "DELETE /api/auth/sign-ins/{sign_in_id}": Route("account:write"),
    "POST /api/llm/chat": Route("chat:use", CHAT),
    "POST /api/llm/chat/stream": Route("chat:use", CHAT),
    "POST /api/llm/chat/session": Route("chat:use", IN_SESSION),
    "POST /api/llm/chat/session/stream": Route("chat:use", IN_SESSION),
    "GET /api/llm/turns/{turn_id}/events": Route("sessions:read"),
    "GET /api/llm/chat/session/{session_id}/history": Route("sessions:read"),
    "DELETE /api/llm/chat/session/{session_id}": Route("chat:use"),
    "POST /api/llm/chat/session/{session_id}/stop": Route("chat:use"),
    "POST /api/llm/chat/session/{session_id}/regenerate": Route("chat:use", {}),
    "GET /api/llm/health": Route(PUBLIC),
    "POST /v1/chat/completions": Route("chat:use", CHAT),
    "POST /v1/embeddings": Route("chat:use", {"input": "hi"}),
    "GET /v1/models": Route(SIGNED_IN),
    "GET /v1/models/{model}": Route(SIGNED_IN),
    "POST /v1/responses": Route("chat:use", {"input": "hi", "conversation": "{session_id}"}),
    "GET /v1/responses/{response_id}": Route("sessions:read"),
    "DELETE /v1/responses/{response_id}": Route("sessions:write"),
    "GET /api/sessions": Route("sessions:read"),
    "GET /api/sessions/{session_id}": Route("sessions:read"),
    "GET /api/sessions/{session_id}/branches": Route("sessions:read"),
    "POST /api/sessions/{session_id}/messages/{message_id}/choose": Route("sessions:write"),
    "PATCH /api/sessions/{session_id}": Route("sessions:write", {"title": "T"}),
    "DELETE /api/sessions/{session_id}": Route("sessions:write"),
    "POST /api/sessions/{session_id}/restore": Route("sessions:write"),
    "GET /api/sessions/{session_id}/key": Route("sessions:read"),
    "PUT /api/sessions/{session_id}/key": Route("sessions:write", {"provider": "p", "key": "k"}),
    "DELETE /api/sessions/{session_id}/key": Route("sessions:write"),
    "POST /api/sessions/{session_id}/messages/{message_id}/pin": Route("sessions:write"),
    "DELETE /api/sessions/{session_id}/messages/{message_id}/pin": Route("sessions:write"),
    "GET /api/templates": Route("templates:read"),
    "POST /api/templates": Route("templates:write", TEMPLATE),
    "POST /api/templates/preview": Route("templates:read", {"content": "Hello"}),
    "GET /api/templates/{template_id}": Route("templates:read"),
    "PUT /api/templates/{template_id}": Route("templates:write", TEMPLATE),
    "DELETE /api/templates/{template_id}": Route("templates:write"),
    "POST /api/templates/{template_id}/restore": Route("templates:write"),
    "GET /api/templates/{template_id}/versions": Route("templates:read"),
    "GET /api/templates/{template_id}/versions/{version}": Route("templates:read"),
    "POST /api/templates/{template_id}/render": Route("templates:read", {"variables": {}}),
    "GET /api/keys": Route("keys:write"),
    "POST /api/keys": Route("keys:write", {"name": "k"}),
    "DELETE /api/keys/{key_id}": Route("keys:write"),
    "GET /api/stats": Route("usage:read"),
    "POST /api/mqtt/publish_state": Route("chat:use", {"session_id": "{session_id}", "state": {"x": 1}}),
    "POST /api/mqtt/publish_template": Route(
        "sessions:write", {"session_id": "{session_id}", "template": "Be kind.", "reset": False}
    ),
    "GET /api/mqtt/last_hint": Route("sessions:read", params={"session_id": "{session_id}"}),
    "GET /api/mqtt/status": Route(SIGNED_IN),
    "GET /api/admin/users": Route("users:read"),
    "PATCH /api/admin/users/{user_id}": Route("users:write", {}),
    "POST /api/admin/users/{user_id}/password-reset": Route("users:write"),
    "DELETE /api/admin/users/{user_id}/sign-ins": Route("users:write"),
    "GET /api/admin/users/{user_id}/keys": Route("users:read"),
    "DELETE /api/admin/users/{user_id}/keys/{key_id}": Route("users:write"),
    "GET /api/admin/invitations": Route("users:read"),
    "POST /api/admin/invitations": Route("users:write", {"role": "player"}),
    "DELETE /api/admin/invitations/{link_id}": Route("users:write"),
    "GET /api/admin/roles": Route("users:read"),
    "PUT /api/admin/roles/{name}": Route("roles:write", {"permissions": []}),
    "DELETE /api/admin/roles/{name}": Route("roles:write"),
    "GET /api/admin/limits": Route("usage:read-all"),
    "PUT /api/admin/limits/{subject}": Route("roles:write", {}),
    "DELETE /api/admin/limits/{subject}": Route("roles:write"),
    "GET /api/admin/usage": Route("usage:read-all"),
    "GET /api/admin/alerts": Route("usage:read-all"),
    "GET /api/admin/devices": Route("devices:read"),
    "POST /api/admin/devices": Route("devices:write", {"name": "cab-7", "projects": ["maze"]}),
    "DELETE /api/admin/devices/{name}": Route("devices:write"),
    "POST /api/admin/devices/{name}/password": Route("devices:write"),
    "GET /metrics": Route("metrics:read"),
    "GET /api/admin/servers": Route("servers:read"),
    "POST /api/admin/servers/{name}/drain": Route("servers:write"),
    "POST /api/admin/servers/{name}/undrain": Route("servers:write"),
    "GET /api/models": Route(SIGNED_IN),
    "POST /api/models/sync": Route("models:write"),
    "PUT /api/models/default": Route("chat:use", {"model": None}),
    "PUT /api/admin/models/default": Route("models:write", {"model": None}),
    "GET /api/admin/audit": Route("audit:read"),
    "GET /api/admin/audit/export": Route("audit:read"),
    "GET /api/admin/audit/verify": Route("audit:read"),
    "GET /health/live": Route(PUBLIC),
    "GET /health/ready": Route(PUBLIC),
}

TOPICS: dict[str, tuple[str, dict[str, Any]]] = {
    "user_input/{session_id}": ("chat:use", {"message": "hi"}),
    "state/{session_id}": ("chat:use", {"x": 1}),
    "cancel/{session_id}": ("chat:use", {}),
    "clear_history/{session_id}": ("chat:use", {}),
    "delete_session/{session_id}": ("sessions:write", {}),
    "template/{session_id}": ("sessions:write", {"template": "Be kind."}),
    "template": ("projects:write", {"template": "Be kind.", "reset": False}),
    "clear_history": ("projects:clear", {"target": "all"}),
}
"""Every request topic of a project, with the permission that it needs and what it takes."""

NOBODYS = {
    "session_id": "nobodys",
    "turn_id": "nobodys",
    "response_id": "resp_nobodys",
    "model": "nobodys",
    "message_id": "nobodys",
    "template_id": "nobodys",
    "version": "1",
    "sign_in_id": "nobodys",
    "key_id": "nobodys",
    "user_id": "nobodys",
    "link_id": "nobodys",
    "name": "nobodys",
    "subject": "project:nobodys",
}
"""A value for each parameter of a path, with which nothing is found."""


OPENAI_CODES = {"unauthenticated": "invalid_api_key", "not_found": "model_not_found"}
"""Codes that are others below `/v1`."""


def problem(answer: httpx.Response) -> tuple[int, str, str]:
    """Status, code and message of an error, in the form that its route has."""
    error = answer.json()["error"]
    if answer.request.url.path.startswith("/v1/"):
        assert set(error) == {"message", "type", "param", "code"}
        codes = {own: code for code, own in OPENAI_CODES.items()}
        return answer.status_code, codes.get(error["code"], error["code"]), error["message"]
    assert answer.json()["detail"] == error["message"]
    return answer.status_code, error["code"], error["message"]


def operations(document: Mapping[str, Any]) -> Iterator[str]:
    """The routes of an OpenAPI document, as they are called here."""
    for path, methods in document["paths"].items():
        for method in methods:
            yield f"{method.upper()} {path}"


def call(client: httpx.Client, name: str, ids: Mapping[str, str] = NOBODYS) -> httpx.Response:
    """Calls a route with what it takes."""
    route = ROUTES[name]
    method, path = _filled(name, ids).split(" ", 1)
    body = None if route.body is None else _filled_body(route.body, ids)
    headers = {"X-Request-ID": "test"}
    return client.request(
        method, path, json=body, data=route.form, params=_filled_body(route.params, ids), headers=headers
    )


def _filled(text: str, ids: Mapping[str, str]) -> str:
    return re.sub(r"{(\w+)}", lambda found: ids[found[1]], text)


def _filled_body(body: Mapping[str, Any], ids: Mapping[str, str]) -> dict[str, Any]:
    return {name: _filled(value, ids) if isinstance(value, str) else value for name, value in body.items()}
