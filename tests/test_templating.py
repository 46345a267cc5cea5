from __future__ import annotations

import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import InvalidRequest
from app.services.templating import LONGEST_PROMPT, names_of, render


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
    content = "{{ b }} {{ a.x }} {% if c is defined %}{{ c }}{% endif %}{{ d | default('') }}"
    assert names_of(content) == (["a", "b"], ["c", "d"])
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
    "content",
    [
        "{{ a" + ".b" * 400 + " }}",
        "{{ a" + "|trim" * 150 + " }}",
        "{{ a" + "|trim" * 400 + " }}",
        "{{ " + "a and " * 250 + "a }}",
        "{{ " + "a and " * 2000 + "a }}",
        "{{ " + "not " * 400 + "a }}",
        "{% for b in a %}" * 25 + "{% endfor %}" * 25,
        "{% if a %}" * 120 + "{% endif %}" * 120,
        "{{ " + "(" * 500 + "a" + ")" * 500 + " }}",
    ],
    ids=lambda content: content[:20],
)
def test_what_is_chained_or_nested_too_deeply_is_refused(content: str) -> None:
    began = time.process_time()
    with pytest.raises(InvalidRequest, match=r"^content: (line 1: )?it is nested too deeply$"):
        render(content, {"a": ["x"]})
    assert time.process_time() - began < 1


def test_variables_that_are_nested_too_deeply_are_refused() -> None:
    deep: list[Any] = []
    for _ in range(3000):
        deep = [deep]
    with pytest.raises(InvalidRequest, match=r"^variables: they are nested too deeply$"):
        render("{{ deep }}", {"deep": deep})


def test_many_chains_take_no_long() -> None:
    began = time.process_time()
    assert render(("{{ a" + "|trim" * 50 + " }}") * 45, {"a": "x"}) == "x" * 45
    assert time.process_time() - began < 1


@pytest.mark.parametrize("content", ["{{ a }}" * 14_000, "{{ [" + "1," * 49_000 + "1] }}", "{# #}a" * 16_000])
def test_a_template_of_more_parts_than_anybody_writes_is_refused(content: str) -> None:
    began = time.process_time()
    with pytest.raises(
        InvalidRequest, match=r"^content: there is more in it than 5000 names, signs and pieces"
    ):
        render(content, {"a": "x"})
    assert time.process_time() - began < 0.5


def test_a_long_text_is_an_ordinary_template() -> None:
    assert len(render("Some words for the model.\n" * 3_800 + "{{ a }}", {"a": "x"})) == 98_801


def test_chains_and_nesting_of_ordinary_templates() -> None:
    names = [f"n{number}" for number in range(40)]
    assert render("{{ " + " or ".join(names) + " }}", dict.fromkeys(names, 0) | {"n39": "x"}) == "x"
    choices = "".join(f"{{% elif a == {number} %}}{number}" for number in range(200))
    assert render("{% if a == 'no' %}" + choices + "{% endif %}", {"a": 150}) == "150"
    assert render("{% for b in a %}" * 9 + "{{ b }}" + "{% endfor %}" * 9, {"a": ["x"]}) == "x"


@pytest.mark.parametrize(
    "content",
    [
        "{{ " + "9" * 5000 + " }}",
        "{{ 0x" + "f" * 5000 + " }}",
        "{{ 1e999 }}",
        "{{ large|round(1, 'floor') }}",
    ],
    ids=lambda content: content[:8],
)
def test_numbers_that_are_too_large_are_refused(content: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^content: "):
        render(content, {"large": 10**400})


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


LETTERS = "a" * 100_000
ROW = [0] * 100_000


@pytest.mark.parametrize(
    "content",
    [
        "{{ 1|round(100000000, 'floor') }}",
        "{{ [1]|tojson(200000000) }}",
        "{{ deep|tojson(9000) }}",
        "{{ text|replace('a', text) }}",
        "{{ text|replace('', text) }}",
        "{{ text|join(text) }}",
        "{{ row|join(text) }}",
        "{{ text|join('', '" + "0." * 2000 + "0') }}",
        "{{ text|sort(false, false, '" + "0," * 2000 + "0') }}",
        "{{ text|unique(false, '" + "0." * 2000 + "0') }}",
        "{{ text|trim(text) }}",
        "{% for a in row %}{% if [row]|string %}{% endif %}{% endfor %}",
        "{% for a in text %}{% if a in row %}{% endif %}{% endfor %}",
        "{% for a in text %}{% if a is in row %}{% endif %}{% endfor %}",
        "{% for a in text %}{% if row == [text] %}{% endif %}{% endfor %}",
        "{% for a in row %}" + "{% if a %}{% endif %}" * 60 + "{% endfor %}",
        "{{ [" + "text, " * 60 + "] }}",
        "{{ row[[" + "text, " * 60 + "]] }}",
    ],
    ids=lambda content: content[:40],
)
def test_what_a_template_would_make_is_paid_for_before_it_is_made(content: str) -> None:
    variables = {"text": LETTERS, "row": ROW, "deep": [[[[[0] * 30]]]]}
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(InvalidRequest, match="too much work"):
            render(content, variables)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 2


@pytest.mark.parametrize("content", ["{{ 1|round(*x) }}", "{{ 1|round(**x) }}", "{{ 1 is in(*x) }}"])
def test_arguments_are_given_one_by_one(content: str) -> None:
    with pytest.raises(InvalidRequest, match=r"\* and \*\* are not allowed"):
        names_of(content)


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        ("{{ 2.346|round(2) }} {{ 2.5|round(0, 'floor') }}", "2.35 2.0"),
        ("{{ d|tojson(2) }}", '{\n  "k": [\n    1\n  ]\n}'),
        ("{{ t|replace('e', '-', 1) }}", "on- line\n"),
        ("{{ t|replace('\n', ' ')|trim }}|{{ t|trim('o\n') }}", "one line|ne line"),
        ("{{ r|unique|list|join(', ') }} {{ r|reverse|join }}", "b, a aab"),
        ("{{ p|sort(false, false, 'n')|join(' ', 'n') }}", "1 2"),
        ("{% for x in r %}{% if x in ['a'] %}{{ loop.index }}{% endif %}{% endfor %}", "23"),
        ("{{ r|length }} {{ r|unique|length }} {{ r|last }}", "3 2 a"),
    ],
)
def test_filters_of_ordinary_templates(content: str, prompt: str) -> None:
    variables = {"d": {"k": [1]}, "t": "one line\n", "r": ["b", "a", "a"], "p": [{"n": 2}, {"n": 1}]}
    assert render(content, variables) == prompt


def test_a_long_list_is_written_out_within_the_budget() -> None:
    rows = [{"name": f"name {number}", "text": "some words " * 5} for number in range(2000)]
    content = (
        "{% for row in rows %}- {{ row.name|upper }}: {{ row.text|trim|replace('w', 'W') }}\n{% endfor %}"
    )
    assert render(content, {"rows": rows}).count("\n") == 2000


@given(st.text(max_size=60), st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
def test_any_text_renders_or_is_refused_with_a_field(content: str, variables: dict[str, str]) -> None:
    try:
        render(content, variables)
    except InvalidRequest as error:
        assert error.message.startswith(("content: ", "variables: "))
