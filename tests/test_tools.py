"""Tools for models that know none, and states as models read them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from app.config import Settings
from app.errors import InvalidRequest
from app.events import GenerationOptions
from app.services.llm_client import LLMClient
from app.services.projects import SHIPPED_PROJECTS, read_projects
from app.services.states import compact
from app.services.tools import ConstrainedReply, constrained
from tests.fake_llm import FakeLLM, Script, text
from tests.support import GameClient, LlamaServer, MakePortal, Mosquitto

MAZE = read_projects(SHIPPED_PROJECTS)["maze"]
TOOLS = MAZE.tools_for(("*",))

cuts = st.lists(st.integers(0, 400), max_size=12)


def pieces(raw: str, at: list[int]) -> list[str]:
    borders = [0, *sorted({min(cut, len(raw)) for cut in at}), len(raw)]
    return [raw[start:end] for start, end in pairwise(borders)]


def read(raw: str, at: list[int]) -> tuple[str, list[dict[str, Any]]]:
    reply = ConstrainedReply()
    said = "".join(reply.feed(piece) for piece in pieces(raw, at))
    return said + reply.flush(), reply.tool_calls


@given(st.text(), st.booleans(), st.sampled_from([None, 2]), cuts)
def test_the_text_is_told_as_it_comes_whatever_it_is_cut_into(
    said: str, ascii_only: bool, indent: int | None, at: list[int]
) -> None:
    call = {"name": "reveal_map", "arguments": {"seconds": 3}}
    raw = json.dumps({"response": said, "tool_calls": [call]}, ensure_ascii=ascii_only, indent=indent)
    told, calls = read(raw, at)
    assert told == said
    assert [json.loads(found["function"]["arguments"]) for found in calls] == [{"seconds": 3}]


@given(st.text(st.sampled_from('\ud83d\ude00\ud8ff\udc00a"\\ud\n')), cuts)
def test_lone_surrogates_are_told_as_a_sign_that_something_is_wrong(said: str, at: list[int]) -> None:
    call = {"name": "reveal_map", "arguments": {"why": said}}
    told, calls = read(json.dumps({"response": said, "tool_calls": [call]}), at)
    whole = said.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    assert told == whole
    assert [json.loads(found["function"]["arguments"]) for found in calls] == [{"why": whole}]


@pytest.mark.parametrize(
    ("escaped", "said"),
    [
        (r"abc \ud83d xyz", "abc \ufffd xyz"),
        (r"abc \uD83D", "abc \ufffd"),
        (r"\udc00", "\ufffd"),
        (r"\ud83d\n\ud83d\ud83d\ude00", "\ufffd\n\ufffd\U0001f600"),
        (r"C:\users\d \ud83d\u12 \n\u", "C:\\users\\d \ufffd\\u12 \n\\u"),
        (r"\ud83d\u0041\ud83d\ud7ff\ud83d\\ude00", "\ufffdA\ufffd\ud7ff\ufffd\\ude00"),
    ],
)
def test_escapes_may_be_odd_and_cut_anywhere(escaped: str, said: str) -> None:
    raw = '{"response": "%s", "tool_calls": [{"name": "reveal_map", "arguments": {}}]}' % escaped  # noqa: UP031
    for at in [*([cut] for cut in range(len(raw))), list(range(len(raw)))]:
        told, calls = read(raw, at)
        assert told == said
        assert len(calls) == 1


@given(st.text().filter(lambda said: not said.lstrip().startswith("{")), cuts)
def test_a_server_that_does_not_keep_to_the_form_is_taken_at_its_word(said: str, at: list[int]) -> None:
    told, calls = read(said, at)
    assert (told.strip(), calls) == (said.strip(), [])


@pytest.mark.parametrize(
    "raw", ['{"hint": "North."}', '{"response": "No', '{"response": "N", "tool_calls": [{']
)
def test_what_broke_off_has_no_calls(raw: str) -> None:
    told, calls = read(raw, [])
    assert calls == []
    assert told in {raw, "No", "N"}


def test_the_form_takes_every_tool_and_nothing_else() -> None:
    form = constrained(GenerationOptions(tools=TOOLS)).response_format
    assert form is not None
    schema = Draft202012Validator(form["json_schema"]["schema"])

    def allows(name: str, arguments: Any) -> bool:
        return bool(
            schema.is_valid({"response": "x", "tool_calls": [{"name": name, "arguments": arguments}]})
        )

    assert allows("break_wall", {"x": 1, "y": 2})
    assert allows("highlight_zone", {"zone": {"x": 1, "y": 1, "width": 2, "height": 2}, "seconds": 3})
    assert not allows("break_wall", {"x": 1})
    assert not allows("break_wall", {"x": -1, "y": 2})
    assert not allows("open_door", {})
    assert schema.is_valid({"response": "x", "tool_calls": []})
    required = constrained(GenerationOptions(tools=TOOLS, tool_choice="required")).response_format
    assert required is not None
    assert required["json_schema"]["schema"]["properties"]["tool_calls"]["minItems"] == 1
    short = constrained(GenerationOptions(tools=TOOLS, max_tokens=100)).response_format
    assert short is not None
    assert short["json_schema"]["schema"]["properties"]["response"]["maxLength"] == 200
    with pytest.raises(InvalidRequest, match="response_format"):
        constrained(GenerationOptions(tools=TOOLS, response_format={"type": "json_object"}))


def test_all_shipped_actions_are_there() -> None:
    assert set(MAZE.tools) == {
        *("break_wall", "break_walls", "speed_boost", "slow_germs", "freeze_germs", "teleport_player"),
        *("spawn_oxygen", "move_exit", "highlight_zone", "reveal_map"),
    }
    for tool in MAZE.tools.values():
        Draft202012Validator.check_schema(tool.parameters)


@pytest.mark.parametrize(
    ("state", "lines"),
    [
        ({"position": {"x": 1, "y": 2}}, ["position: (1,2)"]),
        ({"position": [1, 2.5]}, ["position: (1,2.5)"]),
        ({"germs": [{"x": 1, "y": 2, "speed": 3}, [4, 5]]}, ['germs: (1,2){"speed":3} (4,5)']),
        ({"visible_map": [[1, 1, 1], [1, 0, 1]]}, ["visible_map:", "###", "#.#"]),
        ({"map": ["#.#", "#e#"]}, ["map:", "#.#", "#e#"]),
        ({"laps": [[1, 2], [3, 4]]}, ["laps: (1,2) (3,4)"]),
        ({"names": ["Ada", "Bo"]}, ['names: ["Ada","Bo"]']),
        ({"speed": 30, "lights": True, "car": {"fuel": 1}}, ["speed: 30", "lights: true", 'car: {"fuel":1}']),
    ],
)
def test_states_are_short(state: dict[str, Any], lines: list[str]) -> None:
    assert compact(state).splitlines() == lines


@pytest.mark.parametrize(("mode", "native"), [("native", True), ("auto", True), ("constrained", False)])
async def test_how_a_model_is_asked(fake: FakeLLM, mode: str, native: bool) -> None:
    said = json.dumps(
        {"response": "Go.", "tool_calls": [{"name": "reveal_map", "arguments": {"seconds": 2}}]}
    )
    fake.script = Script(pieces=text(said[:9], said[9:30], said[30:]))
    client = LLMClient(Settings(_env_file=None, llm_server_url=fake.url, llm_tool_mode=mode))
    await client.open()
    try:
        options = GenerationOptions(tools=TOOLS)
        updates = [update async for update in client.stream([{"role": "user", "content": "x"}], options)]
    finally:
        await client.close()
    asked = fake.requests[-1]
    assert ("tools" in asked) == native
    assert ("response_format" in asked) != native
    assert ("freeze_germs(seconds)" in asked["messages"][0]["content"]) != native
    told = "".join(getattr(update, "content", "") for update in updates)
    assert told == (said if native else "Go.")
    assert len(updates[-1].tool_calls) == (0 if native else 1)  # type: ignore[union-attr]


async def test_a_lone_surrogate_ends_no_turn(fake: FakeLLM) -> None:
    said = r'{"response": "Go \ud83d on\udc00.", "tool_calls": []}'
    fake.script = Script(pieces=text(said[:21], said[21:]))
    client = LLMClient(Settings(_env_file=None, llm_server_url=fake.url, llm_tool_mode="constrained"))
    await client.open()
    try:
        options = GenerationOptions(tools=TOOLS)
        updates = [update async for update in client.stream([{"role": "user", "content": "x"}], options)]
    finally:
        await client.close()
    assert "".join(getattr(update, "content", "") for update in updates) == "Go \ufffd on\ufffd."


@pytest.mark.slow
def test_the_starter_model_plays(
    llama: LlamaServer, mosquitto: Mosquitto, tmp_path: Path, make_portal: MakePortal
) -> None:
    portal = make_portal(
        tmp_path,
        LLM_SERVER_URL=llama.url,
        MQTT_BROKER_URL=mosquitto.url,
        MQTT_PROJECTS="maze",
        PROJECTS_FILE="none.toml",
    ).start()
    game = GameClient(mosquitto.port, "maze/hint/starter")
    state = {"position": [1, 1], "exit": [5, 5], "oxygen": 9}
    game.publish("maze/state/starter", {**state, "temperature": 0, "maxTokens": 120, "requestId": "r"})
    told = json.loads(game.reply("maze/hint/starter", seconds=100))
    game.close()
    portal.stop()
    assert told["requestId"] == "r"
    assert "error" not in told
    assert not told["hint"].lstrip().startswith("{"), "the form is not what is said"
    for call in told.get("function_calls", ()):
        assert MAZE.tools[call["name"]].validator.is_valid(call["arguments"])
