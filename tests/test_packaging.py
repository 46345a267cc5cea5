"""What the program imports is what its installation brings."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions

from tests.support import ROOT


def imported() -> Iterator[str]:
    for file in (ROOT / "backend").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                yield node.module.partition(".")[0]


def normal(name: str) -> str:
    return re.split(r"[\[<>=!;~ ]", name)[0].lower().replace("_", "-")


def test_every_import_is_a_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = {normal(name) for name in [*project["dependencies"], *extras["llm"], *extras["otel"]]}
    brought_by_fastapi = {"starlette", "pydantic", "pydantic-core"}
    distributions = packages_distributions()
    foreign = set(imported()) - set(sys.stdlib_module_names) - {"app"}
    missing = {
        name
        for name in foreign
        if not {normal(found) for found in distributions.get(name, [name])} & (declared | brought_by_fastapi)
    }
    assert missing == set()
