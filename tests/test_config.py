from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from app.config import (
    BACKEND_DIR,
    EXAMPLE_FILE,
    Settings,
    WrongSettings,
    env_example,
    is_loopback,
    load_settings,
)


def test_the_example_is_generated_from_the_settings() -> None:
    assert EXAMPLE_FILE.read_text() == env_example(), "run `make generate`"


def test_the_example_gives_the_defaults() -> None:
    assert load_settings(EXAMPLE_FILE).model_dump() == Settings(_env_file=None).model_dump()


def test_every_setting_is_described() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("SECRET_KEY=short", "secret_key"),
        ("SECRET_KEY=please-change-me-please-change-me-please", "secret_key"),
        ("SECRET_KEY=aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "secret_key"),
        ("LLM_SERVER_URL=localhost:8080", "llm_server_url"),
        ("LLM_SERVER_URL=ftp://localhost", "llm_server_url"),
        ("LLM_TEMPERATURE=3", "llm_temperature"),
        ("LLM_MAX_CONCURRENCY=0", "llm_max_concurrency"),
        ("MQTT_BROKER_URL=http://localhost", "mqtt_broker_url"),
        ("MQTT_PROJECTS=maze,a/b", "mqtt_projects"),
        ("DATABASE_URL=mysql://me@localhost/portal", "database_url"),
        ("CORS_ORIGINS=*", "cors_origins"),
        ("MQTT_ACL=mosquitto", "mqtt_acl"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, line: str, name: str) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text(line)
    with pytest.raises(WrongSettings) as error:
        load_settings(env_file)
    (said,) = error.value.lines()
    assert said.startswith(f"{name.upper()}: ")


@pytest.mark.parametrize(
    "line",
    [
        "SECRET_KEY=tulip",
        "SECRET_KEY_PREVIOUS=tulip",
        "ALERT_WEBHOOK_URL=http://me:tulip",
        "LLM_SERVER_URL=http://me:tulip",
        "MQTT_BROKER_URL=mqtt://me:tulip#@localhost",
        "MQTT_BROKER_URL=mqtt://me:tulip℀@localhost",
        "REDIS_URL=redis://me:tulip",
    ],
)
def test_no_secret_is_told_with_what_is_wrong(tmp_path: Path, line: str) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text(line)
    with pytest.raises(WrongSettings) as error:
        load_settings(env_file)
    assert "tulip" not in f"{error.value} {error.value.lines()} {error.value.__cause__!r}"


def test_a_file_that_is_named_must_be_there_and_be_text(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    for content, said in ((None, "there is no such file"), (b"LLM_MODEL=\xfc", "it is not UTF-8")):
        if content is not None:
            env_file.write_bytes(content)
        with pytest.raises(WrongSettings) as error:
            load_settings(env_file)
        assert said in error.value.lines()[0]


def test_the_environment_comes_before_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("LLM_TIMEOUT=10\nLLM_TOP_P=0.5\nMQTT_PROJECTS=a b,c\n")
    monkeypatch.setenv("LLM_TIMEOUT", "20")
    settings = load_settings(env_file)
    assert (settings.llm_timeout, settings.llm_top_p) == (20, 0.5)
    assert settings.mqtt_projects == ("a", "b", "c")


def test_a_relative_database_file_lies_beside_the_env_file(tmp_path: Path) -> None:
    (tmp_path / ".env").touch()
    settings = load_settings(tmp_path / ".env", database_url="sqlite:///x.db")
    assert settings.sqlalchemy_url == f"sqlite:///{tmp_path}/x.db"
    server = load_settings(tmp_path / ".env", database_url="postgresql://u@h/d")
    assert server.sqlalchemy_url == "postgresql+psycopg://u@h/d"


@pytest.mark.parametrize(
    ("broker", "anonymous", "expected"),
    [
        ("mqtt://localhost:1883", None, True),
        ("mqtt://127.0.0.1", None, True),
        ("mqtt://10.0.0.5", None, False),
        ("mqtt://10.0.0.5", "allow", True),
        ("mqtt://localhost", "deny", False),
    ],
)
def test_anonymous_messages_need_loopback_or_a_clear_word(
    broker: str, anonymous: str | None, expected: bool
) -> None:
    settings = Settings(_env_file=None, mqtt_broker_url=broker, mqtt_anonymous=anonymous)
    assert settings.anonymous_mqtt is expected


def test_loopback() -> None:
    assert [is_loopback(host) for host in ("localhost", "127.0.0.8", "::1", "[::1]")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "10.0.0.1", "example.org", "")] == [False] * 4


def test_the_locked_packages_are_those_that_are_declared() -> None:
    declared = tomllib.loads((BACKEND_DIR.parent / "pyproject.toml").read_text())["project"]["dependencies"]
    locked = (BACKEND_DIR / "requirements.txt").read_text()
    names = [re.split(r"[\[>=]", requirement)[0] for requirement in declared]
    assert [name for name in names if f"\n{name}==" not in f"\n{locked}"] == [], "run `make lock`"
