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
    fill_in_sign_in,
    go,
    let_in,
    scrolls_sideways,
    serious_findings,
    try_in_chat,
    write_template,
)
from tests.fake_llm import FakeLLM, Script, text
from tests.proxy import Proxy
from tests.support import PASSWORD, Portal, wait_until

AT_ONE_WIDTH = pytest.mark.parametrize("context", [1280], ids=["desktop"], indirect=True)
"""For what is the same however wide the page is."""


SEES_NO_SESSION = """() => new MutationObserver(() => {
  window.sawNoSession ||= document.body.innerText.includes("no such session");
}).observe(document.body, { subtree: true, childList: true })"""


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
    write_template(ada, "Guide", "You are {{ name }}, a {{ mood | default('silent') }} guide. Be brief.")
    try_in_chat(ada)
    ask(ada, "Who are you?")
    expect(ada.get_by_role("alert")).to_contain_text("Fill in name first")
    ada.get_by_label("name", exact=True).fill("Theseus")
    ada.get_by_label("mood (optional)").fill("merry")
    ada.get_by_role("textbox", name="Message").press("Enter")
    expect(ada).to_have_url(CHAT_URL)
    answered(ada)
    expect(ada.get_by_text("Guide v1")).to_be_visible()
    ada.get_by_role("button", name="System prompt").click()
    expect(ada.get_by_text("You are Theseus, a merry guide. Be brief.")).to_be_visible()
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
    ada.evaluate(SEES_NO_SESSION)
    ada.get_by_role("button", name="What to do with this chat").click()
    ada.get_by_role("menuitem", name="Delete").click()
    expect(ada).to_have_url(re.compile(r"/chat$"))
    ada.get_by_role("button", name="Undo").click()
    assert not ada.evaluate("window.sawNoSession")
    go(ada, "Tea, once more")
    expect(answers(ada)).to_have_count(1)


def test_a_reload_loses_nothing_and_signing_out_leaves_nothing(
    ada: Page, portal: Portal, username: str
) -> None:
    def choose(item: str) -> None:
        if ada.get_by_role("button", name="Menu", exact=True).is_visible():
            ada.get_by_role("button", name="Menu", exact=True).click()
        ada.get_by_role("button", name="Account of").click()
        ada.get_by_role("menuitem", name=item).click()

    box = ada.get_by_role("textbox", name="Message")
    box.fill("half a thought")
    ada.reload()
    expect(box).to_have_value("half a thought")
    assert ada.evaluate("JSON.stringify([localStorage, sessionStorage, document.cookie])").count("eyJ") == 0
    choose("Account")
    choose("Sign out")
    expect(ada.get_by_role("heading", name="Sign in")).to_be_visible()
    other = f"{username}-b"
    with portal.client(other):
        fill_in_sign_in(ada, other)
    expect(box).to_have_value("")


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
        ada.get_by_role("textbox", name="Message").fill("Next")
        ada.route("**/stop", lambda route: route.abort())
        ada.get_by_role("button", name="Stop the answer").click()
        alert = ada.get_by_role("main").get_by_role("alert")
        expect(alert).to_contain_text("cannot be reached")
        ada.unroute("**/stop")
        alert.get_by_role("button", name="Try again").click()
        expect(ada.get_by_text("Stopped")).to_be_visible()
        expect(ada.get_by_role("textbox", name="Message")).to_have_value("Next")
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
        script.pieces, script.reason = [{"reasoning_content": "Hmm, and on and on"}], "length"
        ask(ada, "And?")
        cut = answers(ada).nth(1)
        expect(cut).to_contain_text("The model has written no answer.")
        expect(cut).to_contain_text("Cut at its longest")

    def test_an_error_says_what_to_do_and_asks_again(self, ada: Page, script: Script) -> None:
        script.status = 500
        ask(ada, "Hi")
        alert = ada.get_by_role("alert")
        expect(alert).to_contain_text("whoever runs the portal")
        ada.reload()
        expect(alert).to_contain_text("whoever runs the portal")
        script.status = 200
        alert.get_by_role("button", name="Ask again").dblclick()
        expect(answers(ada)).to_contain_text("Hello there")
        expect(ada.get_by_role("article", name="You")).to_have_count(2)

    @AT_ONE_WIDTH
    def test_a_failure_is_told_of_only_until_another_answer_is_there(
        self, ada: Page, portal: Portal, username: str, script: Script
    ) -> None:
        script.status = 500
        ask(ada, "Hi")
        expect(ada.get_by_role("alert")).to_have_count(1)
        script.status = 200
        with portal.client(username) as elsewhere:
            path = f"/api/llm/chat/session/{ada.url.rsplit('/', 1)[1]}/regenerate"
            assert elsewhere.post(path, json={}).status_code == 200
        assert history(portal, ada, username)[0]["status"] == "failed"
        ada.reload()
        expect(answers(ada)).to_contain_text("Hello there")
        expect(ada.get_by_role("alert")).to_have_count(0)

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
    def test_a_message_is_sent_once_and_takes_nothing_with_it(
        self, ada: Page, portal: Portal, username: str
    ) -> None:
        box = ada.get_by_role("textbox", name="Message")
        chats = ada.get_by_role("region", name="Chats").get_by_role("link")
        ada.get_by_role("button", name="Write a system prompt").click()
        ada.get_by_label("System prompt").fill("Be brief.")
        ada.route("**/session/stream", lambda route: (route.fetch(), route.abort()))
        ask(ada, "First")
        expect(ada.get_by_role("main").get_by_role("alert")).to_contain_text("cannot be reached")
        ada.unroute("**/session/stream")
        ada.reload()
        expect(ada.get_by_label("System prompt")).to_have_value("Be brief.")
        box.press("Enter")
        answered(ada)
        assert [message["role"] for message in history(portal, ada, username)] == [
            "system",
            "user",
            "assistant",
        ]
        expect(chats).to_have_text(["First"])

        held: list[Route] = []

        def hold(route: Route) -> None:
            held.append(route)

        ada.route("**/session/stream", hold)
        with ada.expect_request("**/session/stream"):
            ask(ada, "Second")
        box.fill("Third")
        held[0].continue_()
        answered(ada, 2)
        expect(box).to_have_value("Third")

        go(ada, "New chat")
        expect(ada.get_by_label("System prompt")).to_have_value("")
        with ada.expect_request("**/session/stream"):
            ask(ada, "Another")
        go(ada, "Templates")
        held[1].continue_()
        expect(chats).to_have_text(["Another", "First"])
        expect(ada).to_have_url(re.compile("/templates$"))

        ada.goto(f"{portal.url}/chat?template=gone")
        ask(ada, "With the template")
        alerts = ada.get_by_role("main").get_by_role("alert")
        expect(alerts.last).to_contain_text("not loaded")
        alerts.first.get_by_role("button", name="Go on without it").click()
        expect(ada).to_have_url(re.compile("/chat$"))
        assert len(held) == 2

    @AT_ONE_WIDTH
    def test_a_place_in_a_long_chat_is_kept(
        self, ada: Page, portal: Portal, username: str, script: Script
    ) -> None:
        with portal.client(username) as elsewhere:

            def say(message: str) -> None:
                body = {"session_id": "long", "message": message}
                assert elsewhere.post("/api/llm/chat/session", json=body).status_code == 200

            for number in range(52):
                say(f"Message {number}")
            go(ada, "Message 0")
            expect(answers(ada)).to_have_count(50)
            say("From elsewhere")
            expect(ada.get_by_text("From elsewhere")).to_be_in_viewport()
        # The oldest of the newest hundred, when the answer to that is there too.
        expect(ada.get_by_role("article").first).to_have_text("Message 3")
        ada.evaluate("window.scrollTo(0, 0)")
        first = ada.get_by_text("Message 3", exact=True)
        before = first.bounding_box()
        ada.get_by_role("button", name="Show earlier messages").click()
        expect(ada.get_by_text("Message 0", exact=True).last).to_be_attached()
        after = first.bounding_box()
        assert before is not None
        assert after is not None
        assert abs(before["y"] - after["y"]) < 2

        script.pieces, script.between = endless(), 0.01
        ask(ada, "Hi")
        begun(ada)
        ada.mouse.move(640, 300)
        ada.mouse.wheel(0, -30)
        from_end = "document.documentElement.scrollHeight - innerHeight - scrollY"
        wait_until(lambda: ada.evaluate(from_end) > 120, what="words below")
        place = ada.evaluate("scrollY")
        wait_until(lambda: ada.evaluate(from_end) > 240, what="more words below")
        assert ada.evaluate("scrollY") == place
        ada.get_by_role("textbox", name="Message").press("Escape")
        expect(ada.get_by_text("Stopped")).to_be_visible()

    @AT_ONE_WIDTH
    def test_an_answer_goes_on_when_the_network_is_back(
        self, page: Page, portal: Portal, username: str, script: Script, module_fake: FakeLLM
    ) -> None:
        asked = len(module_fake.requests)
        proxy = Proxy(portal.port)
        page.clock.install()
        let_in(page, portal, username, url=proxy.url)
        script.pieces, script.between = endless(), 0.05
        ask(page, "Hi")
        begun(page)
        page.context.set_offline(True)
        proxy.cut()
        again = page.get_by_role("log").get_by_role("button", name="Try again")

        def given_up() -> bool:
            page.clock.fast_forward(10_000)
            return again.is_visible()

        wait_until(given_up, what="the last try to follow the answer")
        page.context.set_offline(False)
        begun(page)
        expect(again).to_have_count(0)
        assert_shown_to_the_end(portal, page, username, script)
        assert len(module_fake.requests) == asked + 1
        proxy.close()

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
