"""What tests do on the page, in the words that are on it."""

from __future__ import annotations

import re
from typing import Any, Literal

from playwright.sync_api import Locator, Page, Route, expect

from app.cli.page import FRONTEND
from tests.support import PASSWORD, Portal, wait_until

CHAT_URL = re.compile(r"/chat/[0-9a-f]{32}$")


def sign_up(page: Page, url: str, username: str) -> None:
    page.goto(url)
    page.get_by_role("link", name="Make an account").click()
    expect(page.get_by_role("heading", name="Make an account")).to_be_visible()
    page.get_by_label("Username").fill(username)
    page.get_by_label("Email").fill(f"{username}@example.org")
    page.get_by_label(re.compile("^Password")).fill(PASSWORD)
    page.get_by_role("button", name="Make the account").click()
    expect(page.get_by_role("textbox", name="Message")).to_be_visible()


def let_in(page: Page, portal: Portal, username: str, role: str | None = None, *, url: str = "") -> None:
    """Opens the page as somebody who has signed in before, with the cookie of that; the account is made when
    it is new, with the role."""
    with portal.client(username, role) as client:
        (cookie,) = client.cookies.jar
    kept: Any = {"name": cookie.name, "value": cookie.value, "domain": "127.0.0.1", "path": cookie.path}
    page.context.add_cookies([kept])
    page.goto(url or portal.url)
    expect(page.get_by_role("textbox", name="Message")).to_be_visible()


def go(page: Page, link: str) -> None:
    """Follows a link of the menu, which a phone hides behind a button."""
    if page.viewport_size is not None and page.viewport_size["width"] < 600:
        page.get_by_role("button", name="Menu", exact=True).click()
    page.get_by_role("navigation").get_by_role("link", name=link, exact=True).click()


def try_in_chat(page: Page) -> None:
    """Begins a chat with the template whose page this is, and has inputs of the same names."""
    page.get_by_role("link", name="Try in a chat").click()
    expect(page.get_by_role("heading", name="What is it about?")).to_be_visible()


def ask(page: Page, message: str) -> None:
    box = page.get_by_role("textbox", name="Message")
    box.fill(message)
    box.press("Enter")


def answers(page: Page) -> Locator:
    return page.get_by_role("article", name="The model")


def begun(page: Page) -> None:
    """Waits until the newest answer has some words."""
    expect(answers(page).last).to_contain_text(re.compile(r"^(?!Waiting|Thinking|Number).*\w+ \w+"))


def answered(page: Page, number: int = 1) -> None:
    """Waits until there are so many answers, all of them whole."""
    expect(page.get_by_role("button", name="Copy the answer")).to_have_count(number, timeout=60_000)
    expect(page.get_by_role("button", name="Stop the answer")).to_have_count(0, timeout=60_000)


def write_template(page: Page, title: str, text: str) -> None:
    """Saves a new template, and stays on its page."""
    go(page, "Templates")
    page.get_by_role("link", name="New template").click()
    page.get_by_label("Title").fill(title)
    page.get_by_label("Text").fill(text)
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.get_by_role("heading", name=title, exact=True)).to_be_visible()


def hold_posts(page: Page, url: str) -> list[Route]:
    """Lets what is posted to a URL wait from now on, in the list, until the test goes on with it."""
    held: list[Route] = []

    def hold(route: Route) -> None:
        if route.request.method == "POST":
            held.append(route)
        else:
            route.continue_()

    page.route(url, hold)
    return held


def scrolls_sideways(page: Page) -> bool:
    """Whether the page is wider than the window."""
    wider = page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
    return bool(wider)


COLOURS: tuple[Literal["light", "dark"], ...] = ("light", "dark")
HAS_LIGHT_TEXT = """() => {
  const [red, green, blue] = getComputedStyle(document.body).color.match(/[0-9]+/g).map(Number);
  return red + green + blue > 3 * 128;
}"""


def findings_in_all_colours(page: Page) -> list[str]:
    """What axe finds that keeps people out when the page is light; and of its colours, when it is dark."""
    found = []
    for colours, rules in zip(COLOURS, ({}, {"runOnly": ["color-contrast"]}), strict=True):
        page.emulate_media(color_scheme=colours, reduced_motion="reduce")
        wait_until(lambda: page.evaluate(HAS_LIGHT_TEXT) is (colours == "dark"), what=colours)  # noqa: B023
        found += [f"{colours}: {finding}" for finding in serious_findings(page, rules)]
    return found


def serious_findings(page: Page, options: dict[str, Any] | None = None) -> list[str]:
    """What axe finds that keeps people out."""
    if not page.evaluate("'axe' in window"):
        page.evaluate((FRONTEND / "node_modules" / "axe-core" / "axe.min.js").read_text())
    result: dict[str, Any] = page.evaluate("options => axe.run(options)", options or {})
    return [
        f"{found['id']}: {node['html'][:160]} {node['failureSummary'][:300]}"
        for found in result["violations"]
        if found["impact"] in {"serious", "critical"}
        for node in found["nodes"]
    ]


def sign_in(page: Page, url: str, username: str, password: str = PASSWORD) -> None:
    page.goto(f"{url}/sign-in")
    fill_in_sign_in(page, username, password)


def fill_in_sign_in(page: Page, username: str, password: str = PASSWORD) -> None:
    page.get_by_label("Username or email").fill(username)
    page.get_by_label(re.compile("^Password")).fill(password)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("textbox", name="Message")).to_be_visible()
