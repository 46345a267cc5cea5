"""Sign-ins, which refresh tokens renew."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "sign_ins",
        sa.Column("id", sa.String(length=28), nullable=False),
        sa.Column("user", sa.String(length=28), nullable=False),
        sa.Column(
            "generation", sa.Integer(), nullable=False, comment="of the refresh token that is good now"
        ),
        sa.Column("user_agent", sa.String(length=200), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("renewed_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=False),
        sa.Column("ended_at", sa.Float(), comment="signed out, or its refresh token was used twice"),
        sa.ForeignKeyConstraint(["user"], ["users.id"], name=op.f("fk_sign_ins_user")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sign_ins")),
    )
    op.create_index(op.f("ix_sign_ins_user"), "sign_ins", ["user"])


def downgrade() -> None:
    op.drop_table("sign_ins")
