"""Which model answers where a request names none: the one that the asker has chosen, else the one that an
admin has chosen for all, else that of `LLM_MODEL`.

What is not served any more, or is not the role's to use any more, is passed over. All choices are kept in
memory; what another process changes in the database is known here within `REFRESH_S`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from sqlalchemy import Connection, delete, select

from app.access import Identity, Role, matches
from app.database import Database, insert_of, keep_fresh
from app.errors import InvalidRequest
from app.models.tables import default_models
from app.services.audit import note
from app.services.authorizer import Authorizer
from app.services.llm_client import LLMClient
from app.services.policies import ALL
from app.services.routing import UNNAMED


class ModelDefaults:
    """The choices of default models."""

    def __init__(self, database: Database, authorizer: Authorizer, llm: LLMClient) -> None:
        self._database = database
        self._authorizer = authorizer
        self._llm = llm
        self._chosen: Mapping[str, str] = {}
        self._changes = 0

    async def open(self) -> None:
        """Reads what the database has."""
        await self._refresh()

    async def watch(self) -> None:
        """Looks for what other processes have changed. Runs until cancelled."""
        await keep_fresh(self._refresh, "default models")

    async def _refresh(self) -> None:
        wanted, changes = select(default_models.c.subject, default_models.c.model), self._changes
        rows = await self._database.read(lambda c: c.execute(wanted).all())
        if changes == self._changes:  # else it may be older than what was changed here meanwhile
            self._take({row.subject: row.model for row in rows})

    def _take(self, chosen: Mapping[str, str]) -> None:
        self._chosen = chosen
        self._llm.router.preferred = chosen.get(ALL)

    # --- what answers ---

    def chosen(self, subject: str) -> str | None:
        """What was chosen for an owner, or for `all`; it need not be served any more."""
        return self._chosen.get(subject)

    def model(self, owner: str, role: Role, wanted: str | None) -> str | None:
        """The model to ask for when somebody wants this one; None for the one that is the default for
        all."""
        if not self._chosen or wanted not in UNNAMED:
            return wanted
        own = self._chosen.get(owner)
        if own is not None and self._may_have(role, own):
            return own
        of_all = self._chosen.get(ALL)
        if of_all is None or matches(of_all, role.models):
            return None
        return self._llm.router.of_settings().name or None  # the role may not use what is for all

    def _may_have(self, role: Role, name: str) -> bool:
        router = self._llm.router
        return matches(name, role.models) and router.is_served(router.route(name))

    # --- choosing ---

    async def choose(self, who: Identity, model: str | None) -> None:
        """Makes a model the asker's default one; None takes the choice back. Raises `Forbidden`,
        `InvalidRequest` for what cannot be a default, `LLMUnavailable` while nobody knows."""
        await self._authorizer.check(who, "chat:use")
        name = await self._checked(who, model)
        await self._write(who, who.owner, name)

    async def choose_for_all(self, who: Identity, model: str | None) -> None:
        """The same for all who have chosen nothing. It is in the audit log."""
        await self._authorizer.check(who, "models:write")
        name = await self._checked(who, model)
        await self._write(who, ALL, name)

    async def _checked(self, who: Identity, model: str | None) -> str | None:
        """The name that the portal has for the model."""
        if model is None:
            return None
        if model in UNNAMED:
            raise InvalidRequest("model: the name of a model is needed, or null for none of one's own")
        await self._authorizer.check_model(who, self._llm.catalog.canonical(model))
        name = await self._llm.model_name(model)
        await self._authorizer.check_model(who, name)
        if self._llm.router.route(name).lacks_key(None):
            raise InvalidRequest("model: it answers only sessions that bring a key for it; name it there")
        return name

    async def _write(self, who: Identity, subject: str, model: str | None) -> None:
        def operation(connection: Connection) -> None:
            if model is None:
                connection.execute(delete(default_models).where(default_models.c.subject == subject))
            else:
                body = {"model": model, "chosen_at": time.time()}
                inserted = insert_of(connection.dialect.name, default_models).values(subject=subject, **body)
                connection.execute(inserted.on_conflict_do_update(index_elements=["subject"], set_=body))
            if subject == ALL:
                note(connection, who, "model.default", target=model or "")

        await self._database.write(operation)
        self._changes += 1
        others = {name: chosen for name, chosen in self._chosen.items() if name != subject}
        self._take(others if model is None else {**others, subject: model})
