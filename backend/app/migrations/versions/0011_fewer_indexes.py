"""Fewer pages to write for each turn: one index on messages for two, and none that turns need not be in."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"

RARE = "action <> 'turn'"


def upgrade() -> None:
    op.create_index(op.f("ix_messages_session_turn_id"), "messages", ["session", "turn_id"])
    op.drop_index(op.f("ix_messages_session"), "messages")
    op.drop_index(op.f("ix_messages_turn_id"), "messages")
    op.drop_index(op.f("ix_usage_at"), "usage")
    rare: dict[str, Any] = {"sqlite_where": sa.text(RARE), "postgresql_where": sa.text(RARE)}
    op.create_index("ix_audit_rare", "audit", ["seq"], **rare)
    op.drop_index(op.f("ix_audit_action_seq"), "audit")


def downgrade() -> None:
    op.create_index(op.f("ix_audit_action_seq"), "audit", ["action", "seq"])
    op.drop_index("ix_audit_rare", "audit")
    op.create_index(op.f("ix_usage_at"), "usage", ["at"])
    op.create_index(op.f("ix_messages_turn_id"), "messages", ["turn_id"])
    op.create_index(op.f("ix_messages_session"), "messages", ["session"])
    op.drop_index(op.f("ix_messages_session_turn_id"), "messages")
