from __future__ import annotations

from playwright.sync_api import Page, expect

from tests.support import Portal


def test_the_api_can_be_read_and_tried_without_the_internet(page: Page, portal: Portal) -> None:
    asked: list[str] = []
    problems: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.goto(f"{portal.url}/docs")
    health = page.locator("#operations-health-live")
    health.get_by_role("button").first.click()
    page.get_by_role("button", name="Execute").click()
    expect(health.locator(".live-responses-table")).to_contain_text('"status": "ok"')
    assert [url for url in asked if not url.startswith((portal.url, "data:"))] == []
    assert problems == []
