"""Invitations, accounts of others, and setting passwords anew."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.access import LOCAL, Identity, Role
from app.cli.people import invite, invite_first_admin
from app.config import Settings
from app.container import open_container
from app.errors import Conflict
from app.events import new_id
from tests.support import PASSWORD, MakePortal, Portal, person, token_of


def id_of(client: httpx.Client) -> str:
    return str(client.get("/api/auth/me").json()["id"])


def secret_of(link: dict[str, Any]) -> str:
    return str(link["path"]).partition("#")[2]


def join(portal: Portal, invitation: str | None, name: str | None = None) -> httpx.Response:
    name = name or f"new-{new_id()[-8:]}"
    account = {"username": name, "email": f"{name}@example.org", "password": PASSWORD}
    return httpx.post(f"{portal.url}/api/auth/register", json={**account, "invitation": invitation})


def test_an_invitation_makes_one_account_with_its_role(fake_portal: Portal, admin: httpx.Client) -> None:
    link = admin.post("/api/admin/invitations", json={"role": "viewer"}).json()
    assert link["path"].startswith("/join#")
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: join(fake_portal, secret_of(link)), range(6)))
    made = [answer.json() for answer in answers if answer.status_code == 201]
    assert [account["role"] for account in made] == ["viewer"]
    others = [answer.json()["error"] for answer in answers if answer.status_code != 201]
    assert {error["code"] for error in others} == {"invalid_request"}
    assert all("ask for another one" in error["message"] for error in others)


def test_an_account_that_cannot_be_made_uses_no_invitation_up(
    fake_portal: Portal, admin: httpx.Client
) -> None:
    secret = secret_of(admin.post("/api/admin/invitations", json={"role": "player"}).json())
    taken = admin.get("/api/auth/me").json()["username"]
    assert join(fake_portal, secret, taken).status_code == 409
    assert join(fake_portal, secret).status_code == 201


def test_invitations_are_listed_without_secrets_and_can_be_taken_back(
    fake_portal: Portal, admin: httpx.Client
) -> None:
    link = admin.post("/api/admin/invitations", json={"role": "player", "days": 1}).json()
    listed = admin.get("/api/admin/invitations")
    assert link["id"] in [one["id"] for one in listed.json()["invitations"]]
    assert secret_of(link) not in listed.text
    assert admin.delete(f"/api/admin/invitations/{link['id']}").status_code == 204
    assert join(fake_portal, secret_of(link)).status_code == 422
    assert admin.delete(f"/api/admin/invitations/{link['id']}").status_code == 404


@pytest.mark.parametrize("policy", ["open", "invite", "closed"])
def test_who_may_make_an_account(policy: str, make_portal: MakePortal, tmp_path: Path) -> None:
    portal = make_portal(tmp_path, REGISTRATION=policy, DEFAULT_ROLE="player").start(ready=False)
    stranger = join(portal, None)
    assert stranger.status_code == (201 if policy == "open" else 403)
    if policy == "open":
        assert stranger.json()["role"] == "player"
    with portal.client("root", role="admin") as admin:
        link = admin.post("/api/admin/invitations", json={"role": "author"}).json()
        invited = join(portal, secret_of(link))
        assert invited.status_code == (403 if policy == "closed" else 201)
        left = [one["id"] for one in admin.get("/api/admin/invitations").json()["invitations"]]
        assert left == ([link["id"]] if policy == "closed" else []), "what is refused uses no link up"
    assert join(portal, invite(portal.env_file, "author").secret).status_code == 201, (
        "the operator always may"
    )


def test_the_first_admin_is_made_by_a_link_and_only_while_there_is_none(
    make_portal: MakePortal, tmp_path: Path
) -> None:
    portal = make_portal(tmp_path).start(ready=False)
    earlier, link = (invite_first_admin(portal.env_file) for _ in range(2))
    assert earlier is not None
    assert link is not None
    assert join(portal, earlier.secret).status_code == 422, "only what was printed last is good"
    assert join(portal, link.secret).json()["role"] == "admin"
    assert invite_first_admin(portal.env_file) is None


def test_accounts_are_found_and_seeing_them_is_noted(admin: httpx.Client, client: httpx.Client) -> None:
    me = client.get("/api/auth/me").json()
    found = admin.get("/api/admin/users", params={"search": me["email"][:12]}).json()
    assert [(user["username"], user["role"]) for user in found["users"]] == [(me["username"], "author")]
    assert found["users"][0]["last_seen_at"] is not None
    assert found["users"][0]["created_at"] == me["created_at"], "a time has one form"
    noted = admin.get("/api/admin/audit", params={"action": "user.list"}).json()["entries"][0]
    assert (noted["personal_data"], noted["details"]) == (True, {"shown": 1})


def test_another_role_holds_at_once(admin: httpx.Client, client: httpx.Client) -> None:
    body = {"session_id": new_id(), "message": "hi"}
    assert client.post("/api/llm/chat/session", json=body).status_code == 200
    changed = admin.patch(f"/api/admin/users/{id_of(client)}", json={"role": "viewer"})
    assert changed.json()["role"] == "viewer"
    refused = client.post("/api/llm/chat/session", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
    assert "the role 'viewer' does not allow this" in refused.json()["detail"]
    assert client.get(f"/api/llm/chat/session/{body['session_id']}/history").status_code == 200


def test_a_closed_account_is_out_at_once_and_can_be_opened(
    fake_portal: Portal, admin: httpx.Client, client: httpx.Client
) -> None:
    key = client.post("/api/keys", json={"name": "k"}).json()["secret"]
    user = id_of(client)
    assert admin.patch(f"/api/admin/users/{user}", json={"closed": True}).json()["closed_at"] is not None
    with_key = {"Authorization": f"Bearer {key}"}
    assert client.get("/api/auth/me").status_code == 401
    assert httpx.get(f"{fake_portal.url}/api/auth/me", headers=with_key).status_code == 401
    name = admin.get("/api/admin/users", params={"search": "ada-"}).json()["users"]
    account = next(one for one in name if one["id"] == user)
    login = {"username": account["username"], "password": PASSWORD}
    assert httpx.post(f"{fake_portal.url}/api/auth/login", json=login).status_code == 403
    newest = admin.get("/api/admin/audit", params={"action": "auth.sign_in"}).json()["entries"][0]
    assert (newest["target"], newest["outcome"]) == (f"user:{user}", "denied")
    admin.patch(f"/api/admin/users/{user}", json={"closed": False})
    assert httpx.post(f"{fake_portal.url}/api/auth/login", json=login).status_code == 200


def test_the_last_admin_stays(make_portal: MakePortal, tmp_path: Path) -> None:
    portal = make_portal(tmp_path).start(ready=False)
    with portal.client("root", role="admin") as admin, portal.client("second", role="admin") as second:
        ids = [id_of(admin), id_of(second)]
        demote = {"json": {"role": "author"}}
        with ThreadPoolExecutor(2) as pool:  # each demotes the other at the same moment
            work = [
                pool.submit(who.patch, f"/api/admin/users/{other}", **demote)  # type: ignore[arg-type]
                for who, other in zip((admin, second), reversed(ids), strict=True)
            ]
            codes = sorted(done.result().status_code for done in work)
        assert codes[0] == 200
        assert codes[1] in {403, 409}, "the other is no admin any more, or the last one"
        left = admin if admin.get("/api/admin/users").status_code == 200 else second
        for change in ({"role": "author"}, {"closed": True}):
            kept = left.patch(f"/api/admin/users/{id_of(left)}", json=change)
            assert (kept.status_code, kept.json()["error"]["code"]) == (409, "conflict")


def test_nobody_gives_rights_that_they_do_not_have(
    fake_portal: Portal, admin: httpx.Client, client: httpx.Client
) -> None:
    helper_role = {"permissions": ["users:read", "users:write", "roles:write", "account:write"]}
    assert admin.put("/api/admin/roles/helpdesk", json=helper_role).status_code == 200
    with fake_portal.client(f"help-{new_id()[-6:]}", role="helpdesk") as helper:
        for method, path, body in [
            ("PATCH", f"/api/admin/users/{id_of(helper)}", {"role": "admin"}),
            ("PATCH", f"/api/admin/users/{id_of(admin)}", {"closed": True}),
            ("POST", f"/api/admin/users/{id_of(admin)}/password-reset", None),
            ("DELETE", f"/api/admin/users/{id_of(admin)}/sign-ins", None),
            ("POST", "/api/admin/invitations", {"role": "admin"}),
            ("PUT", "/api/admin/roles/helpdesk", {"permissions": ["*"]}),
        ]:
            refused = helper.request(method, path, json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden"), path
            assert "rights that you do not have" in refused.json()["detail"]


def test_a_new_password_by_an_admins_link(
    fake_portal: Portal, admin: httpx.Client, client: httpx.Client
) -> None:
    name = client.get("/api/auth/me").json()["username"]
    path = f"/api/admin/users/{id_of(client)}/password-reset"
    first, second = (admin.post(path).json() for _ in range(2))
    assert second["path"].startswith("/new-password#")
    statuses = [set_password(fake_portal, link) for link in (first, second, second)]
    assert statuses == [422, 204, 422], "only the newest, and only once"
    assert client.get("/api/auth/me").status_code == 401, "all sign-ins have ended"
    for password, status in ((PASSWORD, 401), ("another horse", 200)):
        login = {"username": name, "password": password}
        assert httpx.post(f"{fake_portal.url}/api/auth/login", json=login).status_code == status


def test_links_are_good_for_what_they_are_for(
    fake_portal: Portal, admin: httpx.Client, client: httpx.Client
) -> None:
    reset = admin.post(f"/api/admin/users/{id_of(client)}/password-reset").json()
    invitation = admin.post("/api/admin/invitations", json={"role": "admin"}).json()
    assert join(fake_portal, secret_of(reset)).status_code == 422
    body = {"link": secret_of(invitation), "new_password": "another horse"}
    assert httpx.post(f"{fake_portal.url}/api/auth/password-reset", json=body).status_code == 422
    assert join(fake_portal, secret_of(invitation)).status_code == 201, "and neither is used up by that"
    body["link"] = secret_of(reset)
    assert httpx.post(f"{fake_portal.url}/api/auth/password-reset", json=body).status_code == 204


def set_password(portal: Portal, link: dict[str, Any]) -> int:
    body = {"link": secret_of(link), "new_password": "another horse"}
    return httpx.post(f"{portal.url}/api/auth/password-reset", json=body).status_code


HELPER = {"permissions": ["users:read", "users:write", "account:write", "chat:*", "sessions:*", "usage:read"]}


def test_a_link_is_no_way_to_an_account_that_has_become_mightier(
    fake_portal: Portal, admin: httpx.Client
) -> None:
    assert admin.put("/api/admin/roles/helper", json=HELPER).status_code == 200
    with (
        fake_portal.client(f"help-{new_id()[-6:]}", role="helper") as helper,
        fake_portal.client(f"pia-{new_id()[-6:]}", role="player") as player,
    ):
        path = f"/api/admin/users/{id_of(player)}"
        link = helper.post(f"{path}/password-reset").json()
        assert admin.patch(path, json={"role": "admin"}).status_code == 200
        assert helper.post(f"{path}/password-reset").status_code == 403
        assert set_password(fake_portal, link) == 422
        assert admin.patch(path, json={"role": "player"}).status_code == 200
        assert set_password(fake_portal, link) == 204, "nor was it used up by that"


@pytest.mark.parametrize("change", [{"closed": True}, {"role": "author"}, {"role": "helper"}])
def test_links_are_good_while_their_maker_may_make_them(
    fake_portal: Portal, admin: httpx.Client, client: httpx.Client, change: dict[str, Any]
) -> None:
    assert admin.put("/api/admin/roles/helper", json=HELPER).status_code == 200
    with fake_portal.client(f"eve-{new_id()[-6:]}", role="admin") as eve:
        invitation = eve.post("/api/admin/invitations", json={"role": "admin"}).json()
        reset = eve.post(f"/api/admin/users/{id_of(client)}/password-reset").json()
        assert admin.patch(f"/api/admin/users/{id_of(eve)}", json=change).status_code == 200
    assert join(fake_portal, secret_of(invitation)).status_code == 422
    assert set_password(fake_portal, reset) == 422
    listed = admin.get("/api/admin/invitations").json()["invitations"]
    assert invitation["id"] not in [one["id"] for one in listed]


def test_a_role_that_was_narrowed_gives_by_links_what_its_people_may_still_give(
    fake_portal: Portal, admin: httpx.Client
) -> None:
    role = f"h-{new_id()[-8:]}"
    assert admin.put(f"/api/admin/roles/{role}", json=HELPER).status_code == 200
    with fake_portal.client(f"help-{new_id()[-6:]}", role=role) as helper:
        link = helper.post("/api/admin/invitations", json={"role": "player"}).json()
        narrow = {"permissions": ["users:write", "account:write"]}
        assert admin.put(f"/api/admin/roles/{role}", json=narrow).status_code == 200
        assert join(fake_portal, secret_of(link)).status_code == 422


async def test_an_account_that_becomes_mightier_at_the_same_moment_is_not_changed(
    settings_for: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_container(settings_for()) as portal:
        await portal.policies.define_role(LOCAL, "helper", Role.model_validate(HELPER))
        ada = await portal.accounts.register("ada", "ada@example.org", PASSWORD)
        user = ada.user or ""
        await portal.people.change(LOCAL, user, role="player")
        check_within = portal.authorizer.check_within

        async def then_promote(who: Identity, role: Role) -> None:
            await check_within(who, role)
            if who is not LOCAL:
                await portal.people.change(LOCAL, user, role="admin")
                await portal.people.change(LOCAL, other.user or "", role="admin")

        other = await portal.accounts.register("bo", "bo@example.org", PASSWORD)
        monkeypatch.setattr(portal.authorizer, "check_within", then_promote)
        helper = person("help", portal.policies.role("helper"))
        with pytest.raises(Conflict):
            await portal.people.change(helper, user, closed=True)
        (found,), _ = await portal.people.search(LOCAL, "ada")
        assert (found.role, found.closed_at) == ("admin", None)


def test_an_admin_signs_somebody_out_everywhere(admin: httpx.Client, client: httpx.Client) -> None:
    assert token_of(client)
    assert admin.delete(f"/api/admin/users/{id_of(client)}/sign-ins").status_code == 204
    assert client.get("/api/auth/me").status_code == 401


def test_an_admin_revokes_the_key_of_somebody(
    fake_portal: Portal, admin: httpx.Client, client: httpx.Client
) -> None:
    made = client.post("/api/keys", json={"name": "lost"}).json()
    user = id_of(client)
    keys = f"/api/admin/users/{user}/keys"
    assert [key["name"] for key in admin.get(keys).json()["keys"]] == ["lost"]
    assert admin.delete(f"/api/admin/users/{id_of(admin)}/keys/{made['id']}").status_code == 404
    assert admin.delete(f"{keys}/{made['id']}").status_code == 204
    headers = {"Authorization": f"Bearer {made['secret']}"}
    assert httpx.get(f"{fake_portal.url}/api/auth/me", headers=headers).status_code == 401


def test_unknown_accounts_and_roles_are_told(admin: httpx.Client) -> None:
    assert admin.patch(f"/api/admin/users/{new_id()}", json={"role": "author"}).status_code == 404
    refused = admin.patch(f"/api/admin/users/{id_of(admin)}", json={"role": "emperor"})
    assert (refused.status_code, refused.json()["detail"]) == (422, "role: there is no such role")
    assert admin.post("/api/admin/invitations", json={"role": "emperor"}).status_code == 422
