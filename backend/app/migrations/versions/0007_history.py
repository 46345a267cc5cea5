"""Pinned messages, and summaries of what was cut."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column(
        "messages",
        sa.Column(
            "pinned",
            sa.Boolean(),
            nullable=True,
            comment="its exchange is sent to the model also after a cut",
        ),
    )
    op.create_index(
        "ix_messages_pinned",
        "messages",
        ["session"],
        sqlite_where=sa.text("pinned"),
        postgresql_where=sa.text("pinned"),
    )
    op.create_table(
        "summaries",
        sa.Column("session", sa.String(28), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column("until", sa.String(28), nullable=False, comment="the oldest message that is not in it"),
        sa.Column("made_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["session"], ["sessions.id"], name=op.f("fk_summaries_session")),
        sa.PrimaryKeyConstraint("session", name=op.f("pk_summaries")),
        comment="What the model is told of messages that are not sent to it any more.",
    )


def downgrade() -> None:
    op.drop_table("summaries")
    op.drop_index("ix_messages_pinned", "messages")
    op.drop_column("messages", "pinned")
