"""The core: users, templates, sessions, messages, turns, outbox, leases."""

from __future__ import annotations

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

ACTIVE = "state IN ('waiting', 'running')"
LIVE = "deleted_at IS NULL"


def upgrade() -> None:
    op.create_table(
        "identity",
        sa.Column("database_id", sa.String(length=32), nullable=False),
        sa.PrimaryKeyConstraint("database_id", name=op.f("pk_identity")),
        comment="One row: names this database, for MQTT client ids.",
    )
    op.create_table(
        "leases",
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("holder", sa.String(length=128), nullable=False, comment="a process, or an instance"),
        sa.Column("expires_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_leases")),
        comment="Who is in charge of what: `instance:NAME` of its turns, `mqtt:PROJECT` of its topics.",
    )
    op.create_table(
        "outbox",
        sa.Column("id", sa.String(length=28), nullable=False),
        sa.Column("turn_id", sa.String(length=28), nullable=False),
        sa.Column("project", sa.String(length=64), nullable=False),
        sa.Column("topic", sa.Text(), nullable=False),
        sa.Column("format", sa.String(length=8), nullable=False),
        sa.Column("ready", sa.Boolean(), nullable=False, comment="its turn has ended"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_outbox")),
        sa.UniqueConstraint("turn_id", "topic", "format", name=op.f("uq_outbox_turn_id_topic_format")),
        comment="Replies owed over MQTT; a row goes when the broker has confirmed the publish.",
    )
    op.create_index(op.f("ix_outbox_project_ready"), "outbox", ["project", "ready"], unique=False)
    op.create_table(
        "templates",
        sa.Column("id", sa.String(length=28), nullable=False),
        sa.Column("owner", sa.String(length=200), nullable=False),
        sa.Column("latest", sa.Integer(), nullable=False, comment="the number of its newest version"),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("updated_at", sa.Float(), nullable=False),
        sa.Column("deleted_at", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_templates")),
    )
    op.create_index(
        "ix_templates_recent",
        "templates",
        ["owner", "updated_at"],
        unique=False,
        sqlite_where=sa.text(LIVE),
        postgresql_where=sa.text(LIVE),
    )
    op.create_table(
        "users",
        sa.Column("id", sa.String(length=28), nullable=False),
        sa.Column("username", sa.String(length=64), nullable=False),
        sa.Column("email", sa.String(length=254), nullable=False),
        sa.Column("password_hash", sa.String(length=255), nullable=False),
        sa.Column("is_admin", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_users")),
        sa.UniqueConstraint("email", name=op.f("uq_users_email")),
        sa.UniqueConstraint("username", name=op.f("uq_users_username")),
    )
    op.create_table(
        "template_versions",
        sa.Column("id", sa.String(length=28), nullable=False),
        sa.Column("template", sa.String(length=28), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("title", sa.String(length=200), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["template"], ["templates.id"], name=op.f("fk_template_versions_template")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_template_versions")),
        sa.UniqueConstraint("template", "number", name=op.f("uq_template_versions_template_number")),
        comment="What a template was at each save; never changed.",
    )
    op.create_table(
        "sessions",
        sa.Column("id", sa.String(length=28), nullable=False),
        sa.Column("owner", sa.String(length=200), nullable=False),
        sa.Column("session_id", sa.String(length=128), nullable=False, comment="the client's name for it"),
        sa.Column("project", sa.String(length=64), nullable=False),
        sa.Column("system_prompt", sa.Text(), nullable=False),
        sa.Column(
            "template_version", sa.String(length=28), nullable=True, comment="that system_prompt came from"
        ),
        sa.Column(
            "leaf_id", sa.String(length=28), nullable=True, comment="the newest message of the chosen path"
        ),
        sa.Column(
            "window_start",
            sa.String(length=28),
            nullable=True,
            comment="the oldest message that is still sent to the model",
        ),
        sa.Column("version", sa.Integer(), nullable=False, comment="changes with the history"),
        sa.Column("next_position", sa.Integer(), nullable=False),
        sa.Column("title", sa.String(length=200), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("updated_at", sa.Float(), nullable=False),
        sa.Column(
            "deleted_at", sa.Float(), nullable=True, comment="its id may name a new session since then"
        ),
        sa.ForeignKeyConstraint(
            ["template_version"], ["template_versions.id"], name=op.f("fk_sessions_template_version")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sessions")),
    )
    op.create_index(
        "ix_sessions_recent",
        "sessions",
        ["owner", "updated_at"],
        unique=False,
        sqlite_where=sa.text(LIVE),
        postgresql_where=sa.text(LIVE),
    )
    op.create_index(
        "uq_sessions_live",
        "sessions",
        ["owner", "session_id"],
        unique=True,
        sqlite_where=sa.text(LIVE),
        postgresql_where=sa.text(LIVE),
    )
    op.create_table(
        "messages",
        sa.Column("id", sa.String(length=28), nullable=False),
        sa.Column("session", sa.String(length=28), nullable=False),
        sa.Column(
            "parent_id",
            sa.String(length=28),
            nullable=True,
            comment="null for the first, and while its turn waits",
        ),
        sa.Column("turn_id", sa.String(length=28), nullable=False),
        sa.Column("role", sa.String(length=16), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column("tool_calls", sa.JSON(), nullable=True),
        sa.Column("usage", sa.JSON(), nullable=True),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["session"], ["sessions.id"], name=op.f("fk_messages_session")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_messages")),
    )
    op.create_index(op.f("ix_messages_session"), "messages", ["session"], unique=False)
    op.create_index(op.f("ix_messages_turn_id"), "messages", ["turn_id"], unique=False)
    op.create_table(
        "turns",
        sa.Column("id", sa.String(length=28), nullable=False),
        sa.Column("session", sa.String(length=28), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False, comment="order of acceptance in the session"),
        sa.Column(
            "request_id", sa.String(length=128), nullable=True, comment="null once its 24 hours are over"
        ),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("message_id", sa.String(length=28), nullable=False),
        sa.Column("options", sa.JSON(), nullable=False),
        sa.Column("deadline", sa.Float(), nullable=True),
        sa.Column("detached", sa.Boolean(), nullable=False),
        sa.Column(
            "state",
            sa.String(length=16),
            nullable=False,
            comment="waiting, running, or the type of the ending",
        ),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("instance", sa.String(length=128), nullable=False, comment="who is in charge of it"),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("ended_at", sa.Float(), nullable=True),
        sa.Column("ending", sa.LargeBinary(), nullable=True, comment="the ending event, JSON"),
        sa.Column(
            "trace",
            sa.LargeBinary(),
            nullable=True,
            comment="where the pieces of the reply began and ended, msgpack",
        ),
        sa.ForeignKeyConstraint(["session"], ["sessions.id"], name=op.f("fk_turns_session")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_turns")),
        sa.UniqueConstraint("session", "request_id", name=op.f("uq_turns_session_request_id")),
    )
    op.create_index(
        "ix_turns_active",
        "turns",
        ["session", "instance"],
        unique=False,
        sqlite_where=sa.text(ACTIVE),
        postgresql_where=sa.text(ACTIVE),
    )
    op.execute(sa.text("INSERT INTO identity VALUES (:id)").bindparams(id=secrets.token_hex(8)))


def downgrade() -> None:
    op.drop_index("ix_turns_active", table_name="turns")
    op.drop_table("turns")
    op.drop_index(op.f("ix_messages_turn_id"), table_name="messages")
    op.drop_index(op.f("ix_messages_session"), table_name="messages")
    op.drop_table("messages")
    op.drop_index("uq_sessions_live", table_name="sessions")
    op.drop_index("ix_sessions_recent", table_name="sessions")
    op.drop_table("sessions")
    op.drop_table("template_versions")
    op.drop_table("users")
    op.drop_index("ix_templates_recent", table_name="templates")
    op.drop_table("templates")
    op.drop_index(op.f("ix_outbox_project_ready"), table_name="outbox")
    op.drop_table("outbox")
    op.drop_table("leases")
    op.drop_table("identity")
