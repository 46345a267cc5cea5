"""The load of the soak: people and games that do all that can be done, each in a session of its own."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from app.events import new_id

PROJECT = "soak"
ENDINGS = {"final", "cancelled", "superseded", "expired", "error"}
ANSWER_S = 30.0
"""How long an answer may take; none of the load should ever have to wait for it."""

Event = dict[str, Any]
CHAT, COMPLETIONS = "/api/llm/chat/session", "/v1/chat/completions"


class Game:
    """An MQTT client on a thread of its own, which keeps nothing of what it has received."""

    def __init__(self, port: int, protocol: MQTTProtocolVersion) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[str, asyncio.Future[Event]] = {}
        self._seen: dict[str, int] = {}
        self._client = paho.Client(CallbackAPIVersion.VERSION2, protocol=protocol)
        self._ready = asyncio.Event()
        topics = [(f"{PROJECT}/{name}/#", 1) for name in ("assistant_response", "hint", "stream")]

        def connected(*_: Any) -> None:
            self._client.subscribe(topics)

        def subscribed(*_: Any) -> None:
            self._loop.call_soon_threadsafe(self._ready.set)

        self._client.on_connect, self._client.on_subscribe = connected, subscribed
        self._client.on_message = self._received
        self._client.connect("127.0.0.1", port)

    async def __aenter__(self) -> Game:
        self._client.loop_start()
        await asyncio.wait_for(self._ready.wait(), ANSWER_S)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._client.disconnect()
        await asyncio.to_thread(self._client.loop_stop)

    async def ask(self, topic: str, session: str, body: Event, *, stream: bool = False) -> Event:
        """Publishes, and returns the answer; of a stream its end, all of which must have come in order."""
        request_id = new_id()
        awaited = [request_id, f"stream {request_id}"] if stream else [request_id]
        for name in awaited:
            self._waiting[name] = self._loop.create_future()
        asked = {**body, "requestId": request_id, "format": "json", "stream": stream}
        self._client.publish(f"{PROJECT}/{topic}/{session}", json.dumps(asked), qos=1)
        try:
            answers = await asyncio.wait_for(
                asyncio.gather(*(self._waiting[name] for name in awaited)), ANSWER_S
            )
        finally:
            for name in awaited:
                del self._waiting[name]
        return answers[-1]

    def say(self, topic: str, session: str, body: Event) -> None:
        self._client.publish(f"{PROJECT}/{topic}/{session}", json.dumps(body), qos=1)

    def _received(self, _client: object, _data: object, message: paho.MQTTMessage) -> None:
        self._loop.call_soon_threadsafe(self._take, message.topic, bytes(message.payload))

    def _take(self, topic: str, payload: bytes) -> None:
        said = json.loads(payload)
        name = said.get("requestId", "")
        if topic.startswith(f"{PROJECT}/stream/"):
            request_id = topic.rsplit("/", 1)[-1]
            expected = 0 if said["seq"] == 0 else self._seen.get(request_id, -1) + 1
            if said["seq"] != expected:
                said = {"type": "gap", "seq": said["seq"], "expected": expected}
            self._seen[request_id] = expected
            if said["type"] not in ENDINGS | {"gap"}:
                return
            del self._seen[request_id]
            name = f"stream {request_id}"
        waiting = self._waiting.get(name)
        if waiting is not None and not waiting.done():
            waiting.set_result(said)


class Lane:
    """One that does one thing after the other, in one session for a while and then in another. What it does
    is looked at: an answer that is not what it should be is an `AssertionError`."""

    def __init__(self, web: aiohttp.ClientSession, games: list[Game], template: str, seed: int) -> None:
        self._web, self._games, self._template = web, games, template
        self._chance = random.Random(seed)
        self._session = new_id()
        self.done: Counter[str] = Counter()
        self._recent: deque[str] = deque(maxlen=5)
        self._acts: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (8, self._rest),
            (8, self._sse),
            (4, self._sse_left),
            (4, self._ndjson_resumed),
            (8, self._socket_resumed),
            (2, self._watched),
            (10, self._mqtt),
            (4, self._states),
            (4, self._openai),
            (2, self._openai_left),
            (3, self._response),
            (4, self._stopped),
            (2, self._cancelled),
            (2, self._again),
            (2, self._cleared),
            (4, self._another_session),
            (3, self._rendered),
            (3, self._looked),
        ]

    async def run(self, seconds: float, every_s: float) -> None:
        """Does something every so many seconds, or as soon as it can."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        weights = [weight for weight, _ in self._acts]
        await asyncio.sleep(self._chance.random() * every_s)
        while (began := loop.time()) < end:
            [(_, act)] = self._chance.choices(self._acts, weights)
            name = act.__name__.lstrip("_")
            self._recent.append(name)
            try:
                await act()
            except Exception as error:
                error.add_note(f"session {self._session}: {', '.join(self._recent)}")
                raise
            self.done[name] += 1
            await asyncio.sleep(max(0.0, began + every_s * self._chance.uniform(0.5, 1.5) - loop.time()))

    # --- HTTP ---

    async def _rest(self) -> None:
        said = await self._post(CHAT, session_id=self._session, message="hi")
        assert said["response"], said

    async def _sse(self) -> None:
        _whole([event async for event in self._stream()])

    async def _sse_left(self) -> None:
        left_after = self._chance.randrange(1, 4)
        stream = self._stream()
        async for event in stream:
            left_after -= event["type"] != "queued"
            if not left_after:
                break
        await stream.aclose()

    async def _ndjson_resumed(self) -> None:
        seen: list[Event] = []
        stream = self._stream(accept="application/x-ndjson", request_id=new_id())
        async for event in stream:
            seen.append(event)
            if event["type"] == "token":
                break
        await stream.aclose()
        path = f"/api/llm/turns/{seen[0]['turn_id']}/events"
        async with self._web.get(path, params={"after": f"1.{len(seen) - 1}"}) as answer:
            seen += [json.loads(line[6:]) async for line in answer.content if line.startswith(b"data: ")]
        _whole(seen)

    async def _stopped(self) -> None:
        stream = self._stream()
        async for event in stream:
            if event["type"] == "token":
                await self._post(f"{CHAT}/{self._session}/stop")
            last = event
        assert last["type"] in {"cancelled", "final"}, last

    async def _again(self) -> None:
        await self._rest()
        assert (await self._post(f"{CHAT}/{self._session}/regenerate"))["response"]

    async def _cleared(self) -> None:
        async with self._web.delete(f"{CHAT}/{self._session}") as answer:
            assert answer.status in {200, 404}, await answer.text()

    async def _another_session(self) -> None:
        async with self._web.delete(f"/api/sessions/{self._session}") as answer:
            assert answer.status in {204, 404}, await answer.text()
        self._session = new_id()
        made_from = {"template_id": self._template, "variables": {"name": "Ada"}}
        await self._post(CHAT, session_id=self._session, message="hi", **made_from)

    async def _rendered(self) -> None:
        said = await self._post(f"/api/templates/{self._template}/render", variables={"name": "Ada"})
        assert said["prompt"] == "Hello Ada.", said

    async def _looked(self) -> None:
        for path in ("/health/live", "/health/ready", "/api/llm/health", "/api/models", "/api/sessions"):
            async with self._web.get(path) as answer:
                assert answer.status == 200, await answer.text()

    # --- sockets: one is left in the middle and comes back ---

    async def _socket_resumed(self) -> None:
        request_id, path = new_id(), f"/ws/chat/{self._session}"
        seen: list[Event] = []
        async with self._web.ws_connect(path) as socket:
            await socket.send_json({"type": "send_message", "message": "hi", "request_id": request_id})
            async for event in _told(socket):
                # A turn that was left a moment ago may be seen to end here.
                mine = event.get("request_id") == request_id or (
                    seen and event["turn_id"] == seen[0]["turn_id"]
                )
                seen += [event] if mine and "id" in event else []
                if mine and event["type"] == "ai_message_chunk":
                    break
        turn, last = seen[0]["turn_id"], seen[-1]["id"]
        async with self._web.ws_connect(path) as socket:
            await socket.send_json({"type": "resume", "turn_id": turn, "after": last})
            resumed = False
            async for event in _told(socket):
                # While it runs, a new socket is sent it from its beginning, until `resume` is taken.
                resumed = resumed or event["type"] == "resumed"
                seen += [event] if resumed and "id" in event else []
                if resumed and event["type"] == "ai_message_complete":
                    break
        _whole(seen)

    async def _watched(self) -> None:
        async with self._web.ws_connect("/ws/sessions") as socket:
            told = _told(socket)
            assert (await anext(told))["type"] == "connection_established"
            await self._rest()
            async for event in told:
                # Of one that is new in the list it is told that it was created.
                if event.get("session", {}).get("session_id") == self._session:
                    break

    # --- MQTT ---

    async def _mqtt(self) -> None:
        game, stream = self._chance.choice(self._games), self._chance.random() < 0.5
        said = await game.ask("user_input", self._session, {"message": "hi"}, stream=stream)
        assert said["type"] == "final", said

    async def _states(self) -> None:
        game = self._chance.choice(self._games)
        for number in range(3):
            game.say("state", self._session, {"position": [number, 1], "oxygen": 30, "requestId": new_id()})
        said = await game.ask("state", self._session, {"position": [9, 9]})
        assert said.get("hint"), said

    async def _cancelled(self) -> None:
        game = self._chance.choice(self._games)
        asking = asyncio.create_task(game.ask("user_input", self._session, {"message": "hi"}))
        await asyncio.sleep(self._chance.uniform(0, 0.1))
        game.say("cancel", self._session, {})
        assert (await asking)["type"] in {"cancelled", "final"}

    # --- OpenAI's API ---

    async def _openai(self) -> None:
        said = await self._post(COMPLETIONS, messages=[{"role": "user", "content": "hi"}])
        assert said["choices"][0]["message"]["content"], said

    async def _openai_left(self) -> None:
        asked = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
        headers = {"X-Session-Id": self._session}
        async with self._web.post(COMPLETIONS, json=asked, headers=headers) as answer:
            assert answer.status == 200, await answer.text()
            await answer.content.readline()
            answer.close()

    async def _response(self) -> None:
        said = await self._post("/v1/responses", input="hi", conversation=self._session)
        assert said["status"] == "completed", said

    def _is_kept(self) -> bool:
        """Whether a chat completion is to be a turn of the session."""
        return self._chance.random() < 0.7

    # --- what they share ---

    async def _post(self, path: str, **body: Any) -> Event:
        headers = {"X-Session-Id": self._session} if path == COMPLETIONS and self._is_kept() else None
        async with self._web.post(path, json=body, headers=headers) as answer:
            assert answer.status == 200, (path, await answer.text())
            said: Event = await answer.json()
            return said

    async def _stream(self, accept: str = "text/event-stream", **body: Any) -> AsyncGenerator[Event, None]:
        asked = {"session_id": self._session, "message": "hi", **body}
        async with self._web.post(f"{CHAT}/stream", json=asked, headers={"Accept": accept}) as answer:
            assert answer.status == 200, await answer.text()
            try:
                async for line in answer.content:
                    if line.startswith((b"data: ", b"{")):
                        yield json.loads(line.removeprefix(b"data: "))
            finally:
                answer.close()  # else the rest of the stream would be read first


async def _told(socket: aiohttp.ClientWebSocketResponse) -> AsyncIterator[Event]:
    async with asyncio.timeout(ANSWER_S):
        async for message in socket:
            yield json.loads(message.data)
    raise AssertionError(f"the socket was closed with {socket.close_code}")


def _whole(events: list[Event]) -> None:
    """The pieces of the reply make the reply."""
    assert events[-1]["type"] in {"final", "ai_message_complete"}, events
    pieces = [event["content"] for event in events if event["type"] in {"token", "ai_message_chunk"}]
    assert "".join(pieces) == events[-1]["response"], events
