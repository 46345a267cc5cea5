"""Fewer pages to write for each turn: the outbox needs no index, and what is used is kept in one tree."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

COPIED = ("turn_id", "target_hash", "id", "project", "target")
TURN = sa.String(28)


def upgrade() -> None:
    rows = _owed()
    op.drop_table("outbox")
    outbox = op.create_table(
        "outbox",
        sa.Column("turn_id", TURN, nullable=False),
        sa.Column("target_hash", sa.String(64), nullable=False),
        sa.Column("id", TURN, nullable=False, comment="another one when the reply is asked for again"),
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("target", sa.LargeBinary(), nullable=False, comment="where the reply goes, and how; JSON"),
        sa.PrimaryKeyConstraint("turn_id", "target_hash", name=op.f("pk_outbox")),
        comment="Replies owed over MQTT; a row goes when the broker has confirmed the publish.",
        sqlite_with_rowid=False,
    )
    op.bulk_insert(outbox, rows)
    op.drop_index(op.f("ix_usage_owner_at"), "usage")
    _rebuild(with_rowid=False)


def _owed() -> list[dict[str, object]]:
    columns: list[sa.ColumnElement[Any]] = [sa.column(name) for name in COPIED]
    found = op.get_bind().execute(sa.select(*columns).select_from(sa.table("outbox")))
    return [dict(zip(COPIED, row, strict=True)) for row in found]


def _rebuild(*, with_rowid: bool) -> None:
    if op.get_bind().dialect.name != "sqlite":
        return
    for name in ("usage", "usage_days"):
        kind = {"sqlite_with_rowid": with_rowid}
        with op.batch_alter_table(name, recreate="always", table_kwargs=kind):
            pass


def downgrade() -> None:
    active = set(op.get_bind().execute(sa.text("SELECT id FROM turns WHERE ended_at IS NULL")).scalars())
    rows = [{**row, "ready": row["turn_id"] not in active} for row in _owed()]
    op.drop_table("outbox")
    outbox = op.create_table(
        "outbox",
        sa.Column("id", TURN, nullable=False),
        sa.Column("turn_id", TURN, nullable=False),
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("target", sa.LargeBinary(), nullable=False, comment="where the reply goes, and how; JSON"),
        sa.Column("target_hash", sa.String(64), nullable=False),
        sa.Column("ready", sa.Boolean(), nullable=False, comment="its turn has ended"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_outbox")),
        sa.UniqueConstraint("turn_id", "target_hash", name=op.f("uq_outbox_turn_id_target_hash")),
        comment="Replies owed over MQTT; a row goes when the broker has confirmed the publish.",
    )
    op.create_index(op.f("ix_outbox_project_ready"), "outbox", ["project", "ready"])
    op.bulk_insert(outbox, rows)
    op.create_index(op.f("ix_usage_owner_at"), "usage", ["owner", "at"])
    _rebuild(with_rowid=True)
