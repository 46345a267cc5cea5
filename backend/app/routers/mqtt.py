"""`/api/mqtt`: what games do over MQTT, for programs that speak HTTP."""

from __future__ import annotations

from contextlib import aclosing, suppress
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query, WebSocket
from pydantic import BaseModel, Field

from app.access import Identity
from app.dependencies import (
    CurrentUser,
    HintsDep,
    MqttDep,
    ProjectsDep,
    SessionsDep,
    SettingsDep,
    TemplatesDep,
)
from app.errors import InvalidRequest, NotFound
from app.events import ID_PATTERN, GenerationOptions, ReplyTarget, TurnRequest
from app.hardening import StrictRoute
from app.options import Object
from app.routers.times import deadline_in
from app.services.hint_feed import HintFeed, HintOf
from app.services.session_manager import SessionManager
from app.services.states import compact
from app.services.templates import Templates
from app.sockets import open_socket, until_one_ends

router = APIRouter(prefix="/api/mqtt", tags=["mqtt"], route_class=StrictRoute)

Id = Annotated[str, Field(pattern=ID_PATTERN)]
Project = Annotated[
    str | None,
    Field(
        max_length=64, description="Of a session that is new; the first one of MQTT_PROJECTS when left out"
    ),
]
Prompt = Annotated[str | None, Field(max_length=1_000_000)]


class GameState(GenerationOptions):
    """The state of a game. `template_id` with its `variables`, and `project` count only when the session is
    new."""

    session_id: Id
    state: Annotated[Object, Field(min_length=1, description="Whatever the game has")]
    template_id: Annotated[str | None, Field(description="A template of mine, for the system prompt")] = None
    variables: Annotated[dict[str, Any], Field(default_factory=dict, description="What the template needs")]
    project: Project = None
    request_id: Annotated[Id | None, Field(description="Makes the request safe to repeat")] = None
    deadline_s: Annotated[float | None, Field(gt=0, le=86400)] = None


class PublishedState(BaseModel):
    """The state is taken; its hint comes by `last_hint`, the WebSocket, and the MQTT topic, where there is
    one."""

    session_id: str
    turn_id: str
    request_id: str | None
    hint_topic: str | None


class NewPrompt(BaseModel):
    """Another system prompt: for a session, or for the sessions that a project will have."""

    session_id: Id | None = None
    template: Prompt = None
    template_id: Annotated[str | None, Field(description="A template of mine; its newest version")] = None
    variables: Annotated[dict[str, Any], Field(default_factory=dict, description="What the template needs")]
    reset: Annotated[bool, Field(description="Whether the session begins anew")] = True
    project: Project = None


class Updated(BaseModel):
    """It was done."""

    ok: bool = True
    message: str = "Template updated"


class FunctionCall(BaseModel):
    """An action of the game that the model asks for."""

    name: str
    arguments: dict[str, Any]


class Hint(BaseModel):
    """The answer to a state."""

    session_id: str
    turn_id: str
    request_id: str | None
    hint: str
    suggestion: str | None = None
    function_calls: list[FunctionCall] | None = None


class ProjectStatus(BaseModel):
    """A project; `connected` when its requests reach the portal."""

    project: str
    connected: bool


class MqttStatus(BaseModel):
    """How the MQTT door is; `enabled` when the portal has a broker at all."""

    enabled: bool
    connected: bool
    projects: list[ProjectStatus]


@router.post("/publish_state", status_code=202)
async def publish_state(
    body: GameState, user: CurrentUser, sessions: SessionsDep, mqtt: MqttDep, settings: SettingsDep
) -> PublishedState:
    """Takes the state of a game. Of states that wait in a session only the newest is answered."""
    project = await _project(body.session_id, body.project, user, sessions, settings.mqtt_projects)
    target = None
    if mqtt is not None and project in mqtt.projects:
        target = ReplyTarget(project, f"{project}/hint/{body.session_id}", body.session_id, form="hint")
    turn = await sessions.submit(
        TurnRequest(
            who=user,
            session_id=body.session_id,
            message=compact(body.state),
            kind="state",
            request_id=body.request_id,
            template_id=body.template_id,
            variables=body.variables,
            project=project,
            options=body,
            deadline=deadline_in(body.deadline_s),
            reply_to=target,
        )
    )
    topic = None if target is None else target.topic
    return PublishedState(
        session_id=body.session_id, turn_id=turn.id, request_id=turn.row.request_id, hint_topic=topic
    )


@router.post("/publish_template")
async def publish_template(
    body: NewPrompt,
    user: CurrentUser,
    sessions: SessionsDep,
    templates: TemplatesDep,
    projects: ProjectsDep,
    settings: SettingsDep,
) -> Updated:
    """Gives a session another system prompt, or, without a session, a project."""
    prompt = await _prompt(body, user, templates)
    if body.session_id is None:
        await projects.set_prompt(user, body.project or settings.mqtt_projects[0], prompt)
    else:
        project = await _project(body.session_id, body.project, user, sessions, settings.mqtt_projects)
        await sessions.set_prompt(user, body.session_id, prompt, project=project, reset=body.reset)
    return Updated()


@router.get("/last_hint", response_model_exclude_none=True)
async def last_hint(
    session_id: Annotated[str, Query(pattern=ID_PATTERN)], user: CurrentUser, hints: HintsDep
) -> Hint:
    """The answer to the session's newest state that has one."""
    found = await hints.last(user, session_id)
    if found is None:
        raise NotFound("This session has no hint yet.")
    return Hint(**_shown(session_id, found))


@router.get("/status")
async def status(_user: CurrentUser, mqtt: MqttDep) -> MqttStatus:
    """Whether the portal is at its broker."""
    projects = {} if mqtt is None else mqtt.projects
    found = [ProjectStatus(project=name, connected=connected) for name, connected in projects.items()]
    return MqttStatus(
        enabled=mqtt is not None, connected=mqtt is not None and mqtt.is_connected, projects=found
    )


@router.websocket("/ws/hints/{session_id}")
async def follow_hints(socket: WebSocket, session_id: str) -> None:
    """Sends `connection_established`, then the hints of a session as they come: `{"type": "hint", …}`."""
    container = socket.app.state.container
    opened = await open_socket(socket, lambda user: container.sessions.may_watch(user, session_id))
    if opened is not None:
        hints = _send_hints(socket, opened.user, session_id, container.hints)
        await opened.serve(until_one_ends(hints, _until_gone(socket)))


async def _until_gone(socket: WebSocket) -> None:
    with suppress(KeyError):  # bytes have no meaning here
        while True:
            await socket.receive_text()


async def _send_hints(socket: WebSocket, user: Identity, session_id: str, feed: HintFeed) -> None:
    async with aclosing(feed.follow(user, session_id)) as hints:
        await anext(hints)  # what comes after this moment is new
        await socket.send_json({"type": "connection_established", "session_id": session_id})
        async for found in hints:
            if found is not None:
                await socket.send_json({"type": "hint", **_shown(session_id, found)})


def _shown(session_id: str, found: HintOf) -> dict[str, Any]:
    ids = {"session_id": session_id, "turn_id": found.turn_id, "request_id": found.request_id}
    return {**ids, **msgspec.to_builtins(found.hint)}


async def _project(
    session_id: str, wanted: str | None, user: Identity, sessions: SessionManager, known: tuple[str, ...]
) -> str:
    """The project of a session that is there, or of one that is to be."""
    own = await sessions.project_of(user, session_id)
    return own or wanted or user.only_project or known[0]


async def _prompt(body: NewPrompt, user: Identity, templates: Templates) -> str:
    if (body.template is None) == (body.template_id is None):
        raise InvalidRequest("template: give either this or template_id")
    if body.template_id is None:
        return body.template or ""
    return (await templates.get(user, body.template_id)).render(body.variables)
