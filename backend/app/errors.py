"""Every failure that a client can see, with the contract's code, and one renderer for all doors.

    PortalError
    ├── InvalidRequest 422 (400 when the body is not even JSON)
    │   └── ContextExceeded 422
    ├── Unauthenticated 401
    ├── Forbidden 403
    ├── NotFound 404
    ├── Conflict 409
    │   └── Superseded 409
    ├── PayloadTooLarge 413
    ├── RateLimited 429
    │   └── BudgetExceeded 429
    ├── LLMError 502
    ├── LLMUnavailable 503
    ├── Overloaded 503
    │   ├── BrokerUnavailable 503
    │   └── StorageUnavailable 503
    ├── LLMTimeout 504
    ├── Expired 504
    └── Internal 500

Messages are written for the person who sees them: what is wrong and what would be right. They never
hold a path, a key, an address of an upstream server, or a prompt.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import msgspec
from msgspec import UNSET, UnsetType


class ErrorInfo(msgspec.Struct, frozen=True):
    """The error object of events and MQTT replies. `retry_after` is in seconds."""

    code: str
    message: str
    retryable: bool
    retry_after: float | UnsetType = UNSET


class QuotaInfo(msgspec.Struct, frozen=True):
    """How a rate limit stands: `remaining` of `amount` in `seconds`; `resets_in` seconds one more is free."""

    name: str
    amount: int
    seconds: float
    remaining: int
    resets_in: float


class PortalError(Exception):
    """A failure with a code of the contract.

    `retryable` says whether the same request may succeed later; `retry_after` (seconds) when;
    `details` is a JSON value for programs, such as the list of fields that were wrong; `quotas` are the
    rate limits that were looked at.
    """

    code: ClassVar[str] = "internal"
    status: int = 500
    retryable: bool = False

    def __init__(
        self,
        message: str,
        *,
        details: Any = None,
        retry_after: float | None = None,
        retryable: bool | None = None,
        status: int | None = None,
        quotas: Sequence[QuotaInfo] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.details = details
        self.retry_after = retry_after
        self.quotas = quotas
        if retryable is not None:
            self.retryable = retryable
        if status is not None:
            self.status = status

    @property
    def info(self) -> ErrorInfo:
        """The error as events and MQTT replies carry it."""
        retry_after = UNSET if self.retry_after is None else self.retry_after
        return ErrorInfo(self.code, self.message, self.retryable, retry_after)


class InvalidRequest(PortalError):
    """The request is wrong in itself; `details` names the fields."""

    code = "invalid_request"
    status = 422


class ContextExceeded(InvalidRequest):
    """The LLM server has no room for the prompt: it reads `limit` tokens and was sent `size`, where it
    tells."""

    def __init__(self, *, limit: int | None = None, size: int | None = None) -> None:
        most = "" if limit is None else f" of {limit} tokens"
        super().__init__(
            f"message: with a reply of max_tokens it is too long for the model's context{most}; make one of "
            "them shorter."
        )
        self.limit = limit
        self.size = size


class Unauthenticated(PortalError):
    """Nobody is signed in, or the credential is wrong or has run out."""

    code = "unauthenticated"
    status = 401


class Forbidden(PortalError):
    """Signed in, but not allowed."""

    code = "forbidden"
    status = 403


class NotFound(PortalError):
    """There is no such thing, or it is somebody else's."""

    code = "not_found"
    status = 404


class Conflict(PortalError):
    """The request contradicts what is stored: an id already used for something else."""

    code = "conflict"
    status = 409


class Superseded(Conflict):
    """A newer state of the session took this one's place before it ran."""

    code = "superseded"


class PayloadTooLarge(PortalError):
    """More bytes than the portal takes."""

    code = "payload_too_large"
    status = 413


class RateLimited(PortalError):
    """Too many requests; `retry_after` says when the next one is welcome."""

    code = "rate_limited"
    status = 429
    retryable = True


class BudgetExceeded(RateLimited):
    """The budget of tokens, cost or GPU time is spent, or has too little left."""

    code = "budget_exceeded"


class LLMError(PortalError):
    """The LLM server answered with an error, or with something that is no answer."""

    code = "llm_error"
    status = 502


class LLMUnavailable(PortalError):
    """The LLM server cannot be reached, or is still loading its model."""

    code = "llm_unavailable"
    status = 503
    retryable = True


class Overloaded(PortalError):
    """A bounded queue is full."""

    code = "overloaded"
    status = 503
    retryable = True


class StorageUnavailable(Overloaded):
    """The database takes or gives nothing at the moment: locked, full, or away."""


class BrokerUnavailable(Overloaded):
    """The MQTT broker cannot be reached, or does not do what it is told."""


class LLMTimeout(PortalError):
    """The LLM server was too slow: to connect, to begin, to go on, or to end."""

    code = "llm_timeout"
    status = 504
    retryable = True


class Expired(PortalError):
    """The request's own deadline passed before it could run."""

    code = "expired"
    status = 504


class Internal(PortalError):
    """A defect of the portal; the log of that moment tells more."""

    retryable = True


def _tree(root: type[PortalError]) -> dict[str, type[PortalError]]:
    found: dict[str, type[PortalError]] = {}
    for child in root.__subclasses__():
        found |= {**_tree(child), child.code: child}
    return found


BY_CODE: dict[str, type[PortalError]] = _tree(PortalError)


def from_info(info: ErrorInfo) -> PortalError:
    """The exception for a stored error, as it was when it was stored."""
    retry_after = None if info.retry_after is UNSET else info.retry_after
    error = BY_CODE.get(info.code, Internal)
    return error(info.message, retryable=info.retryable, retry_after=retry_after)


def http_body(error: PortalError, request_id: str) -> dict[str, Any]:
    """The body of an HTTP error answer."""
    inner: dict[str, Any] = {"code": error.code, "message": error.message, "request_id": request_id}
    if error.details is not None:
        inner["details"] = error.details
    return {"error": inner, "detail": error.message}


_FIELD = re.compile(r"([a-z_][A-Za-z0-9_.]*): ")
_OPENAI_CODES = {
    "unauthenticated": "invalid_api_key",
    "rate_limited": "rate_limit_exceeded",
    "budget_exceeded": "insufficient_quota",
}
_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def openai_status(error: PortalError) -> int:
    """The HTTP status as OpenAI's clients know it: what is wrong in itself is a 400 for them."""
    return 400 if error.status == 422 else error.status


def openai_body(error: PortalError) -> dict[str, Any]:
    """The body of an error as OpenAI's clients read it. `code` is the contract's, but where OpenAI has one
    that clients act on."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    code, field = _OPENAI_CODES.get(error.code, error.code), _field_of(error)
    if (error.status, field) == (404, "model"):
        code = "model_not_found"
    return {
        "error": {
            "message": error.message,
            "type": code if code == "insufficient_quota" else _OPENAI_TYPES.get(error.status, kind),
            "param": field,
            "code": code,
        }
    }


def _field_of(error: PortalError) -> str | None:
    """The field that is wrong, which the message begins with."""
    found = _FIELD.match(error.message)
    return None if found is None else found[1]


def may_try_again(error: PortalError) -> bool:
    """Whether a program should send the same again soon, by itself."""
    return error.retryable and not isinstance(error, BudgetExceeded)


def quota_headers(quotas: Sequence[QuotaInfo]) -> Mapping[str, str]:
    """How the rate limits stand, as HTTP headers (draft-ietf-httpapi-ratelimit-headers-10)."""
    if not quotas:
        return {}
    policies = [f'"{quota.name}";q={quota.amount};w={quota.seconds:.0f}' for quota in quotas]
    left = [f'"{quota.name}";r={quota.remaining};t={math.ceil(quota.resets_in)}' for quota in quotas]
    return {"RateLimit-Policy": ", ".join(policies), "RateLimit": ", ".join(left)}
