"""Traces, as a collector gets them over OTLP."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from app.config import Settings, child_environment
from app.events import new_id
from tests.fake_llm import FakeLLM, Script, text
from tests.support import GameClient, MakePortal, Mosquitto, Portal, ask, wait_until

pytestmark = pytest.mark.slow

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


class Collector:
    """Takes what is sent to it."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.about: dict[str, Any] = {}
        self.headers: list[dict[str, str]] = []
        self.raw = b""
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.take(self.path, dict(self.headers), body)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def take(self, path: str, headers: dict[str, str], body: bytes) -> None:
        assert path == "/v1/traces"
        self.raw += body
        self.headers.append(headers)
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.about = attributes(group.resource)
            for scope in group.scope_spans:
                self.spans += scope.spans

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def attributes(of: Any) -> dict[str, Any]:
    """The attributes of a span, or of a resource."""
    return {pair.key: value_of(pair.value) for pair in of.attributes}


def value_of(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [value_of(item) for item in value.array_value.values]
    return getattr(value, str(kind))


@pytest.fixture
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.close()


@pytest.fixture
def portal(
    collector: Collector,
    fake_thread: FakeLLM,
    mosquitto: Mosquitto,
    tmp_path: Path,
    make_portal: MakePortal,
) -> Portal:
    """A portal that sends its traces there: all of them once it has stopped."""
    return make_portal(
        tmp_path,
        LLM_SERVER_URL=fake_thread.url,
        LLM_MAX_CONCURRENCY="1",
        MQTT_BROKER_URL=mosquitto.url,
        MQTT_PROJECTS="traced",
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
        OTEL_EXPORTER_OTLP_HEADERS="x-key=word%20one",
        DRAIN_TIMEOUT="20",
    ).start()


def named(collector: Collector, name: str) -> list[Span]:
    return [span for span in collector.spans if span.name == name]


def test_a_turn_with_its_wait_and_its_request(
    portal: Portal, collector: Collector, fake_thread: FakeLLM
) -> None:
    prompt, reply = f"canary-{new_id()}", f"canary-{new_id()}"
    fake_thread.script = Script(text(reply), usage={"prompt_tokens": 7, "completion_tokens": 2})
    with portal.client() as client:
        answer = client.post(
            "/api/llm/chat/session",
            json={"session_id": "s", "message": prompt, "temperature": 0.5, "max_tokens": 20},
            headers={"traceparent": TRACEPARENT, "tracestate": "vendor=1"},
        ).json()
    assert portal.stop() == 0
    (turn,), (queue,), (call,) = (named(collector, name) for name in ("turn", "queue", "chat fake-1"))
    assert turn.trace_id.hex() == TRACE
    assert turn.parent_span_id.hex() == PARENT
    assert queue.parent_span_id == call.parent_span_id == turn.span_id
    (asked,) = fake_thread.requests
    assert asked["headers"]["traceparent"] == f"00-{TRACE}-{call.span_id.hex()}-01"
    assert asked["headers"]["tracestate"] == "vendor=1"
    told = attributes(turn)
    assert told["portal.turn.id"] == answer["turn_id"]
    assert (told["portal.door"], told["portal.outcome"]) == ("http", "final")
    called = attributes(call)
    assert called["gen_ai.operation.name"] == "chat"
    assert called["gen_ai.request.model"] == called["gen_ai.response.model"] == "fake-1"
    assert (called["gen_ai.request.temperature"], called["gen_ai.request.max_tokens"]) == (0.5, 20)
    assert (called["gen_ai.usage.input_tokens"], called["gen_ai.usage.output_tokens"]) == (7, 2)
    assert called["gen_ai.response.finish_reasons"] == ["stop"]
    assert called["server.address"] == "127.0.0.1"
    assert turn.kind == Span.SPAN_KIND_SERVER
    assert call.kind == Span.SPAN_KIND_CLIENT
    assert turn.start_time_unix_nano <= queue.start_time_unix_nano <= queue.end_time_unix_nano
    assert queue.end_time_unix_nano <= call.start_time_unix_nano < call.end_time_unix_nano
    assert call.end_time_unix_nano <= turn.end_time_unix_nano
    assert collector.about["service.name"] == "prompt-portal"
    assert {headers["x-key"] for headers in collector.headers} == {"word one"}
    for canary in (prompt, reply):
        assert canary.encode() not in collector.raw


def test_a_wait_that_lasts_and_a_failure(portal: Portal, collector: Collector, fake_thread: FakeLLM) -> None:
    fake_thread.script = Script(text("a", "b"), between=0.3)
    with portal.client() as client:
        body = {"session_id": "one", "message": "hi"}
        with client.stream("POST", "/api/llm/chat/session/stream", json=body) as first:
            wait_until(lambda: fake_thread.running == 1, what="the first turn")
            fake_thread.script = Script(status=400)
            assert ask(client).status_code == 502
            first.read()
    assert portal.stop() == 0
    well, failed = sorted(
        named(collector, "turn"), key=lambda span: attributes(span)["portal.outcome"] == "error"
    )
    assert well.trace_id != failed.trace_id
    assert attributes(failed)["error.type"] == "llm_error"
    assert failed.status.code == 2
    (call,) = [span for span in named(collector, "chat fake-1") if span.parent_span_id == failed.span_id]
    assert (attributes(call)["error.type"], call.status.code) == ("llm_error", 2)
    (queue,) = [span for span in named(collector, "queue") if span.parent_span_id == failed.span_id]
    assert queue.end_time_unix_nano - queue.start_time_unix_nano > 0.1e9
    assert "error.type" not in attributes(queue)


def test_over_mqtt(
    portal: Portal, collector: Collector, fake_thread: FakeLLM, mosquitto: Mosquitto, session: str
) -> None:
    from paho.mqtt.enums import MQTTProtocolVersion

    topic = f"traced/assistant_response/{session}"
    game = GameClient(mosquitto.port, topic, protocol=MQTTProtocolVersion.MQTTv5)
    game.publish(
        f"traced/user_input/{session}", {"message": "hi"}, UserProperty=[("traceparent", TRACEPARENT)]
    )
    game.reply(topic)
    game.publish(f"traced/user_input/{session}", {"message": "hi"})
    game.reply(topic, 2)
    game.close()
    assert portal.stop() == 0
    first, second = named(collector, "turn")
    assert (first.trace_id.hex(), first.parent_span_id.hex()) == (TRACE, PARENT)
    assert second.trace_id.hex() != TRACE
    assert second.parent_span_id == b""
    assert attributes(first)["portal.door"] == "mqtt"
    assert first.kind == Span.SPAN_KIND_CONSUMER
    assert fake_thread.requests[0]["headers"]["traceparent"].split("-")[1] == TRACE


def test_a_traceparent_that_is_none_begins_a_trace(
    portal: Portal, collector: Collector, fake_thread: FakeLLM
) -> None:
    with portal.client() as client:
        for given in ("nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "é" * 600):
            headers = {"traceparent": given.encode("latin-1")}
            body = {"session_id": new_id(), "message": "hi"}
            assert client.post("/api/llm/chat/session", json=body, headers=headers).status_code == 200  # type: ignore[arg-type]
    assert portal.stop() == 0
    turns = named(collector, "turn")
    assert len({span.trace_id for span in turns}) == len(turns) == 3
    assert not any(span.parent_span_id for span in turns)


def test_a_collector_that_is_away_harms_nothing(
    fake_thread: FakeLLM, tmp_path: Path, make_portal: MakePortal
) -> None:
    portal = make_portal(
        tmp_path, LLM_SERVER_URL=fake_thread.url, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9"
    ).start()
    with portal.client() as client:
        assert ask(client).status_code == 200
    assert portal.stop() == 0


def test_without_an_endpoint_nothing_of_it_is_imported(fake_portal: Portal) -> None:
    program = (
        "import sys, run_server\n"
        "print([name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'prometheus_client'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=child_environment({}), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_llm_server_is_told_of_no_trace_without_it(
    fake_portal: Portal, client: httpx.Client, llm: FakeLLM
) -> None:
    client.post(
        "/api/llm/chat/session",
        json={"session_id": "s", "message": "hi"},
        headers={"traceparent": TRACEPARENT},
    )
    assert "traceparent" not in {name.lower() for name in llm.requests[-1]["headers"]}


def test_headers_are_read() -> None:
    settings = Settings(_env_file=None, otel_exporter_otlp_headers="A=b%3D1, c=d")
    assert settings.otel_headers == {"a": "b=1", "c": "d"}
    with pytest.raises(ValueError, match="name=value"):
        Settings(_env_file=None, otel_exporter_otlp_headers="nonsense")
