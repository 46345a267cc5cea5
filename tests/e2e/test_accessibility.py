from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, Route, expect

from tests.e2e.support import (
    answered,
    ask,
    findings_in_all_colours,
    go,
    scrolls_sideways,
    sign_up,
    try_in_chat,
    write_template,
)
from tests.support import Portal


def check(page: Page) -> None:
    assert findings_in_all_colours(page) == []
    assert not scrolls_sideways(page)


def test_every_page_can_be_used_by_everybody(page: Page, portal: Portal, username: str) -> None:
    page.goto(portal.url)
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    check(page)
    sign_up(page, portal.url, username)
    check(page)
    go(page, "Templates")
    expect(page.get_by_role("heading", name="Templates")).to_be_visible()
    check(page)
    write_template(page, "Guide", "You are {{ name }}.")
    expect(page.get_by_role("region", name="Prompt")).to_be_visible()
    check(page)
    page.get_by_role("tab", name="Versions").click()
    page.get_by_role("button", name="v1").click()
    expect(page.get_by_role("region", name="Changes")).to_be_visible()
    check(page)
    try_in_chat(page)
    page.get_by_label("name", exact=True).fill("a guide, and write Python code in ``` fences")
    check(page)
    ask(page, "Write a short Python function that adds two numbers.")
    answered(page)
    page.get_by_role("button", name="System prompt").click()
    check(page)
    page.get_by_role("button", name="What to do with this chat").click()
    expect(page.get_by_role("menuitem", name="Delete")).to_be_visible()
    check(page)


@pytest.mark.parametrize("path", ["templates", "templates/1", "account", "chat/" + 32 * "0"])
def test_pages_can_be_used_by_everybody_while_they_load(ada: Page, portal: Portal, path: str) -> None:
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    ada.route(re.compile("/api/(?!auth/(me|permissions|refresh))"), hold)
    ada.goto(f"{portal.url}/{path}")
    expect(ada.get_by_role("status", name=re.compile("^Loading")).first).to_be_visible()
    check(ada)
    for route in held:
        route.abort()


def test_it_can_be_used_by_keyboard_alone(page: Page, portal: Portal, username: str) -> None:
    sign_up(page, portal.url, username)
    expect(page.get_by_role("textbox", name="Message")).to_be_focused()
    page.keyboard.type("Say one word.")
    page.keyboard.press("Enter")
    answered(page)
    expect(page.get_by_role("textbox", name="Message")).to_be_focused()
    page.keyboard.press("Shift+Tab")
    focused = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert focused == "Copy the answer"
    page.goto(f"{portal.url}/templates")
    expect(page.get_by_role("link", name="New template")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("main")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="New template")).to_be_focused()
