"""Embeddings: numbers that an LLM server makes of texts. They count as a turn does, and nothing but their
usage is stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.access import ANY, Identity
from app.errors import Internal, PortalError
from app.events import Failed, Final, GenerationOptions, TurnRequest, Usage, new_id
from app.services.accounting import Accounting
from app.services.admission import Admission
from app.services.authorizer import Authorizer
from app.services.drain import Drain
from app.services.llm_client import LLMClient
from app.services.llm_server import Embedded
from app.services.redaction import redact
from app.services.session_manager import DEFAULT_PROJECT
from app.services.turns import Turn, unstored


class Embeddings:
    """Asks LLM servers for embeddings."""

    def __init__(
        self,
        llm: LLMClient,
        authorizer: Authorizer,
        admission: Admission,
        accounting: Accounting,
        drain: Drain,
    ) -> None:
        self._llm = llm
        self._authorizer = authorizer
        self._admission = admission
        self._accounting = accounting
        self._drain = drain

    async def embed(
        self, who: Identity, texts: list[str], model: str | None, asked: Mapping[str, Any]
    ) -> tuple[Embedded, Turn]:
        """The embeddings of `texts`, and the turn that they count as; `asked` is what else the server is to
        be told. Raises what `SessionManager.submit` and `LLMClient.embed` raise."""
        project = who.only_project or DEFAULT_PROJECT
        await self._authorizer.check(who, "chat:use", project=project, what="project")
        if who.role.models != ANY:
            await self._authorizer.check_model(who, await self._llm.model_name(model))
        if who.role.redaction:
            texts = [redact(text) for text in texts]
        options = GenerationOptions(model=model, max_tokens=1)
        request = TurnRequest(who, "", "\n".join(texts), project=project, options=options)
        turn = unstored(new_id(), who, project, request.message)
        self._drain.check()
        known = self._llm.known_model(model)
        turn.ticket = await self._admission.admit(who, request, turn.id, known)
        try:
            made = await self._llm.embed(texts, model, asked, owner=who.owner, meter=turn.meter)
        except PortalError as error:
            await self._end(turn, Failed(turn.id, error.info))
            raise
        except BaseException:
            await self._end(turn, Failed(turn.id, Internal("The embeddings were given up.").info))
            raise
        turn.usage = Usage(made.tokens)
        await self._end(turn, Final(turn.id, "", "stop", turn.usage, [], 0, None, None))
        return made, turn

    async def _end(self, turn: Turn, ending: Final | Failed) -> None:
        if isinstance(ending, Failed):
            turn.usage = Usage(estimated=True)
        turn.end(ending)
        await self._accounting.count(turn)
