from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest
from playwright.sync_api import APIResponse, Page, Route, expect

from tests.e2e.support import (
    CHAT_URL,
    answered,
    answers,
    ask,
    begun,
    go,
    let_in,
    scrolls_sideways,
    serious_findings,
    write_template,
)
from tests.fake_llm import FakeLLM, Script, text
from tests.proxy import Proxy
from tests.support import PASSWORD, Portal, wait_until

AT_ONE_WIDTH = pytest.mark.parametrize("context", [1280], ids=["desktop"], indirect=True)
"""For what is the same however wide the page is."""


def endless() -> list[dict[str, str]]:
    """More words than anybody waits for."""
    return text(*(f"word{number} " for number in range(100_000)))


def assert_shown_to_the_end(portal: Portal, page: Page, username: str, script: Script) -> None:
    """Lets the answer end, which is stored then as it is on the page."""
    del script.pieces[1:]
    answered(page)
    stored = history(portal, page, username)
    assert [(message["role"], message["status"]) for message in stored] == [
        ("user", "complete"),
        ("assistant", "complete"),
    ]
    words = re.findall(r"\w+", stored[-1]["content"])
    assert re.findall(r"word\d+", answers(page).inner_text()) == words


def history(portal: Portal, page: Page, username: str) -> list[dict[str, str]]:
    """What is stored of the chat that is open."""
    session = page.url.rsplit("/", 1)[1]
    with httpx.Client(base_url=portal.url) as client:
        body = {"username": username, "password": PASSWORD}
        token = client.post("/api/auth/login", json=body).json()["access_token"]
        path = f"/api/llm/chat/session/{session}/history"
        answer = client.get(path, headers={"Authorization": f"Bearer {token}"}).json()
    messages: list[dict[str, str]] = answer["messages"]
    return messages


def test_a_template_is_written_and_chatted_with(ada: Page, portal: Portal, username: str) -> None:
    write_template(ada, "Guide", "You are {{ name }}, a guide. Be brief.")
    ada.get_by_role("link", name="Try in a chat").click()
    ask(ada, "Who are you?")
    expect(ada.get_by_role("alert")).to_contain_text("Fill in name first")
    ada.get_by_label("name", exact=True).fill("Theseus")
    ada.get_by_role("textbox", name="Message").press("Enter")
    expect(ada).to_have_url(CHAT_URL)
    answered(ada)
    expect(ada.get_by_text("Guide v1")).to_be_visible()
    ada.get_by_role("button", name="System prompt").click()
    expect(ada.get_by_text("You are Theseus, a guide. Be brief.")).to_be_visible()
    ask(ada, "And what do you do?")
    answered(ada, 2)
    stored = history(portal, ada, username)
    assert [message["role"] for message in stored] == ["system", *["user", "assistant"] * 2]
    assert [message["status"] for message in stored] == ["complete"] * 5


def test_chats_are_found_renamed_deleted_and_brought_back(ada: Page, portal: Portal, username: str) -> None:
    ask(ada, "Say one word about tea.")
    expect(ada).to_have_url(CHAT_URL)
    answered(ada)
    ada.get_by_role("button", name="What to do with this chat").click()
    ada.get_by_role("menuitem", name="Rename").click()
    ada.get_by_role("textbox", name="Title").fill("About tea")
    ada.keyboard.press("Enter")
    expect(ada.get_by_role("heading", name="About tea")).to_be_visible()
    with portal.client(username) as elsewhere:
        path = f"/api/sessions/{ada.url.rsplit('/', 1)[1]}"
        assert elsewhere.patch(path, json={"title": "Tea, once more"}).status_code == 200
    expect(ada.get_by_role("heading", name="Tea, once more")).to_be_visible()
    ada.get_by_role("button", name="What to do with this chat").click()
    ada.get_by_role("menuitem", name="Delete").click()
    expect(ada).to_have_url(re.compile(r"/chat$"))
    ada.get_by_role("button", name="Undo").click()
    go(ada, "Tea, once more")
    expect(answers(ada)).to_have_count(1)


def test_a_reload_stays_signed_in_and_signing_out_does_not(ada: Page) -> None:
    ada.reload()
    expect(ada.get_by_role("textbox", name="Message")).to_be_visible()
    assert ada.evaluate("JSON.stringify([localStorage, sessionStorage, document.cookie])").count("eyJ") == 0
    if ada.get_by_role("button", name="Menu", exact=True).is_visible():
        ada.get_by_role("button", name="Menu", exact=True).click()
    ada.get_by_role("button", name="Account of").click()
    ada.get_by_role("menuitem", name="Sign out").click()
    expect(ada.get_by_role("heading", name="Sign in")).to_be_visible()
    ada.reload()
    expect(ada.get_by_role("heading", name="Sign in")).to_be_visible()


def test_what_was_written_is_not_lost_by_a_reload(ada: Page) -> None:
    ada.get_by_role("textbox", name="Message").fill("half a thought")
    ada.reload()
    expect(ada.get_by_role("textbox", name="Message")).to_have_value("half a thought")


class TestWithAnLLMThatDoesAsItIsTold:
    """The starter model cannot think, and does not fail when it is told to."""

    @pytest.fixture(scope="class")
    @classmethod
    def portal(cls, module_fake: FakeLLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Portal]:
        directory = tmp_path_factory.mktemp("portal")
        running = Portal(directory, LLM_SERVER_URL=module_fake.url, LLM_SKIP_THINKING="false")
        yield running
        running.stop()

    @pytest.fixture(autouse=True)
    def script(self, module_fake: FakeLLM, portal: Portal) -> Script:
        """What the LLM server is told. Some tests have stopped the portal."""
        if not portal.alive():
            portal.start()
        module_fake.script = Script()
        return module_fake.script

    def test_a_stopped_answer_is_kept_as_far_as_it_came(
        self, ada: Page, portal: Portal, username: str, script: Script
    ) -> None:
        script.pieces, script.between = endless(), 0.05
        ask(ada, "Hi")
        begun(ada)
        ada.get_by_role("textbox", name="Message").press("Escape")
        expect(ada.get_by_text("Stopped")).to_be_visible()
        expect(ada.get_by_role("button", name="Stop the answer")).to_have_count(0)
        assert history(portal, ada, username)[-1]["status"] == "cancelled"

    @AT_ONE_WIDTH
    def test_an_answer_is_stopped_before_it_begins(
        self, ada: Page, portal: Portal, username: str, script: Script
    ) -> None:
        script.before_first = 60
        ask(ada, "Hi")
        expect(ada.get_by_text("Waiting for the model")).to_be_visible()
        ada.get_by_role("button", name="Stop the answer").click()
        expect(ada.get_by_text("Stopped")).to_be_visible()
        assert [message["status"] for message in history(portal, ada, username)] == ["cancelled"]

    @AT_ONE_WIDTH
    def test_an_answer_goes_on_after_a_reload_in_its_middle(
        self, ada: Page, portal: Portal, username: str, script: Script, module_fake: FakeLLM
    ) -> None:
        asked = len(module_fake.requests)
        script.pieces, script.between = endless(), 0.05
        ask(ada, "Hi")
        begun(ada)
        ada.reload()
        begun(ada)
        assert_shown_to_the_end(portal, ada, username, script)
        expect(answers(ada)).to_have_count(1)
        assert len(module_fake.requests) == asked + 1, "it was not asked twice"

    @AT_ONE_WIDTH
    def test_an_answer_survives_lost_connections(
        self, page: Page, portal: Portal, username: str, script: Script
    ) -> None:
        script.pieces, script.between = endless(), 0.05
        proxy = Proxy(portal.port)
        let_in(page, portal, username, url=proxy.url)
        ask(page, "Hi")
        for _ in range(3):
            begun(page)
            shown = answers(page).inner_text()
            wait_until(proxy.cut, what="a connection to cut")
            expect(answers(page)).not_to_have_text(shown)
        assert_shown_to_the_end(portal, page, username, script)
        proxy.close()

    def test_thinking_is_folded_also_later(self, ada: Page, script: Script) -> None:
        script.pieces = [{"reasoning_content": "Hmm, a greeting."}, *text("Hello", " there")]
        script.usage = {
            "prompt_tokens": 5,
            "completion_tokens": 9,
            "completion_tokens_details": {"reasoning_tokens": 4},
        }
        ask(ada, "Hi")
        answered(ada)
        for _ in range(2):
            expect(answers(ada)).to_contain_text("Hello there")
            expect(ada.get_by_text("Hmm, a greeting.")).to_have_count(0)
            ada.get_by_role("button", name="Reasoning").click()
            expect(ada.get_by_text("Hmm, a greeting.")).to_be_visible()
            ada.reload()

    def test_an_error_says_what_to_do_and_asks_again(self, ada: Page, script: Script) -> None:
        script.status = 500
        ask(ada, "Hi")
        alert = ada.get_by_role("alert")
        expect(alert).to_contain_text("whoever runs the portal")
        ada.reload()
        expect(alert).to_contain_text("whoever runs the portal")
        script.status = 200
        alert.get_by_role("button", name="Ask again").click()
        expect(answers(ada)).to_contain_text("Hello there")

    @AT_ONE_WIDTH
    def test_an_answer_that_breaks_off_stays_as_far_as_it_came(self, ada: Page, script: Script) -> None:
        script.pieces, script.between, script.cut_after = text("As far as", " this", " and on"), 0.05, 2
        ask(ada, "Hi")
        for _ in range(2):
            expect(answers(ada).first).to_contain_text("Broken off")
            expect(ada.get_by_role("alert")).to_have_count(1)
            expect(answers(ada)).to_contain_text("As far as this")
            ada.reload()
        script.cut_after = None
        ada.get_by_role("alert").get_by_role("button", name="Ask again").click()
        expect(answers(ada).nth(1)).to_contain_text("As far as this and on")

    @AT_ONE_WIDTH
    def test_a_message_that_cannot_be_sent_stays_in_the_box(self, ada: Page, portal: Portal) -> None:
        ask(ada, "First")
        answered(ada)
        portal.stop()
        ask(ada, "Second")
        # The list of the chats beside it may say so too.
        alert = ada.get_by_role("main").get_by_role("alert")
        expect(alert).to_contain_text("cannot be reached")
        expect(ada.get_by_role("textbox", name="Message")).to_have_value("Second")
        portal.start()
        alert.get_by_role("button", name="Try again").click()
        answered(ada, 2)

    @AT_ONE_WIDTH
    def test_an_answer_is_shown_whole_when_it_ends_while_the_chat_is_loaded(
        self, ada: Page, script: Script
    ) -> None:
        script.before_first = 1.0
        loads: list[Route] = []
        answers_to_loads: list[APIResponse] = []

        def keep_the_first(route: Route) -> None:
            loads.append(route)
            if len(loads) > 1:
                route.continue_()
                return
            answers_to_loads.append(route.fetch())

        ada.route("**/history?**", keep_the_first)
        # The first message makes the chat, and the model waits a second before it answers.
        with ada.expect_response(
            lambda response: bool(answers_to_loads) and "/api/sessions?" in response.url
        ):
            ask(ada, "First")
        loads[0].fulfill(response=answers_to_loads[0])
        answered(ada)

    @AT_ONE_WIDTH
    def test_a_chat_that_cannot_be_refreshed_stays_on_the_page(self, ada: Page, portal: Portal) -> None:
        ask(ada, "First")
        answered(ada)
        portal.stop()
        failed: list[str] = []
        ada.on("requestfailed", lambda request: failed.append(request.url))

        def given_up() -> bool:
            # As somebody who comes back to the tab, which refreshes what is five seconds old.
            ada.evaluate("document.dispatchEvent(new Event('visibilitychange', { bubbles: true }))")
            return sum("/history" in url for url in failed) == 3

        wait_until(given_up, what="the last try to refresh the chat")
        expect(answers(ada)).to_contain_text("Hello there")
        expect(ada.get_by_role("textbox", name="Message")).to_be_visible()
        expect(ada.get_by_role("main").get_by_role("alert")).to_have_count(0)


class TestTwoModels:
    @pytest.fixture(scope="class")
    @classmethod
    def portal(cls, module_fake: FakeLLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Portal]:
        directory = tmp_path_factory.mktemp("two-models")
        second = '[models.second]\nprovider = "other"\nid = "fake-1"\n'
        (directory / "models.toml").write_text(f'[providers.other]\nurl = "{module_fake.url}"\n{second}')
        running = Portal(directory, LLM_SERVER_URL=module_fake.url)
        yield running.start()
        running.stop()

    def test_the_model_that_answers_is_chosen(self, ada: Page, portal: Portal) -> None:
        ask(ada, "Hello")
        answered(ada)
        choice = ada.get_by_role("combobox", name="Model")
        expect(choice).to_have_value("fake-1")
        choice.hover()
        expect(ada.get_by_role("tooltip")).to_be_visible()
        choice.click()
        expect(ada.get_by_role("option", name="second")).to_be_visible()
        expect(ada.get_by_role("tooltip")).to_have_count(0)
        ada.get_by_role("option", name="second").click()
        expect(choice).to_have_value("second")
        assert serious_findings(ada) == []
        assert not scrolls_sideways(ada)
        ada.reload()
        expect(choice).to_have_value("second")
        ask(ada, "Hello again")
        answered(ada, 2)
        with portal.client("root", role="admin") as root:
            used = root.get("/api/admin/usage", params={"by": "model"}).json()["lines"]
        assert {line["model"] for line in used} >= {"fake-1", "second"}
