"""What all pages have in common: the frame around them, and how they ask the portal."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from tests.e2e.support import answered, answers, write_template
from tests.support import Portal


@pytest.mark.parametrize("context", [360], indirect=True)
def test_pages_open_at_their_beginning_and_ask_without_a_network(
    ada: Page, portal: Portal, username: str
) -> None:
    with portal.client(username) as client:
        message = "\n\n".join("Say hi." for _ in range(60))
        client.post("/api/llm/chat/session", json={"session_id": "long", "message": message, "max_tokens": 4})
    ada.goto(f"{portal.url}/chat/long")
    answered(ada)
    # A browser in flight mode still reaches the portal on its own machine.
    ada.evaluate("window.dispatchEvent(new Event('offline'))")
    write_template(ada, "Guide", "\n".join("Be brief." for _ in range(40)))
    ada.mouse.wheel(0, 5_000)
    ada.get_by_role("tab", name="Versions").click()
    ada.get_by_role("button", name="v1").click()
    expect(ada.get_by_role("region", name="Changes")).to_be_visible()
    expect(ada.get_by_role("tab", name="Versions")).to_be_in_viewport()
    ada.get_by_role("button", name="Menu", exact=True).click()
    ada.get_by_role("button", name="Account of").click()
    ada.get_by_role("menuitem", name="Account").click()
    expect(ada.get_by_role("heading", name="Account", exact=True)).to_be_in_viewport()
    ada.mouse.wheel(0, 5_000)
    ada.get_by_role("button", name="Menu", exact=True).click()
    ada.get_by_role("link", name="Say hi.").click()
    expect(answers(ada).last).to_be_in_viewport()


@pytest.mark.parametrize("context", [360], indirect=True)
def test_the_menu_of_a_phone_can_be_used_by_keyboard(ada: Page, portal: Portal, username: str) -> None:
    with portal.client(username) as client:
        asked = {"session_id": "kept", "message": "Say hi.", "max_tokens": 4}
        client.post("/api/llm/chat/session", json=asked)
    ada.goto(f"{portal.url}/chat/kept")
    answered(ada)
    actions = ada.get_by_role("button", name="What to do with this chat")
    for name in ("Rename", "Clear"):
        actions.click()
        ada.get_by_role("menuitem", name=name).click()
        ada.get_by_role("dialog").get_by_role("button", name=re.compile("Cancel|Keep it")).click()
        expect(actions).to_be_focused()

    menu = ada.get_by_role("button", name="Menu", exact=True)
    shown = ada.get_by_role("navigation", name="Portal")
    expect(shown).to_be_hidden()
    menu.press("Enter")
    expect(shown).to_be_visible()
    expect(ada.get_by_role("main")).to_be_hidden()
    ada.keyboard.press("Tab")
    expect(ada.get_by_role("button", name="Close the menu")).to_be_focused()
    ada.keyboard.press("Escape")
    expect(shown).to_be_hidden()
    expect(menu).to_be_focused()

    permissions = "**/api/auth/permissions"
    ada.route(permissions, lambda route: route.fulfill(status=400, json={}))
    ada.reload()
    menu.click()
    expect(shown.get_by_role("alert")).to_be_visible()
    expect(shown.get_by_role("link", name="Templates")).to_have_count(0)
    with ada.expect_request(permissions):
        shown.get_by_role("button", name="Try again").click()


@pytest.mark.parametrize("context", [360], indirect=True)
def test_what_is_gone_is_not_asked_for_again(ada: Page, portal: Portal) -> None:
    for path in ("nowhere", "chat/gone", "templates/gone"):
        ada.goto(f"{portal.url}/{path}")
        expect(ada.get_by_role("heading", name="There is nothing here")).to_be_visible()
        expect(ada.get_by_role("main").get_by_role("button", name="Try again")).to_have_count(0)
    ada.get_by_role("link", name="Go to the chat").click()
    expect(ada.get_by_role("textbox", name="Message")).to_be_visible()
