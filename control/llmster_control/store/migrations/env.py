"""Alembic's entry: migrates over the connection that `database.py` hands in, in its transaction."""

from alembic import context

from llmster_control.store.tables import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata)
with context.begin_transaction():
    context.run_migrations()
