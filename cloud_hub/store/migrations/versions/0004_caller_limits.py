"""What the bearer of a token may do: how often, and how much at once."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Give every token limits; those made before have none."""
    for name, kind in (("rate", sa.Float), ("burst", sa.Integer), ("concurrency", sa.Integer)):
        op.add_column("token", sa.Column(name, kind, nullable=False, server_default="0"))
