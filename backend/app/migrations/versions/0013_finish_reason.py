"""Why a reply ended, with its message: one that was cut at its longest looks whole."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    comment = "why the model's reply ended; null where it broke off"
    op.add_column("messages", sa.Column("finish_reason", sa.Text, comment=comment))


def downgrade() -> None:
    with op.batch_alter_table("messages") as table:
        table.drop_column("finish_reason")
