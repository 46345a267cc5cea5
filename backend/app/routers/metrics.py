"""`/metrics`: for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Response

from app.dependencies import MetricsDep, WatchingUser
from app.hardening import StrictRoute

router = APIRouter(tags=["health"], route_class=StrictRoute)


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {"description": "The metrics", "content": {"text/plain": {"schema": {"type": "string"}}}}
    },
)
async def metrics(user: WatchingUser, found: MetricsDep) -> Response:
    """How the portal is and what it has done, in Prometheus' text format."""
    text, media_type = await found.text(user)
    return Response(text, headers={"Content-Type": media_type, "Cache-Control": "no-store"})
