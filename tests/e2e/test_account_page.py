from __future__ import annotations

import re

import httpx
from playwright.sync_api import Page, expect

from tests.e2e.support import scrolls_sideways, serious_findings
from tests.support import PASSWORD, Portal


def open_account(page: Page) -> None:
    if page.get_by_role("button", name="Menu", exact=True).is_visible():
        page.get_by_role("button", name="Menu", exact=True).click()
    page.get_by_role("button", name="Account of").click()
    page.get_by_role("menuitem", name="Account").click()
    expect(page.get_by_role("heading", name="Signed in on")).to_be_visible()


def test_sign_ins_are_seen_and_ended(ada: Page, portal: Portal, username: str) -> None:
    account = {"username": username, "password": PASSWORD}
    agent = {"User-Agent": "Game/1.0"}
    token = httpx.post(f"{portal.url}/api/auth/login", json=account, headers=agent).json()["access_token"]
    open_account(ada)
    expect(ada.get_by_text("Game/1.0")).to_be_visible()
    assert serious_findings(ada) == []
    assert not scrolls_sideways(ada)
    ada.get_by_role("button", name="Sign out on Game/1.0").click()
    expect(ada.get_by_text("Game/1.0")).to_have_count(0)
    mine = httpx.get(f"{portal.url}/api/auth/me", headers={"Authorization": f"Bearer {token}"})
    assert mine.status_code == 401
    ada.get_by_role("button", name="Sign out everywhere").click()
    expect(ada.get_by_role("heading", name="Sign in")).to_be_visible()


def test_the_password_is_changed(ada: Page, username: str) -> None:
    open_account(ada)
    ada.get_by_label(re.compile("^Current password")).fill("wrong")
    ada.get_by_label(re.compile("^New password")).fill("battery staple")
    ada.get_by_role("button", name="Change the password").click()
    expect(ada.get_by_role("alert")).to_contain_text("current_password: it is wrong")
    ada.get_by_label(re.compile("^Current password")).fill(PASSWORD)
    ada.get_by_role("button", name="Change the password").click()
    expect(ada.get_by_text("It is changed.")).to_be_visible()
    ada.reload()
    expect(ada.get_by_role("heading", name="Signed in on")).to_be_visible()
    ada.get_by_role("button", name="Sign out everywhere").click()
    ada.get_by_label("Username or email").fill(username)
    ada.get_by_label(re.compile("^Password")).fill("battery staple")
    ada.get_by_role("button", name="Sign in").click()
    expect(ada.get_by_role("heading", name="Signed in on")).to_be_visible()
