"""Renders prompt templates: text with `{{ variables }}`, in a small and bounded part of Jinja2.

What a template may hold is a list of what is allowed: variables, their fields, some filters and tests,
`if` and `for`. Nothing can be called, assigned, imported or multiplied. What repeats or grows is metered:
each iteration, filter, list and comparison spends from a budget before it is done, for what it is given
and for what it would make of that, so the time and the memory of a rendering are bounded too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from itertools import islice
from math import inf
from typing import Any, NamedTuple

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, UndefinedError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from app.errors import InvalidRequest

LONGEST_TEMPLATE = 100_000
LONGEST_PROMPT = 400_000
MOST_TOKENS = 5_000
"""Names, numbers, signs and pieces of text in a template: each takes 20 us to read, and more to compile."""
DEEPEST = 60
"""Levels of what is nested or chained in a template."""
MOST_WORK = 200_000
"""Iterations of loops, and tenths of the characters that filters and the like go through, in one
rendering."""

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


def _weight(value: Any, indent: int = 0) -> int:
    """About how many characters a value is as text, with all that is in it, and at least ten for each
    item. It stops counting when that is more than can be paid."""
    total, most = 0, 10 * MOST_WORK
    left = [(value, 0)]
    while left and total <= most:
        item, depth = left.pop()
        total += 10 + indent * depth
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, int):
            total += item.bit_length() // 3
        elif isinstance(item, list | tuple | dict):
            if 10 * len(item) > most:
                return 10 * len(item)
            left += [(part, depth + 1) for part in item]
            if isinstance(item, dict):
                left += [(part, depth + 1) for part in item.values()]
    return total


def _count(values: Any) -> int:
    return len(values) if isinstance(values, str | list | tuple | dict) else 0


def _items(values: Any, *_: Any) -> int:
    """The weight of the list that is made of values: that of a text has an item for each character."""
    return 10 * _count(values)


def _by_attribute(values: Any, attribute: Any) -> int:
    """What it costs to look up `a.b,c` in each of the values."""
    names = 1 + attribute.count(".") + attribute.count(",") if isinstance(attribute, str) else 0
    return names * (_weight(values) + _items(values))


def _joined(values: Any, separator: Any = "", attribute: Any = None, *_: Any) -> int:
    return _items(values) + _count(values) * _weight(separator) + _by_attribute(values, attribute)


def _sorted(values: Any, _reverse: Any = False, _case: Any = False, attribute: Any = None, *_: Any) -> int:
    return _items(values) + _by_attribute(values, attribute)


def _unique(values: Any, _case: Any = False, attribute: Any = None, *_: Any) -> int:
    return _items(values) + _by_attribute(values, attribute)


def _replaced(value: Any, old: Any = "", new: Any = "", most: Any = None, *_: Any) -> int:
    found = str(value).count(str(old))
    if isinstance(most, int) and most >= 0:
        found = min(found, most)
    return found * len(str(new))


def _rounded(_value: Any, precision: Any = 0, *_: Any) -> int:
    """It takes ten to the power of the precision, which has as many digits."""
    return 10 * abs(precision) if isinstance(precision, int) else 0


def _dumped(value: Any, indent: Any = None, *_: Any) -> int:
    width = len(indent) if isinstance(indent, str) else indent if isinstance(indent, int) else 0
    # The line that closes a list is indented too.
    return 2 * _weight(value, max(width, 0)) + max(width, 0)


def _trimmed(value: Any, characters: Any = "", *_: Any) -> int:
    """Each character that goes is looked for among those that may."""
    return _weight(value) * _count(characters)


WITHOUT_WORK = frozenset({"default", "first", "last", "length"})
COSTS: dict[str, Callable[..., int]] = {
    "join": _joined,
    "list": _items,
    "replace": _replaced,
    "reverse": _items,
    "round": _rounded,
    "sort": _sorted,
    "tojson": _dumped,
    "trim": _trimmed,
    "unique": _unique,
}
"""What filters cost, in characters, beside the weight of what they are given."""


def _metered(name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, paid for before it runs."""
    of_jinja = 1 if hasattr(filter_, "jinja_pass_arg") else 0

    @wraps(filter_)
    def run(*arguments: Any) -> Any:
        given = [_at_hand(value) for value in arguments[of_jinja:]]
        _spend(1)
        if name not in WITHOUT_WORK:
            for value in given:
                _spend(_weight(value) // 10)
        if name in COSTS:
            _spend(COSTS[name](*given) // 10)
        return filter_(*arguments[:of_jinja], *given)

    return run


def _at_hand(value: Any) -> Any:
    """What a filter gives item by item, as a list: that can be weighed. It was paid for by that filter."""
    return list(value) if isinstance(value, Iterator) else value


def _weighed(value: Any) -> Any:
    """A value that is compared, or put into a list: both cost as much as there is in it."""
    value = _at_hand(value)
    _spend(_weight(value) // 10)
    return value


def _iterated(values: Iterable[Any], size: int) -> list[Any]:
    """What a loop goes through; every `for` is given this filter, with the size of what it repeats."""
    items = list(values)
    _spend(len(items) * (1 + size // 10))
    return items


_environment = ImmutableSandboxedEnvironment(
    undefined=StrictUndefined,
    autoescape=False,
    keep_trailing_newline=True,
    optimized=False,  # what it works out beforehand takes longer than it saves in a template that runs once
)
_environment.filters = {name: _metered(name, _environment.filters[name]) for name in FILTERS}
_environment.filters |= {"iterated": _iterated, "weighed": _weighed}


class Names(NamedTuple):
    """What a template calls its values, sorted: the `variables` that it needs, and the `optional` ones, about
    which it asks before it uses them, or has a default for."""

    variables: list[str]
    optional: list[str]


def names_of(content: str) -> Names:
    """The names in a template. Raises `InvalidRequest` when it is none."""
    with _as_refusal():
        tree = _parse(content)
        named, asked = _undeclared(tree), _optional(tree)
        return Names(sorted(named - asked), sorted(named & asked))


def render(content: str, variables: Mapping[str, Any]) -> str:
    """The prompt. Raises `InvalidRequest` when a variable is missing, naming all that are, or when the
    prompt would be too long."""
    missing = [name for name in names_of(content).variables if name not in variables]
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
    except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
        raise InvalidRequest(f"content: {error}") from None
    except RecursionError:
        raise InvalidRequest("variables: they are nested too deeply") from None
    finally:
        _work_left.reset(started)
    return "".join(pieces)


@contextmanager
def _as_refusal() -> Iterator[None]:
    """Whatever parsing, checking and compiling a template raise is an `InvalidRequest`."""
    try:
        yield
    except TemplateSyntaxError as error:
        raise InvalidRequest(f"content: line {error.lineno}: {error.message}") from None
    except (RecursionError, MemoryError, SyntaxError):
        # Python takes only so many blocks and brackets inside each other, and has three ways to say so.
        raise InvalidRequest("content: it is nested too deeply") from None
    except ValueError as error:  # of a number with thousands of digits
        raise InvalidRequest(f"content: {error}") from None


def _compile(content: str) -> Template:
    with _as_refusal():
        tree = _parse(content)
        _meter(tree)
        code = _environment.compile(tree)
    return Template.from_code(_environment, code, _environment.make_globals(None))


def _meter(node: nodes.Node) -> int:
    """Puts the filters that spend into a tree. Gives its size, in nodes."""
    size = 1 + sum([_meter(child) for child in node.iter_child_nodes()])
    if isinstance(node, nodes.For):
        node.iter = _filtered(node.iter, "iterated", nodes.Const(size, lineno=node.lineno))
    elif isinstance(node, nodes.Compare | nodes.Operand):
        node.expr = _filtered(node.expr, "weighed")
    elif isinstance(node, nodes.Test) and node.name == "in":
        node.node = _filtered(node.node, "weighed")
        node.args = [_filtered(value, "weighed") for value in node.args]
    elif isinstance(node, nodes.List) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
        node.items = [_filtered(value, "weighed") for value in node.items]
    return size


def _filtered(value: nodes.Node, name: str, *arguments: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, name, list(arguments), [], None, None, lineno=value.lineno)


def _parse(content: str) -> nodes.Template:
    if len(content) > LONGEST_TEMPLATE:
        raise InvalidRequest(f"content: it is longer than {LONGEST_TEMPLATE} characters")
    tokens = (kind for _, kind, _ in _environment.lex(content) if kind != "whitespace")
    if next(islice(tokens, MOST_TOKENS, None), None) is not None:
        raise InvalidRequest(
            f"content: there is more in it than {MOST_TOKENS} names, signs and pieces of text"
        )
    tree = _environment.parse(content)
    _check(tree)
    return tree


def _check(node: nodes.Node, depth: int = 0) -> None:
    """Raises `InvalidRequest` for whatever is not allowed."""
    line = f"content: line {node.lineno}: "
    if depth > DEEPEST:  # long before Python gives up: the time to compile grows with a power of the depth
        raise InvalidRequest(f"{line}it is nested too deeply")
    if not isinstance(node, ALLOWED):
        raise InvalidRequest(f"{line}{type(node).__name__} is not allowed in a prompt template")
    if isinstance(node, nodes.Filter) and node.name not in FILTERS:
        raise InvalidRequest(f"{line}there is no filter {node.name}; there are {', '.join(sorted(FILTERS))}")
    if isinstance(node, nodes.Test) and node.name not in TESTS:
        raise InvalidRequest(f"{line}there is no test {node.name}; there are {', '.join(sorted(TESTS))}")
    if isinstance(node, nodes.Const) and node.value == inf:
        raise InvalidRequest(f"{line}the number is too large")
    if isinstance(node, nodes.Filter | nodes.Test) and (node.dyn_args or node.dyn_kwargs):
        raise InvalidRequest(f"{line}* and ** are not allowed in a prompt template")
    for child in node.iter_child_nodes():
        _check(child, depth + 1)


def _undeclared(tree: nodes.Template) -> set[str]:
    """What `meta.find_undeclared_variables` gives, but without working out what is constant: that took
    seconds for many chains of filters."""
    tracking = meta.TrackingCodeGenerator(_environment)
    tracking.optimizer = None
    tracking.visit(tree)
    return tracking.undeclared_identifiers


def _optional(tree: nodes.Template) -> set[str]:
    """Names that the template asks about before it uses them, or has a default for."""
    asking = [test for test in tree.find_all(nodes.Test) if test.name in {"defined", "undefined"}]
    asking += [use for use in tree.find_all(nodes.Filter) if use.name == "default"]  # type: ignore[misc]
    return {test.node.name for test in asking if isinstance(test.node, nodes.Name)}
