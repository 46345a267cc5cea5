"""Prints the OpenAPI document, from which the page's client is made: `python -m app.openapi`."""

from __future__ import annotations

import json
import sys

from app.config import load_settings
from app.main import create_app


def document() -> str:
    """The document as JSON."""
    return json.dumps(create_app(load_settings()).openapi(), indent=1)


if __name__ == "__main__":
    sys.stdout.write(document())
