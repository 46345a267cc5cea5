"""Game states, reply targets with everything MQTT 5 has, messages that a broker sends again, prompts of
projects."""

from __future__ import annotations

import hashlib

import msgspec
import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column(
        "turns",
        sa.Column("kind", sa.String(8), nullable=False, server_default="message", comment="message or state"),
    )
    op.create_table(
        "projects",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("system_prompt", sa.Text(), nullable=False),
        sa.Column("updated_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_projects")),
        comment="System prompts of projects as clients set them, above those of files.",
    )
    op.create_table(
        "received",
        sa.Column(
            "mark", sa.String(64), nullable=False, comment="hash of packet id, topic, payload and properties"
        ),
        sa.Column("turn_id", sa.String(28), comment="that it made; null for what made none"),
        sa.Column("at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("mark", name=op.f("pk_received")),
        comment="MQTT messages without a request id: a broker that sends one again means the same.",
    )
    op.create_index(op.f("ix_received_at"), "received", ["at"])
    owed = op.get_bind().execute(sa.text("SELECT id, turn_id, project, topic, format, ready FROM outbox"))
    rows = [_row(*row) for row in owed]
    op.drop_table("outbox")
    outbox = _make_outbox()
    op.bulk_insert(outbox, rows)


def _make_outbox() -> sa.Table:
    table = op.create_table(
        "outbox",
        sa.Column("id", sa.String(28), nullable=False),
        sa.Column("turn_id", sa.String(28), nullable=False),
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("target", sa.LargeBinary(), nullable=False, comment="where the reply goes, and how; JSON"),
        sa.Column("target_hash", sa.String(64), nullable=False),
        sa.Column("ready", sa.Boolean(), nullable=False, comment="its turn has ended"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_outbox")),
        sa.UniqueConstraint("turn_id", "target_hash", name=op.f("uq_outbox_turn_id_target_hash")),
        comment="Replies owed over MQTT; a row goes when the broker has confirmed the publish.",
    )
    op.create_index(op.f("ix_outbox_project_ready"), "outbox", ["project", "ready"])
    return table


def _row(owed: str, turn: str, project: str, topic: str, form: str, ready: bool) -> dict[str, object]:
    session = topic.split("/")[2] if topic.count("/") >= 2 else ""
    values = {"project": project, "topic": topic, "session_id": session, "form": form}
    target = msgspec.json.encode(values)
    digest = hashlib.sha256(target).hexdigest()
    common = {"id": owed, "turn_id": turn, "project": project, "ready": bool(ready)}
    return {**common, "target": target, "target_hash": digest}


def downgrade() -> None:
    for table in ("outbox", "received", "projects"):
        op.drop_table(table)
    op.drop_column("turns", "kind")
    op.create_table(
        "outbox",
        sa.Column("id", sa.String(28), nullable=False),
        sa.Column("turn_id", sa.String(28), nullable=False),
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("topic", sa.Text(), nullable=False),
        sa.Column("format", sa.String(8), nullable=False),
        sa.Column("ready", sa.Boolean(), nullable=False, comment="its turn has ended"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_outbox")),
        sa.UniqueConstraint("turn_id", "topic", "format", name=op.f("uq_outbox_turn_id_topic_format")),
        comment="Replies owed over MQTT; a row goes when the broker has confirmed the publish.",
    )
    op.create_index(op.f("ix_outbox_project_ready"), "outbox", ["project", "ready"])
