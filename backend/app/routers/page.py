"""The web page: the built front end, under a policy that lets nothing but its own files run."""

from __future__ import annotations

import secrets
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.types import Receive, Scope, Send

from app.config import BACKEND_DIR
from app.errors import NotFound

PAGE_DIR = BACKEND_DIR.parent / "frontend" / "dist"

NONCE_MARK = "CSP_NONCE"
"""What the build writes where the page's own nonce belongs."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'nonce-{nonce}'; img-src 'self' data:; "
    "font-src 'self'; connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)

FOR_EVER = "public, max-age=31536000, immutable"
"""For files whose names change with what is in them."""

NOT_BUILT = """<!doctype html><html lang="en"><title>Prompt Portal</title>
<h1>The page is not built</h1>
<p>The portal runs, and its API is described at
<a href="/openapi.json">/openapi.json</a>. To build the page:
<code>./setup_llm.sh install</code>, or <code>npm ci</code> and <code>npm run build</code> in
<code>frontend/</code>. Then load this again.</p></html>"""


async def serve_page(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers addresses that no route has (ASGI): with a file of the page, or, at `/` and to a browser that
    goes anywhere else, with the page itself. Raises `NotFound` for all else."""
    if scope["type"] != "http" or scope["method"] not in {"GET", "HEAD"}:
        raise NotFound("There is no such address.")
    request = Request(scope)
    path = scope["path"].removeprefix("/")
    response = _page("docs.html") if path == "docs" else _file_response(path)
    if response is None:
        if path and "text/html" not in request.headers.get("accept", ""):
            raise NotFound("There is no such address.")
        response = _page("index.html")
    await response(scope, receive, send)


def _page(name: str) -> Response:
    index = PAGE_DIR / name
    if not index.is_file():
        return HTMLResponse(NOT_BUILT, 503)
    nonce = secrets.token_urlsafe(18)
    headers = {
        "Cache-Control": "no-store",
        "Content-Security-Policy": POLICY.format(nonce=nonce),
        "Referrer-Policy": "same-origin",
        "X-Content-Type-Options": "nosniff",
    }
    return HTMLResponse(index.read_text().replace(NONCE_MARK, nonce), headers=headers)


def _file_response(path: str) -> Response | None:
    file = _file(path)
    if file is None:
        return None
    kept = FOR_EVER if path.startswith("assets/") else "no-cache"
    return FileResponse(file, headers={"Cache-Control": kept, "X-Content-Type-Options": "nosniff"})


def _file(path: str) -> Path | None:
    """The file of the built page that the path names, if it is one."""
    if path in {"", "index.html", "docs.html"} or "\0" in path:
        return None
    root = PAGE_DIR.resolve()
    file = (root / path).resolve()
    return file if file.is_relative_to(root) and file.is_file() else None
