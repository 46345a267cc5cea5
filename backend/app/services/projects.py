"""Projects: what their sessions begin with, from the file that is shipped, the admin's own file, and, for the
system prompt, the database above both.

All of it is kept in memory; what another process changes in the database is known here within `REFRESH_S`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from sqlalchemy import Connection, select

from app.access import Identity, Limits, matches
from app.database import Database, insert_of, keep_fresh
from app.errors import InvalidRequest
from app.files import read_toml
from app.logs import get_logger
from app.models.tables import projects
from app.services.audit import note
from app.services.authorizer import Authorizer

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

SHIPPED_PROJECTS = Path(__file__).resolve().parent.parent / "projects.toml"
TOOL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
LONGEST_PROMPT = 1_000_000

log = get_logger(__name__)


class Tool(BaseModel):
    """Something that the model may ask the client to do; `parameters` is the JSON Schema of its arguments."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    description: str
    parameters: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}

    @cached_property
    def validator(self) -> Validator:
        """Tells whether arguments are as `parameters` want them."""
        from jsonschema import Draft202012Validator  # heavy, and needed by projects with tools only

        return Draft202012Validator(self.parameters)

    def as_function(self, name: str) -> dict[str, Any]:
        """The tool in OpenAI's form."""
        function = {"name": name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


class Project(BaseModel):
    """What the sessions of a project begin with, and what holds for them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    description: Annotated[str, Field(max_length=500)] = ""
    system_prompt: Annotated[str, Field(max_length=LONGEST_PROMPT)] = ""
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    max_tokens: Annotated[int | None, Field(ge=1, le=1_000_000)] = None
    tools: Mapping[str, Tool] = {}
    limits: Annotated[Limits, Field(description="Of all its sessions together")] = Limits()
    device_limits: Annotated[Limits, Field(description="Of each of its devices")] = Limits()

    def tools_for(self, patterns: tuple[str, ...]) -> list[dict[str, Any]]:
        """Its tools in OpenAI's form, as far as the patterns of a role allow them."""
        return [tool.as_function(name) for name, tool in self.tools.items() if matches(name, patterns)]


NONE = Project()

_projects_file = TypeAdapter(dict[str, Project])


def read_projects(file: Path) -> dict[str, Project]:
    """The projects of a TOML file; none where it does not exist. Raises `InvalidRequest` when it is wrong."""
    found = read_toml(file, _projects_file)
    for name, project in found.items():
        for tool_name, tool in project.tools.items():
            if TOOL_NAME.fullmatch(tool_name) is None:
                raise InvalidRequest(f"{file.name}: {name}: {tool_name!r} cannot name a tool")
            if tool.parameters.get("type") != "object":
                raise InvalidRequest(f"{file.name}: {name}.{tool_name}.parameters: an object is needed")
    return found


class Projects:
    """What projects there are."""

    def __init__(
        self, database: Database, authorizer: Authorizer, projects_file: Path, served: Sequence[str]
    ) -> None:
        """`served` are the projects of the MQTT door. Raises `InvalidRequest` when `projects_file` is
        wrong."""
        self._database = database
        self._authorizer = authorizer
        self._from_files = {**read_projects(SHIPPED_PROJECTS), **read_projects(projects_file)}
        self.names = frozenset((*self._from_files, *served))
        """Of those that are defined or served."""
        self._projects: Mapping[str, Project] = self._from_files
        self._read_at: dict[str, float] = {}
        """Of each system prompt that was read from the database, when it was changed."""

    async def open(self) -> None:
        """Reads what the database has."""
        await self._refresh()

    async def watch(self) -> None:
        """Looks for what other processes have changed. Runs until cancelled."""
        await keep_fresh(self._refresh, "projects")

    async def _refresh(self) -> None:
        stamps = select(projects.c.name, projects.c.updated_at)
        prompts = select(projects.c.name, projects.c.updated_at, projects.c.system_prompt)

        def operation(connection: Connection) -> Sequence[Any]:
            changed = [name for name, at in connection.execute(stamps) if self._read_at.get(name) != at]
            return connection.execute(prompts.where(projects.c.name.in_(changed))).all() if changed else ()

        for name, at, prompt in await self._database.read(operation):
            changed = self.project(name).model_copy(update={"system_prompt": prompt})
            self._projects = {**self._projects, name: changed}
            self._read_at[name] = at

    def project(self, name: str) -> Project:
        """The project; an empty one when nothing is defined for it."""
        return self._projects.get(name, NONE)

    def limits(self) -> dict[str, Limits]:
        """The limits of the files, by their subjects."""
        of_projects = {f"project:{name}": project.limits for name, project in self._from_files.items()}
        of_devices = {f"devices:{name}": project.device_limits for name, project in self._from_files.items()}
        return {**of_projects, **of_devices}

    async def set_prompt(self, who: Identity, name: str, prompt: str) -> None:
        """Gives the project another system prompt, for sessions that are made from then on. Raises
        `Forbidden`, and `InvalidRequest` for a project that is nowhere defined or served: all prompts are
        kept in memory."""
        await self._authorizer.check(who, "projects:write", project=name, what="project")
        if name not in self.names:
            raise InvalidRequest(f"project: one of {', '.join(sorted(self.names))} is needed")
        body = {"system_prompt": prompt, "updated_at": time.time()}

        def operation(connection: Connection) -> None:
            statement = insert_of(connection.dialect.name, projects).values(name=name, **body)
            connection.execute(statement.on_conflict_do_update(index_elements=["name"], set_=body))
            note(connection, who, "project.prompt", target=name, details={"characters": len(prompt)})

        await self._database.write(operation)
        await self._refresh()
