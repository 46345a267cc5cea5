"""The variables of a version of a template, stored with it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from app.errors import InvalidRequest
from app.services.templating import variables_of

revision = "0012"
down_revision = "0011"

VERSIONS = sa.table(
    "template_versions", sa.column("id"), sa.column("content"), sa.column("variables", sa.JSON)
)


def upgrade() -> None:
    column = sa.Column(
        "variables", sa.JSON, nullable=False, server_default=sa.text("'[]'"), comment="names that it needs"
    )
    op.add_column("template_versions", column)
    connection = op.get_bind()
    for version, content in connection.execute(sa.select(VERSIONS.c.id, VERSIONS.c.content)).all():
        changed = sa.update(VERSIONS).where(VERSIONS.c.id == version)
        connection.execute(changed.values(variables=_variables(content)))


def _variables(content: str) -> list[str]:
    try:
        return variables_of(content)
    except InvalidRequest:  # it is no template any more, by rules that are newer
        return []


def downgrade() -> None:
    with op.batch_alter_table("template_versions") as table:
        table.drop_column("variables")
