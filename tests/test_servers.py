"""LLM servers and keys of sessions as clients and admins of a portal meet them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from app.cli.__main__ import app
from tests.fake_llm import FakeLLM, FakeThread, Script, text
from tests.support import SECRET, GameClient, MakePortal, Mosquitto, Portal, free_port, wait_until

CANARY = "sk-kanarienvogel-0123456789"
SLOW = Script(pieces=text(*["more "] * 400), between=0.02)


@pytest.fixture(scope="module")
def fakes() -> Iterator[list[FakeLLM]]:
    """Two servers of LLM_SERVER_URL, and one of a provider that takes keys of sessions."""
    threads = [FakeThread() for _ in range(3)]
    for number, thread in enumerate(threads):
        thread.fake.script = Script(pieces=text(f"from {number}"))
    yield [thread.fake for thread in threads]
    for thread in threads:
        thread.close()


@pytest.fixture(scope="module")
def pool(
    fakes: list[FakeLLM], mosquitto: Mosquitto, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Portal]:
    directory = tmp_path_factory.mktemp("pool")
    (directory / "models.toml").write_text(
        f'[providers.cloud]\nkind = "openai"\nurl = "{fakes[2].url}"\nown_keys = true\n'
        '[models.clever]\nprovider = "cloud"\naliases = ["smart"]\nprice = { output = 1e6 }\n'
    )
    running = Portal(
        directory,
        LLM_SERVER_URL=f"{fakes[0].url},{fakes[1].url}",
        LOG_LEVEL="debug",
        MQTT_BROKER_URL=mosquitto.url,
        MQTT_PROJECTS="driving",
    ).start()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def admin(pool: Portal) -> Iterator[httpx.Client]:
    with pool.client("root", role="admin") as client:
        yield client


@pytest.fixture(scope="module")
def ada(pool: Portal) -> Iterator[httpx.Client]:
    with pool.client("ada") as client:
        yield client


def chat(client: httpx.Client, session: str, **body: Any) -> httpx.Response:
    return client.post("/api/llm/chat/session", json={"session_id": session, "message": "hi", **body})


def servers(admin: httpx.Client) -> dict[str, dict[str, Any]]:
    return {server["name"]: server for server in admin.get("/api/admin/servers").json()["servers"]}


def test_an_admin_sees_how_the_servers_are(admin: httpx.Client, fakes: list[FakeLLM]) -> None:
    wait_until(lambda: servers(admin)["default-2"]["state"] == "ok", what="a look at both")
    first = servers(admin)["default-1"]
    assert {**first, "latency_ms": 0} == {
        "name": "default-1",
        "provider": "default",
        "kind": "compatible",
        "url": fakes[0].url,
        "state": "ok",
        "draining": False,
        "breaker": "closed",
        "failures": 0,
        "running": 0,
        "capacity": 8,
        "waiting": 0,
        "latency_ms": 0,
        "models": ["fake-1"],
        "problem": None,
    }
    assert first["latency_ms"] is not None
    assert servers(admin)["cloud-1"]["kind"] == "openai"


def test_a_server_is_drained_while_a_stream_runs_on_it(
    pool: Portal, admin: httpx.Client, ada: httpx.Client, fakes: list[FakeLLM]
) -> None:
    home = int(chat(ada, "long").json()["response"][-1])
    name, fake = f"default-{home + 1}", fakes[home]
    fake.script = SLOW
    body = {"session_id": "long", "message": "on and on", "request_id": "long-1"}
    with ada.stream("POST", "/api/llm/chat/session/stream", json=body) as answer:
        lines = answer.iter_lines()
        next(line for line in lines if '"token"' in line)
        drained = admin.post(f"/api/admin/servers/{name}/drain").json()
        assert (drained["state"], drained["draining"], drained["running"]) == ("draining", True, 1)
        assert "out of service" in drained["problem"]
        for number in range(4):
            assert chat(ada, f"new-{number}").json()["response"] == f"from {1 - home}"
        rest = "".join(lines)
    assert '"final"' in rest, "what ran there ended as ever"
    fake.script = Script(pieces=text(f"from {home}"))
    assert servers(admin)[name]["state"] == "drained"
    assert chat(ada, "long").json()["response"] == f"from {1 - home}", "its server is gone"
    assert httpx.get(f"{pool.url}/api/llm/health").json()["status"] == "ok"

    assert admin.post(f"/api/admin/servers/{name}/undrain").json()["state"] == "ok"
    for number in range(4):
        chat(ada, f"again-{number}")
    assert fake.requests[-1]["messages"][-1]["content"] == "hi", "it is asked again"
    told = admin.get("/api/admin/audit", params={"action": "server.drain"}).json()["entries"]
    assert [(entry["action"], entry["target"]) for entry in told] == [("server.drain", name)]
    assert admin.post("/api/admin/servers/default-9/drain").status_code == 404
    assert ada.post(f"/api/admin/servers/{name}/drain").status_code == 403


def test_the_command_drains_for_every_portal(pool: Portal, admin: httpx.Client) -> None:
    def run(*words: str) -> str:
        result = CliRunner().invoke(app, ["servers", *words, "--state", str(pool.directory)])
        assert result.exit_code == 0, result.output
        return result.output

    assert "default-2" in run("list")
    run("drain", "default-2")
    wait_until(lambda: servers(admin)["default-2"]["state"] == "drained", what="the word of the command")
    listed = next(line for line in run("list").splitlines() if line.startswith("default-2"))
    assert listed.rstrip().endswith("no")
    run("undrain", "default-2")
    wait_until(lambda: servers(admin)["default-2"]["state"] == "ok", what="the word of the command")


def test_health_and_status_tell_of_the_pool(
    make_portal: MakePortal, tmp_path: Path, fakes: list[FakeLLM], mosquitto: Mosquitto
) -> None:
    first, second = fakes[0], fakes[1]
    urls = f"{first.url},{second.url}"
    game = GameClient(mosquitto.port, "racing/status")
    portal = make_portal(
        tmp_path, LLM_SERVER_URL=urls, MQTT_BROKER_URL=mosquitto.url, MQTT_PROJECTS="racing"
    ).start()

    def tells(health: str, state: str, ready: int) -> None:
        def agree() -> bool:
            said = json.loads(game.messages("racing/status")[-1])["state"]
            found = httpx.get(f"{portal.url}/api/llm/health").json()["status"]
            return (found, said, httpx.get(f"{portal.url}/health/ready").status_code) == (
                health,
                state,
                ready,
            )

        wait_until(agree, what=f"{health}, {state}")

    try:
        game.wait_for(lambda: bool(game.messages_unlocked("racing/status")))
        tells("ok", "online", 200)
        first.models_status = 503
        tells("degraded", "degraded", 200)
        second.models_status = 500
        tells("degraded", "degraded", 503)
        first.models_status = second.models_status = 200
        tells("ok", "online", 200)
    finally:
        first.models_status = second.models_status = 200
        game.close()


def test_failures_are_counted_in_a_row(make_portal: MakePortal, fake_thread: FakeLLM, tmp_path: Path) -> None:
    portal = make_portal(tmp_path, LLM_SERVER_URL=fake_thread.url).start()
    with portal.client("root", role="admin") as admin:
        for cut_after, failures in ((1, 1), (1, 2), (None, 0), (1, 1)):
            fake_thread.script = Script(cut_after=cut_after)
            assert chat(admin, "s").status_code == (200 if cut_after is None else 502)
            assert servers(admin)["default-1"]["failures"] == failures
    portal.stop()


def test_all_servers_down_is_down(make_portal: MakePortal, tmp_path: Path) -> None:
    urls = ",".join(f"http://127.0.0.1:{free_port()}" for _ in range(2))
    portal = make_portal(tmp_path, LLM_SERVER_URL=urls).start(ready=False)
    assert httpx.get(f"{portal.url}/api/llm/health").json()["status"] == "down"
    with portal.client() as client:
        refused = chat(client, "s")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "llm_unavailable")
        assert "127.0.0.1" not in refused.text


def test_roles_know_a_model_by_its_own_name(pool: Portal, admin: httpx.Client) -> None:
    role = {"permissions": ["chat:use", "sessions:*"], "models": ["clever"]}
    assert admin.put("/api/admin/roles/cloudy", json=role).status_code == 200
    with pool.client("cleo", role="cloudy") as cleo:
        for model in ("smart", "clever"):
            assert "PUT /api/sessions" in chat(cleo, "s", model=model).json()["detail"], "it may be asked for"
        for other in ("default", "fake-1", None):
            assert chat(cleo, "s", model=other).status_code == 403


# --- keys of sessions ----------------------------------------------------------------------------


def test_a_session_brings_its_own_key(
    pool: Portal, ada: httpx.Client, admin: httpx.Client, fakes: list[FakeLLM]
) -> None:
    cloud = fakes[2]
    without = chat(ada, "mine", model="clever")
    assert (without.status_code, without.json()["error"]["code"]) == (422, "invalid_request")
    assert "PUT /api/sessions" in without.json()["detail"]
    assert ada.get("/api/sessions/mine/key").status_code == 404
    put = ada.put("/api/sessions/mine/key", json={"provider": "cloud", "key": CANARY})
    assert put.status_code == 200, put.text
    shown = ada.get("/api/sessions/mine/key").json()
    assert set(shown) == {"provider", "created_at"}
    assert shown["provider"] == "cloud"

    spent = ada.get("/api/stats").json()["today"]["cost"]
    assert chat(ada, "mine", model="clever").json()["response"] == "from 2"
    assert cloud.requests[-1]["headers"]["Authorization"] == f"Bearer {CANARY}"
    assert ada.get("/api/stats").json()["today"]["cost"] == spent, "its owner pays the provider"
    chat(ada, "mine")
    assert chat(ada, "other", model="clever").status_code == 422, "the key is that session's alone"
    elsewhere = [request for fake in fakes[:2] for request in fake.requests]
    assert elsewhere
    assert CANARY not in json.dumps(elsewhere), "and for that provider alone"

    with pool.client("bo") as bo:
        for call in (bo.get, bo.delete):
            assert call("/api/sessions/mine/key").status_code == 404
        stolen = bo.put("/api/sessions/mine/key", json={"provider": "cloud", "key": "x"})
        assert stolen.status_code == 404

    cloud.script = Script(status=401, error=f"no such key: {CANARY}")
    refused = chat(ada, "mine", model="clever")
    assert (refused.status_code, refused.json()["detail"]) == (
        502,
        "The LLM server did not accept the session's own key.",
    )
    cloud.script = Script(pieces=text("from 2"))
    wrong: list[dict[str, Any]] = [
        {"provider": "default"},
        {"provider": "none"},
        {"key": f"{CANARY}\n"},
        {"key": [CANARY]},
    ]
    answers = [
        ada.put("/api/sessions/mine/key", json={"provider": "cloud", "key": CANARY, **body}) for body in wrong
    ]
    assert {answer.status_code for answer in answers} == {422}
    assert CANARY not in "".join(answer.text for answer in answers) + refused.text

    audit = admin.get("/api/admin/audit/export").text
    assert '"session.key.set"' in audit
    files = b"".join(path.read_bytes() for path in Path(pool.directory).glob("portal.db*"))
    for place in (audit.encode(), pool.log.read_bytes(), files):
        assert CANARY.encode() not in place

    assert ada.delete("/api/sessions/mine/key").status_code == 204
    assert ada.delete("/api/sessions/mine/key").status_code == 404
    assert chat(ada, "mine", model="clever").status_code == 422


def test_a_key_goes_with_its_session(pool: Portal, ada: httpx.Client) -> None:
    chat(ada, "short-lived")
    ada.put("/api/sessions/short-lived/key", json={"provider": "cloud", "key": CANARY})
    ada.delete("/api/sessions/short-lived")
    ada.post("/api/sessions/short-lived/restore")
    assert ada.get("/api/sessions/short-lived/key").status_code == 404


def test_a_key_is_encrypted_and_outlives_a_change_of_the_secret(
    make_portal: MakePortal, tmp_path: Path, fakes: list[FakeLLM]
) -> None:
    (tmp_path / "models.toml").write_text(
        f'[providers.cloud]\nkind = "openai"\nurl = "{fakes[2].url}"\nown_keys = true\n'
        '[models.clever]\nprovider = "cloud"\n'
    )
    portal = make_portal(tmp_path, LLM_SERVER_URL=fakes[0].url).start()
    with portal.client() as client:
        chat(client, "s")
        assert client.put("/api/sessions/s/key", json={"provider": "cloud", "key": CANARY}).status_code == 200
    with sqlite3.connect(tmp_path / "portal.db") as database:
        ((provider, sealed),) = database.execute("SELECT provider, sealed FROM session_keys").fetchall()
    assert (provider, len(sealed)) == ("cloud", 1 + 12 + len(CANARY) + 16)
    assert CANARY.encode() not in sealed
    portal.stop()

    settings = portal.env_file.read_text()
    new = "another-one-0f8a6b1c2d3e4f5a6b7c8d9e"
    changes = {
        f"SECRET_KEY={new}\nSECRET_KEY_PREVIOUS={SECRET}": (200, "from 2"),
        f"SECRET_KEY={new}": (422, "set it again"),
    }
    for secrets, (status, words) in changes.items():
        portal.env_file.write_text(settings.replace(f"SECRET_KEY={SECRET}", secrets))
        portal.start()
        with portal.client() as client:
            answer = chat(client, "s", model="clever")
            assert answer.status_code == status
            assert words in answer.text
        portal.stop()


@pytest.mark.slow
def test_portals_of_one_database_agree(
    make_portal: MakePortal, tmp_path: Path, fakes: list[FakeLLM], postgres_url: str
) -> None:
    portals = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "models.toml").write_text(
            f'[providers.cloud]\nkind = "openai"\nurl = "{fakes[2].url}"\nown_keys = true\n'
            '[models.clever]\nprovider = "cloud"\n'
        )
        portals.append(
            make_portal(
                tmp_path / name,
                LLM_SERVER_URL=f"{fakes[0].url},{fakes[1].url}",
                DATABASE_URL=postgres_url,
                INSTANCE=name,
            ).start()
        )
    with portals[0].client("pat", role="admin") as one, portals[1].client("pat") as two:
        assert chat(one, "shared").status_code == 200
        for key in (CANARY, f"{CANARY}-2"):
            put = one.put("/api/sessions/shared/key", json={"provider": "cloud", "key": key})
            assert put.status_code == 200
        assert chat(two, "shared", model="clever").json()["response"] == "from 2"
        assert fakes[2].requests[-1]["headers"]["Authorization"] == f"Bearer {CANARY}-2"
        assert two.delete("/api/sessions/shared/key").status_code == 204
        for _ in range(2):
            assert one.post("/api/admin/servers/default-1/drain").json()["state"] == "drained"
        wait_until(lambda: servers(two)["default-1"]["state"] == "drained", what="the other portal's word")
        drained = one.get("/api/admin/audit", params={"action": "server.drain"}).json()["entries"]
        assert len(drained) == 1, "what changes nothing is not noted"
        two.post("/api/admin/servers/default-1/undrain")
        wait_until(lambda: servers(one)["default-1"]["state"] == "ok", what="the other portal's word")
