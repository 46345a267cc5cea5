"""`models.toml`: providers and their dialects, names, aliases, fallbacks."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from app.config import Settings, load_settings
from app.errors import InvalidRequest, LLMError, LLMUnavailable, Overloaded, PortalError
from app.events import GenerationOptions, Usage
from app.services.catalog import Catalog
from app.services.llm_client import LLMClient
from app.services.places import Meter
from app.services.replies import Completion
from app.services.routing import OwnKey
from tests.fake_llm import FakeLLM, Script, serve, text
from tests.support import ROOT, SECRET, free_port

SettingsFor = Callable[..., Settings]
HI = [{"role": "user", "content": "hi"}]
DOWN = "http://127.0.0.1:9"


@pytest.fixture
async def other() -> AsyncIterator[FakeLLM]:
    """The server of a provider, beside the one of LLM_SERVER_URL."""
    async with serve(FakeLLM(model="other-1", script=Script(pieces=text("from the other")))) as running:
        yield running


@asynccontextmanager
async def portal_with(directory: Path, url: str, models: str, **changes: str) -> AsyncIterator[LLMClient]:
    (directory / "models.toml").write_text(models)
    lines = {"SECRET_KEY": SECRET, "LLM_SERVER_URL": url, "LLM_API_KEY": "portal-key", **changes}
    env_file = directory / ".env"
    env_file.write_text("".join(f"{name}={value}\n" for name, value in lines.items()))
    client = LLMClient(load_settings(env_file))
    await client.open()
    try:
        await client.ahealth()
        yield client
    finally:
        await client.close()


async def ask(
    client: LLMClient, model: str | None = None, *, own_key: OwnKey | None = None, **options: Any
) -> tuple[str, Meter]:
    completion, meter = Completion(), Meter()
    options_given = GenerationOptions(model=model, **options)
    async with aclosing(client.stream(HI, options_given, meter=meter, own_key=own_key)) as updates:
        async for update in updates:
            completion.add(update)
    return completion.response, meter


# --- names ---------------------------------------------------------------------------------------

NAMES = """
[providers.near]
url = "{other}"

[models.clever]
provider = "near"
id = "other-1"
aliases = ["smart", "brainy"]
context = 4096
options = {{ temperature = 0.1, max_tokens = 99 }}
price = {{ input = 1.0 }}

[models."near-*"]
provider = "near"

[models.small]
id = "fake-1"
price = {{ output = 2.0 }}
"""


async def test_models_have_names_aliases_and_patterns(fake: FakeLLM, other: FakeLLM, tmp_path: Path) -> None:
    async with portal_with(tmp_path, fake.url, NAMES.format(other=other.url)) as client:
        for name in ("clever", "smart", "brainy"):
            reply, meter = await ask(client, name)
            assert (reply, meter.model) == ("from the other", "clever")
            assert await client.model_name(name) == client.known_model(name) == "clever"
        assert {request["model"] for request in other.requests} == {"other-1"}
        assert await client.model_name("near-9") == "near-9"
        await ask(client, "near-9")
        assert other.requests[-1]["model"] == "near-9"
        for asked, meant in (
            ("small", "small"),
            ("fake-1", "fake-1"),
            (None, "fake-1"),
            ("default", "fake-1"),
        ):
            reply, meter = await ask(client, asked)
            assert (reply, meter.model) == ("Hello there", meant)
        assert client.context_of("smart") == 4096
        with pytest.raises(InvalidRequest, match=r"try one of fake-1"):
            await ask(client, "nonsense")


async def test_a_models_options_go_before_the_settings_and_behind_the_request(
    fake: FakeLLM, other: FakeLLM, tmp_path: Path
) -> None:
    async with portal_with(tmp_path, fake.url, NAMES.format(other=other.url)) as client:
        await ask(client, "clever", max_tokens=7)
    sent = other.requests[-1]
    assert (sent["temperature"], sent["max_tokens"], sent["top_p"]) == (0.1, 7, 0.9)


async def test_the_default_model_may_be_another_providers(
    fake: FakeLLM, other: FakeLLM, tmp_path: Path
) -> None:
    async with portal_with(tmp_path, DOWN, NAMES.format(other=other.url), LLM_MODEL="smart") as client:
        reply, meter = await ask(client)
        assert (reply, meter.model) == ("from the other", "clever")
        health = await client.ahealth()
        assert (health.model, health.status) == ("clever", "degraded"), "LLM_SERVER_URL is down"


async def test_a_pattern_for_everything_leaves_what_is_served_here(
    fake: FakeLLM, other: FakeLLM, tmp_path: Path
) -> None:
    models = f'[providers.far]\nurl = "{other.url}"\n[models."*"]\nprovider = "far"'
    async with portal_with(tmp_path, fake.url, models) as client:
        for name in (None, "default", "fake-1"):
            reply, meter = await ask(client, name)
            assert (reply, meter.model) == ("Hello there", "fake-1")
        assert (await ask(client, "anything"))[0] == "from the other"
        assert (await client.ahealth()).model == "fake-1"


def test_prices_are_those_of_canonical_names(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text(
        NAMES.format(other=DOWN) + '[models."*"]\nprice = { gpu_second = 1.0 }\n'
    )
    catalog = Catalog(tmp_path / "models.toml")
    million = Usage(1_000_000, 1_000_000)
    costs = [
        catalog.price(name).of(million, 1.0)
        for name in ("clever", catalog.canonical("smart"), "small", "x", "near-1")
    ]
    assert costs == [1.0, 1.0, 2.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("models", "complaint"),
    [
        ("[models.a]\nprovider = 'x'", r"models\.a\.provider: there is no \[providers\.x\]"),
        ("[providers.x]\nkind = 'azure'", "url: where is it"),
        ("[providers.x]\nkind = 'smoke'", r"providers\.x\.kind"),
        ("[providers.x]\nurl = 'ftp://x'", r"providers\.x\.url"),
        ("[providers.default]\nurl = 'http://x'", "LLM_SERVER_URL"),
        ("[models.a]\naliases = ['b']\n[models.b]", r"models\.b: this name has a meaning already"),
        ("[models.default]\nid = 'x'", r"models\.default: this name has a meaning already"),
        ("[models.'a*']\nid = 'x'", "pattern"),
        ("[models.a]\noptions = { temprature = 1 }", "there is no option temprature"),
        ("[models.a]\noptions = { temperature = 9 }", r"models\.a\.options\.temperature"),
        ("[providers.openai]\nkind = 'openai'\nkey = { env = 'A', file = 'b' }", "either env or file"),
        ("[providers.openai]\nkind = 'openai'\nkey = { env = 'NO_SUCH' }", r"openai\.key: .*NO_SUCH"),
        ("[providers.openai]\nkind = 'openai'\nkey = { file = 'none' }", r"openai\.key: .*the file none"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(
    settings_for: SettingsFor, tmp_path: Path, models: str, complaint: str
) -> None:
    file = tmp_path / "models.toml"
    file.write_text(models)
    with pytest.raises(InvalidRequest, match=complaint) as wrong:
        LLMClient(settings_for(), Catalog(file))
    assert wrong.value.message.startswith("models.toml: ")


async def test_keys_stand_where_the_file_says(fake: FakeLLM, other: FakeLLM, tmp_path: Path) -> None:
    (tmp_path / "near.key").write_text("key-of-a-file\n")
    models = f"""
        [providers.near]
        url = "{other.url}"
        key = {{ file = "near.key" }}
        headers = {{ X-Team = {{ env = "TEAM" }}, X-App = "portal" }}
        [models.m]
        provider = "near"
    """
    async with portal_with(tmp_path, fake.url, models, TEAM="blue") as client:
        await ask(client, "m")
        await ask(client)
    shown = other.requests[-1]["headers"]
    assert (shown["Authorization"], shown["X-Team"], shown["X-App"]) == (
        "Bearer key-of-a-file",
        "blue",
        "portal",
    )
    assert fake.requests[-1]["headers"]["Authorization"] == "Bearer portal-key"
    assert "X-Team" not in fake.requests[-1]["headers"]


FROM_A_VARIABLE = """
[providers.near]
url = "{other}"
key = {{ env = "NEAR_KEY" }}
headers = {{ X-Team = {{ env = "TEAM" }} }}
[models.m]
provider = "near"
"""


async def test_a_key_may_end_with_the_line_break_that_echo_leaves(
    fake: FakeLLM, other: FakeLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"LLM_API_KEY": "ours\n", "NEAR_KEY": "theirs\r\n", "TEAM": "blue\n"}.items():
        monkeypatch.setenv(name, value)
    async with portal_with(tmp_path, fake.url, FROM_A_VARIABLE.format(other=other.url)) as client:
        await ask(client, "m")
        await ask(client)
    shown = other.requests[-1]["headers"]
    assert (shown["Authorization"], shown["X-Team"]) == ("Bearer theirs", "blue")
    assert fake.requests[-1]["headers"]["Authorization"] == "Bearer ours"


@pytest.mark.parametrize("wrong", ["canary\nkey", "canary-k\u20acy", "canary\x07key"])
@pytest.mark.parametrize(
    ("variable", "setting"),
    [
        ("LLM_API_KEY", "^LLM_API_KEY: "),
        ("NEAR_KEY", r"^models\.toml: providers\.near\.key: "),
        ("TEAM", r"^models\.toml: providers\.near\.headers\.X-Team: "),
    ],
)
def test_a_key_that_no_header_can_have_is_told_by_its_setting(
    settings_for: SettingsFor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wrong: str,
    variable: str,
    setting: str,
) -> None:
    file = tmp_path / "models.toml"
    file.write_text(FROM_A_VARIABLE.format(other=DOWN))
    values = {"LLM_API_KEY": "k", "NEAR_KEY": "k", "TEAM": "blue", variable: wrong}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidRequest, match=setting) as caught:
        LLMClient(settings_for(), Catalog(file))
    assert "canary" not in caught.value.message


def test_the_examples_of_the_documentation_are_right(tmp_path: Path) -> None:
    examples = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "providers.md").read_text(), re.DOTALL)
    seen: set[str] = set()
    for number, example in enumerate(examples):
        file = tmp_path / f"{number}.toml"
        file.write_text(example)
        seen |= {provider.kind for provider in Catalog(file).providers.values()}
    assert seen >= {"openai", "azure", "anthropic", "bedrock", "watsonx", "vllm", "ollama"}


# --- fallbacks -----------------------------------------------------------------------------------


def falling(other: FakeLLM) -> str:
    return f"""
        [providers.near]
        url = ["{DOWN}", "http://127.0.0.1:{free_port()}"]
        [providers.far]
        url = "{other.url}"
        [models.first]
        provider = "near"
        fallbacks = ["second", "third"]
        [models.second]
        provider = "far"
        id = "other-1"
        [models.third]
        id = "fake-1"
        [models."fake-1"]
        fallbacks = ["second"]
    """


async def test_a_fallback_answers_when_no_server_of_the_model_can(
    fake: FakeLLM, other: FakeLLM, tmp_path: Path
) -> None:
    async with portal_with(tmp_path, fake.url, falling(other)) as client:
        reply, meter = await ask(client, "first")
        assert (reply, meter.model) == ("from the other", "second"), "it is priced as what answered"
        other.script = Script(status=503)
        reply, meter = await ask(client, "first")
        assert (reply, meter.model) == ("Hello there", "third")
        other.script, fake.script = Script(pieces=text("from the other")), Script(status=502)
        assert (await ask(client))[1].model == "second", "also of the default model"


async def test_a_fallback_is_for_those_who_may_use_it(fake: FakeLLM, other: FakeLLM, tmp_path: Path) -> None:
    async with portal_with(tmp_path, fake.url, falling(other)) as client:
        meter = Meter()
        options = GenerationOptions(model="first")
        async for _ in client.stream(HI, options, meter=meter, allowed=("first", "third")):
            pass
        assert meter.model == "third"
        with pytest.raises(PortalError, match="reached"):
            async for _ in client.stream(HI, options, allowed=("first",)):
                pass
    assert not other.requests


async def test_there_is_no_fallback_after_the_first_piece(
    fake: FakeLLM, other: FakeLLM, tmp_path: Path
) -> None:
    async with portal_with(tmp_path, fake.url, falling(other)) as client:
        fake.script = Script(cut_after=1)
        with pytest.raises(LLMError, match="broke off"):
            await ask(client)
    assert not other.requests


def at_one_provider(other: FakeLLM, kind: str = "compatible") -> str:
    return f"""
        [providers.near]
        kind = "{kind}"
        url = "{other.url}"
        [models.clever]
        provider = "near"
        id = "other-1"
        fallbacks = ["small"]
        [models.small]
        provider = "near"
        id = "other-2"
    """


@pytest.mark.parametrize("status", [429, 500, 502, 503])
async def test_a_fallback_may_be_at_the_same_server(
    fake: FakeLLM, other: FakeLLM, tmp_path: Path, status: int
) -> None:
    other.failing = {"other-1": Script(status=status)}
    async with portal_with(tmp_path, fake.url, at_one_provider(other, "openai")) as client:
        for _ in range(4):
            reply, meter = await ask(client, "clever")
            assert (reply, meter.model) == ("from the other", "small")
        assert client.pools["near"].servers[0].state.state == "ok", "it answers, if not with each model"
    asked = [request["model"] for request in other.requests]
    assert asked.count("other-1") == (1 if status == 429 else 4), "who sends a 429 is left alone"


@pytest.mark.parametrize("kind", ["compatible", "llamacpp"])
async def test_with_no_fallback_left_the_error_is_the_first_models(
    fake: FakeLLM, other: FakeLLM, tmp_path: Path, kind: str
) -> None:
    other.failing = {"other-1": Script(status=502), "other-2": Script(status=503)}
    async with portal_with(tmp_path, fake.url, at_one_provider(other, kind)) as client:
        with pytest.raises(LLMError, match="502"):
            await ask(client, "clever")
    assert [request["model"] for request in other.requests] == ["other-1", "other-2"]


async def test_a_limit_is_for_a_model_at_a_provider_and_for_all_at_an_own_server(
    fake: FakeLLM, other: FakeLLM, tmp_path: Path
) -> None:
    other.failing = {"other-1": Script(status=429, headers={"Retry-After": "30"})}
    models = at_one_provider(other, "openai").replace("fallbacks", "aliases")
    async with portal_with(tmp_path, fake.url, models.replace('["small"]', '["smart"]')) as client:
        for _ in range(2):
            with pytest.raises(Overloaded) as busy:
                await ask(client, "clever")
            assert busy.value.retry_after == pytest.approx(30, abs=2)
        assert (await ask(client, "small"))[0] == "from the other"
        assert len(other.requests) == 2, "it asked to be left alone with the one"
    async with portal_with(tmp_path, fake.url, at_one_provider(other, "llamacpp")) as client:
        for model in ("clever", "small"):
            with pytest.raises(Overloaded):
                await ask(client, model)
        assert len(other.requests) == 3, "one's own server is busy for all of them"


async def test_a_server_that_cannot_be_reached_is_not_tried_with_a_fallback(
    fake: FakeLLM, other: FakeLLM, tmp_path: Path
) -> None:
    refused = FakeLLM(url=f"http://127.0.0.1:{free_port()}")
    async with portal_with(tmp_path, fake.url, at_one_provider(refused, "openai")) as client:
        with pytest.raises(LLMUnavailable, match="reached"):
            await ask(client, "clever")
        assert client.pools["near"].servers[0].state.failures == 1


# --- dialects ------------------------------------------------------------------------------------

NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}
ASKED: dict[str, Any] = {"temperature": 0.5, "max_tokens": 50, "extra": {"top_k": 7}}


@pytest.mark.parametrize(
    ("kind", "more", "path", "shown", "there", "gone"),
    [
        ("compatible", "", "/v1/chat/completions", "Bearer k", {"max_tokens": 50, "top_k": 7}, ()),
        ("llamacpp", "", "/v1/chat/completions", "Bearer k", NO_THINKING, ()),
        ("vllm", "", "/v1/chat/completions", "Bearer k", NO_THINKING, ()),
        ("ollama", "", "/v1/chat/completions", "Bearer k", {"reasoning_effort": "none"}, ()),
        ("localai", "", "/v1/chat/completions", "Bearer k", {"max_tokens": 50, "top_k": 7}, ()),
        (
            "openai",
            "",
            "/v1/chat/completions",
            "Bearer k",
            {"max_completion_tokens": 50, "top_p": 0.9, "stream_options": {"include_usage": True}},
            ("max_tokens", "top_k"),
        ),
        (
            "azure",
            "api_version = '2025-01-01'",
            "/openai/deployments/the%20id/chat/completions?api-version=2025-01-01",
            "k",
            {"max_completion_tokens": 50},
            ("max_tokens", "top_k"),
        ),
        (
            "anthropic",
            "",
            "/v1/chat/completions",
            "Bearer k",
            {"max_completion_tokens": 50, "temperature": 0.5},
            ("max_tokens", "top_k", "top_p"),
        ),
        (
            "bedrock",
            "",
            "/openai/v1/chat/completions",
            "Bearer k",
            {"max_completion_tokens": 50},
            ("max_tokens", "top_k"),
        ),
        (
            "watsonx",
            "token_url = '{url}/identity/token'",
            "/ml/gateway/v1/chat/completions",
            "Bearer token-1",
            {"max_completion_tokens": 50},
            ("max_tokens", "top_k"),
        ),
    ],
)  # fmt: skip
async def test_each_kind_is_spoken_to_in_its_dialect(
    fake: FakeLLM,
    other: FakeLLM,
    tmp_path: Path,
    kind: str,
    more: str,
    path: str,
    shown: str,
    there: dict[str, Any],
    gone: tuple[str, ...],
) -> None:
    models = f"""
        [providers.p]
        kind = "{kind}"
        url = "{other.url}"
        key = "k"
        {more.format(url=other.url)}
        [models.m]
        provider = "p"
        id = "the id"
    """
    async with portal_with(tmp_path, fake.url, models) as client:
        for _ in range(2):
            assert (await ask(client, "m", **ASKED))[0] == "from the other"
    sent = other.requests[-1]
    assert (sent["path"], sent["model"], sent["stream"]) == (path, "the id", True)
    assert sent["headers"]["api-key" if kind == "azure" else "Authorization"] == shown
    assert {name: sent.get(name) for name in there} == there
    assert not set(gone) & set(sent)
    if kind == "azure":
        assert "Authorization" not in sent["headers"]
    if kind == "watsonx":
        form = {"grant_type": "urn:ibm:params:oauth:grant-type:apikey", "apikey": "k"}
        assert other.token_requests == [form], "once for both requests"


@pytest.mark.parametrize("own_keys", [False, True])
@pytest.mark.parametrize(
    ("status", "kind", "complaint"),
    [
        (400, LLMError, "The token service did not accept {whose}"),
        (401, LLMError, "The token service did not accept {whose}"),
        (404, LLMError, "The token service answered with status 404"),
        (429, Overloaded, "The token service is busy"),
        (503, LLMError, "The token service answered with status 503"),
        (None, LLMUnavailable, "The token service cannot be reached"),
    ],
)
async def test_what_the_token_service_refuses_is_no_fault_of_the_llm_server(
    fake: FakeLLM,
    other: FakeLLM,
    tmp_path: Path,
    own_keys: bool,
    status: int | None,
    kind: type[PortalError],
    complaint: str,
) -> None:
    models = f"""
        [providers.p]
        kind = "watsonx"
        url = "{other.url}/v1"
        key = "k"
        own_keys = true
        token_url = "{DOWN if status is None else other.url}/identity/token"
        [models.m]
        provider = "p"
    """
    other.token_status = status or 200
    own_key = OwnKey("p", "mine") if own_keys else None
    whose = "the session's own key" if own_keys else r"the portal's key \(providers\.p\.key\)"
    async with portal_with(tmp_path, fake.url, models) as client:
        with pytest.raises(kind, match=complaint.format(whose=whose)):
            await ask(client, "m", own_key=own_key)
    async with portal_with(tmp_path, fake.url, models) as client:  # whose servers have not failed
        with pytest.raises(kind, match=complaint.format(whose=r"the portal's key \(providers\.p\.key\)")):
            await client.embed(["one"], "m", {})
    assert not other.requests


@pytest.mark.parametrize("url", ["{url}/v1", "{url}/openai/v1", "{url}/v1beta/openai"])
async def test_a_url_with_a_path_is_taken_as_it_is(
    fake: FakeLLM, other: FakeLLM, tmp_path: Path, url: str
) -> None:
    where = url.format(url=other.url)
    models = f'[providers.p]\nurl = "{where}"\nkind = "openai"\n[models.m]\nprovider = "p"'
    async with portal_with(tmp_path, fake.url, models) as client:
        await ask(client, "m")
    assert other.requests[-1]["path"] == f"{where.removeprefix(other.url)}/chat/completions"


async def test_what_a_model_refuses_to_be_told_is_left_out(
    fake: FakeLLM, other: FakeLLM, tmp_path: Path
) -> None:
    models = f"""
        [providers.p]
        kind = "openai"
        url = "{other.url}"
        [models.thinker]
        provider = "p"
        omit = ["temperature", "top_p", "max_tokens"]
    """
    async with portal_with(tmp_path, fake.url, models) as client:
        await ask(client, "thinker", temperature=0.3)
    assert not {"temperature", "top_p", "max_tokens", "max_completion_tokens"} & set(other.requests[-1])


async def test_of_two_that_exclude_each_other_the_one_that_was_asked_for_stays(
    fake: FakeLLM, other: FakeLLM, tmp_path: Path
) -> None:
    models = f'[providers.p]\nkind = "anthropic"\nurl = "{other.url}"\n[models.m]\nprovider = "p"'
    async with portal_with(tmp_path, fake.url, models) as client:
        await ask(client, "m", top_p=0.3)
    assert other.requests[-1]["top_p"] == 0.3
    assert "temperature" not in other.requests[-1]


# --- keys of sessions ----------------------------------------------------------------------------


async def test_an_own_key_goes_to_its_provider_alone(fake: FakeLLM, other: FakeLLM, tmp_path: Path) -> None:
    models = f"""
        [providers.p]
        kind = "openai"
        url = "{other.url}"
        own_keys = true
        [models.m]
        provider = "p"
        fallbacks = ["fake-1"]
        [models.second]
        fallbacks = ["m"]
        id = "fake-1"
    """
    mine = OwnKey("p", "canary-key")
    async with portal_with(tmp_path, fake.url, models) as client:
        _, meter = await ask(client, "m", own_key=mine)
        assert other.requests[-1]["headers"]["Authorization"] == "Bearer canary-key"
        assert meter.own_key
        other.script = Script(status=503)
        _, meter = await ask(client, "m", own_key=mine)
        assert (meter.model, meter.own_key) == ("fake-1", False)
        assert fake.requests[-1]["headers"]["Authorization"] == "Bearer portal-key"

        other.script = Script(status=429, headers={"Retry-After": "60"})
        await ask(client, "m", own_key=mine)
        other.script = Script()
        assert (await ask(client, "m", own_key=mine))[1].own_key, "one key that is worn out closes no server"
        other.script = Script(status=401, error="no such key: canary-key")
        with pytest.raises(LLMError, match="the session's own key"):
            await ask(client, "m", own_key=mine)

        for useless, complaint in ((None, "PUT /api/sessions"), (OwnKey("p", None), "set it again")):
            with pytest.raises(InvalidRequest, match=complaint):
                await ask(client, "m", own_key=useless)
        so_far = len(other.requests)
        fake.script = Script(status=503)
        with pytest.raises(PortalError, match="not ready"):
            await ask(client, "second")
        assert len(other.requests) == so_far, "a fallback that needs a key is none for who has none"
    assert "canary" not in repr(mine)


@pytest.mark.parametrize("key", ["canary\nkey", "canary-k\u20acy"])
async def test_an_own_key_that_cannot_be_sent_is_told_to_be_wrong(
    fake: FakeLLM, other: FakeLLM, tmp_path: Path, key: str
) -> None:
    models = f'[providers.p]\nurl = "{other.url}"\nown_keys = true\n[models.m]\nprovider = "p"'
    mine = OwnKey("p", key)
    async with portal_with(tmp_path, fake.url, models) as client:
        with pytest.raises(LLMError, match="the session's own key") as caught:
            await ask(client, "m", own_key=mine)
    assert "canary" not in caught.value.message
