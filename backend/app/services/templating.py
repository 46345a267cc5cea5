"""Renders prompt templates: text with `{{ variables }}`, in a small and bounded part of Jinja2.

What a template may hold is a list of what is allowed: variables, their fields, some filters and tests,
`if` and `for`. Nothing can be called, assigned, imported or multiplied. What repeats is metered: each
iteration and each filter spends from a budget, so the time of a rendering is bounded too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from functools import wraps
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, UndefinedError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from app.errors import InvalidRequest

LONGEST_TEMPLATE = 100_000
LONGEST_PROMPT = 400_000
MOST_WORK = 200_000
"""Iterations of loops, and tenths of what filters are given, in one rendering."""

ALLOWED = (
    nodes.Template,
    nodes.Output,
    nodes.TemplateData,
    nodes.Name,
    nodes.Const,
    nodes.Getattr,
    nodes.Getitem,
    nodes.Filter,
    nodes.Test,
    nodes.If,
    nodes.CondExpr,
    nodes.For,
    nodes.And,
    nodes.Or,
    nodes.Not,
    nodes.Compare,
    nodes.Operand,
    nodes.Tuple,
    nodes.List,
)
FILTERS = frozenset(
    {"capitalize", "default", "first", "join", "last", "length", "list", "lower", "replace", "reverse"}
    | {"round", "sort", "string", "title", "tojson", "trim", "unique", "upper", "wordcount"}
)
TESTS = frozenset(
    {"defined", "undefined", "none", "string", "number", "mapping", "sequence", "true", "false", "in"}
)

_work_left: ContextVar[list[int]] = ContextVar("work_left")


def _spend(work: int) -> None:
    left = _work_left.get()
    left[0] -= work
    if left[0] < 0:
        raise InvalidRequest("content: with these variables it takes too much work to render")


def _metered(filter_: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(filter_)
    def run(*arguments: Any, **options: Any) -> Any:
        _spend(1 + sum(len(value) for value in arguments if isinstance(value, str | list | dict)) // 10)
        return filter_(*arguments, **options)

    return run


def _iterated(values: Iterable[Any]) -> list[Any]:
    """What a loop goes through; every `for` is given this filter."""
    items = list(values)
    _spend(len(items))
    return items


_environment = ImmutableSandboxedEnvironment(
    undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True
)
_environment.filters = {name: _metered(_environment.filters[name]) for name in FILTERS}
_environment.filters["iterated"] = _iterated


def variables_of(content: str) -> list[str]:
    """The names that a template needs, sorted. Raises `InvalidRequest` when it is no template."""
    tree = _parse(content)
    return sorted(meta.find_undeclared_variables(tree) - _optional(tree))


def render(content: str, variables: Mapping[str, Any]) -> str:
    """The prompt. Raises `InvalidRequest` when a variable is missing, naming all that are, or when the
    prompt would be too long."""
    missing = [name for name in variables_of(content) if name not in variables]
    if missing:
        raise InvalidRequest(f"variables: missing {', '.join(missing)}", details=[{"missing": missing}])
    pieces, length = [], 0
    started = _work_left.set([MOST_WORK])
    try:
        for piece in _compile(content).generate(dict(variables)):
            pieces.append(piece)
            length += len(piece)
            if length > LONGEST_PROMPT:
                raise InvalidRequest(
                    f"variables: the prompt would be longer than {LONGEST_PROMPT} characters"
                )
    except UndefinedError as error:
        raise InvalidRequest(f"variables: {error.message}") from None
    except (TemplateError, TypeError, ValueError) as error:
        raise InvalidRequest(f"content: {error}") from None
    finally:
        _work_left.reset(started)
    return "".join(pieces)


def _compile(content: str) -> Template:
    tree = _parse(content)
    for loop in list(tree.find_all(nodes.For)):
        loop.iter = nodes.Filter(loop.iter, "iterated", [], [], None, None, lineno=loop.lineno)
    code = _environment.compile(tree)
    return Template.from_code(_environment, code, _environment.make_globals(None))


def _parse(content: str) -> nodes.Template:
    if len(content) > LONGEST_TEMPLATE:
        raise InvalidRequest(f"content: it is longer than {LONGEST_TEMPLATE} characters")
    try:
        tree = _environment.parse(content)
    except TemplateSyntaxError as error:
        raise InvalidRequest(f"content: line {error.lineno}: {error.message}") from None
    except RecursionError:
        raise InvalidRequest("content: it is nested too deeply") from None
    _check(tree)
    return tree


def _check(node: nodes.Node) -> None:
    """Raises `InvalidRequest` for whatever is not allowed."""
    line = f"content: line {node.lineno}: "
    if not isinstance(node, ALLOWED):
        raise InvalidRequest(f"{line}{type(node).__name__} is not allowed in a prompt template")
    if isinstance(node, nodes.Filter) and node.name not in FILTERS:
        raise InvalidRequest(f"{line}there is no filter {node.name}; there are {', '.join(sorted(FILTERS))}")
    if isinstance(node, nodes.Test) and node.name not in TESTS:
        raise InvalidRequest(f"{line}there is no test {node.name}; there are {', '.join(sorted(TESTS))}")
    for child in node.iter_child_nodes():
        _check(child)


def _optional(tree: nodes.Template) -> set[str]:
    """Names that the template asks about before it uses them, or has a default for."""
    asking = [test for test in tree.find_all(nodes.Test) if test.name in {"defined", "undefined"}]
    asking += [use for use in tree.find_all(nodes.Filter) if use.name == "default"]  # type: ignore[misc]
    return {test.node.name for test in asking if isinstance(test.node, nodes.Name)}
