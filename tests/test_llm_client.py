from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import pytest

from app.config import Settings
from app.errors import InvalidRequest, LLMError, LLMTimeout, LLMUnavailable, Overloaded, PortalError
from app.events import GenerationOptions
from app.services.llm_client import LLMClient
from app.services.replies import Completion
from tests.fake_llm import FakeLLM, Script, serve, text
from tests.support import client_for, free_port

SettingsFor = Callable[..., Settings]
HI = [{"role": "user", "content": "hi"}]
TOLERANCE_S = 1.0


@pytest.fixture
async def client(fake: FakeLLM, settings_for: SettingsFor) -> AsyncIterator[LLMClient]:
    async with client_for(settings_for(fake.url)) as opened:
        yield opened


async def complete(client: LLMClient, **options: Any) -> Completion:
    completion = Completion()
    async with aclosing(client.stream(HI, GenerationOptions(**options))) as updates:
        async for update in updates:
            completion.add(update)
    return completion


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
async def test_the_url_may_end_in_v1(fake: FakeLLM, settings_for: SettingsFor, suffix: str) -> None:
    async with client_for(settings_for(fake.url + suffix)) as client:
        assert await client.agenerate(HI) == "Hello there"


async def test_settings_and_options_reach_the_server(fake: FakeLLM, settings_for: SettingsFor) -> None:
    async with client_for(settings_for(fake.url, llm_api_key="k-123", llm_max_tokens=77)) as client:
        await client.agenerate(HI, temperature=0, stop=["END"], seed=5)
    sent = fake.requests[-1]
    assert sent["headers"]["Authorization"] == "Bearer k-123"
    assert (sent["model"], sent["max_tokens"], sent["temperature"]) == ("fake-1", 77, 0)
    assert (sent["stop"], sent["seed"], sent["top_p"], sent["messages"]) == (["END"], 5, 0.9, HI)
    assert "tools" not in sent


async def test_default_is_the_model_that_is_served(fake: FakeLLM, client: LLMClient) -> None:
    fake.model = "/models/secret/Llama.gguf"
    await complete(client, model="default")
    assert fake.requests[-1]["model"] == "/models/secret/Llama.gguf"
    await complete(client, model="Llama.gguf")
    assert fake.requests[-1]["model"] == "/models/secret/Llama.gguf"
    assert (await client.ahealth()).model == "Llama.gguf", "no path is shown"
    with pytest.raises(InvalidRequest, match=r"model: .*Llama\.gguf"):
        await complete(client, model="other")


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        ("llamacpp", {"chat_template_kwargs": {"enable_thinking": False}}),
        ("vllm", {"chat_template_kwargs": {"enable_thinking": False}}),
        ("library", {"reasoning_effort": "none"}),
        ("openai", {}),
    ],
)
async def test_thinking_is_switched_off_where_the_server_can(
    fake: FakeLLM, client: LLMClient, server: str, expected: dict[str, Any]
) -> None:
    fake.owner = server
    fake.script = Script(pieces=[{"reasoning": "hm"}, *text("<think>so", "</think>Yes")])
    completion = await complete(client)
    keys = {"chat_template_kwargs", "reasoning_effort"}
    assert {key: value for key, value in fake.requests[-1].items() if key in keys} == expected
    assert (completion.response, completion.thinking) == ("Yes", "")


async def test_usage_is_the_servers_own(fake: FakeLLM, client: LLMClient) -> None:
    fake.script = Script(
        pieces=[{"reasoning_content": "1234567890"}, *text("1234567890")],
        usage={
            "prompt_tokens": 50,
            "completion_tokens": 20,
            "total_tokens": 70,
            "prompt_tokens_details": {"cached_tokens": 40},
        },
    )
    usage = (await complete(client)).usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (50, 20, 40)
    assert usage.reasoning_tokens == 10
    assert not usage.estimated


async def test_usage_is_read_from_llama_cpps_timings(fake: FakeLLM, client: LLMClient) -> None:
    timings = b'{"cache_n": 30, "prompt_n": 4, "predicted_n": 2, "predicted_per_second": 12.345}'
    chunk = (
        b'data: {"choices":[{"delta":{"content":"ab"},"finish_reason":"stop"}],"timings":%b}\n\n' % timings
    )
    fake.script = Script(raw=chunk + b"data: [DONE]\n\n")
    usage = (await complete(client)).usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (34, 2, 30)
    assert usage.tokens_per_second == 12.35


async def test_a_speed_is_measured_where_none_is_told(fake: FakeLLM, client: LLMClient) -> None:
    fake.script = Script(pieces=text(*"abcdefghijk"), between=0.02, usage={"completion_tokens": 11})
    pace = (await complete(client)).usage.tokens_per_second
    assert pace is not None
    assert 10 < pace <= 50


async def test_tool_calls_are_put_together(fake: FakeLLM, client: LLMClient) -> None:
    def call(index: int, **delta: Any) -> dict[str, Any]:
        return {"tool_calls": [{"index": index, **delta}]}

    fake.script = Script(
        pieces=[
            call(0, id="c1", type="function", function={"name": "go", "arguments": ""}),
            call(0, function={"arguments": '{"x"'}),
            call(1, id="c2", function={"name": "stop", "arguments": "{}"}),
            call(0, function={"arguments": ":1}"}),
        ]
    )
    calls = (await complete(client)).tool_calls
    assert [(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in calls] == [
        ("c1", "go", '{"x":1}'),
        ("c2", "stop", "{}"),
    ]


async def test_a_server_that_does_not_stream_is_understood(fake: FakeLLM, client: LLMClient) -> None:
    fake.script = Script(whole=True)
    assert (await complete(client)).response == "Hello there"


async def test_pieces_that_come_together_leave_together(fake: FakeLLM, client: LLMClient) -> None:
    chunk = b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n'
    end = b'data: {"choices":[{"delta":{},"finish_reason":"length"}]}\n\ndata: [DONE]\n\n'
    fake.script = Script(raw=b"".join(chunk % b"x" for _ in range(64)) + b": ping\n\n" + end)
    updates = [update async for update in client.stream(HI, GenerationOptions())]
    assert len(updates) < 10
    assert await client.agenerate(HI) == "x" * 64


async def test_at_most_so_many_at_once_behind_a_bounded_queue(
    fake: FakeLLM, settings_for: SettingsFor
) -> None:
    async with client_for(settings_for(fake.url, llm_max_concurrency=3, llm_max_queue=5)) as client:
        fake.script = Script(before_first=0.1)
        results = await asyncio.gather(*(client.agenerate(HI) for _ in range(10)), return_exceptions=True)
    assert fake.most_running == 3
    assert [type(result) for result in results] == [str] * 8 + [Overloaded] * 2
    assert client.places.taken == client.places.waiting == 0


async def test_closing_a_stream_closes_the_request(fake: FakeLLM, client: LLMClient) -> None:
    fake.script = Script(pieces=text(*["more "] * 500), between=0.02)
    async with aclosing(client.agenerate_stream(HI)) as pieces:
        async for _ in pieces:
            break
    await fake.until(lambda: fake.dropped == 1, 1.0)
    fake.script = Script(before_headers=30)
    asking = asyncio.create_task(client.agenerate(HI))
    await fake.until(lambda: fake.running == 1)
    asking.cancel()
    await fake.until(lambda: fake.dropped == 2, 1.0)
    assert client.places.taken == 0


LIMITS = {
    "llm_timeout": 30.0,
    "llm_first_token_timeout": 20.0,
    "llm_idle_timeout": 10.0,
    "llm_connect_timeout": 5.0,
}


@pytest.mark.parametrize(
    ("limit", "script", "words"),
    [
        ("llm_first_token_timeout", Script(before_headers=60), "begin"),
        ("llm_first_token_timeout", Script(before_first=60), "begin"),
        ("llm_idle_timeout", Script(between=60), "silent"),
        ("llm_timeout", Script(pieces=text(*["x"] * 1000), between=0.05), "finish"),
    ],
)
async def test_a_slow_server_gives_a_typed_error_in_time(
    fake: FakeLLM, settings_for: SettingsFor, limit: str, script: Script, words: str
) -> None:
    limits = {**LIMITS, limit: 0.5}
    if limit == "llm_timeout":
        limits["llm_connect_timeout"] = 0.4
    async with client_for(settings_for(fake.url, **limits)) as client:
        await client.amodels()
        fake.script = script
        began = time.monotonic()
        with pytest.raises(LLMTimeout, match=words):
            await client.agenerate(HI)
        assert time.monotonic() - began < 0.5 + TOLERANCE_S
        await fake.until(lambda: fake.dropped == 1, 1.0)
        assert client.places.taken == 0


async def test_hidden_thinking_is_a_beginning(fake: FakeLLM, settings_for: SettingsFor) -> None:
    async with client_for(settings_for(fake.url, llm_first_token_timeout=0.3)) as client:
        thoughts = [{"reasoning_content": "hm"} for _ in range(20)]
        fake.script = Script(pieces=[*thoughts, *text("Yes")], between=0.03)
        assert await client.agenerate(HI) == "Yes"


async def test_a_server_that_cannot_be_reached(settings_for: SettingsFor) -> None:
    async with client_for(settings_for(f"http://127.0.0.1:{free_port()}")) as client:
        began = time.monotonic()
        with pytest.raises(LLMUnavailable, match="reached") as error:
            await client.agenerate(HI)
        assert time.monotonic() - began < TOLERANCE_S
        assert "127.0.0.1" not in error.value.message
        assert (await client.ahealth()).status == "down"


async def test_a_server_that_does_not_accept_connections(settings_for: SettingsFor) -> None:
    def never(_reader: Any, _writer: Any) -> None: ...

    server = await asyncio.start_server(never, "127.0.0.1", 0, backlog=1, start_serving=False)
    port = server.sockets[0].getsockname()[1]
    fillers = [asyncio.create_task(asyncio.open_connection("127.0.0.1", port)) for _ in range(8)]
    await asyncio.wait(fillers, timeout=0.2)
    async with client_for(settings_for(f"http://127.0.0.1:{port}", llm_connect_timeout=0.5)) as client:
        began = time.monotonic()
        with pytest.raises(LLMUnavailable):
            await client.agenerate(HI)
        assert time.monotonic() - began < 0.5 + TOLERANCE_S
    for filler in fillers:
        filler.cancel()
    for result in await asyncio.gather(*fillers, return_exceptions=True):
        if isinstance(result, tuple):
            result[1].transport.abort()
    server.close()


@pytest.mark.parametrize(
    ("script", "error", "retryable"),
    [
        (Script(status=400, error="http://10.0.0.5/secret"), LLMError, False),
        (Script(status=401), LLMError, False),
        (Script(status=404), LLMError, False),
        (Script(status=429, headers={"Retry-After": "7"}), Overloaded, True),
        (Script(status=500), LLMError, True),
        (Script(status=503), LLMUnavailable, True),
        (Script(cut_after=1), LLMError, True),
        (Script(raw=b"data: {nonsense\n\n"), LLMError, False),
        (Script(raw=b'data: {"error": {"message": "out of secret memory"}}\n\n'), LLMError, True),
        (Script(raw=b""), LLMError, True),
        (Script(raw=b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'), LLMError, True),
    ],
)
async def test_every_failure_of_the_server_has_its_error(
    fake: FakeLLM, client: LLMClient, script: Script, error: type[PortalError], retryable: bool
) -> None:
    fake.script = script
    with pytest.raises(error) as raised:
        await client.agenerate(HI)
    assert raised.value.retryable is retryable
    assert "secret" not in raised.value.message, "what the server says of itself is not told"
    assert client.places.taken == 0
    fake.script = Script()
    if script.headers:
        assert raised.value.retry_after == 7
        with pytest.raises(Overloaded) as again:
            await client.agenerate(HI)
        assert again.value.retry_after == pytest.approx(7, abs=1)
        assert len(fake.requests) == 1, "it asked to be left alone for so long"
        return
    assert await client.agenerate(HI) == "Hello there"


async def test_health_follows_the_server(fake: FakeLLM, client: LLMClient) -> None:
    watching = asyncio.create_task(client.watch())
    try:
        async with asyncio.timeout(10):
            for status, expected in ((200, "ok"), (503, "degraded"), (200, "ok"), (404, "degraded")):
                fake.models_status = status
                while (await client.ahealth()).status != expected:
                    await asyncio.sleep(0.02)
    finally:
        watching.cancel()


async def test_idle_connections_are_used_again_and_replaced_when_they_broke(
    fake: FakeLLM, settings_for: SettingsFor
) -> None:
    port = free_port()
    async with client_for(settings_for(f"http://127.0.0.1:{port}")) as client:
        for _ in range(2):
            async with serve(FakeLLM(), port):
                assert await client.agenerate(HI) == "Hello there"


async def test_the_context_comes_from_the_server(fake: FakeLLM, client: LLMClient) -> None:
    assert client.context_of(None) is None
    fake.context = 2048
    await client.amodels()
    assert client.context_of(None) == 2048
