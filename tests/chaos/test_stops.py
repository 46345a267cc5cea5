"""A stop, or the leaving of who waits, ends the request to the LLM server: at every door, at every stage."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from typing import Any, Protocol

import httpx
import pytest
from websockets.sync.client import ClientConnection, connect

from app.access import LOCAL
from app.config import Settings
from app.container import Container, open_container
from app.events import new_id
from app.loop import BackgroundLoop
from tests.chaos.support import Form as ChaosForm
from tests.fake_llm import FakeLLM, Script, text
from tests.support import GameClient, MakePortal, Mosquitto, Portal, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

BAR_S = 1.0
STAGES = {
    "queued": Script(),
    "before the first piece": Script(before_first=60),
    "in the middle": Script(pieces=text(*["more "] * 3000), between=0.02),
    "not streamed": Script(whole=True, before_first=60),
}


Leave = Callable[[], object]
Form = Callable[[str], dict[str, Any]]
"""What is sent, by the id of the session."""


class Door(Protocol):
    """A way to ask, and then to leave, and to stop; `waiting` tells how many wait for a place behind it."""

    def ask(self, session: str) -> Leave: ...
    def stop(self, session: str) -> None: ...
    def waiting(self) -> int: ...
    def is_over(self, session: str) -> bool: ...


class WebDoor:
    """What is posted to a path, with headers and a body that may depend on the session: each time with a
    connection of its own, so that it can be left."""

    def __init__(self, portal: Portal, client: httpx.Client, path: str, headers: Form, body: Form) -> None:
        self._portal, self._client, self._path = portal, client, path
        self._headers, self._body = headers, body

    def ask(self, session: str) -> Leave:
        body = json.dumps(self._body(session)).encode()
        head = [f"POST {self._path} HTTP/1.1", f"Host: 127.0.0.1:{self._portal.port}"]
        head += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        head += [f"Authorization: {self._client.headers['Authorization']}"]
        head += [f"{name}: {value}" for name, value in self._headers(session).items()]
        connection = socket.create_connection(("127.0.0.1", self._portal.port))
        connection.sendall("\r\n".join([*head, "", ""]).encode() + body)
        return connection.close

    def stop(self, session: str) -> None:
        self._client.post(f"/api/llm/chat/session/{session}/stop")

    def waiting(self) -> int:
        return int(self._client.get("/api/llm/health").json()["queue"])

    def is_over(self, session: str) -> bool:
        history = self._client.get(f"/api/llm/chat/session/{session}/history").json()
        return all(message["status"] == "cancelled" for message in history["messages"])


class GameDoor:
    """MQTT: a game stops what it has asked for."""

    def __init__(self, portal: Portal, broker: Mosquitto) -> None:
        self._portal = portal
        self._game = GameClient(broker.port, "maze/assistant_response/#")

    def ask(self, session: str) -> Leave:
        body = {"message": "hi", "requestId": "r", "format": "json"}
        self._game.publish(f"maze/user_input/{session}", body)
        return lambda: None

    def stop(self, session: str) -> None:
        self._game.publish(f"maze/cancel/{session}", {"requestId": "r"})

    def close(self) -> None:
        self._game.close()

    def waiting(self) -> int:
        return int(httpx.get(f"{self._portal.url}/api/llm/health").json()["queue"])

    def is_over(self, session: str) -> bool:
        replies = self._game.json_replies(f"maze/assistant_response/{session}")
        return [reply["type"] for reply in replies] == ["cancelled"]


class ForgetfulDoor(WebDoor):
    """The same, where nothing is kept: there is no session to look at, or to stop anything in."""

    def is_over(self, session: str) -> bool:
        return True


class SocketDoor(WebDoor):
    """A WebSocket, each time another one. What is asked over it runs on when it is closed."""

    def __init__(self, portal: Portal, client: httpx.Client) -> None:
        super().__init__(portal, client, "", _no_headers, _no_headers)
        self._open: dict[str, ClientConnection] = {}

    def ask(self, session: str) -> Leave:
        url = self._portal.url.replace("http://", "ws://")
        headers = {"Authorization": self._client.headers["Authorization"]}
        stack = ExitStack()
        opened = connect(f"{url}/ws/chat/{session}", additional_headers=headers)
        self._open[session] = stack.enter_context(opened)
        self._open[session].send(json.dumps({"type": "send_message", "message": "hi"}))
        return stack.close

    def is_answered(self, session: str) -> bool:
        history = self._client.get(f"/api/llm/chat/session/{session}/history").json()
        return [message["status"] for message in history.get("messages", [])] == ["complete"] * 2

    def stop(self, session: str) -> None:
        self._open[session].send(json.dumps({"type": "stop"}))


class PythonDoor:
    """Plain Python, with an event loop on a thread of its own."""

    def __init__(self, settings: Settings) -> None:
        self._background = BackgroundLoop()
        self._stack = AsyncExitStack()
        self._portal: Container = self._run(self._stack.enter_async_context(open_container(settings)))

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._background.loop).result(20)

    def ask(self, session: str) -> Leave:
        asking = self._portal.sessions.aprocess_message(session, "", "hi")
        waiting = asyncio.run_coroutine_threadsafe(asking, self._background.loop)
        return waiting.cancel

    def stop(self, session: str) -> None:
        self._run(self._portal.sessions.stop(LOCAL, session))

    def waiting(self) -> int:
        return self._portal.llm.places.waiting

    def is_over(self, session: str) -> bool:
        page = self._run(self._portal.sessions.page(LOCAL, session))
        return all(message.status == "cancelled" for message in page.messages)

    def close(self) -> None:
        self._run(self._stack.aclose())
        self._background.stop()


def _no_headers(_session: str) -> dict[str, Any]:
    return {}


def _accept(accept: str) -> Form:
    return lambda _session: {"Accept": accept}


def _message(session: str) -> dict[str, Any]:
    return {"session_id": session, "message": "hi"}


def _in_session(session: str) -> dict[str, Any]:
    return {"X-Session-Id": session}


def _completion(*, stream: bool) -> Form:
    return lambda _session: {"messages": [{"role": "user", "content": "hi"}], "stream": stream}


def _response(*, stream: bool) -> Form:
    return lambda session: {"input": "hi", "conversation": session, "stream": stream}


WEB_DOORS: dict[str, tuple[str, Form, Form]] = {
    "REST": ("/api/llm/chat/session", _accept("application/json"), _message),
    "SSE": ("/api/llm/chat/session/stream", _accept("text/event-stream"), _message),
    "NDJSON": ("/api/llm/chat/session/stream", _accept("application/x-ndjson"), _message),
    "/v1 in a session": ("/v1/chat/completions", _in_session, _completion(stream=False)),
    "/v1 in a session, streamed": ("/v1/chat/completions", _in_session, _completion(stream=True)),
    "responses": ("/v1/responses", _no_headers, _response(stream=False)),
    "responses, streamed": ("/v1/responses", _no_headers, _response(stream=True)),
}
"""Path, headers and body of what is posted."""

FORGETFUL_DOORS: dict[str, tuple[str, Form, Form]] = {
    "/v1": ("/v1/chat/completions", _no_headers, _completion(stream=False)),
    "/v1, streamed": ("/v1/chat/completions", _no_headers, _completion(stream=True)),
}
"""Nobody can stop what comes by these but who asks, by leaving."""

DETACHED = {"MQTT", "WebSocket"}
"""What came so runs on when its client goes."""


@pytest.fixture
def doors(
    fake_thread: FakeLLM,
    mosquitto: Mosquitto,
    tmp_path: Any,
    make_portal: MakePortal,
    settings_for: Callable[..., Settings],
) -> Iterator[dict[str, Door]]:
    """All of them, each with one place at the LLM server."""
    (tmp_path / "web").mkdir()
    portal = make_portal(
        tmp_path / "web",
        LLM_SERVER_URL=fake_thread.url,
        MQTT_BROKER_URL=mosquitto.url,
        MQTT_PROJECTS="maze",
        LLM_MAX_CONCURRENCY="1",
    ).start()
    python = PythonDoor(settings_for(fake_thread.url, llm_max_concurrency=1))
    game = GameDoor(portal, mosquitto)
    with portal.client() as client:
        yield {
            **{name: WebDoor(portal, client, *how) for name, how in WEB_DOORS.items()},
            **{name: ForgetfulDoor(portal, client, *how) for name, how in FORGETFUL_DOORS.items()},
            "WebSocket": SocketDoor(portal, client),
            "MQTT": game,
            "Python": python,
        }
    game.close()
    python.close()
    portal.stop()


def seconds_to_end(door: Door, fake: FakeLLM, stage: str, *, by_stop: bool) -> float:
    """Asks, ends it at a stage, and tells how long it took until the LLM server was rid of it; of one that
    waits, until the queue was, which must not reach the server then."""
    session, before = new_id(), new_id()
    if stage == "queued":
        fake.script = Script(before_first=60)
        leave_before = door.ask(before)
        wait_until(lambda: fake.running == 1, what="one that holds the place")
    dropped, pieces, asked = fake.dropped, fake.pieces, len(fake.requests)
    fake.script = STAGES[stage]
    leave = door.ask(session)
    reached = {"queued": lambda: door.waiting() == 1, "in the middle": lambda: fake.pieces > pieces + 3}
    wait_until(reached.get(stage, lambda: fake.running == 1), what=stage)
    began = time.monotonic()
    door.stop(session) if by_stop else leave()
    over = (lambda: door.waiting() == 0) if stage == "queued" else (lambda: fake.dropped > dropped)
    wait_until(over, what=f"the end of one that was {stage}")
    took = time.monotonic() - began
    wait_until(lambda: door.is_over(session), what="the mark of a stopped turn")
    leave()
    if stage == "queued":
        assert len(fake.requests) == asked, "what was stopped in the queue never reached the server"
        door.stop(before)
        leave_before()
    wait_until(lambda: fake.running == 0, what="an LLM server at rest")
    return took


@pytest.mark.parametrize("way", ["stop", "leave"])
def test_the_llm_server_is_rid_of_it_within_a_second(
    way: str, doors: dict[str, Door], fake_thread: FakeLLM, form: ChaosForm
) -> None:
    names = [name for name in doors if name not in (FORGETFUL_DOORS if way == "stop" else DETACHED)]
    took = {
        (stage, name, number): seconds_to_end(doors[name], fake_thread, stage, by_stop=way == "stop")
        for number in range(form.stops)
        for stage in STAGES
        for name in names
    }
    worst = max(took, key=lambda which: took[which])
    in_time = sum(seconds <= BAR_S for seconds in took.values())
    print(f"{way}: {in_time} of {len(took)} within {BAR_S:g} s; the slowest {took[worst]:.2f} s ({worst})")
    assert in_time == len(took)


def test_what_was_asked_over_a_socket_goes_on_when_it_is_closed(
    doors: dict[str, Door], fake_thread: FakeLLM
) -> None:
    door, gate = doors["WebSocket"], threading.Event()
    assert isinstance(door, SocketDoor)
    fake_thread.script = Script(gate=gate)
    door.ask("first")()
    wait_until(lambda: fake_thread.running == 1, what="one that has no piece yet")
    door.ask("queued")()
    wait_until(lambda: door.waiting() == 1, what="one that waits")
    gate.set()
    wait_until(lambda: door.is_answered("first") and door.is_answered("queued"), what="their answers")
    fake_thread.script = Script(pieces=text(*"abcdef"), between=0.1)
    leave = door.ask("middle")
    wait_until(lambda: fake_thread.pieces > 4, what="its first pieces")
    leave()
    wait_until(lambda: door.is_answered("middle"), what="the answer")
    fake_thread.script = Script(whole=True, before_first=0.5)
    leave = door.ask("whole")
    wait_until(lambda: fake_thread.running == 1, what="a server that does not stream")
    leave()
    wait_until(lambda: door.is_answered("whole"), what="the answer")
    assert fake_thread.dropped == 0
