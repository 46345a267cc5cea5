"""Telling another program of alerts, by a POST to its address."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec

from app.errors import PortalError
from app.logs import get_logger
from app.services.outbound import Outbound, OutboundFailed

PAUSES_S = (1.0, 5.0, 25.0)
"""Before each further try."""

MOST_WAITING = 100

AGAIN = frozenset({408, 425, 429})
"""Refusals that a later try may not meet; so are those of a server at fault."""

log = get_logger(__name__)


class Webhook:
    """Posts JSON to one address, in the background and in the order of `tell`. What cannot be delivered is
    given up after a few tries, and what waits when the portal stops is lost."""

    def __init__(self, url: str, outbound: Outbound, pauses: Sequence[float] = PAUSES_S) -> None:
        self._url = url
        self._outbound = outbound
        self._pauses = pauses
        self._waiting: asyncio.Queue[dict[str, Any]] = asyncio.Queue(MOST_WAITING)

    def tell(self, body: dict[str, Any]) -> None:
        """Leaves a message to be posted; returns at once."""
        try:
            self._waiting.put_nowait(body)
        except asyncio.QueueFull:
            log.error("a webhook message was dropped: too many wait")

    async def run(self) -> None:
        """Posts what is there to be posted. Runs until cancelled."""
        while True:
            body = msgspec.json.encode(await self._waiting.get())
            for pause in (*self._pauses, None):
                problem, again = await self._post(body)
                if problem is None:
                    break
                # The address is a secret: whoever has it can post there too.
                log.warning("a webhook message was not taken", reason=problem, again=again and bool(pause))
                if not again or pause is None:
                    break
                await asyncio.sleep(pause)

    async def _post(self, body: bytes) -> tuple[str | None, bool]:
        """What is wrong, if something is, and whether another try may help."""
        try:
            status = (await self._outbound.post(self._url, body)).status
        except PortalError as error:
            return error.message, False
        except OutboundFailed as error:
            return str(error), True
        if 200 <= status < 300:
            return None, False
        return f"status {status}", status >= 500 or status in AGAIN
