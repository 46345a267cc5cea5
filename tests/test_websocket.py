"""A session over a WebSocket, with real sockets."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import psutil
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from app.events import new_id
from app.routers import websocket
from app.services.token_watch import LOOK_S
from app.sockets import CLOSE_S
from tests.fake_llm import FakeLLM, Script, text
from tests.support import GameClient, Mosquitto, Portal, ask, token_of, wait_until

pytestmark = pytest.mark.slow

Message = dict[str, Any]


class Chat:
    """A client of the socket."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection

    def say(self, kind: str, **rest: Any) -> None:
        self.connection.send(json.dumps({"type": kind, **rest}))

    def next(self) -> Message:
        found: Message = json.loads(self.connection.recv(20))
        return found

    def until(self, kind: str) -> list[Message]:
        """What comes, up to the first message of this type."""
        seen = [self.next()]
        while seen[-1]["type"] != kind:
            seen.append(self.next())
        return seen


@contextmanager
def opened(portal: Portal, client: httpx.Client, path: str, **options: Any) -> Iterator[Chat]:
    """A socket on a path, as the client unless the options say who, before anything was read from it."""
    url = portal.url.replace("http://", "ws://") + path
    options = options or {"additional_headers": {"Authorization": client.headers["Authorization"]}}
    ticket = options.pop("ticket", None)
    with connect(url if ticket is None else f"{url}?ticket={ticket}", **options) as connection:
        yield Chat(connection)


@contextmanager
def chat(portal: Portal, client: httpx.Client, session: str, **options: Any) -> Iterator[Chat]:
    with opened(portal, client, f"/ws/chat/{session}", **options) as socket:
        assert socket.next() == {"type": "connection_established", "session_id": session}
        yield socket


def types(messages: list[Message]) -> list[str]:
    return [message["type"] for message in messages]


def reply(messages: list[Message]) -> str:
    return "".join(m["content"] for m in messages if m["type"] == "ai_message_chunk")


def test_a_message_is_answered(fake_portal: Portal, client: httpx.Client, llm: FakeLLM, session: str) -> None:
    with chat(fake_portal, client, session) as socket:
        socket.say("send_message", message="hi", request_id="r", temperature=0.5, system_prompt="Be kind.")
        seen = socket.until("ai_message_complete")
    assert types(seen)[:2] == ["user_message", "ai_typing"]
    first, last = seen[0], seen[-1]
    assert (first["request_id"], first["session_id"], first["message"]["content"]) == ("r", session, "hi")
    assert first["message"]["id"] == first["message_id"]
    assert reply(seen) == last["response"] == last["message"]["content"] == "Hello there"
    assert last["message"]["role"] == "assistant"
    assert llm.requests[-1]["temperature"] == 0.5
    shown = client.get(f"/api/llm/chat/session/{session}/history").json()["messages"]
    assert [message["content"] for message in shown] == ["Be kind.", "hi", "Hello there"]
    assert shown[-1]["id"] == last["message_id"]


def test_all_sockets_see_what_comes_by_every_door(
    fake_portal: Portal, client: httpx.Client, mosquitto: Mosquitto, llm: FakeLLM, session: str
) -> None:
    game = GameClient(mosquitto.port, f"maze/assistant_response/{session}")
    with chat(fake_portal, client, session) as one, chat(fake_portal, client, session) as two:
        ask(client, session, message="by REST")
        game.publish(f"maze/user_input/{session}", {"message": "by MQTT", "token": token_of(client)})
        game.reply(f"maze/assistant_response/{session}")
        one.say("send_message", message="by socket")
        for socket in (one, two):
            for said in ("by REST", "by MQTT", "by socket"):
                seen = socket.until("ai_message_complete")
                assert seen[0]["message"]["content"] == said
                assert reply(seen) == "Hello there"
    game.close()


def test_who_comes_in_the_middle_sees_the_turn_from_its_beginning(
    fake_portal: Portal, client: httpx.Client, llm: FakeLLM, session: str
) -> None:
    llm.script = Script(pieces=text(*"abcdefgh"), between=0.1)
    with chat(fake_portal, client, session) as one:
        one.say("send_message", message="go")
        one.until("ai_message_chunk")
        with chat(fake_portal, client, session) as two:
            seen = two.until("ai_message_complete")
    assert seen[0]["message"]["content"] == "go"
    assert reply(seen) == "abcdefgh"


def test_a_turn_is_resumed_where_it_was_left(
    fake_portal: Portal, client: httpx.Client, llm: FakeLLM, session: str
) -> None:
    llm.script = Script(pieces=text(*"abcdefgh"), between=0.1)
    with chat(fake_portal, client, session) as socket:
        socket.say("send_message", message="go")
        before = socket.until("ai_message_chunk")
    wait_until(lambda: llm.running == 0, what="the end of the turn, which nobody follows")
    with chat(fake_portal, client, session) as socket:
        socket.say("resume", turn_id=before[0]["turn_id"], after=before[-1]["id"])
        after = socket.until("ai_message_complete")
    assert reply(before) + reply(after) == "abcdefgh" == after[-1]["response"]
    assert "user_message" not in types(after)


def test_a_request_id_is_answered_once_and_told_again(
    fake_portal: Portal, client: httpx.Client, llm: FakeLLM, session: str
) -> None:
    with chat(fake_portal, client, session) as socket:
        socket.say("send_message", message="hi", request_id="r")
        first = socket.until("ai_message_complete")
        socket.say("send_message", message="hi", request_id="r")
        again = socket.until("ai_message_complete")
        socket.say("send_message", message="other", request_id="r")
        refused = socket.next()
    assert (first[-1]["turn_id"], reply(first)) == (again[-1]["turn_id"], reply(again))
    assert len(llm.requests) == 1
    assert (refused["type"], refused["request_id"], refused["error"]["code"]) == ("error", "r", "conflict")


def test_stop_keeps_what_there_was(
    fake_portal: Portal, client: httpx.Client, llm: FakeLLM, session: str
) -> None:
    llm.script = Script(pieces=text("some", " more"), between=60)
    with chat(fake_portal, client, session) as one, chat(fake_portal, client, session) as two:
        one.say("send_message", message="go")
        one.until("ai_message_chunk")
        two.say("stop")
        for socket in (one, two):
            assert socket.until("cancelled")[-1]["response"] == "some"
        two.say("stop")
        two.say("ping")
        assert two.next() == {"type": "pong"}, "nothing runs, so nothing is stopped"


def test_a_turn_runs_on_when_its_socket_goes(
    fake_portal: Portal, client: httpx.Client, llm: FakeLLM, session: str
) -> None:
    llm.script = Script(pieces=text(*"abcd"), between=0.1)
    with chat(fake_portal, client, session) as socket:
        socket.say("send_message", message="go")
        socket.until("ai_message_chunk")

    def last() -> str:
        shown = client.get(f"/api/llm/chat/session/{session}/history").json()["messages"]
        return str(shown[-1]["content"])

    wait_until(lambda: last() == "abcd", what="the answer")


def test_the_last_message_is_answered_again(
    fake_portal: Portal, client: httpx.Client, llm: FakeLLM, session: str
) -> None:
    with chat(fake_portal, client, session) as socket:
        socket.say("regenerate")
        assert socket.next()["error"]["code"] == "not_found"
        socket.say("send_message", message="hi")
        first = socket.until("ai_message_complete")
        llm.script = Script(pieces=text("Good", " day"))
        socket.say("regenerate")
        second = socket.until("ai_message_complete")
        assert second[0]["message"] == first[0]["message"]
        assert second[-1]["response"] == "Good day"
    path = f"/api/llm/chat/session/{session}"
    shown = client.get(f"{path}/history").json()["messages"]
    assert [message["content"] for message in shown] == ["hi", "Good day"]
    assert [message["content"] for message in llm.requests[-1]["messages"]] == ["hi"]
    llm.script = Script(pieces=text("Hey"))
    answer = client.post(f"{path}/regenerate", json={"temperature": 0.1})
    assert (answer.status_code, answer.json()["response"]) == (200, "Hey")
    assert llm.requests[-1]["temperature"] == 0.1
    streamed = client.post(f"{path}/regenerate", headers={"Accept": "application/x-ndjson"})
    assert [json.loads(line)["type"] for line in streamed.text.splitlines()] == ["accepted", "token", "final"]
    ask(client, session, message="next")
    assert [m["content"] for m in llm.requests[-1]["messages"]] == ["hi", "Hey", "next"]


def test_a_busy_session_does_not_answer_again(
    fake_portal: Portal, client: httpx.Client, llm: FakeLLM, session: str
) -> None:
    llm.script = Script(pieces=text("a", "b"), between=60)
    with chat(fake_portal, client, session) as socket:
        socket.say("send_message", message="go")
        socket.until("ai_message_chunk")
        assert client.post(f"/api/llm/chat/session/{session}/regenerate").status_code == 409
        socket.say("stop")
        socket.until("cancelled")


def test_others_see_that_somebody_types(fake_portal: Portal, client: httpx.Client, session: str) -> None:
    with chat(fake_portal, client, session) as one, chat(fake_portal, client, session) as two:
        one.say("typing")
        told = two.next()
        assert (told["type"], told["session_id"]) == ("typing", session)
        one.say("stop_typing")
        assert two.next()["type"] == "stop_typing"
        one.say("ping")
        assert one.next() == {"type": "pong"}, "oneself is told nothing"


@pytest.mark.parametrize(
    ("said", "code", "told"),
    [
        ("no JSON", "invalid_request", "JSON"),
        ("[1]", "invalid_request", "object"),
        ('{"type": "dance"}', "invalid_request", "type: one of send_message"),
        ('{"type": "send_message"}', "invalid_request", "message"),
        ('{"type": "send_message", "message": " "}', "invalid_request", "message"),
        ('{"type": "send_message", "message": "x", "temperature": 9}', "invalid_request", "temperature"),
        ('{"type": "send_message", "message": "x", "session_id": "y"}', "invalid_request", "session_id"),
        ('{"type": "resume"}', "invalid_request", "turn_id"),
        ('{"type": "resume", "turn_id": "x"}', "not_found", "turn"),
        ('{"type": "approve", "call_id": "x"}', "not_found", "call_id"),
    ],
)
def test_what_is_wrong_is_told_and_the_socket_stays(
    fake_portal: Portal, client: httpx.Client, session: str, said: str, code: str, told: str
) -> None:
    with chat(fake_portal, client, session) as socket:
        socket.connection.send(said)
        error = socket.next()["error"]
        assert error["code"] == code
        assert told in error["message"]
        socket.say("ping")
        assert socket.next() == {"type": "pong"}


REFUSED: list[tuple[dict[str, Any], int]] = [
    ({"additional_headers": {}}, 401),
    ({"additional_headers": {"Authorization": "Bearer forged"}}, 401),
    ({"subprotocols": [Subprotocol("bearer"), Subprotocol("forged")]}, 401),
    ({"ticket": "forged"}, 401),
    ({"origin": "https://evil.example"}, 403),
]
"""How a socket is not opened, and the status that says so."""


@pytest.mark.parametrize(("options", "status"), [*REFUSED, ({"session": "no%20such"}, 422)])
def test_nobody_else_opens_a_socket(
    fake_portal: Portal, client: httpx.Client, options: dict[str, Any], status: int
) -> None:
    session = options.get("session", "s")
    options = {name: value for name, value in options.items() if name != "session"}
    if "origin" in options or not options:
        options["additional_headers"] = {"Authorization": client.headers["Authorization"]}
    with pytest.raises(InvalidStatus) as refused, chat(fake_portal, client, session, **options):
        pass
    assert refused.value.response.status_code == status


def test_a_ticket_opens_one_socket_once(fake_portal: Portal, client: httpx.Client) -> None:
    given = client.post("/api/auth/ws-ticket").json()
    assert given["expires_in"] > 0
    with chat(fake_portal, client, "s", ticket=given["ticket"], origin=fake_portal.url) as socket:
        socket.say("ping")
        assert socket.next() == {"type": "pong"}
    with pytest.raises(InvalidStatus), chat(fake_portal, client, "s", ticket=given["ticket"]):
        pass
    assert httpx.post(f"{fake_portal.url}/api/auth/ws-ticket").status_code == 401


def test_a_session_of_another_is_another_session(
    fake_portal: Portal, client: httpx.Client, llm: FakeLLM, session: str
) -> None:
    with fake_portal.client(f"eve-{new_id()[-6:]}") as eve, chat(fake_portal, eve, session) as listening:
        turn = ask(client, session, message="secret").json()["turn_id"]
        listening.say("resume", turn_id=turn)
        assert listening.next()["error"]["code"] == "not_found"
        listening.say("regenerate")
        assert listening.next()["error"]["code"] == "not_found"
        listening.say("ping")
        assert listening.next() == {"type": "pong"}


def test_a_viewer_sees_and_does_not_send(fake_portal: Portal, client: httpx.Client, session: str) -> None:
    body = {"name": "reader", "scopes": ["sessions:read"]}
    key = client.post("/api/keys", json=body).json()["secret"]
    headers = {"Authorization": f"Bearer {key}"}
    with chat(fake_portal, client, session, additional_headers=headers) as socket:
        ask(client, session, message="hi")
        assert reply(socket.until("ai_message_complete")) == "Hello there"
        for kind in ("send_message", "regenerate", "stop"):
            socket.say(kind, message="x")
            assert socket.next()["error"]["code"] == "forbidden"


def test_who_does_not_read_is_closed_and_can_resume(
    fake_portal: Portal, client: httpx.Client, llm: FakeLLM, session: str
) -> None:
    process = fake_portal.process
    assert process is not None
    small = socket.socket()
    small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    small.connect(("127.0.0.1", fake_portal.port))
    mine = small.getsockname()[1]

    def is_open() -> bool:
        found = psutil.Process(process.pid).net_connections()
        return any(connection.raddr[1:] == (mine,) for connection in found)

    headers = {"Authorization": client.headers["Authorization"]}
    slow = {"sock": small, "max_queue": 1, "compression": None, "additional_headers": headers}
    with chat(fake_portal, client, session, **slow):
        large = "x" * 1_000_000
        llm.script = Script(pieces=text(*[large[:50_000]] * 20))
        again, body = f"/api/llm/chat/session/{session}/regenerate", {"max_tokens": 100_000}
        asked = [ask(client, session, **body).json()["turn_id"]]
        asked += [client.post(again, json=body).json()["turn_id"] for _ in range(2)]
        assert is_open()
        llm.script = Script()
        for _ in range(websocket.MOST_BEHIND):
            assert client.post(again).status_code == 200
        wait_until(lambda: not is_open(), CLOSE_S + 5, "the end of the connection")
    with chat(fake_portal, client, session, max_size=None, additional_headers=headers) as back:
        for turn in asked:
            back.say("resume", turn_id=turn)
            assert back.until("ai_message_complete")[-1]["response"] == large


def test_a_socket_ends_with_its_sign_in_and_follows_its_role(
    make_portal: Callable[..., Portal], llm: FakeLLM, tmp_path: Any, session: str
) -> None:
    assert LOOK_S <= 15, "so long it may take"
    look_s = 1.0
    times = {"app.services.token_watch.LOOK_S": look_s}
    portal = make_portal(tmp_path, LLM_SERVER_URL=llm.url).with_times(times).start()
    with ExitStack() as stack:
        ada, eve = (stack.enter_context(portal.client(name)) for name in ("ada", "eve"))
        admin = stack.enter_context(portal.client("admin", role="admin"))
        ending = stack.enter_context(chat(portal, ada, session))
        staying = stack.enter_context(chat(portal, eve, session))
        began = time.monotonic()
        assert ada.delete("/api/auth/sign-ins").status_code == 204
        path = f"/api/admin/users/{eve.get('/api/auth/me').json()['id']}"
        assert admin.patch(path, json={"role": "viewer"}).status_code == 200
        assert ending.next()["error"]["code"] == "unauthenticated"
        with pytest.raises(ConnectionClosed) as closed:
            ending.next()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1008

        def is_refused() -> bool:
            staying.say("regenerate")
            return bool(staying.next()["error"]["code"] == "forbidden")

        wait_until(is_refused, what="the other role")
        assert time.monotonic() - began < look_s + 5


@pytest.mark.parametrize("path", ["/ws/chat/{}", "/ws/sessions", "/api/mqtt/ws/hints/{}"])
def test_a_socket_ends_when_its_user_may_not_open_it_any_more(
    make_portal: Callable[..., Portal], llm: FakeLLM, tmp_path: Any, session: str, path: str
) -> None:
    look_s = 1.0
    times = {"app.services.token_watch.LOOK_S": look_s}
    portal = make_portal(tmp_path, LLM_SERVER_URL=llm.url).with_times(times).start()
    with (
        portal.client() as ada,
        portal.client("admin", role="admin") as admin,
        opened(portal, ada, path.format(session)) as socket,
    ):
        assert socket.next()["type"] == "connection_established"
        assert admin.put("/api/admin/roles/mute", json={"permissions": ["account:write"]}).status_code == 200
        user = f"/api/admin/users/{ada.get('/api/auth/me').json()['id']}"
        assert admin.patch(user, json={"role": "mute"}).status_code == 200
        told = socket.next()
        assert (told["type"], told["error"]["code"]) == ("error", "forbidden")
        with pytest.raises(ConnectionClosed) as closed:
            socket.next()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1008
