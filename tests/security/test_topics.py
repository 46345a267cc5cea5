"""MQTT messages that try to make the bridge speak where it should not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import GameClient, Mosquitto, Portal

pytestmark = pytest.mark.slow

BAD_IDS = [
    "a+b",
    "+",
    "#",
    "a/#",
    "a/b",
    "../x",
    "a\0b",
    "\0",
    "$SYS",
    " ",
    "é",
    "a\n",
    "a" * 129,
    "a" * 65_536,
]


@pytest.fixture
def everything(target: Portal, mosquitto: Mosquitto) -> Iterator[GameClient]:
    """Hears whatever is published."""
    client = GameClient(mosquitto.port, "#", "$SYS/x/#")
    yield client
    client.close()


def said_by_the_bridge(everything: GameClient, session: str, payload: Any) -> dict[str, Any]:
    """The answer to a message, when it and the next one are all that was published meanwhile, on the asker's
    own topic; the next one's is the sign that nothing more follows the first."""
    mine, asked = f"siege/assistant_response/{session}", f"siege/user_input/{session}"
    everything.publish(asked, payload)
    everything.reply(mine)
    everything.publish(asked, {"message": "hi", "format": "json", "requestId": "next"})
    everything.wait_for(lambda: any(b'"next"' in body for body in everything.messages_unlocked(mine)))
    told = [topic for topic, _, retained in everything.received if not retained]
    topics = {topic for topic in told if not topic.endswith("/status")}
    assert topics == {asked, mine}
    assert len(everything.messages(mine)) == 2
    return dict(json.loads(everything.messages(mine)[0]))


@pytest.mark.parametrize("bad", BAD_IDS, ids=lambda bad: repr(bad[:8]))
@pytest.mark.parametrize("field", ["sessionId", "session_id", "requestId"])
def test_a_bad_id_is_an_error_to_who_sent_it_and_nothing_to_anybody_else(
    everything: GameClient, session: str, field: str, bad: str
) -> None:
    told = said_by_the_bridge(everything, session, {"message": "hi", "format": "json", field: bad})
    assert told["error"]["code"] == "invalid_request"
    assert len(json.dumps(told)) < 1000


@pytest.mark.parametrize(
    "topic",
    [
        "siege/assistant_response/somebody-else",
        "siege/assistant_response/{id}x",
        "siege/assistant_response/{id}/#",
        "siege/assistant_response/{id}/+",
        "siege/assistant_response/{id}/a\0b",
        "siege/assistant_response/{id}/../somebody-else/" + "a" * 1024,
        "siege/assistant_response/+",
        "siege/assistant_response/#",
        "siege/assistant_response",
        "siege/user_input/{id}",
        "siege/status",
        "keep/assistant_response/{id}",
        "$SYS/x/{id}",
        "$share/g/siege/assistant_response/{id}",
        "#",
        "+",
        "/",
        " ",
    ],
)
def test_replies_go_to_no_topic_but_ones_own(everything: GameClient, session: str, topic: str) -> None:
    wanted = topic.format(id=session)
    told = said_by_the_bridge(everything, session, {"message": "hi", "format": "json", "replyTopic": wanted})
    assert told["error"]["code"] == "invalid_request"
    assert told["error"]["message"].startswith("replyTopic: ")


@pytest.mark.parametrize(
    "payload",
    [
        b"{" * 200_000,
        b'{"a":' * 200_000,
        b'{"message":NaN}',
        b'{"message":"\\ud800"}',
        b'{"message":"hi","token":' + b"[" * 5000,
        b"\xff\xfe\x00",
        b'{"message":["hi"]}',
        b'{"message":"hi","temperature":1e999}',
        b'{"message":"hi","tools":' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"message":"' + b"a" * 1_000_001 + b'"}',
    ],
    ids=lambda payload: repr(payload[:24]),
)
def test_a_hostile_payload_is_answered_with_an_error(
    everything: GameClient, session: str, payload: bytes
) -> None:
    mine = f"siege/assistant_response/{session}"
    everything.publish(f"siege/user_input/{session}", payload)
    assert everything.reply(mine).startswith(b"Error: ")
    everything.publish(f"siege/user_input/{session}", {"message": "hi", "maxTokens": 1})
    assert not everything.reply(mine, 2).startswith(b"Error: "), "and the bridge goes on"
