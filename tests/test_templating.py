from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import InvalidRequest
from app.services.templating import LONGEST_PROMPT, render, variables_of


@pytest.mark.parametrize(
    ("content", "variables", "prompt"),
    [
        ("You are {{ name }}.", {"name": "Ada"}, "You are Ada."),
        ("{{ a.b }} {{ c[0] }}", {"a": {"b": 1}, "c": ["x"]}, "1 x"),
        ("{% for item in items %}- {{ item }}\n{% endfor %}", {"items": ["a", "b"]}, "- a\n- b\n"),
        ("{% if mood is defined %}Be {{ mood }}.{% endif %}", {}, ""),
        ("{{ mood|default('calm') }}", {}, "calm"),
        ("{{ name|upper }}{{ '!' if loud else '' }}", {"name": "a", "loud": True}, "A!"),
        ("<b>{{ html }}</b>", {"html": "<i>"}, "<b><i></b>"),
        ("no variables\n", {"more": 1}, "no variables\n"),
    ],
)
def test_prompts(content: str, variables: dict[str, Any], prompt: str) -> None:
    assert render(content, variables) == prompt


def test_all_missing_variables_are_named() -> None:
    assert variables_of("{{ b }} {{ a.x }} {% if c is defined %}{{ c }}{% endif %}") == ["a", "b"]
    with pytest.raises(InvalidRequest, match=r"^variables: missing a, b$"):
        render("{{ b }} {{ a.x }}", {})
    with pytest.raises(InvalidRequest, match=r"variables: .*x"):
        render("{{ a.x }}", {"a": {}})


@pytest.mark.parametrize(
    "content",
    [
        "{{ range(10) }}",
        "{{ ''.__class__ }}",
        "{{ x.__class__.__mro__ }}",
        "{{ 'a' * 1000000000 }}",
        "{{ 2 ** 1000000 }}",
        "{% set x = 1 %}",
        "{% macro f() %}{% endmacro %}",
        "{% include 'x' %}",
        "{% import 'x' as y %}",
        "{{ x|attr('y') }}",
        "{{ x|map('upper') }}",
        "{{ lipsum() }}",
        "{{ cycler }}{{ x() }}",
        "{{ unclosed",
        "{% if %}",
        "{{ x|nope }}",
        "{{ (" * 500,
    ],
)
def test_what_is_not_allowed_is_refused(content: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^(content|variables): "):
        render(content, {"x": "text"})


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{% for a in x %}{{ y }}{% endfor %}", str(LONGEST_PROMPT)),
        ("{% for a in x %}{% for b in x %}{% endfor %}{% endfor %}", "too much work"),
        ("{% for a in x %}{% if y|replace('l', 'm') %}{% endif %}{% endfor %}", "too much work"),
    ],
)
def test_a_rendering_is_bounded_in_space_and_time(content: str, complaint: str) -> None:
    began = time.process_time()
    with pytest.raises(InvalidRequest, match=complaint):
        render(content, {"x": list(range(100_000)), "y": "long " * 1000})
    assert time.process_time() - began < 1


@given(st.text(max_size=60), st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
def test_any_text_renders_or_is_refused_with_a_field(content: str, variables: dict[str, str]) -> None:
    try:
        render(content, variables)
    except InvalidRequest as error:
        assert error.message.startswith(("content: ", "variables: "))
