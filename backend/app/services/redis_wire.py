"""The wire by Redis: publish and subscribe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from app.services.wire import QUIET_S, Letter, WireDown


class RedisLink:
    """See `Link`."""

    def __init__(self, url: str) -> None:
        patience: dict[str, Any] = {"socket_timeout": QUIET_S, "socket_connect_timeout": 2}
        self._sender = Redis.from_url(url, **patience)
        # It must not come back by itself: what was lost meanwhile has to be asked for.
        self._listener = Redis.from_url(url, **patience, retry=Retry(NoBackoff(), 0))

    async def listen(
        self, channels: Sequence[str], heard: Callable[[bytes], None], ready: Callable[[], None]
    ) -> NoReturn:
        """See `Link`."""
        try:
            async with self._listener.pubsub() as subscription:
                await subscription.subscribe(*channels)
                is_asked = False
                while True:
                    message = await subscription.get_message(timeout=QUIET_S)
                    if message is None:
                        if is_asked:
                            raise WireDown("Redis does not answer")
                        await subscription.ping()
                    elif message["type"] == "message":
                        heard(message["data"])
                    elif message["type"] == "subscribe" and message["data"] == len(channels):
                        ready()
                    is_asked = message is None
        except (RedisError, OSError) as error:
            raise WireDown(f"Redis: {type(error).__name__}") from None

    async def send(self, letters: Sequence[Letter]) -> None:
        """See `Link`."""
        try:
            async with self._sender.pipeline(transaction=False) as pipeline:
                for channel, message in letters:
                    pipeline.publish(channel, message)
                await pipeline.execute()
        except (RedisError, OSError) as error:
            raise WireDown(f"Redis: {type(error).__name__}") from None

    async def close(self) -> None:
        """See `Link`."""
        for client in (self._sender, self._listener):
            with suppress(RedisError, OSError):
                await client.aclose()
