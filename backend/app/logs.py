"""Structured logs: one event a line, with keys and values, never with prompts or secrets."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from typing import Any, TextIO, cast

import structlog


def get_logger(name: str) -> Any:
    """A logger whose methods take an event and keyword values: `log.info("turn ended", turn=id)`."""
    return structlog.get_logger(name)


def quiet_unless_configured() -> None:
    """For programs that use the portal as a library and have said nothing of logs: warnings only."""
    if not structlog.is_configured():
        configure_logging("warning")


def configure_logging(level: str) -> None:
    """Sends all logs to standard error, coloured when that is a terminal; those of libraries only
    from warnings on."""
    number = getattr(logging, level.upper())
    logging.basicConfig(format="%(levelname)-8s %(name)s: %(message)s", level=logging.WARNING, force=True)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _Lossy(sys.stderr))),
        cache_logger_on_first_use=True,
    )


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
