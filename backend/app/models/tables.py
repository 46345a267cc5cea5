"""The tables, as SQLAlchemy Core sees them: the store's statements are written against these.

Times are Unix times in seconds. Ids are made by `app.events.new_id`, so they sort by age.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

ACTIVE = "state IN ('waiting', 'running')"
"""Turns that have not ended. Spelled out in SQL, so that the partial index on them serves."""

LIVE = "deleted_at IS NULL"
"""Sessions and templates that are not deleted; spelled out for the same reason."""

RARE = "action <> 'turn'"
"""What the audit log tells apart from turns, which are nearly all of it; spelled out for the same reason."""

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

identity = Table(
    "identity",
    metadata,
    Column("database_id", String(32), primary_key=True),
    comment="One row: names this database, for MQTT client ids.",
)

leases = Table(
    "leases",
    metadata,
    Column("name", String(200), primary_key=True),
    Column("holder", String(128), nullable=False, comment="a process, or an instance"),
    Column("expires_at", Float, nullable=False),
    comment="Who is in charge of what: `instance:NAME` of its turns, `mqtt:PROJECT` of its topics.",
)

projects = Table(
    "projects",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("system_prompt", Text, nullable=False),
    Column("updated_at", Float, nullable=False),
    comment="System prompts of projects as clients set them, above those of files.",
)

users = Table(
    "users",
    metadata,
    Column("id", String(28), primary_key=True),
    Column("username", String(64), nullable=False, unique=True),
    Column("email", String(254), nullable=False, unique=True),
    Column("password_hash", String(255), nullable=False),
    Column("role", String(64), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("closed_at", Float, comment="may not sign in since then"),
)

roles = Table(
    "roles",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("definition", JSON, nullable=False),
    Column("updated_at", Float, nullable=False),
    comment="Roles as the API defined them, above those of files.",
)

links = Table(
    "links",
    metadata,
    Column("id", String(28), primary_key=True),
    Column("kind", String(16), nullable=False, comment="invitation or password"),
    Column("secret_hash", String(64), nullable=False, unique=True),
    Column("role", String(64), comment="that an invited account will have"),
    Column("user", ForeignKey("users.id"), comment="whose password it sets"),
    Column("made_by", String(200), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("used_at", Float),
    comment="One-use links.",
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(28), primary_key=True),
    Column("user", ForeignKey("users.id"), nullable=False),
    Column("name", String(100), nullable=False),
    Column("prefix", String(16), nullable=False, comment="how it begins, to tell it from others"),
    Column("secret_hash", String(64), nullable=False, unique=True),
    Column("scopes", JSON, nullable=False),
    Column("project", String(64), comment="the only one it is good for"),
    Column("device", String(64), comment="good in MQTT payloads of this device only"),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("last_used_at", Float),
    Column("revoked_at", Float),
    Index(None, "user"),
)

devices = Table(
    "devices",
    metadata,
    Column("id", String(28), primary_key=True),
    Column("name", String(64), nullable=False, unique=True, comment="its user name at the broker"),
    Column("user", ForeignKey("users.id"), nullable=False, comment="who owns its sessions"),
    Column("projects", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
    Index(None, "user"),
    comment="MQTT clients with a password of their own, which only the broker knows.",
)

limits = Table(
    "limits",
    metadata,
    Column("subject", String(200), primary_key=True, comment="all, project:, key:, or an owner"),
    Column("definition", JSON, nullable=False),
    Column("updated_at", Float, nullable=False),
)

sign_ins = Table(
    "sign_ins",
    metadata,
    Column("id", String(28), primary_key=True),
    Column("user", ForeignKey("users.id"), nullable=False),
    Column("generation", Integer, nullable=False, comment="of the refresh token that is good now"),
    Column("user_agent", String(200), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("renewed_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("ended_at", Float, comment="signed out, or its refresh token was used twice"),
    Index(None, "user"),
)

tickets = Table(
    "tickets",
    metadata,
    Column("secret_hash", String(64), primary_key=True),
    Column("sealed", LargeBinary, nullable=False, comment="the token, encrypted"),
    Column("expires_at", Float, nullable=False),
    comment="Each opens one WebSocket.",
)

templates = Table(
    "templates",
    metadata,
    Column("id", String(28), primary_key=True),
    Column("owner", String(200), nullable=False),
    Column("latest", Integer, nullable=False, comment="the number of its newest version"),
    Column("created_at", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
    Column("deleted_at", Float),
    Index("ix_templates_recent", "owner", "updated_at", sqlite_where=text(LIVE), postgresql_where=text(LIVE)),
)

template_versions = Table(
    "template_versions",
    metadata,
    Column("id", String(28), primary_key=True),
    Column("template", ForeignKey("templates.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("title", String(200), nullable=False),
    Column("description", Text, nullable=False),
    Column("content", Text, nullable=False),
    Column("variables", JSON, nullable=False, server_default=text("'[]'"), comment="names that it needs"),
    Column("optional", JSON, nullable=False, server_default=text("'[]'"), comment="and can do without"),
    Column("created_at", Float, nullable=False),
    UniqueConstraint("template", "number"),
    comment="What a template was at each save; never changed.",
)

sessions = Table(
    "sessions",
    metadata,
    Column("id", String(28), primary_key=True),
    Column("owner", String(200), nullable=False),
    Column("session_id", String(128), nullable=False, comment="the client's name for it"),
    Column("project", String(64), nullable=False),
    Column("system_prompt", Text, nullable=False),
    Column("template_version", ForeignKey("template_versions.id"), comment="that system_prompt came from"),
    Column("leaf_id", String(28), comment="the newest message of the chosen path"),
    Column("window_start", String(28), comment="the oldest message that is still sent to the model"),
    Column("version", Integer, nullable=False, comment="changes with the history"),
    Column("next_position", Integer, nullable=False),
    Column("title", String(200), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
    Column("deleted_at", Float, comment="its id may name a new session since then"),
    Index(
        "uq_sessions_live",
        "owner",
        "session_id",
        unique=True,
        sqlite_where=text(LIVE),
        postgresql_where=text(LIVE),
    ),
    Index("ix_sessions_recent", "owner", "updated_at", sqlite_where=text(LIVE), postgresql_where=text(LIVE)),
)

session_keys = Table(
    "session_keys",
    metadata,
    Column("session", ForeignKey("sessions.id"), primary_key=True),
    Column("provider", String(64), nullable=False),
    Column("sealed", LargeBinary, nullable=False, comment="the key, encrypted with the server's secret"),
    Column("created_at", Float, nullable=False),
    comment="Keys that sessions bring for a provider of models.",
)

messages = Table(
    "messages",
    metadata,
    Column("id", String(28), primary_key=True),
    Column("session", ForeignKey("sessions.id"), nullable=False),
    Column("parent_id", String(28), comment="null for the first, and while its turn waits"),
    Column("turn_id", String(28), nullable=False),
    Column("role", String(16), nullable=False),
    Column("content", Text, nullable=False),
    Column("tool_calls", JSON),
    Column("usage", JSON),
    Column("finish_reason", Text, comment="why the model's reply ended; null where it broke off"),
    Column("created_at", Float, nullable=False),
    Column("pinned", Boolean, comment="its exchange is sent to the model also after a cut"),
    Index(None, "session", "turn_id"),
    Index("ix_messages_pinned", "session", sqlite_where=text("pinned"), postgresql_where=text("pinned")),
)

summaries = Table(
    "summaries",
    metadata,
    Column("session", ForeignKey("sessions.id"), primary_key=True),
    Column("content", Text, nullable=False),
    Column("until", String(28), nullable=False, comment="the oldest message that is not in it"),
    Column("made_at", Float, nullable=False),
    comment="What the model is told of messages that are not sent to it any more.",
)

turns = Table(
    "turns",
    metadata,
    Column("id", String(28), primary_key=True),
    Column("session", ForeignKey("sessions.id"), nullable=False),
    Column("position", Integer, nullable=False, comment="order of acceptance in the session"),
    Column("request_id", String(128), comment="null once its 24 hours are over"),
    Column("fingerprint", String(64), nullable=False),
    Column("message_id", String(28), nullable=False),
    Column("kind", String(8), nullable=False, comment="message or state"),
    Column("options", JSON, nullable=False),
    Column("deadline", Float),
    Column("detached", Boolean, nullable=False),
    Column("state", String(16), nullable=False, comment="waiting, running, or the type of the ending"),
    Column("attempt", Integer, nullable=False),
    Column("instance", String(128), nullable=False, comment="who is in charge of it"),
    Column("door", String(16), nullable=False),
    Column("role", String(64), nullable=False, comment="of who asked"),
    Column("api_key", String(28)),
    Column("created_at", Float, nullable=False),
    Column("ended_at", Float),
    Column("ending", LargeBinary, comment="the ending event, JSON"),
    Column("trace", LargeBinary, comment="where the pieces of the reply began and ended, msgpack"),
    UniqueConstraint("session", "request_id"),
    Index("ix_turns_active", "session", "instance", sqlite_where=text(ACTIVE), postgresql_where=text(ACTIVE)),
)

outbox = Table(
    "outbox",
    metadata,
    Column("turn_id", String(28), primary_key=True),
    Column("target_hash", String(64), primary_key=True),
    Column("id", String(28), nullable=False, comment="another one when the reply is asked for again"),
    Column("project", String(64), nullable=False),
    Column("target", LargeBinary, nullable=False, comment="where the reply goes, and how; JSON"),
    comment="Replies owed over MQTT; a row goes when the broker has confirmed the publish.",
    sqlite_with_rowid=False,
)

received = Table(
    "received",
    metadata,
    Column("mark", String(64), primary_key=True, comment="hash of packet id, topic, payload and properties"),
    Column("turn_id", String(28), comment="that it made; null for what made none"),
    Column("at", Float, nullable=False),
    Index(None, "at"),
    comment="MQTT messages without a request id: a broker that sends one again means the same.",
)

usage = Table(
    "usage",
    metadata,
    Column("turn_id", String(28), primary_key=True),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("at", Float, nullable=False, comment="when it ended"),
    Column("owner", String(200), nullable=False),
    Column("api_key", String(28), nullable=False, comment="empty: none was used"),
    Column("project", String(64), nullable=False),
    Column("model", String(256), nullable=False, comment="empty: it came to no model"),
    Column("door", String(16), nullable=False),
    Column("outcome", String(16), nullable=False, comment="the type of the ending"),
    Column("prompt_tokens", Integer, nullable=False),
    Column("completion_tokens", Integer, nullable=False),
    Column("cached_tokens", Integer, nullable=False),
    Column("reasoning_tokens", Integer, nullable=False),
    Column("estimated", Boolean, nullable=False, comment="the server did not count"),
    Column("gpu_seconds", Float, nullable=False),
    Column("cost", Float, nullable=False),
    Column("ttft_ms", Integer),
    Column("elapsed_ms", Integer, nullable=False),
    comment="What each attempt at a turn used.",
    sqlite_with_rowid=False,
)

usage_days = Table(
    "usage_days",
    metadata,
    Column("day", String(10), primary_key=True, comment="UTC, ISO 8601"),
    Column("owner", String(200), primary_key=True),
    Column("api_key", String(28), primary_key=True),
    Column("project", String(64), primary_key=True),
    Column("model", String(256), primary_key=True),
    Column("door", String(16), primary_key=True),
    Column("turns", Integer, nullable=False),
    Column("prompt_tokens", Integer, nullable=False),
    Column("completion_tokens", Integer, nullable=False),
    Column("cached_tokens", Integer, nullable=False),
    Column("reasoning_tokens", Integer, nullable=False),
    Column("gpu_seconds", Float, nullable=False),
    Column("cost", Float, nullable=False),
    comment="The sums of `usage`.",
    sqlite_with_rowid=False,
)

alerts = Table(
    "alerts",
    metadata,
    Column("id", String(28), primary_key=True),
    Column("subject", String(200), nullable=False),
    Column("budget", String(32), nullable=False),
    Column("period", String(10), nullable=False, comment="the day or the month"),
    Column("percent", Integer, nullable=False, comment="the threshold that was crossed"),
    Column("spent", Float, nullable=False),
    Column("amount", Float, nullable=False, comment="the whole budget"),
    Column("at", Float, nullable=False),
    UniqueConstraint("subject", "budget", "period", "percent"),
)

drained_servers = Table(
    "drained_servers",
    metadata,
    Column("url", String(500), primary_key=True),
    Column("drained_at", Float, nullable=False),
    comment="LLM servers that get no new requests, by the admin's word.",
)

default_models = Table(
    "default_models",
    metadata,
    Column("subject", String(200), primary_key=True, comment="all, or an owner"),
    Column("model", String(256), nullable=False),
    Column("chosen_at", Float, nullable=False),
    comment="The models that answer where a request names none.",
)

model_syncs = Table(
    "model_syncs",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("at", Float, nullable=False),
    comment="One row: when somebody wanted all LLM servers to be asked anew, by every process.",
)

audit = Table(
    "audit",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("at", Float, nullable=False),
    Column("actor", String(200), nullable=False, comment="an owner; empty: nobody who is known"),
    Column("action", String(64), nullable=False),
    Column("target", String(200), nullable=False),
    Column("outcome", String(16), nullable=False),
    Column("door", String(16), nullable=False),
    Column("personal_data", Boolean, nullable=False, comment="whether such was shown"),
    Column("details", JSON, nullable=False),
    Column("hash", String(64), nullable=False, comment="of this row and the hash of the one before"),
    Index(None, "actor", "seq"),
    Index("ix_audit_rare", "seq", sqlite_where=text(RARE), postgresql_where=text(RARE)),
    comment="Who did what; rows are only ever added.",
)

audit_head = Table(
    "audit_head",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("seq", Integer, nullable=False),
    Column("hash", String(64), nullable=False),
    comment="One row: the end of the chain. Whoever adds to it locks it.",
)
