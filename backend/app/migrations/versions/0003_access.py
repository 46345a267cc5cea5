"""Roles, one-use links, API keys, limits, usage, audit."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

SQLITE_GUARDS = [
    f"""CREATE TRIGGER audit_no_{verb} BEFORE {verb.upper()} ON audit
        BEGIN SELECT RAISE(ABORT, 'rows of the audit log are never changed'); END"""
    for verb in ("update", "delete")
]
POSTGRES_GUARDS = [
    """CREATE FUNCTION audit_guard() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION 'rows of the audit log are never changed'; END $$""",
    """CREATE TRIGGER audit_guard BEFORE UPDATE OR DELETE OR TRUNCATE ON audit
        FOR EACH STATEMENT EXECUTE FUNCTION audit_guard()""",
]


def upgrade() -> None:
    _people()
    _turns()
    _usage()
    _audit()


def _people() -> None:
    op.add_column("users", sa.Column("role", sa.String(64), nullable=False, server_default="author"))
    op.add_column("users", sa.Column("closed_at", sa.Float(), comment="may not sign in since then"))
    op.execute("UPDATE users SET role = 'admin' WHERE is_admin")
    op.drop_column("users", "is_admin")
    op.create_table(
        "roles",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("definition", sa.JSON(), nullable=False),
        sa.Column("updated_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_roles")),
        comment="Roles as the API defined them, above those of files.",
    )
    op.create_table(
        "links",
        sa.Column("id", sa.String(28), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False, comment="invitation or password"),
        sa.Column("secret_hash", sa.String(64), nullable=False),
        sa.Column("role", sa.String(64), comment="that an invited account will have"),
        sa.Column("user", sa.String(28), comment="whose password it sets"),
        sa.Column("made_by", sa.String(200), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=False),
        sa.Column("used_at", sa.Float()),
        sa.ForeignKeyConstraint(["user"], ["users.id"], name=op.f("fk_links_user")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_links")),
        sa.UniqueConstraint("secret_hash", name=op.f("uq_links_secret_hash")),
        comment="One-use links.",
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(28), nullable=False),
        sa.Column("user", sa.String(28), nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("prefix", sa.String(16), nullable=False, comment="how it begins, to tell it from others"),
        sa.Column("secret_hash", sa.String(64), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("project", sa.String(64), comment="the only one it is good for"),
        sa.Column("device", sa.String(64), comment="good in MQTT payloads of this device only"),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float()),
        sa.Column("last_used_at", sa.Float()),
        sa.Column("revoked_at", sa.Float()),
        sa.ForeignKeyConstraint(["user"], ["users.id"], name=op.f("fk_api_keys_user")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("secret_hash", name=op.f("uq_api_keys_secret_hash")),
    )
    op.create_index(op.f("ix_api_keys_user"), "api_keys", ["user"])
    op.create_table(
        "limits",
        sa.Column("subject", sa.String(200), nullable=False, comment="all, project:, key:, or an owner"),
        sa.Column("definition", sa.JSON(), nullable=False),
        sa.Column("updated_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("subject", name=op.f("pk_limits")),
    )


def _turns() -> None:
    op.add_column("turns", sa.Column("door", sa.String(16), nullable=False, server_default="http"))
    op.add_column(
        "turns",
        sa.Column("role", sa.String(64), nullable=False, server_default="author", comment="of who asked"),
    )
    op.add_column("turns", sa.Column("api_key", sa.String(28)))


def _usage() -> None:
    counts = ("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens")
    op.create_table(
        "usage",
        sa.Column("turn_id", sa.String(28), nullable=False),
        sa.Column("attempt", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("at", sa.Float(), nullable=False, comment="when it ended"),
        sa.Column("owner", sa.String(200), nullable=False),
        sa.Column("api_key", sa.String(28), nullable=False, comment="empty: none was used"),
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("model", sa.String(256), nullable=False, comment="empty: it came to no model"),
        sa.Column("door", sa.String(16), nullable=False),
        sa.Column("outcome", sa.String(16), nullable=False, comment="the type of the ending"),
        *(sa.Column(name, sa.Integer(), nullable=False) for name in counts),
        sa.Column("estimated", sa.Boolean(), nullable=False, comment="the server did not count"),
        sa.Column("gpu_seconds", sa.Float(), nullable=False),
        sa.Column("cost", sa.Float(), nullable=False),
        sa.Column("ttft_ms", sa.Integer()),
        sa.Column("elapsed_ms", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("turn_id", "attempt", name=op.f("pk_usage")),
        comment="What each attempt at a turn used.",
    )
    op.create_index(op.f("ix_usage_owner_at"), "usage", ["owner", "at"])
    op.create_index(op.f("ix_usage_at"), "usage", ["at"])
    op.create_table(
        "usage_days",
        sa.Column("day", sa.String(10), nullable=False, comment="UTC, ISO 8601"),
        sa.Column("owner", sa.String(200), nullable=False),
        sa.Column("api_key", sa.String(28), nullable=False),
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("model", sa.String(256), nullable=False),
        sa.Column("door", sa.String(16), nullable=False),
        sa.Column("turns", sa.Integer(), nullable=False),
        *(sa.Column(name, sa.Integer(), nullable=False) for name in counts),
        sa.Column("gpu_seconds", sa.Float(), nullable=False),
        sa.Column("cost", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint(
            "day", "owner", "api_key", "project", "model", "door", name=op.f("pk_usage_days")
        ),
        comment="The sums of `usage`.",
    )
    op.create_table(
        "alerts",
        sa.Column("id", sa.String(28), nullable=False),
        sa.Column("subject", sa.String(200), nullable=False),
        sa.Column("budget", sa.String(32), nullable=False),
        sa.Column("period", sa.String(10), nullable=False, comment="the day or the month"),
        sa.Column("percent", sa.Integer(), nullable=False, comment="the threshold that was crossed"),
        sa.Column("spent", sa.Float(), nullable=False),
        sa.Column("amount", sa.Float(), nullable=False, comment="the whole budget"),
        sa.Column("at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_alerts")),
        sa.UniqueConstraint(
            "subject", "budget", "period", "percent", name=op.f("uq_alerts_subject_budget_period_percent")
        ),
    )


def _audit() -> None:
    op.create_table(
        "audit",
        sa.Column("seq", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("actor", sa.String(200), nullable=False, comment="an owner; empty: nobody who is known"),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("target", sa.String(200), nullable=False),
        sa.Column("outcome", sa.String(16), nullable=False),
        sa.Column("door", sa.String(16), nullable=False),
        sa.Column("personal_data", sa.Boolean(), nullable=False, comment="whether such was shown"),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.Column(
            "hash", sa.String(64), nullable=False, comment="of this row and the hash of the one before"
        ),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_audit")),
        comment="Who did what; rows are only ever added.",
    )
    op.create_index(op.f("ix_audit_actor_seq"), "audit", ["actor", "seq"])
    op.create_index(op.f("ix_audit_action_seq"), "audit", ["action", "seq"])
    op.create_table(
        "audit_head",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_head")),
        comment="One row: the end of the chain. Whoever adds to it locks it.",
    )
    op.execute("INSERT INTO audit_head (id, seq, hash) VALUES (1, 0, '')")
    is_postgres = op.get_bind().dialect.name == "postgresql"
    for statement in POSTGRES_GUARDS if is_postgres else SQLITE_GUARDS:
        op.execute(statement)


def downgrade() -> None:
    for table in ("audit_head", "audit", "alerts", "usage_days", "usage", "limits", "api_keys", "links"):
        op.drop_table(table)
    op.drop_table("roles")
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION audit_guard()")
    for column in ("door", "role", "api_key"):
        op.drop_column("turns", column)
    op.add_column("users", sa.Column("is_admin", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.execute("UPDATE users SET is_admin = (role = 'admin')")
    op.drop_column("users", "role")
    op.drop_column("users", "closed_at")
