"""Traces of turns, for OpenTelemetry: a span for each turn, below it one for each wait for a place and one
for each request to an LLM server. Their attributes are those of the semantic conventions for generative AI;
no text is in them.

The library is an extra, and imported only where an endpoint is configured.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from app import __version__
from app.config import Settings
from app.events import Ending, Failed, Final, Usage, type_of
from app.trace_parent import NONE, trace_of_caller

if TYPE_CHECKING:
    from opentelemetry.trace import Span, SpanKind

    from app.services.llm_server import LLMServer
    from app.services.turns import Turn

NAMES = {"azure": "azure.ai.openai", "bedrock": "aws.bedrock", "watsonx": "ibm.watsonx.ai"}
"""What the conventions call providers, where it is not what they are called here."""

OF_REQUEST = ("max_tokens", "temperature", "top_p", "seed", "frequency_penalty", "presence_penalty")

_current: ContextVar[TurnSpans | None] = ContextVar("turn_spans", default=None)


def current_spans() -> TurnSpans | None:
    """The spans of the turn that this task is about; None where no traces are written."""
    return _current.get()


class Tracing:
    """Sends spans to the endpoint of the settings."""

    def __init__(self, settings: Settings) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        about = {
            "service.name": settings.otel_service_name,
            "service.version": __version__,
            "service.instance.id": settings.instance,
        }
        endpoint = settings.otel_exporter_otlp_endpoint.rstrip("/") + "/v1/traces"
        exporter = OTLPSpanExporter(endpoint=endpoint, headers=settings.otel_headers or None)
        self._provider = TracerProvider(resource=Resource.create(about), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("prompt-portal", __version__)

    async def close(self) -> None:
        """Sends what was not sent yet."""
        await asyncio.to_thread(self._provider.shutdown)

    def begin(self, turn: Turn) -> None:
        """A turn was accepted: its span begins, below that of whoever asked. `turn.context` is the context in
        which it will run."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        row = turn.row
        about: dict[str, Any] = {
            "portal.turn.id": row.id,
            "portal.door": row.door,
            "portal.project": turn.session.project,
            "portal.attempt": row.attempt,
        }
        if turn.session.id:
            about["gen_ai.conversation.id"] = turn.session.id
        parent = TraceContextTextMapPropagator().extract(dict(trace_of_caller()))
        span = self._tracer.start_span("turn", parent, _kind(row.door), about)
        turn.spans = TurnSpans(self._tracer, span, row.options)
        assert turn.context is not None
        turn.context.run(_current.set, turn.spans)


class TurnSpans:
    """The spans of one attempt at a turn."""

    def __init__(self, tracer: Any, span: Span, options: Mapping[str, Any]) -> None:
        self._tracer = tracer
        self._span = span
        self._options = options
        self._waiting: Span | None = None
        self._asking: Span | None = None
        self._asked_until: int | None = None

    def waits(self, provider: str) -> None:
        """It waits for a place at a provider's servers."""
        self._end_asking()
        self._waiting = self._child("queue", {"gen_ai.provider.name": provider})

    def asks(self, server: LLMServer, model: str) -> None:
        """It has the place, and asks a server."""
        from opentelemetry.trace import SpanKind

        self._end_waiting()
        address = urlsplit(server.url)
        kind = server.upstream.kind
        about: dict[str, Any] = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": NAMES.get(kind, kind),
            "gen_ai.request.model": model,
            "gen_ai.request.stream": True,
            "server.address": address.hostname or "",
            "server.port": address.port or (443 if address.scheme == "https" else 80),
            "portal.llm.server": server.name,
        }
        given = {name: self._options[name] for name in OF_REQUEST if name in self._options}
        about |= {f"gen_ai.request.{name}": value for name, value in given.items()}
        self._asking = self._child(f"chat {model}", about, SpanKind.CLIENT)

    @property
    def headers(self) -> Mapping[str, str]:
        """What the server is told of the trace."""
        if self._asking is None:
            return NONE
        from opentelemetry.trace import set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        headers: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(headers, set_span_in_context(self._asking))
        return headers

    def failed(self, code: str) -> None:
        """The server, or the wait for it, has failed."""
        span = self._asking or self._waiting
        if span is not None:
            _mark_failed(span, code)

    def leaves(self) -> None:
        """It has given the place back. What the reply took is known only later."""
        self._end_waiting()
        self._asked_until = time.time_ns()

    def end(self, ending: Ending, usage: Usage | None, model: str) -> None:
        """The ending is stored."""
        about: dict[str, Any] = {} if usage is None else _used(usage)
        if isinstance(ending, Final):
            about["gen_ai.response.finish_reasons"] = [ending.finish_reason]
        if model:
            about["gen_ai.response.model"] = model
        if self._asking is not None:
            self._asking.set_attributes(about)
        self._end_waiting()
        self._end_asking()
        self._span.set_attributes({**about, "portal.outcome": type_of(ending)})
        if isinstance(ending, Failed):
            _mark_failed(self._span, ending.error.code)
        self._span.end()

    def _child(self, name: str, about: dict[str, Any], kind: SpanKind | None = None) -> Span:
        from opentelemetry.trace import SpanKind, set_span_in_context

        parent = set_span_in_context(self._span)
        child: Span = self._tracer.start_span(name, parent, kind or SpanKind.INTERNAL, about)
        return child

    def _end_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.end()
            self._waiting = None

    def _end_asking(self) -> None:
        if self._asking is not None:
            self._asking.end(self._asked_until)
            self._asking = self._asked_until = None


def _kind(door: str) -> SpanKind:
    from opentelemetry.trace import SpanKind

    return {"http": SpanKind.SERVER, "mqtt": SpanKind.CONSUMER}.get(door, SpanKind.INTERNAL)


def _used(usage: Usage) -> dict[str, Any]:
    found: dict[str, Any] = {
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
        "gen_ai.usage.reasoning.output_tokens": usage.reasoning_tokens,
    }
    if usage.ttft_ms is not None:
        found["gen_ai.response.time_to_first_chunk"] = usage.ttft_ms / 1000
    return found


def _mark_failed(span: Span, code: str) -> None:
    from opentelemetry.trace import Status, StatusCode

    span.set_attribute("error.type", code)
    span.set_status(Status(StatusCode.ERROR))
