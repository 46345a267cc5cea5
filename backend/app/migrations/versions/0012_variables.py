"""The names in a version of a template, stored with it."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

from app.errors import InvalidRequest
from app.services.templating import names_of

revision = "0012"
down_revision = "0011"

COMMENTS = {"variables": "names that it needs", "optional": "and can do without"}
VERSIONS = sa.table(
    "template_versions",
    sa.column("id"),
    sa.column("content"),
    *(sa.column(name, sa.JSON) for name in COMMENTS),
)


def upgrade() -> None:
    for name, comment in COMMENTS.items():
        none: Any = sa.text("'[]'")
        column = sa.Column(name, sa.JSON, nullable=False, server_default=none, comment=comment)
        op.add_column("template_versions", column)
    connection = op.get_bind()
    for version, content in connection.execute(sa.select(VERSIONS.c.id, VERSIONS.c.content)).all():
        try:
            names = names_of(content)
        except InvalidRequest:  # it is no template any more, by rules that are newer
            continue
        connection.execute(sa.update(VERSIONS).where(VERSIONS.c.id == version).values(names._asdict()))


def downgrade() -> None:
    with op.batch_alter_table("template_versions") as table:
        for name in COMMENTS:
            table.drop_column(name)
