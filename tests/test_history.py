"""What is sent to the model: a property test of the invariants, and of how rarely the prefix changes."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import InvalidRequest
from app.events import Usage
from app.services.history import History

Prompt = list[dict[str, Any]]
SYSTEM = "s" * 10


def size(messages: Sequence[dict[str, Any]]) -> int:
    """A server that counts a token a character and four a message."""
    return sum(len(message["content"]) + 4 for message in messages)


async def count(messages: Sequence[dict[str, Any]]) -> int | None:
    return size(messages)


async def cannot_count(messages: Sequence[dict[str, Any]]) -> int | None:
    return None


def converse(
    history: History, exchanges: list[tuple[int, int]], *, budget: int, counts: bool = True
) -> list[Prompt]:
    """The prompts of a conversation whose questions and answers have these lengths."""
    prompts = []

    async def turn(number: int, asked: int, answered: int) -> None:
        question, answer = f"{number:x}".rjust(asked, "q"), "a" * answered
        prompt = await history.fit(
            question,
            budget=budget,
            max_messages=0,
            context=None,
            count=count if counts else cannot_count,
        )
        prompts.append(prompt)
        usage = Usage(size(prompt), answered) if counts else None
        history.add(f"m{number}", question, answer, usage)

    async def all_turns() -> None:
        for number, (asked, answered) in enumerate(exchanges):
            await turn(number, asked, answered)

    asyncio.run(all_turns())
    return prompts


lengths = st.lists(st.tuples(st.integers(4, 80), st.integers(0, 80)), min_size=1, max_size=40)


@given(lengths, st.integers(250, 1500), st.booleans())
def test_invariants(exchanges: list[tuple[int, int]], budget: int, counts: bool) -> None:
    prompts = converse(History(SYSTEM), exchanges, budget=budget, counts=counts)
    for number, prompt in enumerate(prompts):
        roles = [message["role"] for message in prompt]
        assert prompt[0] == {"role": "system", "content": SYSTEM}
        assert prompt[-1]["content"].endswith(f"{number:x}")
        assert roles[1:] == ["user", "assistant"] * ((len(prompt) - 2) // 2) + ["user"], "whole turns"
        if counts:
            assert size(prompt) <= budget
    for before, after in itertools.pairwise(prompts):
        kept = after[: len(before)] == before
        cut = len(after) < len(before) + 2
        assert kept or cut, "between cuts the prefix stays the same"


def test_it_is_cut_rarely_and_in_big_steps() -> None:
    prompts = converse(History(SYSTEM), [(40, 40)] * 200, budget=2000)
    cuts = [
        number
        for number, (before, after) in enumerate(itertools.pairwise(prompts))
        if after[: len(before)] != before
    ]
    assert 0 < len(cuts) <= 20
    assert all(size(prompts[number + 1]) <= 0.6 * 2000 for number in cuts)


async def test_the_server_is_asked_only_near_the_budget() -> None:
    asked = 0

    async def counting(messages: Sequence[dict[str, Any]]) -> int | None:
        nonlocal asked
        asked += 1
        return size(messages)

    history = History(SYSTEM)
    for number in range(10):
        prompt = await history.fit("q" * 20, budget=1000, max_messages=0, context=None, count=counting)
        history.add(f"m{number}", "q" * 20, "a" * 20, Usage(size(prompt), 20))
    assert asked == 0


async def test_the_number_of_messages_can_be_bounded() -> None:
    history = History("")
    for number in range(30):
        prompt = await history.fit(f"{number}", budget=10_000, max_messages=10, context=None, count=count)
        assert len(prompt) <= 10
        history.add(f"m{number}", f"{number}", "a", None)


async def test_a_message_longer_than_the_context_is_refused_and_nothing_forgotten() -> None:
    history = History("")
    history.add("m1", "early", "answer", None)
    with pytest.raises(InvalidRequest, match=r"message: .*504.*100"):
        await history.fit("q" * 500, budget=80, max_messages=0, context=100, count=count)
    assert len(history.prompt("next")) == 3
