"""The one authorizer: may WHO do WHAT to WHICH. Services ask it, so no door can forget to."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from app.access import PERMISSIONS, Identity, Role, matches
from app.errors import Forbidden, NotFound, StorageUnavailable
from app.logs import get_logger
from app.services.audit import DENIED, Audit

SAME_DENIAL_S = 60.0
"""A denial is written to the audit log once in this time: to be refused must cost more than to refuse."""

MOST_DENIALS = 10_000


log = get_logger(__name__)


class Authorizer:
    """Answers from the role and the key of who asks; what is denied, it puts into the audit log."""

    def __init__(self, audit: Audit) -> None:
        self._audit = audit
        self._denied: OrderedDict[tuple[str, str], float] = OrderedDict()

    async def check(
        self,
        who: Identity,
        permission: str,
        *,
        owner: str | None = None,
        project: str | None = None,
        what: str = "thing",
    ) -> None:
        """Returns when `who` may do it, to a thing of `owner` in `project` where these are given.

        Raises `Forbidden` without the permission, and `NotFound` for what belongs to somebody else or to
        a project that the key is not for, in the words for `what` is not there at all: whether there is
        such a thing is nobody else's business.
        """
        if not who.may(permission):
            await self.deny(who, permission)
            by_key = who.key is not None and who.role.allows(permission)
            lacking = f"the key {who.key.name!r}" if who.key and by_key else f"the role {who.role_name!r}"
            raise Forbidden(
                f"{PERMISSIONS[permission]}: {lacking} does not allow this.",
                details={"permission": permission},
            )
        foreign = owner is not None and owner != who.owner
        elsewhere = project is not None and who.only_project not in {None, project}
        if foreign or elsewhere:
            await self.deny(who, f"{permission} of another")
            raise NotFound(f"There is no such {what}.")

    async def check_model(self, who: Identity, model: str) -> None:
        """Returns when the role may use the model. Raises `Forbidden`."""
        if not matches(model, who.role.models):
            await self.deny(who, "model", model)
            raise Forbidden(
                f"model: the role {who.role_name!r} may use {', '.join(who.role.models) or 'none'}, "
                f"not {model!r}."
            )

    async def check_tools(self, who: Identity, tools: Sequence[Mapping[str, Any]]) -> None:
        """Returns when the role may offer these tools (in OpenAI's form) to the model. Raises
        `Forbidden`."""
        for tool in tools:
            function = tool.get("function")
            name = str(function.get("name", "")) if isinstance(function, Mapping) else ""
            if not matches(name, who.role.tools):
                await self.deny(who, "tool", name[:64])
                raise Forbidden(f"tools: the role {who.role_name!r} may not use {name[:64]!r}.")

    async def check_within(self, who: Identity, role: Role) -> None:
        """Returns when the role allows nothing that `who` may not do. Raises `Forbidden`: nobody makes
        somebody mightier than they are."""
        if beyond := who.role.lacks(role):
            await self.deny(who, "more than one's own rights")
            raise Forbidden(f"This would give rights that you do not have: {', '.join(beyond)}.")

    async def deny(self, who: Identity, what: str, name: str = "") -> None:
        """Notes in the audit log that something was refused; the first `name` of many that are tried."""
        now = time.monotonic()
        key = (who.owner, what)
        if now - self._denied.get(key, -SAME_DENIAL_S) < SAME_DENIAL_S:
            return
        self._denied[key] = now
        self._denied.move_to_end(key)
        if len(self._denied) > MOST_DENIALS:
            self._denied.popitem(last=False)
        try:
            await self._audit.record(who, "access", target=f"{what} {name}".rstrip(), outcome=DENIED)
        except StorageUnavailable:
            log.warning("a denial could not be written to the audit log", what=what)
