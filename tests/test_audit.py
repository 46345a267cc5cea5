"""The audit log: what is in it, and that nobody changes it unseen."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from app.cli.people import verify_audit
from app.config import child_environment
from app.database import create_portal_engine, migrate
from app.events import new_id
from tests.fake_llm import FakeLLM
from tests.support import PASSWORD, GameClient, MakePortal, Mosquitto, Portal, ask, owner_of


def entries(admin: httpx.Client, **params: Any) -> list[dict[str, Any]]:
    answer = admin.get("/api/admin/audit", params=params)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["entries"]
    return found


def test_a_turn_is_noted_by_its_ids_and_sizes(admin: httpx.Client, client: httpx.Client) -> None:
    secret = f"secret-{new_id()}"
    answer = ask(client, message=secret).json()
    (entry,) = entries(admin, actor=owner_of(client), action="turn")
    assert (entry["target"], entry["outcome"], entry["door"]) == (answer["turn_id"], "final", "http")
    assert entry["details"]["question_chars"] == len(secret)
    assert entry["details"]["reply_chars"] == len(answer["response"])
    assert secret not in json.dumps(entries(admin, limit=1000))


def test_signing_in_and_out_and_failing_to_are_noted(admin: httpx.Client, fake_portal: Portal) -> None:
    name = f"cy-{new_id()[-6:]}"
    with fake_portal.client(name) as client:
        owner = owner_of(client)
        wrong = {"username": name, "password": "battery staple"}
        client.post("/api/auth/login", json=wrong)
        client.post("/api/auth/logout")
        change = {"current_password": PASSWORD, "new_password": "battery staple"}
        client.post("/api/auth/login", json={"username": name, "password": PASSWORD})
        client.headers["Authorization"] = f"Bearer {client.post('/api/auth/refresh').json()['access_token']}"
        assert client.put("/api/auth/password", json={**change, "current_password": "x"}).status_code == 422
        assert client.put("/api/auth/password", json=change).status_code == 204
    mine = [entry for entry in entries(admin, action="auth.", limit=1000) if entry["target"] == owner]
    assert [(entry["action"], entry["outcome"]) for entry in reversed(mine)] == [
        ("auth.register", "ok"),
        ("auth.sign_in", "ok"),
        ("auth.sign_in", "denied"),
        ("auth.sign_out", "ok"),
        ("auth.sign_in", "ok"),
        ("auth.password", "denied"),
        ("auth.password", "ok"),
    ]
    about_passwords = [
        entry for entry in mine if entry["action"] == "auth.sign_in" or entry["outcome"] == "denied"
    ]
    assert all("address" in entry["details"] for entry in about_passwords)


def test_a_denial_is_noted_once_however_often_it_is_tried(admin: httpx.Client, client: httpx.Client) -> None:
    for _ in range(5):
        assert client.get("/api/admin/users").status_code == 403
    found = entries(admin, actor=owner_of(client), outcome="denied")
    assert [(entry["action"], entry["target"]) for entry in found] == [("access", "users:read")]


def test_a_foreign_reply_topic_is_noted(admin: httpx.Client, mosquitto: Mosquitto) -> None:
    game = GameClient(mosquitto.port, "general/assistant_response/s")
    body = {"message": "hi", "replyTopic": "general/assistant_response/of-another"}
    game.publish("general/user_input/s", body)
    assert game.reply("general/assistant_response/s").startswith(b"Error: replyTopic")
    game.close()
    (entry,) = entries(admin, actor="anon:general", outcome="denied")
    assert (entry["target"], entry["door"]) == ("reply topic of another", "mqtt")


def test_admin_acts_are_noted_with_what_they_did(admin: httpx.Client, client: httpx.Client) -> None:
    user = owner_of(client)
    admin.patch(f"/api/admin/users/{user.partition(':')[2]}", json={"role": "player"})
    admin.put(f"/api/admin/limits/{user}", json={"daily_tokens": 5})
    admin.delete(f"/api/admin/limits/{user}")
    found = entries(admin, actor=owner_of(admin), limit=3)
    assert [(entry["action"], entry["target"], entry["details"]) for entry in reversed(found)] == [
        ("user.change", user, {"role": "player"}),
        ("limits.set", user, {"daily_tokens": 5}),
        ("limits.clear", user, {}),
    ]


def test_pages_and_filters(admin: httpx.Client, client: httpx.Client) -> None:
    for _ in range(5):
        ask(client)
    params: dict[str, Any] = {"actor": owner_of(client), "action": "turn", "limit": 2}
    first = admin.get("/api/admin/audit", params=params).json()
    second = admin.get("/api/admin/audit", params={**params, "before": first["next"]}).json()
    last = admin.get("/api/admin/audit", params={**params, "before": second["next"]}).json()
    seqs = [entry["seq"] for page in (first, second, last) for entry in page["entries"]]
    assert len(seqs) == 5
    assert seqs == sorted(seqs, reverse=True)
    assert last["next"] is None
    at = first["entries"][0]["at"]
    since, until = (entries(admin, **{name: at}, limit=1000) for name in ("since", "until"))
    assert all(entry["at"] >= at for entry in since)
    assert all(entry["at"] < at for entry in until)
    assert seqs[0] in [entry["seq"] for entry in since]


def test_the_export_is_all_of_it_and_is_noted(admin: httpx.Client) -> None:
    rows = [json.loads(line) for line in admin.get("/api/admin/audit/export").text.splitlines()]
    assert [row["seq"] for row in rows] == list(range(1, len(rows) + 1))
    assert rows[-1]["action"] == "audit.export"


def test_the_chain_is_whole_and_its_head_can_be_kept(admin: httpx.Client, client: httpx.Client) -> None:
    before = admin.get("/api/admin/audit/verify").json()
    assert (before["whole"], before["problem"]) == (True, None)
    ask(client)
    after = admin.get("/api/admin/audit/verify", params={"head": before["head"]}).json()
    assert after["whole"]
    assert after["rows"] > before["rows"]
    other = before["head"][:-64] + "0" * 64
    assert admin.get("/api/admin/audit/verify", params={"head": other}).json()["whole"] is False


def test_a_log_that_grows_while_it_is_verified_is_whole(admin: httpx.Client, client: httpx.Client) -> None:
    is_over = threading.Event()

    def fill() -> None:
        while not is_over.is_set():
            assert ask(client).status_code == 200

    with ThreadPoolExecutor(3) as pool:
        fillers = [pool.submit(fill) for _ in range(3)]
        try:
            verdicts = [admin.get("/api/admin/audit/verify").json() for _ in range(20)]
        finally:
            is_over.set()
        for filler in fillers:
            filler.result()
    assert [verdict["problem"] for verdict in verdicts] == [None] * 20
    assert verdicts[-1]["rows"] > verdicts[0]["rows"]


TAMPERINGS = {
    "UPDATE audit SET outcome = 'ok' WHERE outcome = 'denied'": "was changed",
    "UPDATE audit SET details = '{}' WHERE seq = 2": "row 2 was changed",
    "DELETE FROM audit WHERE seq = 3": "row 3 is missing",
    "DELETE FROM audit WHERE seq = (SELECT max(seq) FROM audit)": "rows at the end are missing",
    "INSERT INTO audit SELECT seq + 1, at, actor, action, target, outcome, door, personal_data, details, hash"
    " FROM audit ORDER BY seq DESC LIMIT 1": "was changed",
    "UPDATE audit_head SET seq = seq - 1": "are not the portal's",
    "UPDATE audit SET seq = seq + 1 WHERE seq = (SELECT max(seq) FROM audit)": "is missing",
}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, module_fake: FakeLLM) -> Path:
    """A database with an audit log, of a portal that does not run any more."""
    directory = tmp_path_factory.mktemp("audit")
    portal = Portal(directory, LLM_SERVER_URL=module_fake.url).start()
    with portal.client() as client:
        ask(client)
        client.get("/api/admin/users")
        ask(client)
    portal.stop()
    return directory


def verify(env_file: Path, *options: str) -> tuple[int, str]:
    """What the command says, and its exit code."""
    command = [sys.executable, "-m", "app.cli", "audit", "verify", "--env-file", str(env_file), *options]
    done = subprocess.run(
        command, env=child_environment({}), capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("statement", TAMPERINGS)
def test_tampering_shows(filled: Path, tmp_path: Path, statement: str) -> None:
    (tmp_path / ".env").write_text((filled / ".env").read_text())
    with sqlite3.connect(filled / "portal.db") as source, sqlite3.connect(tmp_path / "portal.db") as copy:
        source.backup(copy)
    assert verify_audit(tmp_path / ".env", None).problem is None
    with sqlite3.connect(tmp_path / "portal.db") as database:
        for guard in ("audit_no_update", "audit_no_delete"):  # whoever has the file can take them away
            database.execute(f"DROP TRIGGER {guard}")
        assert database.execute(statement).rowcount >= 1
    problem = verify_audit(tmp_path / ".env", None).problem
    assert problem is not None
    assert TAMPERINGS[statement] in problem


def test_a_chain_made_anew_is_not_the_one_that_was_noted(filled: Path) -> None:
    code, told = verify(filled / ".env")
    assert code == 0
    head = told.split()[-1]
    assert verify(filled / ".env", "--head", head)[0] == 0
    seq = int(head.partition(":")[0])
    code, told = verify(filled / ".env", "--head", f"{seq}:{'0' * 64}")
    assert (code, "another chain" in told) == (1, True)
    code, told = verify(filled / ".env", "--head", f"{seq + 1}:{'0' * 64}")
    assert (code, "not there any more" in told) == (1, True)


@pytest.mark.parametrize("statement", ["UPDATE audit SET actor = 'x'", "DELETE FROM audit"])
def test_the_database_itself_refuses_to_change_rows(database_url: str, statement: str) -> None:
    migrate(database_url)
    engine = create_portal_engine(database_url)
    row = "INSERT INTO audit VALUES (:seq, 1, '', '', '', '', '', :no, '{}', '')"
    with engine.connect() as connection:
        connection.execute(text(row), {"seq": 10**6, "no": False})
        with pytest.raises(DBAPIError, match="never changed"):
            connection.execute(text(statement))
        connection.rollback()
    engine.dispose()


def test_processes_that_write_at_once_make_one_chain(
    make_portal: MakePortal, tmp_path: Path, module_fake: FakeLLM, postgres_url: str
) -> None:
    portals = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        portals.append(
            make_portal(tmp_path / name, LLM_SERVER_URL=module_fake.url, DATABASE_URL=postgres_url).start()
        )
    with portals[0].client("w1") as one, portals[1].client("w2") as two, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: ask((one, two)[n % 2]), range(40)))
        with portals[0].client("root", role="admin") as admin:
            verdict = admin.get("/api/admin/audit/verify").json()
    assert verdict["whole"], verdict
    assert verdict["rows"] >= 40
