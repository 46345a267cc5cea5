"""The two forms of the chaos tests: short in every run, long with `--chaos long`."""

from __future__ import annotations

import pytest

from tests.chaos.support import FORMS, Form

LONG_TIMEOUT_S = 1800


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--chaos") == "long":
        longest = LONG_TIMEOUT_S + 60 * config.getoption("--soak-minutes")
        for item in items:
            if item.path.parent.name == "chaos":
                item.add_marker(pytest.mark.timeout(longest), append=False)


@pytest.fixture
def form(pytestconfig: pytest.Config) -> Form:
    """How often something breaks in this run."""
    return FORMS[pytestconfig.getoption("--chaos")]
