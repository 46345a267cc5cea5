"""Runs migrations online, against the URL that `app.database.migrate` hands over."""

from alembic import context

from app.database import create_portal_engine, lock_schema
from app.models.tables import metadata

engine = create_portal_engine(context.config.attributes["url"])
with engine.connect() as connection:
    lock_schema(connection)
    # SQLite can roll back DDL: a migration that is killed leaves nothing half done.
    context.configure(
        connection=connection, target_metadata=metadata, render_as_batch=True, transactional_ddl=True
    )
    context.run_migrations()
    connection.commit()
engine.dispose()
