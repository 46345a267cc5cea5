"""`/api/templates`: prompt templates and their versions."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, Field

from app.dependencies import AuthorizerDep, CurrentUser, TemplatesDep
from app.hardening import StrictRoute
from app.routers.times import moment
from app.services.templates import Draft, TemplateVersion
from app.services.templating import LONGEST_TEMPLATE, names_of, render

router = APIRouter(prefix="/api/templates", tags=["templates"], route_class=StrictRoute)

Content = Annotated[
    str, Field(min_length=1, max_length=LONGEST_TEMPLATE, description="Text with {{ variables }}")
]

MOST_VERSIONS = 2**31 - 1
"""What a database keeps as a number of a version."""


class TemplateBody(BaseModel):
    """What a save consists of."""

    title: Annotated[str, Field(min_length=1, max_length=200)]
    description: Annotated[str, Field(max_length=2000)] = ""
    content: Content

    @property
    def draft(self) -> Draft:
        """The same for the service."""
        return Draft(self.title.strip(), self.description.strip(), self.content)


class TemplateSave(TemplateBody):
    """A save of a template that exists. `based_on` is the number of the version that was edited: when
    another one was saved meanwhile, the answer is a conflict."""

    based_on: int | None = None


class Template(BaseModel):
    """A version of a template. `id` names the template, `version_id` this version of it."""

    id: str
    version: int
    version_id: str
    title: str
    description: str
    content: str
    variables: list[str]
    optional: Annotated[list[str], Field(description="Variables that it can do without")]
    saved_at: datetime

    @classmethod
    def of(cls, version: TemplateVersion) -> Template:
        """The template of a version."""
        return cls(
            id=version.template_id,
            version=version.number,
            version_id=version.id,
            title=version.title,
            description=version.description,
            content=version.content,
            variables=version.variables,
            optional=version.optional,
            saved_at=moment(version.created_at),
        )


class TemplatePage(BaseModel):
    """A part of the list; `total` counts all that match."""

    templates: list[Template]
    total: int


class TemplateVersions(BaseModel):
    """All versions of a template, the newest first."""

    versions: list[Template]


class RenderBody(BaseModel):
    """Values for the variables; `version` is the newest one when it is left out."""

    variables: Annotated[dict[str, Any], Field(default_factory=dict)]
    version: Annotated[int | None, Field(ge=1, le=MOST_VERSIONS)] = None


class PreviewBody(BaseModel):
    """A template that need not be saved, and values for its variables."""

    content: Content
    variables: Annotated[dict[str, Any], Field(default_factory=dict)]


class Rendered(BaseModel):
    """A prompt."""

    prompt: str


class Preview(BaseModel):
    """What a template would make. `prompt` is null while variables are `missing`."""

    variables: list[str]
    optional: list[str]
    missing: list[str]
    prompt: str | None


@router.get("")
async def list_templates(
    user: CurrentUser,
    templates: TemplatesDep,
    search: Annotated[
        str, Query(max_length=200, description="Only those with this text in title, description or content")
    ] = "",
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    offset: Annotated[int, Query(ge=0, le=2**53)] = 0,
) -> TemplatePage:
    """My templates in their newest version, those saved last first."""
    found, total = await templates.search(user, search, limit=limit, offset=offset)
    return TemplatePage(templates=[Template.of(version) for version in found], total=total)


@router.post("", status_code=201)
async def create_template(body: TemplateBody, user: CurrentUser, templates: TemplatesDep) -> Template:
    """Saves a new template."""
    return Template.of(await templates.create(user, body.draft))


@router.post("/preview")
async def preview_template(body: PreviewBody, user: CurrentUser, authorizer: AuthorizerDep) -> Preview:
    """The prompt of a template that need not be saved, and the variables that it needs."""
    await authorizer.check(user, "templates:read")
    names = names_of(body.content)
    missing = [name for name in names.variables if name not in body.variables]
    prompt = None if missing else render(body.content, body.variables)
    return Preview(variables=names.variables, optional=names.optional, missing=missing, prompt=prompt)


@router.get("/{template_id}")
async def get_template(template_id: str, user: CurrentUser, templates: TemplatesDep) -> Template:
    """A template in its newest version."""
    return Template.of(await templates.get(user, template_id))


@router.put("/{template_id}")
async def save_template(
    template_id: str, body: TemplateSave, user: CurrentUser, templates: TemplatesDep
) -> Template:
    """Saves a new version, unless nothing has changed."""
    return Template.of(await templates.save(user, template_id, body.draft, body.based_on))


@router.delete("/{template_id}", status_code=204)
async def delete_template(template_id: str, user: CurrentUser, templates: TemplatesDep) -> None:
    """Deletes a template. Sessions made from it keep their prompt, and it can be restored."""
    await templates.delete(user, template_id)


@router.post("/{template_id}/restore")
async def restore_template(template_id: str, user: CurrentUser, templates: TemplatesDep) -> Template:
    """Brings a deleted template back."""
    return Template.of(await templates.restore(user, template_id))


@router.get("/{template_id}/versions")
async def list_versions(template_id: str, user: CurrentUser, templates: TemplatesDep) -> TemplateVersions:
    """All versions, the newest first."""
    found = await templates.versions(user, template_id)
    return TemplateVersions(versions=[Template.of(version) for version in found])


@router.get("/{template_id}/versions/{version}")
async def get_version(
    template_id: str,
    version: Annotated[int, Path(ge=1, le=MOST_VERSIONS)],
    user: CurrentUser,
    templates: TemplatesDep,
) -> Template:
    """One version."""
    return Template.of(await templates.get(user, template_id, version))


@router.post("/{template_id}/render")
async def render_template(
    template_id: str, body: RenderBody, user: CurrentUser, templates: TemplatesDep
) -> Rendered:
    """The prompt that a version makes with these variables."""
    version = await templates.get(user, template_id, body.version)
    return Rendered(prompt=version.render(body.variables))
