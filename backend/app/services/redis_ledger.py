"""The ledger of several processes: the same counts, kept in Redis.

Each method is one script, so it is one step for all of them; times are Redis' own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from app.errors import Overloaded
from app.logs import get_logger
from app.services.ledger import RESERVATION_S, Hold, Lacking, Quota, Window

log = get_logger(__name__)

_NOW = "local t = redis.call('TIME'); local now = tonumber(t[1]) + tonumber(t[2]) / 1000000\n"

_TAKE = (
    _NOW
    + """
local id, full, counts = ARGV[1], false, {}
for i, key in ipairs(KEYS) do
    local amount, seconds = tonumber(ARGV[2 * i]), tonumber(ARGV[2 * i + 1])
    redis.call('ZREMRANGEBYSCORE', key, '-inf', string.format('%.6f', now - seconds))
    counts[i] = redis.call('ZCARD', key)
    if counts[i] >= amount then full = true end
end
local answer = {}
for i, key in ipairs(KEYS) do
    local amount, seconds = tonumber(ARGV[2 * i]), tonumber(ARGV[2 * i + 1])
    local is_full = counts[i] >= amount
    if not full then
        redis.call('ZADD', key, string.format('%.6f', now), id .. ':' .. redis.call('INCR', key .. ':n'))
        redis.call('PEXPIRE', key, math.ceil(seconds * 1000))
        redis.call('PEXPIRE', key .. ':n', math.ceil(seconds * 1000))
        counts[i] = counts[i] + 1
    end
    local place = math.max(counts[i] - amount, 0)
    local oldest = redis.call('ZRANGE', key, place, place, 'WITHSCORES')
    local wait = oldest[2] and math.max(tonumber(oldest[2]) + seconds - now, 0) or 0
    answer[3 * i - 2] = math.max(amount - counts[i], 0)
    answer[3 * i - 1] = tostring(wait)
    answer[3 * i] = is_full and 1 or 0
end
return answer
"""
)

_GIVE_BACK = """
for _, key in ipairs(KEYS) do
    local members = redis.call('ZREVRANGE', key, 0, -1)
    for _, member in ipairs(members) do
        if string.sub(member, 1, #ARGV[1] + 1) == ARGV[1] .. ':' then
            redis.call('ZREM', key, member)
            break
        end
    end
end
"""

# KEYS are pairs: what is spent, and a hash of the reservations, each `amount:until`. One that has lapsed is
# kept for a day more, so that a turn which takes that long is charged all the same.
_RESERVE = (
    _NOW
    + """
local id, force, lasts = ARGV[1], ARGV[2] == '1', tonumber(ARGV[3])
for i = 1, #KEYS / 2 do
    local amount, budget = tonumber(ARGV[2 + 2 * i]), tonumber(ARGV[3 + 2 * i])
    local spent = redis.call('GET', KEYS[2 * i - 1]) or '0'
    local used = tonumber(spent)
    local reserved = redis.call('HGETALL', KEYS[2 * i])
    for j = 1, #reserved, 2 do
        local held, till = string.match(reserved[j + 1], '^(.-):(.*)$')
        if tonumber(till) + 86400 < now then redis.call('HDEL', KEYS[2 * i], reserved[j])
        elseif tonumber(till) >= now and reserved[j] ~= id then used = used + tonumber(held) end
    end
    if not force and used + amount > budget then return {i, spent} end
end
for i = 1, #KEYS / 2 do
    redis.call('HSET', KEYS[2 * i], id, ARGV[2 + 2 * i] .. ':' .. string.format('%.3f', now + lasts))
    redis.call('PEXPIRE', KEYS[2 * i], math.ceil((lasts + 86400) * 1000))
end
return {0, '0'}
"""
)

_SETTLE = """
local sums = {}
for i = 1, #KEYS / 2 do
    local reserved = redis.call('HDEL', KEYS[2 * i], ARGV[1]) == 1
    sums[i] = redis.call('GET', KEYS[2 * i - 1]) or ''
    if reserved and sums[i] ~= '' then
        sums[i] = redis.call('INCRBYFLOAT', KEYS[2 * i - 1], ARGV[1 + i])
    elseif tonumber(ARGV[1 + i]) ~= 0 then
        redis.call('DEL', KEYS[2 * i - 1])
    end
end
return sums
"""


class RedisLedger:
    """A ledger that all processes with the same `url` and `database_id` share. Raises `Overloaded` when Redis
    does not answer: what cannot be counted is not let through."""

    def __init__(self, url: str, database_id: str) -> None:
        self._prefix = f"portal:{database_id}:"
        self._redis = Redis.from_url(url, socket_timeout=2, socket_connect_timeout=2)
        self._take = self._redis.register_script(_TAKE)
        self._give_back = self._redis.register_script(_GIVE_BACK)
        self._reserve = self._redis.register_script(_RESERVE)
        self._settle = self._redis.register_script(_SETTLE)

    async def take(self, id: str, windows: Sequence[Window]) -> list[Quota]:
        """See `Ledger`."""
        arguments: list[Any] = [id]
        for window in windows:
            arguments += [window.amount, window.seconds]
        answer = await _answered(self._take(self._windows(windows), arguments))
        stands = zip(windows, answer[0::3], answer[1::3], answer[2::3], strict=True)
        return [
            Quota(window, int(remaining), float(wait), bool(is_full))
            for window, remaining, wait, is_full in stands
        ]

    async def give_back(self, id: str, windows: Sequence[Window]) -> None:
        """See `Ledger`."""
        await _answered(self._give_back(self._windows(windows), [id]))

    async def unknown(self, holds: Sequence[Hold]) -> list[Hold]:
        """See `Ledger`."""
        spent = [hold for hold in holds if hold.ends_at]
        if not spent:
            return []
        values = await _answered(self._redis.mget([self._keys(hold)[0] for hold in spent]))
        return [hold for hold, value in zip(spent, values, strict=True) if value is None]

    async def seed(self, hold: Hold, spent: float) -> None:
        """See `Ledger`."""
        until = int(hold.ends_at * 1000)
        await _answered(self._redis.set(self._keys(hold)[0], spent, nx=True, pxat=until))

    async def forget(self, keys: Sequence[str]) -> None:
        """See `Ledger`."""
        await _answered(self._redis.delete(*map(self._spent_key, keys)))

    async def reserve(self, id: str, holds: Sequence[Hold], *, force: bool = False) -> Lacking | None:
        """See `Ledger`."""
        arguments: list[Any] = [id, int(force), RESERVATION_S]
        for hold in holds:
            arguments += [hold.amount, hold.budget]
        keys = [key for hold in holds for key in self._keys(hold)]
        lacking, spent = await _answered(self._reserve(keys, arguments))
        return Lacking(holds[lacking - 1], float(spent)) if lacking else None

    async def settle(self, id: str, holds: Sequence[Hold], spent: Mapping[str, float]) -> dict[str, float]:
        """See `Ledger`."""
        keys = [key for hold in holds for key in self._keys(hold)]
        amounts = [spent.get(hold.key, 0.0) for hold in holds]
        sums = await _answered(self._settle(keys, [id, *amounts]))
        return {hold.key: float(total) for hold, total in zip(holds, sums, strict=True) if total}

    async def hand_over(self, id: str, holds: Sequence[Hold]) -> None:
        """See `Ledger`."""

    async def close(self) -> None:
        """See `Ledger`."""
        await self._redis.aclose()

    def _windows(self, windows: Sequence[Window]) -> list[str]:
        return [f"{self._prefix}w:{window.key}" for window in windows]

    def _keys(self, hold: Hold) -> tuple[str, str]:
        return self._spent_key(hold.key), f"{self._prefix}r:{hold.key}"

    def _spent_key(self, key: str) -> str:
        return f"{self._prefix}s:{key}"


async def _answered(call: Any) -> Any:
    try:
        return await call
    except (RedisError, OSError) as error:
        log.warning("Redis does not answer", reason=type(error).__name__)
        raise Overloaded("What was used cannot be counted now; try again.", retry_after=2) from None
