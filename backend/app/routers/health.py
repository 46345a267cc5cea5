"""`/health`: for load balancers and supervisors."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel

from app.dependencies import DrainDep, LLMDep, MqttDep, StoreDep
from app.errors import StorageUnavailable
from app.hardening import StrictRoute

router = APIRouter(prefix="/health", tags=["health"], route_class=StrictRoute)

State = Literal["ok", "degraded", "down", "off"]


class Live(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """What the portal needs to serve. `mqtt` is `off` where no broker is set; `draining` is a portal that is
    being stopped."""

    status: Literal["ok", "down", "draining"]
    database: State
    llm: State
    mqtt: State


@router.head("/live", include_in_schema=False)
@router.get("/live")
async def live() -> Live:
    """The process runs and its event loop turns."""
    return Live()


@router.head("/ready", include_in_schema=False)
@router.get("/ready", responses={503: {"model": Ready}})
async def ready(response: Response, store: StoreDep, llm: LLMDep, mqtt: MqttDep, drain: DrainDep) -> Ready:
    """Whether requests can be served: 503 while the database, the LLM server or a broker that is
    set cannot be used, and from the signal to stop on."""
    try:
        await store.ping()
        database: State = "ok"
    except StorageUnavailable:
        database = "down"
    broker: State = "off" if mqtt is None else "ok" if mqtt.is_connected else "down"
    server: State = (await llm.ahealth()).status
    is_ready = llm.can_answer and {database, broker} <= {"ok", "off"}
    response.status_code = 200 if is_ready and not drain.is_on else 503
    status: Literal["ok", "down", "draining"] = "draining" if drain.is_on else "ok" if is_ready else "down"
    return Ready(status=status, database=database, llm=server, mqtt=broker)
