"""The pages of admins: people, roles, limits, usage, the audit log."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.e2e.support import (
    COLOURS,
    findings_in_all_colours,
    go,
    hold_posts,
    let_in,
    scrolls_sideways,
    serious_findings,
    sign_in,
)
from tests.support import PASSWORD, GuardedMosquitto, Portal, can_sign_in

Shot = Callable[[Page, str], None]


@pytest.fixture
def root(page: Page, portal: Portal, username: str) -> Page:
    """A tab in which an admin has signed in."""
    let_in(page, portal, f"root-{username}", "admin")
    return page


def tab(page: Page, name: str) -> None:
    page.get_by_role("navigation", name="Admin").get_by_role("link", name=name).click()
    expect(page.get_by_role("navigation", name="Admin").get_by_role("link", name=name)).to_have_attribute(
        "aria-current", "page"
    )


def search(root: Page, username: str) -> None:
    """Leaves only this person in the list, and the admin, whose name has theirs in it: before, rows still
    move away from under a click."""
    root.get_by_label("Search users").fill(username)
    expect(root.get_by_text("2 in all", exact=True)).to_be_visible()


def close_dialog(page: Page) -> None:
    page.get_by_role("button", name="I have it").click()
    expect(page.get_by_role("dialog")).to_have_count(0)


def test_somebody_is_invited_joins_and_gets_another_role(
    root: Page, browser: Browser, portal: Portal, username: str
) -> None:
    go(root, "Admin")
    root.get_by_label("Role", exact=True).select_option("player")
    root.get_by_role("button", name="Invite").click()
    link = root.get_by_role("dialog").locator("pre").inner_text()
    assert link.startswith(f"{portal.url}/join#")
    close_dialog(root)
    expect(root.get_by_text("For the role player").first).to_be_visible()

    with browser.new_context() as context:
        theirs = context.new_page()
        theirs.goto(link)
        expect(theirs.get_by_role("heading", name="You are invited")).to_be_visible()
        assert theirs.url == f"{portal.url}/join", "the secret is not in the address any more"
        theirs.reload()
        theirs.get_by_role("link", name="Sign in").click()
        expect(theirs.get_by_role("heading", name="Sign in")).to_be_visible()
        theirs.go_back()
        theirs.get_by_label("Username").fill(username)
        theirs.get_by_label("Email").fill(f"{username}@example.org")
        theirs.get_by_label(re.compile("^Password")).fill(PASSWORD)
        theirs.get_by_role("button", name="Make the account").click()
        expect(theirs.get_by_role("textbox", name="Message")).to_be_visible()
        menu = theirs.get_by_role("navigation")
        expect(menu.get_by_role("link", name="New chat")).to_be_visible()
        expect(menu.get_by_role("link", name="Templates")).to_have_count(0)
        other = context.new_page()
        other.goto(f"{portal.url}/join")
        expect(other.get_by_role("heading", name="This link is incomplete")).to_be_visible()
        assert serious_findings(other) == []
        expect(theirs.get_by_role("combobox", name="Template")).to_have_count(0)

        search(root, username)
        root.get_by_label(f"Role of {username}", exact=True).select_option("author")
        root.get_by_role("button", name="Change the role").click()
        expect(root.get_by_label(f"Role of {username}", exact=True)).to_have_value("author")
        theirs.reload()
        expect(menu.get_by_role("link", name="Templates")).to_be_visible()
        expect(menu.get_by_role("link", name="Admin")).to_have_count(0)


def test_a_lost_password_is_set_anew(root: Page, browser: Browser, portal: Portal, username: str) -> None:
    with portal.client(username):
        pass
    go(root, "Admin")
    search(root, username)
    root.get_by_role("button", name=f"Actions for {username}", exact=True).click()
    root.get_by_role("menuitem", name="Link for a new password").click()
    link = root.get_by_role("dialog").locator("pre").inner_text()
    with browser.new_context() as context:
        theirs = context.new_page()
        for attempt in (1, 2):
            theirs.goto("about:blank")
            theirs.goto(link)
            theirs.get_by_label(re.compile("^New password")).fill("battery staple")
            theirs.get_by_role("button", name="Set the password").click()
            if attempt == 1:
                expect(theirs.get_by_role("heading", name="Sign in")).to_be_visible()
        expect(theirs.get_by_role("alert")).to_contain_text("ask an admin for another one")
        sign_in(theirs, portal.url, username, "battery staple")


def test_an_account_is_closed_after_a_question(root: Page, portal: Portal, username: str) -> None:
    with portal.client(username) as client:
        go(root, "Admin")
        search(root, username)
        root.get_by_role("button", name=f"Actions for {username}", exact=True).click()
        root.get_by_role("menuitem", name="Close the account").click()
        assert client.get("/api/auth/me").status_code == 200
        root.get_by_role("button", name="Close the account").click()
        expect(root.get_by_text("closed", exact=True)).to_be_visible()
        assert client.get("/api/auth/me").status_code == 401


def test_a_role_is_defined_changed_and_deleted(root: Page, portal: Portal, username: str) -> None:
    go(root, "Admin")
    tab(root, "Roles")
    root.get_by_role("button", name="New role").click()
    root.get_by_role("textbox", name="Name").fill(username)
    root.mouse.click(5, 400)  # beside the dialog
    root.get_by_label("Read own templates and render them").check()
    root.get_by_label("Longest reply, tokens").fill("64")
    root.get_by_role("button", name="Save").click()
    expect(root.get_by_role("dialog")).to_have_count(0)
    row = root.get_by_text(re.compile("Longest reply, tokens: 64"))
    expect(row.first).to_be_visible()
    with portal.client(f"is-{username}", role=username) as client:
        assert client.get("/api/templates").status_code == 200
        root.get_by_role("button", name=f"Change the role {username}").click()
        root.get_by_label("Read own templates and render them").uncheck()
        root.get_by_role("button", name="Save").click()
        expect(root.get_by_role("dialog")).to_have_count(0)
        assert client.get("/api/templates").status_code == 403
    root.get_by_role("button", name=f"Delete the role {username}").click()
    root.get_by_role("button", name="Delete", exact=True).click()
    expect(root.get_by_text("accounts have this role")).to_be_visible()
    expect(root.get_by_role("button", name="Change the role admin")).to_have_count(0)


def test_limits_are_set_for_a_person(root: Page, portal: Portal, username: str) -> None:
    with portal.client(username) as client:
        go(root, "Admin")
        tab(root, "Limits")
        # As if there were more people than one list of them.
        root.route(re.compile("limit=200"), lambda it: it.continue_(url=it.request.url.replace("200", "1")))
        root.get_by_role("button", name="New limits").click()
        root.get_by_role("combobox", name="Person").fill(username)
        root.get_by_role("option", name=username, exact=True).click()
        root.unroute_all()
        root.get_by_label("Messages an hour").fill("1")
        root.get_by_role("button", name="Save").click()
        expect(root.get_by_role("dialog")).to_have_count(0)
        expect(root.get_by_text(username, exact=True)).to_be_visible()
        body = {"session_id": "s", "message": "Say hi.", "max_tokens": 4}
        codes = [client.post("/api/llm/chat/session", json=body).status_code for _ in range(2)]
        assert codes == [200, 429]
        owner = f"user:{client.get('/api/auth/me').json()['id']}"
        root.get_by_role("button", name=f"Take away the limits of {owner}").click()
        root.get_by_role("button", name="Take away", exact=True).click()
        expect(root.get_by_text(username, exact=True)).to_have_count(0)


def test_a_device_is_added_gets_a_new_password_and_is_removed(
    root: Page, broker: GuardedMosquitto, username: str
) -> None:
    def shown_password() -> str:
        password = root.get_by_role("dialog").locator("pre").inner_text()
        close_dialog(root)
        return password

    go(root, "Admin")
    tab(root, "Devices")
    root.get_by_role("button", name="New device").click()
    root.get_by_role("textbox", name="Name").fill(username)
    root.get_by_role("button", name="Add the device").click()
    expect(root.get_by_text("At least one is needed")).to_be_visible()
    root.get_by_label("maze").check()
    root.get_by_role("button", name="Add the device").click()
    first = shown_password()
    assert can_sign_in(broker.port, username, first)
    row = root.get_by_role("row", name=re.compile(f"^{username}"))
    expect(row).to_contain_text(f"root-{username}")
    expect(row).to_contain_text("maze")
    expect(row).to_contain_text("ready")
    assert first not in root.content()

    broker.forget()
    root.reload()
    expect(row).to_contain_text("needs a new password")
    root.get_by_role("button", name=f"Actions for {username}").click()
    root.get_by_role("menuitem", name="New password").click()
    root.get_by_role("button", name="New password", exact=True).click()
    second = shown_password()
    assert [can_sign_in(broker.port, username, password) for password in (first, second)] == [False, True]
    expect(row).to_contain_text("ready")

    root.get_by_role("button", name=f"Actions for {username}").click()
    root.get_by_role("menuitem", name="Remove").click()
    root.get_by_role("button", name="Remove", exact=True).click()
    expect(row).to_have_count(0)
    assert not can_sign_in(broker.port, username, second)


def test_usage_and_the_audit_log_tell_what_happened(root: Page, portal: Portal, username: str) -> None:
    with portal.client(username) as client:
        body = {"session_id": "s", "message": "Say hi.", "max_tokens": 4}
        turn = client.post("/api/llm/chat/session", json=body).json()
        owner = f"user:{client.get('/api/auth/me').json()['id']}"
    go(root, "Admin")
    tab(root, "Usage")
    root.get_by_label("Door").check()
    row = root.get_by_role("row", name=re.compile(username))
    expect(row).to_contain_text("http")
    expect(row).to_contain_text(str(turn["usage"]["prompt_tokens"]))
    with root.expect_download() as downloading:
        root.get_by_role("button", name="CSV").click()
    assert downloading.value.path().read_text().startswith("owner,door,turns,prompt_tokens")

    # The third of March, wherever the browser has its month.
    root.get_by_label("From", exact=True).press_sequentially("03032026")
    expect(root.get_by_text(re.compile(r"^Tokens in \d+ days, 2026-03-03 to"))).to_be_visible()
    expect(root.get_by_title(re.compile(r"^2026-03-03 to .*: 0 tokens"))).to_be_in_viewport()
    expect(root.locator("figure [title]").last).to_be_in_viewport()

    tab(root, "Audit")
    root.get_by_label("Who").fill(username)
    mine = root.get_by_role("row", name=re.compile(f"{username} (turn|auth)"))
    expect(root.get_by_role("row")).to_have_count(4)  # with that of the headings
    expect(mine).to_have_count(3)
    expect(mine.first).to_contain_text("turn by http")
    expect(mine.first).to_contain_text("final")
    expect(mine.last).to_contain_text("auth.register")
    root.get_by_label("Who").fill(owner)
    expect(root.get_by_role("row")).to_have_count(4)
    root.get_by_role("button", name="Verify").click()
    expect(root.get_by_text("The log is whole")).to_be_visible()
    with root.expect_download() as downloading:
        root.get_by_role("button", name="Export").click()
    last = json.loads(downloading.value.path().read_text().splitlines()[-1])
    assert last["action"] == "audit.export"
    root.get_by_label("What").fill("no such action")
    expect(root.get_by_text("Nothing like that is in the log.")).to_be_visible()


def test_an_author_finds_no_admin_pages(ada: Page, portal: Portal) -> None:
    expect(ada.get_by_role("link", name="Admin")).to_have_count(0)
    ada.goto(f"{portal.url}/admin/users")
    expect(ada.get_by_role("alert").first).to_contain_text("the role 'author' does not allow this")


def test_a_key_is_made_used_and_revoked(ada: Page, portal: Portal) -> None:
    # So is a page that came over plain HTTP from another machine.
    ada.add_init_script("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    ada.goto(f"{portal.url}/account")
    ada.get_by_role("button", name="New key").click()
    ada.get_by_label(re.compile("^Name")).fill("script")
    expect(ada.get_by_role("checkbox", name="Send messages")).to_be_checked()
    ada.get_by_label("Read own sessions and follow their turns").check()
    held = hold_posts(ada, "**/api/keys")
    with ada.expect_request(lambda request: request.method == "POST"):
        ada.get_by_role("button", name="Make the key").click()
    ada.keyboard.press("Escape")
    ada.get_by_role("button", name="Close", exact=True).click()
    held[0].continue_()
    secret = ada.get_by_role("dialog").locator("pre").inner_text()
    ada.get_by_role("button", name="Copy it").click()
    expect(ada.get_by_role("button", name="Copied")).to_be_visible()
    close_dialog(ada)
    expect(ada.get_by_role("button", name="New key")).to_be_focused()
    ada.keyboard.press("Enter")
    expect(ada.get_by_label(re.compile("^Name"))).to_be_focused()
    ada.keyboard.press("Control+v")
    expect(ada.get_by_label(re.compile("^Name"))).to_have_value(secret)
    ada.keyboard.press("Escape")
    headers = {"Authorization": f"Bearer {secret}"}

    def status(path: str) -> int:
        return httpx.get(portal.url + path, headers=headers).status_code

    assert [status("/api/sessions"), status("/api/templates")] == [200, 403]
    ada.reload()
    expect(ada.get_by_text("script", exact=True)).to_be_visible()
    assert secret not in ada.content()
    ada.get_by_role("button", name="Revoke script").click()
    ada.get_by_role("button", name="Revoke", exact=True).click()
    expect(ada.get_by_text("You have none.")).to_be_visible()
    assert status("/api/sessions") == 401


def test_what_i_have_used_is_told(ada: Page, portal: Portal) -> None:
    ada.get_by_role("textbox", name="Message").fill("Say hi.")
    ada.get_by_role("textbox", name="Message").press("Enter")
    expect(ada.get_by_role("button", name="Copy the answer")).to_have_count(1, timeout=60_000)
    ada.goto(f"{portal.url}/account")
    expect(ada.get_by_text(re.compile(r"\d+ tokens in 1 messages")).first).to_be_visible()
    expect(ada.get_by_role("table", name="Tokens a day")).to_have_count(1)


def test_everybody_can_use_these_pages(root: Page, portal: Portal, shot: Shot) -> None:
    width = (root.viewport_size or {"width": 0})["width"]

    def check(name: str) -> None:
        assert findings_in_all_colours(root) == [], name
        assert not scrolls_sideways(root), name
        for colours in COLOURS:
            root.emulate_media(color_scheme=colours)
            shot(root, f"{name}-{width}-{colours}")

    with portal.client("root", role="admin") as admin:
        me = admin.get("/api/auth/me").json()["id"]
        admin.put(f"/api/admin/limits/user:{me}", json={"daily_tokens": 100_000, "requests_per_hour": 500})
        admin.post("/api/admin/devices", json={"name": "cab-7", "projects": ["maze", "racing"]})
    root.goto(f"{portal.url}/account")
    expect(root.get_by_role("heading", name="Signed in on")).to_be_visible()
    check("account")
    root.get_by_role("button", name="New key").click()
    expect(root.get_by_role("dialog")).to_be_visible()
    check("new-key")
    for name in ("users", "roles", "limits", "devices", "usage", "audit"):
        root.goto(f"{portal.url}/admin/{name}")
        expect(root.get_by_role("heading", level=2).first).to_be_visible()
        expect(root.get_by_label(re.compile("^Loading"))).to_have_count(0)
        check(name)
        if name in {"roles", "limits", "devices"}:
            root.get_by_role("button", name=re.compile("^New ")).click()
            expect(root.get_by_role("dialog")).to_be_visible()
            check(f"new-{name}")
