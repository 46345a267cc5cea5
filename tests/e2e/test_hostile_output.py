"""What a model writes, and what people call things, neither runs nor fetches anything."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from playwright.sync_api import Page, expect

from tests.e2e.support import answered, ask, go, write_template
from tests.fake_llm import FakeLLM, text
from tests.support import Portal

PAYLOADS = [
    "<script>window.ran = 1</script>",
    "<img src=x onerror='window.ran = 1'>",
    "<img src='{canary}/img'>",
    "![remote]({canary}/markdown.png)",
    "![data](data:image/svg+xml;base64,PHN2ZyBvbmxvYWQ9IndpbmRvdy5yYW49MSIvPg==)",
    "[click](javascript:window.ran=1)",
    "[click](JaVaScRiPt:window.ran=1)",
    "[click](data:text/html,<script>window.ran=1</script>)",
    "<a href='javascript:window.ran=1'>click</a>",
    "<svg onload='window.ran = 1'></svg>",
    "<svg><image href='{canary}/svg' /></svg>",
    "<iframe src='{canary}/frame' srcdoc='<script>parent.ran=1</script>'></iframe>",
    "<object data='{canary}/object'></object><embed src='{canary}/embed'>",
    "<link rel=stylesheet href='{canary}/css'><style>@import '{canary}/import';</style>",
    "<video src='{canary}/video' autoplay></video><audio src='{canary}/audio'></audio>",
    "<form action='{canary}/form'><button>click</button></form>",
    "<base href='{canary}/'><meta http-equiv=refresh content='0;url={canary}/refresh'>",
    "<details open ontoggle='window.ran = 1'>x</details>",
    "[ref]: {canary}/ref\n\n![ref][ref]",
    "```html\n<script>window.ran = 1</script>\n```",
    "<div style='background: url({canary}/style)'>x</div>",
    "&lt;script&gt;window.ran = 1&lt;/script&gt;",
    '<noscript><p title="</noscript><img src=x onerror=window.ran=1>">',
    "<math><mi xlink:href='javascript:window.ran=1'>click</mi></math>",
]


@pytest.fixture
def canary() -> Iterator[tuple[str, list[str]]]:
    """A server that nobody should ask for anything, and what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        do_POST = do_GET  # noqa: N815 - as the server calls it

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.fixture(scope="module")
def portal(module_fake: FakeLLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Portal]:
    """A portal whose model writes what it is told to."""
    running = Portal(tmp_path_factory.mktemp("portal"), LLM_SERVER_URL=module_fake.url).start()
    yield running
    running.stop()


def test_nothing_in_an_answer_runs_or_is_fetched(
    ada: Page, module_fake: FakeLLM, canary: tuple[str, list[str]]
) -> None:
    address, asked = canary
    for number, payload in enumerate(PAYLOADS):
        hostile = payload.format(canary=address)
        # In pieces, as a model writes, so that half a tag is drawn too.
        pieces = [hostile[start : start + 7] for start in range(0, len(hostile), 7)]
        module_fake.script.pieces = text(*pieces, f"\n\nthe end of {number}")
        ask(ada, f"{number}: {hostile}")
        expect(ada.get_by_text(f"the end of {number}")).to_be_visible()
        answered(ada, number + 1)
    assert ada.evaluate("window.ran") is None
    for link in ada.get_by_role("log").get_by_role("link").all():
        assert (link.get_attribute("href") or "").startswith("http"), "no other scheme is a link"
    ada.reload()
    expect(ada.get_by_text(f"the end of {len(PAYLOADS) - 1}")).to_be_visible()
    assert ada.evaluate("window.ran") is None
    assert (
        ada.get_by_role("log").locator("img, iframe, object, embed, video, audio, form, style").count() == 0
    )
    assert asked == []


def test_nothing_in_a_title_runs(ada: Page, canary: tuple[str, list[str]]) -> None:
    address, asked = canary
    hostile = f"<img src='{address}/title' onerror='window.ran = 1'>"
    write_template(ada, hostile, hostile)
    go(ada, "Templates")
    expect(ada.get_by_text(hostile).first).to_be_visible()
    go(ada, "New chat")
    ask(ada, hostile)
    answered(ada)
    assert ada.evaluate("window.ran") is None
    assert asked == []


def test_the_policy_stops_what_would_get_through(ada: Page, canary: tuple[str, list[str]]) -> None:
    address, asked = canary
    ada.evaluate(
        """(address) => {
          const add = (html) => document.body.insertAdjacentHTML("beforeend", html);
          add(`<img src="${address}/img" onerror="window.ran = 1">`);
          add(`<iframe src="${address}/frame"></iframe>`);
          const script = document.createElement("script");
          script.textContent = "window.ran = 1";
          document.body.append(script);
          return fetch(`${address}/fetch`).catch(() => "refused");
        }""",
        address,
    )
    assert ada.evaluate("window.ran") is None
    assert asked == []
