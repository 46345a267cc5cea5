from __future__ import annotations

import re

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.e2e.support import go, hold_posts, write_template
from tests.support import PASSWORD, Portal


def test_the_preview_shows_the_prompt_as_it_is_written(ada: Page) -> None:
    go(ada, "Templates")
    ada.get_by_role("link", name="New template").click()
    ada.get_by_label("Text").fill("You guide {{ name }} through {{ place }}.")
    prompt = ada.get_by_role("region", name="Prompt")
    expect(prompt).to_have_text("You guide \u2039name\u203a through \u2039place\u203a.")
    ada.get_by_label("name", exact=True).fill("Ada")
    ada.get_by_label("place", exact=True).fill("the maze")
    expect(prompt).to_have_text("You guide Ada through the maze.")
    ada.get_by_label("Text").fill("You guide {{ name")
    expect(ada.get_by_role("alert")).to_contain_text("content: line 1")


def test_versions_are_compared_and_brought_back(ada: Page) -> None:
    write_template(ada, "Guide", "Be brief.\nBe kind.\n")
    ada.get_by_label("Text").fill("Be brief.\nBe strict.\n")
    ada.keyboard.press("Control+s")
    expect(ada.get_by_text("v2")).to_be_visible()
    ada.get_by_role("tab", name="Versions").click()
    ada.get_by_role("button", name="v1").click()
    changes = ada.get_by_role("region", name="Changes")
    expect(changes.locator("del")).to_have_text("Be kind.")
    expect(changes.locator("ins")).to_have_text("Be strict.")
    ada.get_by_role("button", name="Put version 1 into the editor").click()
    ada.get_by_label("Title").fill("Guide of the maze")
    ada.get_by_role("button", name="v2").click()
    ada.get_by_role("button", name="Put version 2 into the editor").click()
    ada.get_by_role("button", name="Cancel").click()
    expect(ada.get_by_label("Title")).to_have_value("Guide of the maze")
    ada.get_by_role("button", name="Save", exact=True).click()
    expect(ada.get_by_role("button", name="v3")).to_be_visible()
    expect(ada.get_by_label("Text")).to_have_value("Be brief.\nBe kind.\n")


def test_a_save_by_somebody_else_meanwhile_loses_nothing(ada: Page, portal: Portal, username: str) -> None:
    write_template(ada, "Guide", "one")
    ada.get_by_label("Text").fill("mine")
    with httpx.Client(base_url=portal.url) as client:
        body = {"username": username, "password": PASSWORD}
        token = client.post("/api/auth/login", json=body).json()["access_token"]
        client.headers["Authorization"] = f"Bearer {token}"
        path = f"/api/templates/{ada.url.rsplit('/', 1)[1]}"
        client.put(path, json={"title": "Guide", "content": "theirs"})
        ada.get_by_role("button", name="Save", exact=True).click()
        expect(ada.get_by_text("Version 2 was saved meanwhile.")).to_be_visible()
        ada.get_by_role("button", name="Save mine as version 3").click()
        expect(ada.get_by_text("v3")).to_be_visible()
        assert [v["content"] for v in client.get(f"{path}/versions").json()["versions"]] == [
            "mine",
            "theirs",
            "one",
        ]


def test_unsaved_changes_are_asked_about_and_a_deletion_is_taken_back(ada: Page) -> None:
    go(ada, "Templates")
    ada.get_by_role("link", name="Begin with an example").click()
    expect(ada.get_by_role("button", name="Save", exact=True)).to_be_enabled()
    write_template(ada, "Guide", "one")
    ada.get_by_label("Text").fill("two")
    ada.get_by_role("link", name="Try in a chat").click()
    ada.get_by_role("button", name="Stay").last.click()
    expect(ada.get_by_label("Text")).to_have_value("two")
    ada.get_by_role("link", name="Try in a chat").click()
    ada.get_by_role("button", name="Leave").click()
    expect(ada).to_have_url(re.compile(r"/chat\?template="))
    go(ada, "Templates")
    ada.get_by_role("link", name="Guide").click()
    expect(ada.get_by_label("Text")).to_have_value("one")
    ada.get_by_label("Text").fill("three")
    ada.get_by_role("button", name="What to do with this template").click()
    ada.get_by_role("menuitem", name="Delete").click()
    expect(ada.get_by_text("A template is a prompt that you use again")).to_be_visible()
    ada.get_by_role("button", name="Undo").click()
    expect(ada.get_by_role("link", name="Guide")).to_be_visible()


@pytest.mark.parametrize("context", [1280], indirect=True)
def test_what_is_written_outlives_its_first_save_and_a_sign_out_elsewhere(ada: Page, username: str) -> None:
    held = hold_posts(ada, "**/api/templates")
    go(ada, "Templates")
    ada.get_by_role("link", name="New template").click()
    ada.get_by_label("Title").fill("Guide")
    text = ada.get_by_label("Text")
    text.fill("one")
    with ada.expect_request(lambda request: request.method == "POST" and request.url.endswith("/templates")):
        text.press("Control+s")
    text.press("Control+s")
    text.press_sequentially(" and two")
    text.press("Control+s")
    held[0].continue_()
    expect(ada.get_by_text("v1", exact=True)).to_be_visible()
    text.press_sequentially(" and three")
    expect(text).to_have_value("one and two and three")
    expect(ada.get_by_text("Not saved yet")).to_be_visible()
    assert len(held) == 1

    ada.get_by_role("button", name="Account of").click()
    ada.get_by_role("menuitem", name="Sign out").click()
    ada.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    ada.evaluate("fetch('/api/auth/logout', {method: 'POST'})")
    text.press_sequentially(" and four")
    ada.get_by_label("Username or email").fill(username)
    ada.get_by_label(re.compile("^Password")).fill(PASSWORD)
    ada.get_by_role("button", name="Sign in").click()
    expect(text).to_have_value("one and two and three and four")
    text.press("Control+s")
    expect(ada.get_by_text("v2", exact=True)).to_be_visible()

    text.press_sequentially(" and five")
    ada.get_by_role("button", name="Account of").click()
    ada.get_by_role("menuitem", name="Sign out").click()
    ada.get_by_role("dialog").get_by_role("button", name="Sign out").click()
    expect(ada.get_by_role("heading", name="Sign in")).to_be_visible()
    ada.wait_for_function("!Object.values(sessionStorage).some((kept) => kept.includes('and five'))")


@pytest.mark.parametrize("context", [360], indirect=True)
def test_a_template_beyond_the_end_of_the_list_is_found(ada: Page, portal: Portal, username: str) -> None:
    with portal.client(username) as client:
        for title in ("Guide", "Pilot"):
            client.post("/api/templates", json={"title": title, "content": "Be brief."})
    ada.route(re.compile("limit=200"), lambda it: it.continue_(url=it.request.url.replace("200", "1")))
    ada.reload()
    choice = ada.get_by_role("combobox", name="Template")
    choice.click()
    expect(ada.get_by_role("option")).to_have_text(["Pilot"])
    choice.fill("Guide")
    ada.get_by_role("option", name="Guide").click()
    expect(choice).to_have_value("Guide")
    choice.click()
    expect(ada.get_by_role("option")).to_have_text(["Guide", "Pilot"])
