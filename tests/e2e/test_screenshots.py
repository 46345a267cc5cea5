"""The pictures of the README: `make screenshots`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.e2e.support import answered, ask, go, sign_up, try_in_chat
from tests.support import Portal


@pytest.fixture
def context(browser: Browser) -> object:
    """One width here."""
    return browser.new_context(viewport={"width": 1280, "height": 800}, locale="en-GB")


def test_the_pages_look_as_in_the_readme(
    page: Page, portal: Portal, shot: Callable[[Page, str], None]
) -> None:
    sign_up(page, portal.url, "ada")
    go(page, "Templates")
    page.get_by_role("link", name="Begin with an example").click()
    page.get_by_label("name", exact=True).fill("Ariadne")
    expect(page.get_by_role("region", name="Prompt")).to_contain_text("You are Ariadne")
    shot(page, "template")
    page.get_by_role("button", name="Save").click()
    try_in_chat(page)
    page.get_by_label("name", exact=True).fill("Ariadne")
    page.get_by_label("age", exact=True).fill("9")
    ask(page, "Hello! I stand at a crossing. What should I think about?")
    answered(page)
    ask(page, "Write a Python function that finds the way out of a maze.")
    answered(page, 2)
    shot(page, "chat")
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 360, "height": 740})
    expect(page.get_by_role("navigation")).not_to_be_in_viewport()
    page.evaluate("window.scrollTo(0, document.documentElement.scrollHeight)")
    shot(page, "phone")
