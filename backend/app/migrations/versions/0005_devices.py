"""MQTT devices."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "devices",
        sa.Column("id", sa.String(28), nullable=False),
        sa.Column("name", sa.String(64), nullable=False, comment="its user name at the broker"),
        sa.Column("user", sa.String(28), nullable=False, comment="who owns its sessions"),
        sa.Column("projects", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["user"], ["users.id"], name=op.f("fk_devices_user")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_devices")),
        sa.UniqueConstraint("name", name=op.f("uq_devices_name")),
        comment="MQTT clients with a password of their own, which only the broker knows.",
    )
    op.create_index(op.f("ix_devices_user"), "devices", ["user"])


def downgrade() -> None:
    op.drop_table("devices")
