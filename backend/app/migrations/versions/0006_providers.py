"""Keys that sessions bring, and LLM servers that are out of service."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table(
        "session_keys",
        sa.Column("session", sa.String(28), nullable=False),
        sa.Column("provider", sa.String(64), nullable=False),
        sa.Column(
            "sealed", sa.LargeBinary(), nullable=False, comment="the key, encrypted with the server's secret"
        ),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["session"], ["sessions.id"], name=op.f("fk_session_keys_session")),
        sa.PrimaryKeyConstraint("session", name=op.f("pk_session_keys")),
        comment="Keys that sessions bring for a provider of models.",
    )
    op.create_table(
        "drained_servers",
        sa.Column("url", sa.String(500), nullable=False),
        sa.Column("drained_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("url", name=op.f("pk_drained_servers")),
        comment="LLM servers that get no new requests, by the admin's word.",
    )


def downgrade() -> None:
    op.drop_table("drained_servers")
    op.drop_table("session_keys")
