"""Whatever bytes come on whatever topic: the decoder raises nothing, and answers go to the asker only."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from app.errors import PortalError
from app.events import is_id
from app.mqtt.answers import refusal
from app.mqtt.connection import Incoming
from app.mqtt.contract import BESIDE_STATE, Command, ForeignReplyTopic, Refusal, read
from app.mqtt.topics import VERBS

names = st.sampled_from(["s1", "other", "", "+", "#", "a/b", "a\0b", "$SYS", "é", "x" * 129, "cab-7", "all"])
levels = st.sampled_from(
    [*VERBS, "device", "assistant_response", "hint", "status", "s1", "+", "#", "", "cab-7"]
)
topics = st.one_of(
    st.builds(lambda verb, name: f"maze/{verb}/{name}", st.sampled_from(VERBS), names),
    st.builds(lambda verb: f"maze/{verb}", st.sampled_from(VERBS)),
    st.builds(
        lambda device, verb, name: f"maze/device/{device}/{verb}/{name}", names, st.sampled_from(VERBS), names
    ),
    st.lists(levels, max_size=6).map(lambda found: "/".join(["maze", *found])),
)
places = st.one_of(
    topics,
    st.builds(
        lambda kind, name: f"maze/{kind}/{name}", st.sampled_from(["assistant_response", "hint"]), names
    ),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), names, places),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
keys = st.sampled_from([*sorted(BESIDE_STATE), "target", "template", "reset", "state", "tools", "position"])
payloads = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=100).map(str.encode),
    st.dictionaries(keys, values, max_size=8).map(lambda body: json.dumps(body).encode()),
)


def messages() -> st.SearchStrategy[Incoming]:
    return st.builds(
        Incoming,
        topics,
        payloads,
        again=st.booleans(),
        mid=st.integers(1, 65535),
        response_topic=st.one_of(st.none(), places),
        correlation=st.one_of(st.none(), st.binary(max_size=20)),
        expiry=st.one_of(st.none(), st.integers(0, 2**32 - 1)),
        user=st.dictionaries(
            st.sampled_from(["token", "maxChunkBytes", "x"]), st.text(max_size=10), max_size=3
        ),
    )


def own_topics(found: Command | Refusal, session: str | None) -> tuple[str, ...]:
    address = found.address
    bases = [address.at("assistant_response", ""), address.at("hint", "")]
    if address.verb == "session":
        return (f"{address.base}/session/response",)
    if address.device is None:
        bases = [f"{base}{session or 'all'}" for base in bases]
    return tuple(bases)


@settings(max_examples=600)
@given(messages())
@example(Incoming("maze/state/s1", b'{"state":{"a":' + b"[" * 5000))
@example(Incoming("maze/user_input/s1", b'{"message":"\\ud800"}'))
def test_no_message_raises_or_reaches_anybody_else(message: Incoming) -> None:
    found = read("maze", message)
    if found is None:
        return
    target = found.target
    if target is None:
        return
    session: Any = target.session_id or None
    assert session is None or is_id(session)
    own = own_topics(found, session)
    assert any(target.topic == base.rstrip("/") or target.topic.startswith(base) for base in own), target
    assert not any(mark in target.topic for mark in "+#\0")
    assert target.stream is None or target.stream == found.address.at("stream", session)
    if isinstance(found, Refusal):
        assert isinstance(found.error, PortalError)
        assert refusal(target, found.error, found.request_id)
    elif found.address.device is not None and found.session_id is not None:
        assert found.key == f"{found.address.device}:{found.session_id}", "a device has sessions of its own"


@pytest.mark.parametrize("verb", ["template", "clear_history", "delete_session"])
@pytest.mark.parametrize(
    ("base", "below"),
    [("maze", "hint/all"), ("maze", "hint/all/mine"), ("maze/device/cab-7", "hint/s1/mine")],
)
def test_what_is_about_no_session_has_its_response_topic_too(verb: str, base: str, below: str) -> None:
    wanted = f"{base}/{below}"
    found = read("maze", Incoming(f"{base}/{verb}", b'{"template": "Hi."}', response_topic=wanted))
    assert isinstance(found, Command), found
    assert found.target.topic == wanted
    foreign = read("maze", Incoming(f"{base}/{verb}", b"{}", response_topic="maze/hint/s1"))
    assert isinstance(foreign, Refusal), "the topic of a single session is another's"


@pytest.mark.parametrize(
    ("verb", "kind", "wrong"),
    [
        ("user_input", "assistant_response", {"message": "hi", "temperature": 9}),
        ("user_input", "assistant_response", {"message": ""}),
        ("user_input", "assistant_response", {"message": "hi", "requestId": "a/b"}),
        ("user_input", "assistant_response", {"message": "hi", "sessionId": "a/b"}),
        ("state", "hint", {}),
        ("state", "hint", {"oxygen": 1, "temperature": 9}),
        ("state", "assistant_response", {"state": {"oxygen": 1}, "temperature": 9}),
    ],
)
def test_an_error_goes_where_the_answer_was_to_go(verb: str, kind: str, wrong: dict[str, Any]) -> None:
    def target_of(**more: Any) -> str:
        found = read("maze", Incoming(f"maze/{verb}/s1", json.dumps({**wrong, **more}).encode()))
        assert isinstance(found, Refusal)
        assert not isinstance(found.error, ForeignReplyTopic)
        assert found.target is not None
        return found.target.topic

    default = target_of()
    assert target_of(replyTopic=f"maze/{kind}/s1/x") == f"maze/{kind}/s1/x"
    assert target_of(reply_topic=f"maze/{kind}/s1/x") == f"maze/{kind}/s1/x"
    for useless in (f"maze/{kind}/s2/x", f"maze/{kind}/s1/#", "", 7, None):
        assert target_of(replyTopic=useless) == default


def test_only_what_takes_a_reply_topic_has_its_errors_there() -> None:
    body = {"template": 7, "replyTopic": "maze/hint/s1/x"}
    found = read("maze", Incoming("maze/template/s1", json.dumps(body).encode()))
    assert isinstance(found, Refusal)
    assert found.target is not None
    assert found.target.topic == "maze/hint/s1"


def test_of_two_places_for_the_answer_the_response_topic_counts() -> None:
    body = json.dumps({"message": "hi", "replyTopic": "maze/assistant_response/s1/x"}).encode()
    mine = read("maze", Incoming("maze/user_input/s1", body, response_topic="maze/assistant_response/s1/y"))
    assert isinstance(mine, Command)
    assert mine.target.topic == "maze/assistant_response/s1/y"
    foreign = read("maze", Incoming("maze/user_input/s1", body, response_topic="maze/assistant_response/s2"))
    assert isinstance(foreign, Refusal)
    assert isinstance(foreign.error, ForeignReplyTopic)
    assert foreign.target is not None
    assert foreign.target.topic == "maze/assistant_response/s1"


def test_an_empty_reply_topic_is_none() -> None:
    found = read("maze", Incoming("maze/user_input/s1", b'{"message": "hi", "replyTopic": ""}'))
    assert isinstance(found, Command), found
    assert found.target.topic == "maze/assistant_response/s1"
