"""The models as clients and admins meet them, at LLM servers of several kinds."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from app.cli.__main__ import app
from app.events import new_id
from tests.fake_llm import FakeLLM, FakeThread, Script, text
from tests.support import GameClient, LlamaServer, MakePortal, Mosquitto, Portal, ask, token_of, wait_until

LLAMA_PROPS = {
    "chat_template": "{% if enable_thinking %}{{ tools }}{% endif %}",
    "chat_template_caps": {"supports_tools": True},
    "modalities": {"vision": False, "audio": False},
    "total_slots": 4,
}
SHOWN = {
    "capabilities": ["completion", "tools", "thinking"],
    "parameters": 'stop "<|im_end|>"\nnum_ctx    8192\n',
    "model_info": {"general.architecture": "qwen3", "qwen3.context_length": 40960},
}
SHOWN_SMALL = {"capabilities": ["completion", "vision"], "model_info": {"gemma3.context_length": 32768}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
WITHIN_S = 4.0
"""What another process has changed is known within two seconds; the rest is for a busy machine."""


@pytest.fixture(scope="module")
def threads() -> Iterator[dict[str, FakeThread]]:
    """A server of each kind."""
    made = {kind: FakeThread() for kind in ("llamacpp", "vllm", "ollama", "localai", "cloud")}
    for kind, thread in made.items():
        thread.fake.script = Script(pieces=text(f"from {kind}"))
        thread.fake.owner = kind
    llama, vllm, ollama, localai = (made[kind].fake for kind in ("llamacpp", "vllm", "ollama", "localai"))
    llama.model, llama.context, llama.told = "little", 2048, {"/props": LLAMA_PROPS}
    vllm.listed = [{"id": "big", "owned_by": "vllm", "max_model_len": 65536}]
    ollama.listed = [
        {"id": "qwen3:8b", "owned_by": "library", "created": 1},
        {"id": "gemma3:4b", "owned_by": "somebody", "created": 1},
    ]
    ollama.told = {
        "/api/show qwen3:8b": SHOWN,
        "/api/show gemma3:4b": SHOWN_SMALL,
        "/api/ps": {"models": [{"model": "gemma3:4b", "context_length": 4096}]},
    }
    localai.listed = [{"id": "seer", "object": "model"}, {"id": "other", "object": "model"}]
    localai.told = {
        "/v1/models/capabilities": {
            "data": [
                {"id": "seer", "capabilities": ["chat", "vision"], "input_modalities": ["text", "image"]}
            ]
        },
        "/system": {"backends": ["llama-cpp"], "loaded_models": [{"id": "seer"}]},
    }
    yield made
    for thread in made.values():
        thread.close()


@pytest.fixture(scope="module")
def fakes(threads: dict[str, FakeThread]) -> dict[str, FakeLLM]:
    return {kind: thread.fake for kind, thread in threads.items()}


@pytest.fixture(scope="module")
def models_toml(fakes: dict[str, FakeLLM]) -> str:
    return f"""
[providers.v]
kind = "vllm"
url = "{fakes["vllm"].url}"
[providers.o]
kind = "ollama"
url = "{fakes["ollama"].url}"
[providers.l]
kind = "localai"
url = "{fakes["localai"].url}"
[providers.cloud]
kind = "openai"
url = "{fakes["cloud"].url}"
key = "sk-kanarienvogel"
[providers.bring]
kind = "openai"
url = "{fakes["cloud"].url}"
own_keys = true

[models.clever]
provider = "cloud"
id = "gpt-4o"
aliases = ["smart"]
fallbacks = ["big", "little"]
context = 128000
options = {{ temperature = 0.2 }}
price = {{ input = 2.5, output = 10.0 }}
[models.yours]
provider = "bring"
[models.big]
provider = "v"
[models."qwen*"]
provider = "o"
options = {{ top_p = 0.5 }}
[models."gemma*"]
provider = "o"
[models.seer]
provider = "l"
[models.lost]
id = "nobody-serves-this"
"""


@pytest.fixture(scope="module")
def pool(
    fakes: dict[str, FakeLLM],
    models_toml: str,
    mosquitto: Mosquitto,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Portal]:
    directory = tmp_path_factory.mktemp("models")
    (directory / "models.toml").write_text(models_toml)
    running = Portal(
        directory,
        LLM_SERVER_URL=fakes["llamacpp"].url,
        MQTT_BROKER_URL=mosquitto.url,
        MQTT_PROJECTS="driving",
        REGISTRATION="open",
    ).start()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def root(pool: Portal) -> Iterator[httpx.Client]:
    with pool.client("root", role="admin") as client:
        wait_until(lambda: len(listed(client)) == 8, what="all servers' models")
        yield client


@pytest.fixture
def ada(pool: Portal, root: httpx.Client) -> Iterator[httpx.Client]:
    with pool.client(f"ada-{new_id()[-6:]}") as client:
        yield client


def found(client: httpx.Client) -> dict[str, Any]:
    answer = client.get("/api/models")
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def listed(client: httpx.Client) -> dict[str, dict[str, Any]]:
    return {model["name"]: model for model in found(client)["models"]}


def choose(client: httpx.Client, model: str | None, *, for_all: bool = False) -> httpx.Response:
    path = "/api/admin/models/default" if for_all else "/api/models/default"
    return client.put(path, json={"model": model})


def says(client: httpx.Client, session: str | None = None, **body: Any) -> str:
    answer = ask(client, session, **body)
    assert answer.status_code == 200, answer.text
    response: str = answer.json()["response"]
    return response


# --- the list ------------------------------------------------------------------------------------


def test_what_is_listed_is_what_the_servers_tell(root: httpx.Client) -> None:
    body = found(root)
    models = {model["name"]: model for model in body["models"]}
    assert list(models) == sorted(models)
    # Of what LocalAI serves, one model has no entry that leads there.
    assert set(models) == {"little", "lost", "clever", "yours", "big", "qwen3:8b", "gemma3:4b", "seer"}

    def told(name: str) -> list[Any]:
        model = models[name]
        can = model["capabilities"]
        return [model["context_length"], can["tools"], can["vision"], can["thinking"], model["loaded"]]

    assert told("little") == [2048, True, False, True, True]
    assert told("big") == [65536, None, None, None, True]
    assert told("qwen3:8b") == [8192, True, False, True, False]
    assert told("gemma3:4b") == [4096, False, True, False, True], "the context that it is loaded with"
    assert told("seer") == [None, None, True, None, True]
    assert told("clever") == [128000, None, None, None, None], "nobody is asked who is paid for it"
    assert told("lost") == [None, None, None, None, None]

    clever = models["clever"]
    assert {name: clever[name] for name in ("aliases", "fallbacks", "provider", "options")} == {
        "aliases": ["smart"],
        "fallbacks": ["big", "little"],
        "provider": "cloud",
        "options": {"temperature": 0.2},
    }
    assert clever["price"] == {"input": 2.5, "cached": None, "output": 10.0, "gpu_second": 0.0}
    assert models["little"]["price"] is None
    assert models["qwen3:8b"]["options"] == {"top_p": 0.5}
    health = models["little"]["health"]
    assert {**health, "since": "", "latency_ms": 0} == {
        "status": "ok",
        "since": "",
        "latency_ms": 0,
        "servers": 1,
        "queue": 0,
    }
    assert health["latency_ms"] is not None
    assert 0 <= time.time() - datetime.fromisoformat(health["since"]).timestamp() < 600
    assert models["lost"]["health"] == {
        "status": "down",
        "since": None,
        "latency_ms": None,
        "servers": 0,
        "queue": 0,
    }
    default = {"model": "little", "chosen": None, "note": None}
    assert (body["default"], body["default_for_all"]) == (default, default)
    assert [name for name, model in models.items() if model["is_default"]] == ["little"]
    assert "kanarienvogel" not in json.dumps(body)
    assert "127.0.0.1" not in json.dumps(body)


def test_a_model_that_takes_no_tools_is_told_of_them_in_words(
    ada: httpx.Client, fakes: dict[str, FakeLLM]
) -> None:
    for model, is_native in (("gemma3:4b", False), ("qwen3:8b", True)):
        ask(ada, model=model, tools=[TOOL])
        assert ("tools" in fakes["ollama"].requests[-1]) is is_native


def test_a_role_sees_what_it_may_use(pool: Portal, root: httpx.Client) -> None:
    role = {"permissions": ["chat:use", "sessions:*"], "models": ["clever", "b*"]}
    assert root.put("/api/admin/roles/picky", json=role).status_code == 200
    with pool.client("picky", role="picky") as picky:
        body = found(picky)
        assert [model["name"] for model in body["models"]] == ["big", "clever"]
        assert listed(picky)["clever"]["fallbacks"] == ["big"]
        assert "little" not in json.dumps(body), "nor is the default that it may not use"
        for model, status in (("little", 403), ("qwen3:8b", 403), ("clever", 200), ("smart", 200)):
            assert choose(picky, model).status_code == status, model
        assert says(picky) == "from cloud"
        assert choose(root, "little", for_all=True).status_code == 200
        assert choose(picky, None).json()["model"] is None
        assert ask(picky).status_code == 403
        assert choose(root, None, for_all=True).status_code == 200

        assert choose(picky, "big").status_code == 200
        narrow = {**role, "models": ["clever"]}
        assert root.put("/api/admin/roles/picky", json=narrow).status_code == 200
        assert "may not use big" in found(picky)["default"]["note"]
        assert ask(picky).status_code == 403


# --- defaults ------------------------------------------------------------------------------------


def test_ones_own_default_answers_where_no_model_is_named(
    pool: Portal, ada: httpx.Client, root: httpx.Client, mosquitto: Mosquitto
) -> None:
    again = new_id()
    assert says(ada, again, request_id="r1") == "from llamacpp"
    assert choose(ada, "smart").json() == {"model": "clever", "chosen": "clever", "note": None}
    assert found(ada)["default_for_all"]["model"] == "little"
    assert listed(ada)["clever"]["is_default"]
    assert says(ada) == says(ada, model="default") == "from cloud"
    assert says(ada, model="big") == "from vllm", "what a turn names goes before"
    assert says(ada, again, request_id="r1") == "from llamacpp", "the same request has the same answer"
    messages = [{"role": "user", "content": "hi"}]
    assert ada.post("/api/llm/chat", json={"messages": messages}).json()["response"] == "from cloud"
    assert ada.post("/v1/chat/completions", json={"messages": messages}).json()["model"] == "clever"
    assert ada.post("/v1/responses", json={"input": "hi"}).json()["model"] == "clever"

    session = new_id()
    game = GameClient(mosquitto.port, f"driving/assistant_response/{session}")
    game.publish(f"driving/user_input/{session}", {"message": "hi", "token": token_of(ada)})
    assert game.reply(f"driving/assistant_response/{session}") == b"from cloud"
    game.close()

    assert says(root) == "from llamacpp", "and nobody else's"
    assert choose(ada, None).json() == {"model": "little", "chosen": None, "note": None}
    assert says(ada) == "from llamacpp"


def test_what_cannot_be_a_default(ada: httpx.Client) -> None:
    for model, words in {
        "nothing-like-this": "does not serve",
        "lost": "does not serve",
        "default": "name of a model",
        "": "name of a model",
        "yours": "bring a key",
    }.items():
        refused = choose(ada, model)
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "invalid_request"), model
        assert words in refused.json()["detail"]
    assert ada.put("/api/models/default", json={}).status_code == 422
    assert found(ada)["default"]["chosen"] is None


def test_the_default_for_all(
    pool: Portal, ada: httpx.Client, root: httpx.Client, mosquitto: Mosquitto
) -> None:
    assert choose(ada, "big", for_all=True).status_code == 403
    game = GameClient(mosquitto.port, "driving/status", "driving/assistant_response/#")
    try:
        assert choose(root, "clever", for_all=True).json()["model"] == "clever"
        assert says(ada) == "from cloud"
        assert found(ada)["default"] == {"model": "clever", "chosen": None, "note": None}
        assert httpx.get(f"{pool.url}/api/llm/health").json()["model"] == "clever"

        def models() -> list[str]:
            return [json.loads(status)["model"] for status in game.messages_unlocked("driving/status")]

        game.wait_for(lambda: models()[-1:] == ["clever"])
        game.publish("driving/user_input/game-1", {"message": "hi"})
        assert game.reply("driving/assistant_response/game-1") == b"from cloud", "also who has no account"
        choose(ada, "big")
        assert says(ada) == "from vllm", "one's own goes before"
        entries = root.get("/api/admin/audit", params={"action": "model.default"}).json()["entries"]
        assert entries[0]["target"] == "clever"
    finally:
        assert choose(root, None, for_all=True).json()["model"] == "little"
        game.close()


def test_a_default_that_is_gone_is_replaced_by_what_is_served(
    root: httpx.Client, ada: httpx.Client, fakes: dict[str, FakeLLM], threads: dict[str, FakeThread]
) -> None:
    vllm = fakes["vllm"]
    choose(ada, "big")
    assert choose(root, "qwen3:8b", for_all=True).status_code == 200
    before, vllm.listed = vllm.listed, [{"id": "bigger", "owned_by": "vllm"}]
    try:
        wait_until(lambda: found(ada)["default"]["note"], what="the note")
        body = found(ada)
        assert body["default"] == {
            "model": "qwen3:8b",
            "chosen": "big",
            "note": "big is not served now; qwen3:8b answers instead.",
        }
        assert says(ada) == "from ollama"
        threads["ollama"].stop()
        wait_until(lambda: found(root)["default_for_all"]["model"] == "little", what="the note")
        assert found(root)["default_for_all"] == {
            "model": "little",
            "chosen": "qwen3:8b",
            "note": "qwen3:8b is not served now; little answers instead.",
        }
        assert listed(root)["qwen3:8b"]["health"]["status"] == "down"
        assert says(ada) == says(root) == "from llamacpp"
        threads["ollama"].start()
        vllm.listed = before
        wait_until(lambda: found(ada)["default"]["note"] is None, what="both again")
        assert says(ada) == "from vllm"
        wait_until(lambda: found(root)["default_for_all"]["note"] is None, what="both again")
        assert says(root) == "from ollama"
    finally:
        vllm.listed = before
        choose(root, None, for_all=True)


def test_a_server_is_called_what_it_was_found_to_be(root: httpx.Client) -> None:
    kinds = {one["provider"]: one["kind"] for one in root.get("/api/admin/servers").json()["servers"]}
    assert kinds["default"] == "llamacpp", "nobody has said so"
    assert (kinds["o"], kinds["cloud"]) == ("ollama", "openai")


@pytest.mark.parametrize(("model", "status"), [("little", 400), ("seer", 200), ("big", 200)])
def test_no_image_is_sent_where_none_is_taken(
    ada: httpx.Client, fakes: dict[str, FakeLLM], model: str, status: int
) -> None:
    little = fakes["llamacpp"]
    before = len(little.requests)
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    content = [{"type": "text", "text": "What is this?"}, image]
    body = {"model": model, "messages": [{"role": "user", "content": content}]}
    answer = ada.post("/v1/chat/completions", json=body)
    assert answer.status_code == status, "it is asked where that is not known"
    if status == 400:
        assert answer.json()["error"]["message"] == "messages: this model takes no images"
        assert answer.headers["X-Should-Retry"] == "false"
        assert ada.post("/api/llm/chat", json=body).status_code == 422
        assert len(little.requests) == before


# --- asking anew ---------------------------------------------------------------------------------


def test_a_sync_tells_what_has_changed_and_asks_rarely(root: httpx.Client, fakes: dict[str, FakeLLM]) -> None:
    llama, ollama = fakes["llamacpp"], fakes["ollama"]
    assert root.post("/api/models/sync").status_code == 200
    wait_until(lambda: root.post("/api/models/sync").json()["changes"] == [], what="rest")
    before = (llama.asked["/props"], ollama.asked["/api/show"])
    llama.told = {"/props": {**LLAMA_PROPS, "modalities": {"vision": True}}}
    try:
        seen: list[dict[str, Any]] = []
        began = time.monotonic()

        def is_told() -> bool:
            body = root.post("/api/models/sync").json()
            seen.extend(body["changes"])
            return bool(seen)

        wait_until(is_told, what="the change")
        for _ in range(10):
            assert root.post("/api/models/sync").status_code == 200
        elapsed = time.monotonic() - began
        assert seen == [{"model": "little", "change": "changed", "what": ["capabilities"]}]
        assert listed(root)["little"]["capabilities"]["vision"] is True
        most = 1 + elapsed / 2
        assert llama.asked["/props"] - before[0] <= most, "it was wanted far more often"
        assert ollama.asked["/api/show"] - before[1] <= 2 * most
    finally:
        llama.told = {"/props": LLAMA_PROPS}


def test_other_processes_know_soon(
    make_portal: MakePortal, tmp_path: Path, database_url: str, fakes: dict[str, FakeLLM], models_toml: str
) -> None:
    portals = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "models.toml").write_text(models_toml)
        settings = {"LLM_SERVER_URL": fakes["llamacpp"].url, "DATABASE_URL": database_url}
        portals.append(make_portal(tmp_path / name, **settings).start())
    one, two = portals
    with ExitStack() as stack:
        root = stack.enter_context(one.client("root", role="admin"))
        ada = stack.enter_context(one.client("ada"))
        there = stack.enter_context(httpx.Client(base_url=two.url, headers=ada.headers, timeout=60))
        assert choose(ada, "clever").status_code == 200
        wait_until(lambda: found(there)["default"]["model"] == "clever", WITHIN_S, "one's own default")
        assert says(there) == "from cloud"
        assert choose(ada, None).status_code == 200
        assert choose(root, "clever", for_all=True).status_code == 200
        health = f"{two.url}/api/llm/health"
        wait_until(lambda: httpx.get(health).json()["model"] == "clever", WITHIN_S, "the default for all")
        assert says(there) == "from cloud"
        wait_until(lambda: found(there)["default"]["chosen"] is None, WITHIN_S, "the reset")
        assert choose(root, None, for_all=True).status_code == 200
        wait_until(lambda: httpx.get(health).json()["model"] == "little", WITHIN_S, "the reset for all")

        fakes["llamacpp"].told = {"/props": {**LLAMA_PROPS, "modalities": {"vision": True}}}
        try:
            assert root.post("/api/models/sync").status_code == 200
            vision = lambda: listed(there)["little"]["capabilities"]["vision"]  # noqa: E731
            wait_until(vision, WITHIN_S, "the sync elsewhere")
        finally:
            fakes["llamacpp"].told = {"/props": LLAMA_PROPS}
        assert choose(ada, "big").status_code == 200
    one.stop()
    one.start()
    with one.client("ada") as ada:
        wait_until(lambda: found(ada)["default"]["model"] == "big", what="the choice after a restart")


# --- how the servers are -------------------------------------------------------------------------


def test_health_and_status_follow_a_server_that_dies_comes_back_and_changes(
    make_portal: MakePortal, tmp_path: Path, mosquitto: Mosquitto
) -> None:
    thread = FakeThread()
    game = GameClient(mosquitto.port, "racing/status")
    settings = {"LLM_SERVER_URL": thread.fake.url, "MQTT_BROKER_URL": mosquitto.url}
    portal = make_portal(tmp_path, **settings, MQTT_PROJECTS="racing").start()
    try:
        with portal.client() as ada:

            def tells(health: str, state: str, model: str) -> None:
                def agree() -> bool:
                    said = json.loads(game.messages("racing/status")[-1])
                    now = httpx.get(f"{portal.url}/api/llm/health").json()
                    shown = {name: shown["health"]["status"] for name, shown in listed(ada).items()}
                    agreed = (now["status"], now["model"], shown) == (health, model, {model: health})
                    return agreed and (said["state"], said["model"]) == (state, model)

                wait_until(agree, 8, f"{health}, {state}, {model}")

            game.wait_for(lambda: bool(game.messages_unlocked("racing/status")))
            tells("ok", "online", "fake-1")
            since = listed(ada)["fake-1"]["health"]["since"]
            thread.stop()
            tells("down", "degraded", "fake-1")
            assert listed(ada)["fake-1"]["health"]["since"] > since
            thread.fake.models_status = 503
            thread.start()
            tells("degraded", "degraded", "fake-1")
            thread.fake.models_status = 200
            tells("ok", "online", "fake-1")
            thread.fake.model = "fake-2"
            tells("ok", "online", "fake-2")
            assert list(listed(ada)) == ["fake-2"]
    finally:
        game.close()
        thread.close()


def test_a_llama_cpp_that_names_the_model_it_still_loads_is_not_ok(
    make_portal: MakePortal, tmp_path: Path
) -> None:
    thread = FakeThread()
    thread.fake.owner, thread.fake.props_status = "llamacpp", 503
    try:
        portal = make_portal(tmp_path, LLM_SERVER_URL=thread.fake.url).start(ready=False)
        health = f"{portal.url}/api/llm/health"
        wait_until(lambda: thread.fake.asked["/props"], what="a look")
        assert httpx.get(health).json()["status"] == "degraded"
        thread.fake.props_status = 200
        wait_until(lambda: httpx.get(health).json()["status"] == "ok", 8, "the loaded model")
    finally:
        thread.close()


def test_what_the_real_llama_cpp_tells(portal: Portal, llama: LlamaServer) -> None:
    with portal.client(f"ada-{new_id()[-6:]}") as ada:
        (model,) = found(ada)["models"]
    assert (model["name"], model["context_length"]) == ("smollm2-135m-instruct", 2048)
    assert model["capabilities"] == {"tools": False, "vision": False, "thinking": None}
    assert (model["loaded"], model["health"]["status"], model["is_default"]) == (True, "ok", True)


# --- the command ---------------------------------------------------------------------------------


def test_the_command(pool: Portal, root: httpx.Client, fakes: dict[str, FakeLLM]) -> None:
    def run(*words: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, ["models", *words, "--env-file", str(pool.env_file)])
        assert result.exit_code == code, result.output
        return result.output

    def line(name: str, *words: str) -> str:
        return next(line for line in run(*words).splitlines() if line.startswith(name))

    assert line("qwen3:8b", "list").split() == ["qwen3:8b", "o", "8192", "tools,", "thinking", "ok", "1"]
    assert line("little", "list").split()[-1] == "default"
    before = fakes["llamacpp"].asked["/props"]
    assert "little" in run("sync")
    wait_until(
        lambda: fakes["llamacpp"].asked["/props"] >= before + 2, what="the portal, told by the command"
    )
    try:
        assert "clever" in run("default", "smart")
        wait_until(lambda: says(root) == "from cloud", what="the word of the command")
        assert line("clever", "list").split()[-1] == "default"
        assert "There are" in run("default", "nothing-like-this", code=1)
        run("default", "clever", "--reset", code=1)
    finally:
        assert "little" in run("default", "--reset")
    wait_until(lambda: says(root) == "from llamacpp", what="the word of the command")
    told = root.get("/api/admin/audit", params={"action": "model.default"}).json()["entries"]
    assert [entry["target"] for entry in told][:2] == ["", "clever"]
