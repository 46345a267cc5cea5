"""Alembic migrations, numbered: `0001_core.py` is revision `0001`."""
