"""OpenAI's API: by its official SDK, as it is, against a running portal."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from app.config import child_environment
from app.events import new_id
from tests.fake_llm import USAGE, FakeLLM, Script, text
from tests.support import MakePortal, Portal, Process, ask, free_port, token_of, wait_until

pytestmark = pytest.mark.slow

MODELS = """
[models.big]
id = "fake-1"
aliases = ["smart", "gpt-4o"]

[models.secret]
id = "fake-1"

[models.shy]
provider = "other"
id = "fake-2"
fallbacks = ["big"]

[models.gone]
id = "nobody-serves-this"
"""

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
GO: Any = {"type": "function", "function": {"name": "go", "parameters": {"type": "object", "properties": {}}}}
CALLS = [
    {"tool_calls": [{"index": 0, "id": "call_a", "function": {"name": "go", "arguments": '{"x"'}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]},
    {"tool_calls": [{"index": 1, "id": "call_b", "function": {"name": "go", "arguments": "{}"}}]},
]


@pytest.fixture(scope="module")
def door(module_fake: FakeLLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Portal]:
    """A portal with names for its model, that shows what models think."""
    directory = tmp_path_factory.mktemp("openai")
    other = f'[providers.other]\nkind = "openai"\nurl = "{module_fake.url}"\nkey = "sk-x"\n'
    (directory / "models.toml").write_text(other + MODELS)
    running = Portal(directory, LLM_SERVER_URL=module_fake.url, LLM_SKIP_THINKING="false").start()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def ada(door: Portal) -> Iterator[httpx.Client]:
    with door.client("ada") as client:
        yield client


def sdk_of(client: httpx.Client, **changes: Any) -> OpenAI:
    """The SDK, signed in as the client is."""
    given = {"api_key": token_of(client), "base_url": f"{client.base_url}/v1".replace("//v1", "/v1")}
    return OpenAI(**{**given, "max_retries": 0, **changes})


@pytest.fixture(scope="module")
def sdk(ada: httpx.Client) -> Iterator[OpenAI]:
    with sdk_of(ada) as signed_in:
        yield signed_in


# --- chat completions ----------------------------------------------------------------------------


def test_a_whole_answer(sdk: OpenAI, llm: FakeLLM) -> None:
    llm.script = Script(pieces=[{"reasoning_content": "Hm."}, *text("Hello", " you")], usage=USAGE)
    got = sdk.chat.completions.create(model="smart", messages=HELLO)
    assert (got.model, got.object, got.id.startswith("chatcmpl-")) == ("big", "chat.completion", True)
    choice = got.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Hello you", "stop")
    assert choice.message.model_dump()["reasoning_content"] == "Hm."
    assert got.usage is not None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (20, 9, 29)
    assert got.usage.prompt_tokens_details is not None
    assert got.usage.completion_tokens_details is not None
    assert got.usage.prompt_tokens_details.cached_tokens == 15
    assert got.usage.completion_tokens_details.reasoning_tokens == 4


def test_a_stream(sdk: OpenAI, llm: FakeLLM) -> None:
    llm.script = Script(
        pieces=[{"reasoning_content": "Hm."}, *text("Héllo", " ", "\u2028you")], usage=USAGE, between=0.02
    )
    chunks = list(
        sdk.chat.completions.create(
            model="fake-1", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
    )
    assert len({(chunk.id, chunk.model, chunk.created) for chunk in chunks}) == 1
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == "Héllo \u2028you"
    assert "".join(delta.model_dump().get("reasoning_content") or "" for delta in deltas) == "Hm."
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    usage = chunks[-1].usage
    assert usage is not None
    assert (usage.total_tokens, chunks[-1].choices) == (29, [])


def test_without_being_asked_a_stream_tells_no_usage(sdk: OpenAI, llm: FakeLLM) -> None:
    chunks = list(sdk.chat.completions.create(model="", messages=HELLO, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_every_option_reaches_the_server(sdk: OpenAI, llm: FakeLLM) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    options: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.8,
        "stop": ["END"],
        "seed": 7,
        "frequency_penalty": -1.5,
        "presence_penalty": 2,
        "logit_bias": {"15": -100},
        "parallel_tool_calls": False,
        "response_format": form,
    }
    tools: dict[str, Any] = {"tools": [GO], "tool_choice": {"type": "function", "function": {"name": "go"}}}
    sdk.chat.completions.create(
        model="big",
        messages=HELLO,
        max_tokens=900,
        max_completion_tokens=9,
        n=1,
        user="somebody",
        store=False,
        extra_body={"extra": {"top_k": 40}},
        **options,
        **tools,
    )
    asked = llm.requests[-1]
    assert {name: asked[name] for name in (*options, *tools)} == options | tools
    assert (asked["max_tokens"], asked["top_k"], asked["model"]) == (9, 40, "fake-1")
    assert not {"n", "user", "store", "max_completion_tokens"} & set(asked)


def test_text_in_parts_and_other_roles(sdk: OpenAI, llm: FakeLLM) -> None:
    messages: list[Any] = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}],
        },
        {"role": "user", "content": [{"type": "text", "text": "Go."}]},
        {
            "role": "assistant",
            "tool_calls": [{"id": "c", **GO, "function": {"name": "go", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "done"}]},
    ]
    sdk.chat.completions.create(model="big", messages=messages)
    sent = llm.requests[-1]["messages"]
    assert [message.get("content") for message in sent] == ["Be kind.", "Go.", None, "done"]
    assert [message["role"] for message in sent] == ["system", "user", "assistant", "tool"]
    assert sent[2]["tool_calls"] == messages[2]["tool_calls"]
    picture: Any = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    sdk.chat.completions.create(model="big", messages=[{"role": "user", "content": [picture]}])
    assert llm.requests[-1]["messages"][0]["content"] == [picture]


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_tools(sdk: OpenAI, llm: FakeLLM, stream: bool) -> None:
    llm.script = Script(pieces=CALLS, reason="tool_calls")
    if stream:
        chunks = sdk.chat.completions.create(model="big", messages=HELLO, tools=[GO], stream=True)
        told = [chunk.choices[0] for chunk in chunks]
        calls = [call for choice in told for call in choice.delta.tool_calls or ()]
        assert [call.index for call in calls] == [0, 1]
        reason = told[-1].finish_reason
        found = [(call.id, call.function and (call.function.name, call.function.arguments)) for call in calls]
    else:
        choice = sdk.chat.completions.create(model="big", messages=HELLO, tools=[GO]).choices[0]
        assert choice.message.content is None
        reason = choice.finish_reason
        made: list[Any] = choice.message.tool_calls or []
        found = [(call.id, (call.function.name, call.function.arguments)) for call in made]
    assert reason == "tool_calls"
    assert found == [("call_a", ("go", '{"x": 1}')), ("call_b", ("go", "{}"))]


class Answer(BaseModel):
    """What the model is to say."""

    city: str


def test_the_sdks_own_helpers(sdk: OpenAI, llm: FakeLLM) -> None:
    llm.script = Script(pieces=text('{"city": ', '"Rome"}'))
    parsed = sdk.chat.completions.parse(model="big", messages=HELLO, response_format=Answer)
    assert parsed.choices[0].message.parsed == Answer(city="Rome")
    asked = llm.requests[-1]["response_format"]["json_schema"]
    assert asked["schema"]["properties"]["city"]["type"] == "string"
    with sdk.chat.completions.stream(model="big", messages=HELLO, response_format=Answer) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == Answer(city="Rome")


# --- a session -----------------------------------------------------------------------------------


def test_with_its_header_it_is_a_turn_of_the_session(
    sdk: OpenAI, ada: httpx.Client, llm: FakeLLM, session: str
) -> None:
    llm.script = Script(echo=True)
    chat = sdk.with_options(default_headers={"X-Session-Id": session}).chat.completions
    system: Any = {"role": "system", "content": "You are brief."}
    first = chat.with_raw_response.create(model="big", messages=[system, {"role": "user", "content": "One"}])
    assert first.headers["X-Session-Id"] == session
    assert first.parse().choices[0].message.content == "echo: One"
    later: list[Any] = [
        {"role": "system", "content": "You are long."},
        {"role": "user", "content": "Something that was never said"},
        {"role": "assistant", "content": "Nor this"},
        {"role": "user", "content": [{"type": "text", "text": "Two"}]},
    ]
    assert "".join(
        chunk.choices[0].delta.content or ""
        for chunk in chat.create(model="big", messages=later, stream=True)
    ) == ("echo: Two")
    assert [message["content"] for message in llm.requests[-1]["messages"]] == [
        *("You are brief.", "One", "echo: One", "Two")
    ]
    turn = ada.get(f"/api/llm/turns/{first.headers['X-Turn-Id']}/events")
    assert "echo: One" in turn.text
    assert ask(ada, session, message="Three").json()["response"] == "echo: Three"
    assert len(llm.requests[-1]["messages"]) == 6


def test_what_a_session_cannot_take_is_refused(sdk: OpenAI, session: str) -> None:
    chat = sdk.with_options(default_headers={"X-Session-Id": session}).chat.completions
    result: Any = {"role": "tool", "tool_call_id": "c", "content": "done"}
    picture: Any = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    shown: Any = {"role": "user", "content": [picture]}
    for messages in ([*HELLO, result], [shown]):
        with pytest.raises(openai.BadRequestError, match="X-Session-Id"):
            chat.create(model="big", messages=messages)
    with pytest.raises(openai.BadRequestError, match="session_id"):
        sdk.chat.completions.create(model="big", messages=HELLO, extra_headers={"X-Session-Id": "a b"})


def test_an_idempotency_key_makes_it_safe_to_send_again(sdk: OpenAI, llm: FakeLLM, session: str) -> None:
    llm.script = Script(random=True)
    headers = {"X-Session-Id": session, "Idempotency-Key": '"once"'}
    chat = sdk.with_options(default_headers=headers).chat.completions
    first, second = (chat.create(model="big", messages=HELLO) for _ in range(2))
    assert first == second
    assert len(llm.requests) == 1
    with pytest.raises(openai.ConflictError):
        chat.create(model="big", messages=[{"role": "user", "content": "Something else"}])


def test_without_it_nothing_is_kept(sdk: OpenAI, ada: httpx.Client, llm: FakeLLM) -> None:
    before = ada.get("/api/sessions").json()["total"]
    spent = ada.get("/api/stats").json()["today"]["turns"]
    sdk.chat.completions.create(model="big", messages=HELLO)
    sdk.responses.create(model="big", input="Hello", store=False)
    assert ada.get("/api/sessions").json()["total"] == before
    assert ada.get("/api/stats").json()["today"]["turns"] == spent + 2


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"n": 2}, "n"),
        ({"temperature": 3}, "temperature"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages.0.content"),
        ({"messages": []}, "messages"),
        ({"extra_body": {"functions": [{"name": "go"}]}}, "functions"),
    ],
)
def test_an_error_names_the_field(sdk: OpenAI, wrong: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.chat.completions.create(**{"model": "big", "messages": HELLO, **wrong})
    error = caught.value
    assert (error.param, error.type, error.code) == (param, "invalid_request_error", "invalid_request")
    assert set(error.body) == {"message", "type", "param", "code"}  # type: ignore[call-overload]


@pytest.mark.parametrize("stream", [False, True])
def test_the_server_fails(sdk: OpenAI, llm: FakeLLM, stream: bool) -> None:
    llm.script = Script(status=429, headers={"Retry-After": "1"})
    with pytest.raises(openai.InternalServerError) as caught:
        sdk.chat.completions.create(model="big", messages=HELLO, stream=stream)
    error = caught.value
    assert (error.status_code, error.code, error.type) == (503, "overloaded", "server_error")
    assert (error.response.headers["Retry-After"], error.response.headers["X-Should-Retry"]) == ("1", "true")
    llm.script = Script(status=400)
    with pytest.raises(openai.InternalServerError) as caught:
        sdk.with_options(max_retries=2).chat.completions.create(model="big", messages=HELLO, stream=stream)
    assert (caught.value.status_code, len(llm.requests)) == (502, 2), "it is of no use to send it again"


def test_it_fails_in_the_middle_of_a_stream(sdk: OpenAI, llm: FakeLLM) -> None:
    llm.script = Script(pieces=text("Hello", " you"), cut_after=1, between=0.05)
    stream = sdk.chat.completions.create(model="big", messages=HELLO, stream=True)
    said = [next(stream).choices[0].delta.content for _ in range(2)]
    assert said == ["", "Hello"]
    with pytest.raises(openai.APIError) as caught:
        next(stream)
    assert (caught.value.code, caught.value.type) == ("llm_error", "server_error")
    with sdk.responses.create(model="big", input="Hello", stream=True) as events:
        last = list(events)[-1]
    assert last.type == "response.failed"
    assert last.response.error is not None
    assert last.response.error.code == "server_error"


def test_nobody_and_nothing(sdk: OpenAI, door: Portal) -> None:
    with (
        OpenAI(api_key="wrong", base_url=f"{door.url}/v1", max_retries=0) as nobody,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        nobody.models.list()
    assert (caught.value.code, caught.value.type) == ("invalid_api_key", "authentication_error")
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.chat.completions.create(model="gpt-9", messages=HELLO)
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    assert "fake-1" in missing.value.message
    with pytest.raises(openai.NotFoundError):
        sdk.files.list()
    answer = httpx.post(f"{door.url}/v1/chat/completions", content=b"{")
    assert answer.json()["error"]["code"] in {"invalid_request", "invalid_api_key"}


def test_limits_are_told(door: Portal) -> None:
    with door.client("root", role="admin") as admin, door.client("greedy") as client, sdk_of(client) as sdk:
        me = client.get("/api/auth/me").json()["id"]
        admin.put(f"/api/admin/limits/user:{me}", json={"requests_per_hour": 2})
        chat = sdk.chat.completions
        first = chat.with_raw_response.create(model="big", messages=HELLO)
        assert '"person";r=1' in first.headers["RateLimit"]
        sdk.embeddings.create(model="big", input="x")
        with pytest.raises(openai.RateLimitError) as caught:
            chat.create(model="big", messages=HELLO, stream=True)
        assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "rate_limit_error")
        assert int(caught.value.response.headers["Retry-After"]) > 0
        admin.put(f"/api/admin/limits/user:{me}", json={"requests_per_hour": 0, "daily_tokens": 1})
        with pytest.raises(openai.RateLimitError) as caught:
            chat.create(model="big", messages=HELLO)
        assert caught.value.code == caught.value.type == "insufficient_quota"
        assert caught.value.response.headers["X-Should-Retry"] == "false"


# --- models and embeddings -----------------------------------------------------------------------


def test_models_by_each_of_their_names(sdk: OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == ["big", "fake-1", "gpt-4o", "secret", "shy", "smart"]
    assert sdk.models.retrieve("smart").owned_by == "default"
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("gone")


def test_models_that_the_role_may_not_use_are_not_there(door: Portal) -> None:
    with door.client("root", role="admin") as admin:
        role = {"permissions": ["chat:use"], "models": ["big"]}
        assert admin.put("/api/admin/roles/narrow", json=role).is_success
        with door.client("nora", role="narrow") as client, sdk_of(client) as sdk:
            assert [model.id for model in sdk.models.list()] == ["big", "gpt-4o", "smart"]
            with pytest.raises(openai.NotFoundError):
                sdk.models.retrieve("secret")
            with pytest.raises(openai.PermissionDeniedError) as caught:
                sdk.embeddings.create(model="secret", input="x")
            assert caught.value.param == "model"


def test_embeddings(sdk: OpenAI, ada: httpx.Client, llm: FakeLLM) -> None:
    before = ada.get("/api/stats").json()["today"]
    made = sdk.embeddings.create(model="smart", input=["one", "three"], encoding_format="float", dimensions=2)
    assert [item.embedding for item in made.data] == [[3.0, 0.5], [5.0, 0.5]]
    assert (made.model, made.usage.prompt_tokens, made.usage.total_tokens) == ("big", 8, 8)
    asked = llm.requests[-1]
    assert (asked["model"], asked["encoding_format"], asked["dimensions"]) == ("fake-1", "float", 2)
    after = ada.get("/api/stats").json()["today"]
    assert (after["turns"], after["prompt_tokens"]) == (before["turns"] + 1, before["prompt_tokens"] + 8)
    with pytest.raises(openai.BadRequestError, match="tokens are not taken"):
        sdk.embeddings.create(model="big", input=[[1, 2, 3]])
    llm.script = Script(status=501)
    with pytest.raises(openai.BadRequestError, match="makes no embeddings") as caught:
        sdk.embeddings.create(model="big", input="one")
    assert caught.value.param == "model"


# --- the Responses API ---------------------------------------------------------------------------


def test_responses_go_on_in_a_session(sdk: OpenAI, ada: httpx.Client, llm: FakeLLM) -> None:
    llm.script = Script(echo=True, usage=USAGE)
    first = sdk.responses.create(
        model="big", instructions="You are brief.", input="One", max_output_tokens=50, tools=[]
    )
    assert (first.output_text, first.status, first.model) == ("echo: One", "completed", "big")
    assert first.usage is not None
    assert (first.usage.input_tokens, first.usage.output_tokens_details.reasoning_tokens) == (20, 4)
    second = sdk.responses.create(model="big", input="Two", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    assert first.conversation is not None
    name = first.conversation.id
    third = sdk.responses.create(
        model="big",
        input=[{"role": "user", "content": [{"type": "input_text", "text": "Three"}]}],
        conversation=name,
    )
    said = [message["content"] for message in llm.requests[-1]["messages"]]
    assert said == ["You are brief.", "One", "echo: One", "Two", "echo: Two", "Three"]
    history = ada.get(f"/api/llm/chat/session/{name}/history").json()["messages"]
    assert [message["content"] for message in history] == [*said, "echo: Three"]
    again = sdk.responses.retrieve(third.id)
    assert (again.output, again.usage, again.created_at) == (third.output, third.usage, third.created_at)
    assert sdk.responses.retrieve(first.id).max_output_tokens == 50
    with pytest.raises(openai.ConflictError, match="other responses"):
        sdk.responses.delete(first.id)


def test_the_model_that_answered_is_named_whenever_it_is_asked_for(
    sdk: OpenAI, ada: httpx.Client, llm: FakeLLM, session: str
) -> None:
    llm.failing = {"fake-2": Script(status=503)}
    try:
        key = {"Idempotency-Key": new_id()}
        made = [sdk.responses.create(model="shy", input="One", extra_headers=key) for _ in range(2)]
        found = [*made, sdk.responses.retrieve(made[0].id)]
        key["X-Session-Id"] = session
        chat = sdk.with_options(default_headers=key).chat.completions
        said = [chat.create(model="shy", messages=HELLO) for _ in range(2)]
    finally:
        llm.failing = {}
    answers: list[Any] = [*found, *said]
    assert [answer.model for answer in answers] == ["big"] * 5
    [_, shown] = ada.get(f"/api/llm/chat/session/{session}/history").json()["messages"]
    assert (shown["usage"]["model"], shown["finish_reason"]) == ("big", "stop")


def test_what_goes_on_from_an_older_response_is_a_branch(
    sdk: OpenAI, ada: httpx.Client, llm: FakeLLM
) -> None:
    llm.script = Script(echo=True)

    def said(text: str, after: str, key: str | None = None) -> tuple[str, list[str]]:
        headers = {} if key is None else {"Idempotency-Key": key}
        made = sdk.responses.create(
            model="big", input=text, previous_response_id=after, extra_headers=headers
        )
        return made.id, [message["content"] for message in llm.requests[-1]["messages"]]

    first = sdk.responses.create(model="big", input="One")
    second, _ = said("Two", first.id)
    third, seen = said("Three", first.id, "again")
    assert seen == ["One", "echo: One", "Three"]
    assert said("Three", first.id, "again")[0] == third
    assert said("Four", second)[1] == ["One", "echo: One", "Two", "echo: Two", "Four"]
    assert said("Five", third)[1] == ["One", "echo: One", "Three", "echo: Three", "Five"]
    assert first.conversation is not None
    places = ada.get(f"/api/sessions/{first.conversation.id}/branches").json()["branches"]
    assert [len(place) for place in places] == [2]
    ada.delete(f"/api/llm/chat/session/{first.conversation.id}")
    with pytest.raises(openai.NotFoundError, match="not in the session any more"):
        said("Six", third)


def test_a_new_response_with_a_key_is_made_once(sdk: OpenAI, door: Portal, llm: FakeLLM) -> None:
    key = {"Idempotency-Key": f'"{new_id()}"'}
    llm.script = Script(held=threading.Event())
    with sdk.responses.create(model="big", input="One", stream=True, extra_headers=key) as lost:
        first = next(delta for delta in lost if delta.type == "response.created").response
    assert llm.script.held is not None
    llm.script.held.set()
    again = sdk.responses.create(model="big", input="One", extra_headers=key)
    assert (again.id, again.conversation, again.output_text) == (first.id, first.conversation, "Hello there")
    assert len(llm.requests) == 1
    with pytest.raises(openai.ConflictError):
        sdk.responses.create(model="big", input="Two", extra_headers=key)
    with door.client("bo") as client, sdk_of(client) as other:
        theirs = other.responses.create(model="big", input="Two", extra_headers=key)
    assert theirs.id != first.id
    assert len(llm.requests[-1]["messages"]) == 1
    with pytest.raises(openai.BadRequestError, match="request_id"):
        sdk.responses.create(model="big", input="One", extra_headers={"Idempotency-Key": "a b"})


def test_what_goes_on_from_an_unfinished_response_can_be_sent_again(
    sdk: OpenAI, ada: httpx.Client, llm: FakeLLM, session: str
) -> None:
    llm.script = Script(held=threading.Event())

    def second(after: str) -> Any:
        key = {"Idempotency-Key": "second"}
        return sdk.responses.create(model="big", input="Two", previous_response_id=after, extra_headers=key)

    def waits() -> bool:
        history = ada.get(f"/api/llm/chat/session/{session}/history").json()["messages"]
        return [message["content"] for message in history] == ["One", "Two"]

    with (
        sdk.responses.create(model="big", input="One", conversation=session, stream=True) as events,
        ThreadPoolExecutor() as threads,
    ):
        first = next(event for event in events if event.type == "response.created").response
        waiting = threads.submit(second, first.id)
        try:
            wait_until(waits)
        finally:
            assert llm.script.held is not None
            llm.script.held.set()
        assert [event.type for event in events][-1] == "response.completed"
        made = waiting.result()
    assert second(first.id).id == made.id
    assert len(llm.requests) == 2
    with pytest.raises(openai.ConflictError):
        second(made.id)


def test_a_response_is_deleted(sdk: OpenAI, ada: httpx.Client, llm: FakeLLM, session: str) -> None:
    made = sdk.responses.create(model="big", input="One", extra_headers={"X-Session-Id": session})
    sdk.responses.delete(made.id)
    for use in (
        lambda: sdk.responses.retrieve(made.id),
        lambda: sdk.responses.delete(made.id),
        lambda: sdk.responses.create(model="big", input="Two", previous_response_id=made.id),
    ):
        with pytest.raises(openai.NotFoundError):
            use()
    assert ada.get(f"/api/sessions/{session}").status_code == 404


def test_no_response_is_deleted_with_one_of_another_branch(
    sdk: OpenAI, ada: httpx.Client, llm: FakeLLM, session: str
) -> None:
    first = sdk.responses.create(model="big", input="One", conversation=session)
    edits = ada.get(f"/api/llm/chat/session/{session}/history").json()["messages"][0]["id"]
    second = f"resp_{ask(ada, session, message='ONE', edits=edits).json()['turn_id']}"
    for made in (first.id, second):
        with pytest.raises(openai.ConflictError, match="other responses"):
            sdk.responses.delete(made)
    ada.delete(f"/api/llm/chat/session/{session}")
    third = sdk.responses.create(model="big", input="One", conversation=session)
    with pytest.raises(openai.ConflictError, match="other responses"):
        sdk.responses.delete(third.id)
    assert sdk.responses.retrieve(first.id).output_text == "Hello there"


def test_events_of_a_response(sdk: OpenAI, llm: FakeLLM) -> None:
    llm.script = Script(
        pieces=[{"reasoning_content": "Hm."}, *text("Hello", " you"), *CALLS],
        between=0.03,
        reason="tool_calls",
    )
    tool: Any = {"type": "function", "name": "go", "parameters": {"type": "object", "properties": {}}}
    with sdk.responses.create(model="big", input="Hi", tools=[tool], stream=True) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    names = [event.type.removeprefix("response.") for event in events]
    assert names == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done"),
        *("content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done"),
        "output_item.done",
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done"),
        "output_item.done",
        "completed",
    ]
    done: Any = events[-1]
    whole = sdk.responses.retrieve(done.response.id)
    assert whole.output == done.response.output
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call", "function_call"]
    assert (whole.output_text, whole.output[2].call_id) == ("Hello you", "call_a")  # type: ignore[union-attr]
    assert llm.requests[-1]["tools"] == [GO]
    with sdk.responses.retrieve(done.response.id, stream=True) as replayed:
        assert list(replayed) == events


def test_events_of_a_response_that_has_failed(sdk: OpenAI, llm: FakeLLM) -> None:
    llm.script = Script(pieces=text("Hello", " you"), cut_after=1, between=0.05)
    with sdk.responses.create(model="big", input="One", stream=True) as stream:
        failed: Any = list(stream)[-1]
    assert failed.type == "response.failed"
    with sdk.responses.retrieve(failed.response.id, stream=True) as replayed:
        told = list(replayed)[-1]
    assert (told.type, told.response.error) == (failed.type, failed.response.error)  # type: ignore[union-attr]
    assert sdk.responses.retrieve(failed.response.id).status == "failed"


def test_a_response_in_a_form_and_cut_short(sdk: OpenAI, llm: FakeLLM) -> None:
    llm.script = Script(pieces=text('{"city": ', '"Rome"}'))
    parsed = sdk.responses.parse(model="big", input="Where?", text_format=Answer, store=False)
    assert parsed.output_parsed == Answer(city="Rome")
    assert llm.requests[-1]["response_format"]["json_schema"]["strict"] is True
    with sdk.responses.stream(model="big", input="Where?", text_format=Answer) as stream:
        assert stream.get_final_response().output_parsed == Answer(city="Rome")
    llm.script = Script(reason="length")
    cut = sdk.responses.create(model="big", input="Hi", max_output_tokens=2, reasoning={"effort": "low"})
    assert (cut.status, llm.requests[-1]["reasoning_effort"]) == ("incomplete", "low")
    assert cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"


def test_who_brings_the_history_along_is_not_kept(sdk: OpenAI, ada: httpx.Client, llm: FakeLLM) -> None:
    call = {"type": "function_call", "call_id": "c", "name": "go", "arguments": "{}"}
    items: list[Any] = [
        {"role": "user", "content": "Go."},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        call,
        {"type": "function_call_output", "call_id": "c", "output": "done"},
    ]
    before = ada.get("/api/sessions").json()["total"]
    made = sdk.responses.create(model="big", input=items, instructions="Be kind.")
    sent = llm.requests[-1]["messages"]
    assert [message["role"] for message in sent] == ["system", "user", "assistant", "tool"]
    assert sent[2]["tool_calls"][0]["function"] == {"name": "go", "arguments": "{}"}
    assert made.conversation is None
    assert ada.get("/api/sessions").json()["total"] == before
    twice = {"conversation": new_id(), "previous_response_id": made.id}
    wrongs: list[dict[str, Any]] = [
        {"input": items, "store": True},
        {"input": items, "conversation": new_id()},
        {"input": "x", "conversation": new_id(), "store": False},
        {"input": "x", **twice},
        {"input": "x", "previous_response_id": "what"},
    ]
    for wrong in wrongs:
        with pytest.raises((openai.BadRequestError, openai.NotFoundError)):
            sdk.responses.create(model="big", **wrong)
    with pytest.raises(openai.BadRequestError, match="nothing is run here"):
        sdk.responses.create(model="big", input="x", tools=[{"type": "web_search"}])


def test_responses_are_ones_own(sdk: OpenAI, door: Portal, llm: FakeLLM) -> None:
    mine = sdk.responses.create(model="big", input="One")
    with door.client("bo") as client, sdk_of(client) as other:
        for use in (
            lambda: other.responses.retrieve(mine.id),
            lambda: other.responses.delete(mine.id),
            lambda: other.responses.create(model="big", input="Two", previous_response_id=mine.id),
        ):
            with pytest.raises(openai.NotFoundError):
                use()
    assert sdk.responses.retrieve(mine.id).output_text == "Hello there"


# --- a real model --------------------------------------------------------------------------------


def test_the_starter_model(tmp_path: Path, make_portal: MakePortal, llama: Any) -> None:
    portal = make_portal(tmp_path, LLM_SERVER_URL=llama.url).start()
    with portal.client() as client, sdk_of(client) as sdk:
        (model,) = sdk.models.list()
        asked: dict[str, Any] = {"model": model.id, "temperature": 0, "seed": 1}
        # No longer than it takes the model to greet: how it goes on differs with what else the server does.
        whole = sdk.chat.completions.create(messages=HELLO, max_tokens=4, **asked)
        assert whole.usage is not None
        assert (whole.choices[0].finish_reason, whole.usage.completion_tokens) == ("length", 4)
        chunks = sdk.chat.completions.create(messages=HELLO, max_tokens=4, stream=True, **asked)
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert said == whole.choices[0].message.content
        schema: Any = {
            "type": "json_schema",
            "json_schema": {
                "name": "yes",
                "schema": {"type": "object", "properties": {"yes": {"const": True}}, "required": ["yes"]},
            },
        }
        formed = sdk.chat.completions.create(messages=HELLO, response_format=schema, **asked)
        assert json.loads(formed.choices[0].message.content or "") == {"yes": True}
        first = sdk.responses.create(model=model.id, input="Hello", max_output_tokens=16)
        second = sdk.responses.create(
            model=model.id, input="And?", max_output_tokens=16, previous_response_id=first.id
        )
        assert first.usage is not None
        assert second.usage is not None
        assert second.usage.input_tokens > first.usage.input_tokens
        with pytest.raises(openai.BadRequestError, match="makes no embeddings"):
            sdk.embeddings.create(model=model.id, input="x")
    portal.stop()


def test_embeddings_of_a_real_server(tmp_path: Path, make_portal: MakePortal, starter_model: Path) -> None:
    port = free_port()
    server = Path(__file__).with_name("embedding_server.py")
    command = [sys.executable, str(server), str(starter_model), str(port)]
    process = Process(command, tmp_path / "embeddings.log", child_environment({}))
    process.ready(port)
    portal = make_portal(tmp_path, LLM_SERVER_URL=f"http://127.0.0.1:{port}").start()
    with portal.client() as client, sdk_of(client) as sdk:
        texts = ["The cat sleeps on the sofa.", "A cat is asleep on a couch.", "Invoice number 20417 is due."]
        made = sdk.embeddings.create(model="embedder", input=texts)  # as base64, which the SDK asks for
        plain = sdk.embeddings.create(model="embedder", input=texts[:1], encoding_format="float")
        assert made.usage.prompt_tokens > 10
        assert made.data[0].embedding == pytest.approx(plain.data[0].embedding, abs=1e-5)
        near, far = (
            sum(a * b for a, b in zip(made.data[0].embedding, other.embedding, strict=True))
            for other in made.data[1:]
        )
        assert near > far
        (today,) = client.get("/api/stats").json()["days"]
        assert today["prompt_tokens"] == made.usage.prompt_tokens + plain.usage.prompt_tokens
    portal.stop()
    process.stop()
