"""Structured logs: one event a line, with keys and values, never with prompts or secrets."""

from __future__ import annotations

import logging
import sys
from typing import Any

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
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
