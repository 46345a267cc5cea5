"""What all pages have in common: the frame around them, and how they ask the portal."""

from __future__ import annotations

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
