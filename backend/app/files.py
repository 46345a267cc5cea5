"""Files that the admin writes."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from app.errors import InvalidRequest

T = TypeVar("T")


def read_toml(file: Path, form: TypeAdapter[T]) -> T:
    """What a TOML file says; as if it were empty where it does not exist. Raises `InvalidRequest`, which
    names the file and what is wrong in it."""
    try:
        return form.validate_python(tomllib.loads(file.read_text()) if file.is_file() else {})
    except tomllib.TOMLDecodeError as error:
        raise InvalidRequest(f"{file.name}: {error}") from None
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, found['loc']))}: {found['msg']}"
            for found in error.errors(include_url=False, include_input=False)
        ]
        raise InvalidRequest(f"{file.name}: {'; '.join(problems[:5])}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{file.name}: it cannot be read: {type(error).__name__}") from None
