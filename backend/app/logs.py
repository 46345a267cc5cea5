"""Structured logs: one event a line, with keys and values, never with prompts or secrets."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from contextvars import Context, copy_context
from datetime import UTC, datetime
from typing import Any, Literal, TextIO, cast

import msgspec

# structlog loads rich where it finds it, to draw tracebacks, which ours are not: three megabytes at rest.
_rich = sys.modules.setdefault("rich", None)  # type: ignore[arg-type]
import structlog  # noqa: E402
from structlog.typing import EventDict  # noqa: E402

if _rich is None:
    del sys.modules["rich"]

Form = Literal["console", "json"]

PLAIN = "%(levelname)-8s %(name)s: %(message)s"
"""How the logs of libraries look to people."""


def get_logger(name: str) -> Any:
    """A logger whose methods take an event and keyword values: `log.info("turn ended", turn=id)`."""
    return structlog.get_logger(name)


def quiet_unless_configured() -> None:
    """For programs that use the portal as a library and have said nothing of logs: warnings only."""
    if not structlog.is_configured():
        configure_logging("warning")


def configure_logging(level: str, form: Form = "console") -> None:
    """Sends all logs to standard error; those of libraries only from warnings on. `console` is for people,
    coloured on a terminal; `json` is one object a line."""
    number = getattr(logging, level.upper())
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines() if form == "json" else logging.Formatter(PLAIN))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            _as_json if form == "json" else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _Lossy(sys.stderr))),
        cache_logger_on_first_use=True,
    )


def bind(**ids: str) -> None:
    """From here on, all logs of this task, and of those that it starts, carry `ids`."""
    structlog.contextvars.bind_contextvars(**ids)


def context_with(**ids: str) -> Context:
    """The context of the caller, in which logs carry `ids` too: for a task that others may start later."""
    context = copy_context()
    context.run(bind, **ids)
    return context


_encode = msgspec.json.Encoder(enc_hook=str).encode


def _as_json(_logger: Any, _method: str, event: EventDict) -> str:
    return _encode(event).decode()


class _JsonLines(logging.Formatter):
    """What libraries log, in the same form."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        moment = datetime.fromtimestamp(record.created, UTC).isoformat().replace("+00:00", "Z")
        found = {"event": record.getMessage(), "level": record.levelname.lower(), "timestamp": moment}
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return _encode({**found, "logger": record.name}).decode()


class _Lossy:
    """Writes to a stream as far as it takes it. A disk that is full for the database is full for the log too,
    and what was to be logged there must still be done."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()
