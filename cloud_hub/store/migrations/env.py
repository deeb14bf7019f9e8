"""Alembic's entry: runs the migrations on the connection that ``store.py`` hands over."""

from alembic import context

from cloud_hub.store import schema

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=schema.metadata,
    render_as_batch=True,  # SQLite cannot alter a column in place
)
with context.begin_transaction():
    context.run_migrations()
