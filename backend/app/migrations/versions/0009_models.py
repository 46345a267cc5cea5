"""Default models, and when the LLM servers were to be asked anew."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.create_table(
        "default_models",
        sa.Column("subject", sa.String(200), nullable=False, comment="all, or an owner"),
        sa.Column("model", sa.String(256), nullable=False),
        sa.Column("chosen_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("subject", name=op.f("pk_default_models")),
        comment="The models that answer where a request names none.",
    )
    op.create_table(
        "model_syncs",
        sa.Column("id", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_model_syncs")),
        comment="One row: when somebody wanted all LLM servers to be asked anew, by every process.",
    )


def downgrade() -> None:
    op.drop_table("model_syncs")
    op.drop_table("default_models")
