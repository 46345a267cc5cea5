"""The web app: routers, errors, and the long-lived objects for as long as it runs."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from app import __version__
from app.config import Settings
from app.container import open_container
from app.errors import (
    BY_CODE,
    Internal,
    InvalidRequest,
    PortalError,
    http_body,
    may_try_again,
    openai_body,
    openai_status,
    quota_headers,
)
from app.events import TurnEvent
from app.hardening import BoundedBodies, SecurityHeaders
from app.logs import get_logger
from app.mqtt import asyncapi
from app.options import problem_in
from app.routers import (
    admin,
    auth,
    devices,
    health,
    keys,
    llm,
    metrics,
    models,
    mqtt,
    openai,
    openai_responses,
    page,
    servers,
    session_list,
    sessions,
    stats,
    templates,
    websocket,
)

log = get_logger(__name__)

DESCRIPTION = """
One session-based chat with a local LLM, the same over HTTP and MQTT.

Sign in with `POST /api/auth/login` and send the token, or an API key, as `Authorization: Bearer`. Every
error has the body `{"error": {"code", "message", "request_id", "details"?}, "detail": message}`.
"""


EXPOSED = (
    *("X-Request-ID", "Retry-After", "RateLimit", "RateLimit-Policy"),
    *("X-Session-Id", "X-Turn-Id", "X-Should-Retry"),
)
"""The headers that pages of CORS_ORIGINS may read."""


class _App(FastAPI):
    """FastAPI, with security headers also on what its own error handling answers."""

    def build_middleware_stack(self) -> ASGIApp:
        return SecurityHeaders(super().build_middleware_stack())


def create_app(settings: Settings) -> FastAPI:
    """The portal as an ASGI app. Its lifespan opens and closes everything else."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_container(settings) as container:
            app.state.container = container
            if not await container.people.has_admin():
                log.warning(
                    "nobody is an admin yet: `./setup_llm.sh invite --role admin` makes a link for one"
                )
            yield

    app = _App(
        title="Prompt Portal",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # a page of its own, like the portal's, instead of scripts from elsewhere
        redoc_url=None,
        # Asked for at every request, and of no use while nothing is configured to receive it.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    # Routes are looked for in this order, so the busiest come first. Those of a router that is included are
    # looked for twice at every request.
    busy = (llm, websocket, openai, openai_responses, auth, sessions, templates)
    for part in (*busy, session_list, keys, stats, mqtt, admin, devices, servers, models, health, metrics):
        app.router.routes.extend(part.router.routes)
    app.router.default = page.serve_page
    _add_error_handlers(app)
    app.add_middleware(BoundedBodies, most=settings.max_request_bytes, render=render)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=[*EXPOSED],
        )
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    _add_asyncapi(app, settings)
    return app


# --- errors --------------------------------------------------------------------------------------

_BY_STATUS = {error.status: error for error in reversed(BY_CODE.values())}


def _add_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(PortalError, _on_portal_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_defect)


def render(request: Request, error: PortalError) -> JSONResponse:
    """The answer for an error, below `/v1` in OpenAI's form."""
    request_id = request.scope["request_id"]
    headers = dict(quota_headers(error.quotas))
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    elif error.status in {429, 503}:
        headers["Retry-After"] = "1"
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    container = getattr(request.app.state, "container", None)
    if container is not None:
        container.tally.refuse("http", error.code)
    level = log.warning if error.status >= 500 else log.info
    level("request refused", code=error.code, status=error.status, path=request.url.path)
    if not _is_openai(request):
        return JSONResponse(http_body(error, request_id), error.status, headers)
    headers["X-Should-Retry"] = str(may_try_again(error)).lower()
    return JSONResponse(openai_body(error), openai_status(error), headers)


def _is_openai(request: Request) -> bool:
    return request.url.path.startswith("/v1/")


async def _on_portal_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PortalError)
    return render(request, error)


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = [_problem(found, error.body) for found in error.errors()]
    not_json = any(found["type"] == "json_invalid" for found in error.errors())
    message = "; ".join(f"{problem['field']}: {problem['problem']}" for problem in problems[:5])
    return render(request, InvalidRequest(message, details=problems, status=400 if not_json else 422))


def _problem(found: dict[str, Any], body: Any) -> dict[str, str]:
    if found["type"] == "json_invalid":
        return {"field": "body", "problem": f"this is not JSON: {found['ctx']['error']}"}
    if found["loc"] == ("body",) and isinstance(body, bytes):  # it was not even parsed
        return {"field": "body", "problem": "Content-Type: application/json is needed"}
    place = [str(part) for part in found["loc"] if part not in {"body", "query", "path", "header"}]
    return {"field": ".".join(place) or "body", "problem": problem_in(found)}


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = _BY_STATUS.get(error.status_code, InvalidRequest)
    message = "There is no such address." if error.status_code == 404 else str(error.detail)
    return render(request, kind(message, status=error.status_code))


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # nobody is there to read it


async def _on_defect(request: Request, error: Exception) -> Response:
    log.error("a request failed", path=request.url.path, exc_info=error)
    return render(request, Internal("The portal failed at this request."))


# --- OpenAPI and AsyncAPI -------------------------------------------------------------------------


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The document, with the events of streams, which FastAPI cannot see."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        (reference,), components = msgspec.json.schema_components(
            [TurnEvent], ref_template="#/components/schemas/{name}"
        )
        document["components"]["schemas"] |= {**components, "TurnEvent": reference}
        app.openapi_schema = document
    return app.openapi_schema


def _add_asyncapi(app: FastAPI, settings: Settings) -> None:
    @app.get("/asyncapi.json", include_in_schema=False)
    def asyncapi_document() -> Response:
        return Response(_asyncapi(settings.mqtt_projects), media_type="application/json")


@cache
def _asyncapi(projects: tuple[str, ...]) -> bytes:
    return msgspec.json.encode(asyncapi.document(projects))
