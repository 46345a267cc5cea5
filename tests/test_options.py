"""The options of a generation: the same over HTTP, MQTT and Python, checked before anything is stored."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.access import ALL_RIGHTS, Limits
from app.config import Settings
from app.container import open_container
from app.errors import InvalidRequest
from app.events import GenerationOptions, TurnRequest, new_id
from app.services.chat_body import above
from app.services.llm_client import LLMClient
from tests.fake_llm import FakeLLM
from tests.support import GameClient, Mosquitto, Portal, ask, person

pytestmark = pytest.mark.slow

GO = {"type": "function", "function": {"name": "go", "parameters": {"type": "object", "properties": {}}}}
FLY = {"type": "function", "function": {"name": "fly"}}
BY_NAME = {"type": "function", "function": {"name": "go"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}}

EVERYTHING: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.8,
    "max_tokens": 9,
    "stop": ["END", "\n"],
    "seed": 7,
    "frequency_penalty": -1.5,
    "presence_penalty": 2,
    "logit_bias": {"42": -100},
    "tools": [GO],
    "tool_choice": BY_NAME,
    "parallel_tool_calls": False,
    "response_format": SCHEMA,
    "reasoning_effort": "low",
}
NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}
HIGH = {"chat_template_kwargs": {"reasoning_effort": "high"}}
EXTRA = {"min_p": 0.05, "top_k": 3, "grammar": 'root ::= "yes"', "cache_prompt": False}

WRONG: list[tuple[str, Any, str, str]] = [
    ("stop", [], "stop", "1 to 4"),
    ("stop", ["a", "b", "c", "d", "e"], "stop", "1 to 4"),
    ("stop", ["a", ""], "stop", "none of them empty"),
    ("seed", -1, "seed", "greater than or equal to 0"),
    ("frequency_penalty", 2.1, "frequency_penalty", "less than or equal to 2"),
    ("presence_penalty", -2.1, "presence_penalty", "greater than or equal to -2"),
    ("logit_bias", {"42": 101}, "logit_bias.42", "less than or equal to 100"),
    ("logit_bias", {"yes": 1}, "logit_bias.yes", "should match"),
    ("response_format", {"type": "xml"}, "response_format.type", "'json_object' or 'json_schema'"),
    ("response_format", {"type": "json_schema"}, "response_format", '"json_schema": {"name"'),
    ("tools", [{"type": "code"}], "tools.0.type", "'function'"),
    ("tools", [{"type": "function", "function": {"name": "go away"}}], "tools.0.function.name", "match"),
    ("tools", [GO, GO], "tools", "go comes more than once"),
    (
        "tools",
        [{"type": "function", "function": {"name": "go", "parameters": {"type": "string"}}}],
        "tools.0.function.parameters",
        "an object is needed",
    ),
    ("tool_choice", "maybe", "tool_choice", "auto, none, required"),
    ("tool_choice", "required", "tool_choice", "needs tools"),
    ("parallel_tool_calls", "perhaps", "parallel_tool_calls", "valid boolean"),
    ("reasoning_effort", "huge", "reasoning_effort", "'high'"),
    ("extra", {"messages": []}, "extra", "messages is set by the portal"),
    ("extra", {"n": 4}, "extra", "n is set by the portal"),
    ("extra", {"models": ["dear"]}, "extra", "models is set by the portal"),
    ("extra", {"temperature": 1}, "extra", "temperature has a field of its own"),
    ("extra", {"top-k": 1}, "extra", "no name of an option"),
]


@pytest.fixture
def game(fake_portal: Portal, mosquitto: Mosquitto) -> Iterator[GameClient]:
    client = GameClient(mosquitto.port, "maze/#")
    yield client
    client.close()


def camel(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(other.title() for other in others)


def test_all_of_them_reach_the_server_over_http(client: httpx.Client, llm: FakeLLM) -> None:
    for path, question in (
        ("/api/llm/chat", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/api/llm/chat/session", {"session_id": "s", "message": "hi"}),
    ):
        answer = client.post(path, json={**question, **EVERYTHING, "extra": EXTRA})
        assert answer.status_code == 200, answer.text
        sent = llm.requests[-1]
        assert {name: sent[name] for name in {**EVERYTHING, **EXTRA}} == {**EVERYTHING, **EXTRA}
        assert "extra" not in sent


def test_all_of_them_reach_the_server_over_mqtt(game: GameClient, llm: FakeLLM, session: str) -> None:
    options = {camel(name): value for name, value in EVERYTHING.items()}
    body = {"message": "hi", **options, "seed": "7", "extra": EXTRA, "unknown": 1}
    game.publish(f"maze/user_input/{session}", body)
    game.reply(f"maze/assistant_response/{session}")
    sent = llm.requests[-1]
    assert {name: sent[name] for name in {**EVERYTHING, **EXTRA}} == {**EVERYTHING, **EXTRA}


@pytest.mark.parametrize(("option", "value", "field", "words"), WRONG)
def test_what_is_wrong_is_named_at_every_door(
    client: httpx.Client, game: GameClient, session: str, option: str, value: Any, field: str, words: str
) -> None:
    answer = ask(client, session, **{option: value})
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert error["code"] == "invalid_request"
    assert error["message"].startswith(field)
    assert words in error["message"]
    if "needs tools" not in words:
        assert error["details"][0]["field"].startswith(field)
    assert client.get(f"/api/llm/chat/session/{session}/history").status_code == 404, "nothing is stored"

    game.publish(f"maze/user_input/{session}", {"message": "hi", camel(option): value, "format": "json"})
    refused = json.loads(game.reply(f"maze/assistant_response/{session}"))["error"]
    assert refused["code"] == "invalid_request"
    first, *inner = field.split(".")
    named = first if "needs tools" in words else camel(first)
    assert refused["message"].startswith(".".join([named, *inner]))
    assert words in refused["message"]


def test_a_choice_must_be_among_the_tools(client: httpx.Client) -> None:
    answer = ask(client, tools=[GO], tool_choice=FLY)
    assert answer.status_code == 422
    assert answer.json()["error"]["message"] == "tool_choice: there is no tool of this name; there are go"


def test_other_options_are_another_request(client: httpx.Client, session: str) -> None:
    first = ask(client, session, request_id="r", extra={"top_k": 1})
    assert first.status_code == 200
    assert ask(client, session, request_id="r", extra={"top_k": 1}).json() == first.json()
    assert ask(client, session, request_id="r", extra={"top_k": 2}).status_code == 409


def test_equal_options_have_one_fingerprint() -> None:
    def fingerprint(**options: Any) -> str:
        return TurnRequest(person(), "s", "hi", options=GenerationOptions.of(options)).fingerprint()

    turned = dict(reversed(EVERYTHING.items()))
    assert fingerprint(**EVERYTHING) == fingerprint(**turned)
    assert fingerprint(**EVERYTHING) != fingerprint(**{**EVERYTHING, "seed": 8})


@pytest.mark.parametrize(
    ("server", "asked", "expected"),
    [
        ("llamacpp", None, NO_THINKING),
        ("llamacpp", "none", {"reasoning_effort": "none", **NO_THINKING}),
        (
            "llamacpp",
            "high",
            {"reasoning_effort": "high", "chat_template_kwargs": {"reasoning_effort": "high"}},
        ),
        ("library", None, {"reasoning_effort": "none"}),
        ("library", "low", {"reasoning_effort": "low"}),
        ("openai", "low", {"reasoning_effort": "low"}),
        ("openai", None, {}),
    ],
)
async def test_an_effort_goes_before_the_setting(
    fake: FakeLLM,
    settings_for: Callable[..., Settings],
    server: str,
    asked: str | None,
    expected: dict[str, Any],
) -> None:
    fake.owner = server
    client = LLMClient(settings_for(fake.url))
    await client.open()
    await client.agenerate([{"role": "user", "content": "hi"}], reasoning_effort=asked)
    await client.close()
    keys = {"chat_template_kwargs", "reasoning_effort"}
    assert {key: value for key, value in fake.requests[-1].items() if key in keys} == expected


async def test_python_is_told_the_same(fake: FakeLLM, settings_for: Callable[..., Settings]) -> None:
    fake.owner = "library"
    client = LLMClient(settings_for(fake.url))
    await client.open()
    hi = [{"role": "user", "content": "hi"}]
    with pytest.raises(InvalidRequest, match=r"^stop: a text, or a list of 1 to 4 texts"):
        await client.agenerate(hi, stop=[""])
    for option, value in (("logit_bias", {"5": 1}), ("tool_choice", "none")):
        with pytest.raises(InvalidRequest, match=f"^{option}: Ollama"):
            await client.agenerate(hi, **{option: value})
    await client.close()
    assert fake.requests == []


def test_a_request_goes_before_the_models_options_also_within_extra() -> None:
    of_model = GenerationOptions.of({"temperature": 0.1, "seed": 1, "extra": {"top_k": 1, "min_p": 0.1}})
    request = GenerationOptions.of({"temperature": 0.7, "extra": {"top_k": 9}})
    assert above(of_model, request).given() == {
        "temperature": 0.7,
        "seed": 1,
        "extra": {"top_k": 9, "min_p": 0.1},
    }
    chosen = GenerationOptions.of({"tool_choice": BY_NAME})
    with pytest.raises(InvalidRequest, match=r"^tool_choice: there is no tool"):
        above(GenerationOptions.of({"tools": [FLY]}), chosen)


MODELS = """
[models."fake-1"]
options = { max_tokens = 33, top_p = 0.5, extra = { top_k = 7 } }
"""


async def test_request_before_project_before_model_before_settings(
    fake: FakeLLM, settings_for: Callable[..., Settings], tmp_path: Path
) -> None:
    (tmp_path / "models.toml").write_text(MODELS)
    (tmp_path / "projects.toml").write_text("[maze]\ntop_p = 0.4\n")
    files = {"models_file": str(tmp_path / "models.toml"), "PROJECTS_FILE": str(tmp_path / "projects.toml")}
    limited, short = (
        person(f"{most}", ALL_RIGHTS.model_copy(update={"limits": Limits(max_tokens=most)}))
        for most in (100, 9)
    )
    async with open_container(settings_for(fake.url, **files, llm_temperature=0.3)) as portal:
        for who, project, options, expected in (
            (person(), "general", {}, (0.3, 0.5, 33, 7)),
            (person(), "maze", {}, (0.3, 0.4, 33, 7)),
            (person(), "maze", {"top_p": 0.6, "max_tokens": 44, "extra": {"top_k": 8}}, (0.3, 0.6, 44, 8)),
            (limited, "maze", {}, (0.3, 0.4, 33, 7)),
            (short, "maze", {}, (0.3, 0.4, 9, 7)),
        ):
            request = TurnRequest(who, new_id(), "hi", project=project, options=GenerationOptions.of(options))
            await (await portal.sessions.submit(request)).ended()
            sent = fake.requests[-1]
            assert (sent["temperature"], sent["top_p"], sent["max_tokens"], sent["top_k"]) == expected
