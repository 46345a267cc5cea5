from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.services.thinking import ThinkSplitter


def split(pieces: list[str]) -> tuple[str, str]:
    """(reply, thoughts) of a reply that comes in these pieces."""
    splitter = ThinkSplitter()
    parts = [part for piece in pieces for part in splitter.feed(piece)] + splitter.flush()
    return (
        "".join(content for kind, content in parts if kind == "text"),
        "".join(content for kind, content in parts if kind == "thinking"),
    )


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Hello", ("Hello", "")),
        ("  Hello ", ("  Hello ", "")),
        ("<think>hm</think>\n\nHello", ("Hello", "hm")),
        ("\n<think>hm</think>Hello", ("Hello", "hm")),
        ("<think>a</think>\n<think>b</think> c", ("c", "ab")),
        ("<think></think>\n\nHello", ("Hello", "")),
        ("Use <think> tags", ("Use <think> tags", "")),
        ("<think>never closed", ("", "never closed")),
        ("<thin", ("<thin", "")),
        ("", ("", "")),
    ],
)
def test_thoughts_are_split_from_the_reply(reply: str, expected: tuple[str, str]) -> None:
    assert split([reply]) == expected


marks = st.sampled_from(["<think>", "</think>", "<", "</", "think>", "\n", " ", "a", "ü", "🙂"])


@given(st.lists(marks, max_size=12).map("".join), st.data())
def test_it_does_not_matter_where_the_pieces_are_cut(reply: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(reply)), max_size=8)))
    pieces = [reply[a:b] for a, b in zip([0, *cuts], [*cuts, len(reply)], strict=True)]
    assert split(pieces) == split([reply])
