"""Tickets for WebSockets."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.create_table(
        "tickets",
        sa.Column("secret_hash", sa.String(64), nullable=False),
        sa.Column(
            "sealed",
            sa.LargeBinary(),
            nullable=False,
            comment="the token, encrypted",
        ),
        sa.Column("expires_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("secret_hash", name=op.f("pk_tickets")),
        comment="Each opens one WebSocket.",
    )


def downgrade() -> None:
    op.drop_table("tickets")
