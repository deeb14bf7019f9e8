"""Devices that were forgotten and of which the broker does not know it yet."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Create the table of departed devices."""
    op.create_table(
        "departed",
        sa.Column("device", sa.String(63), nullable=False),
        sa.PrimaryKeyConstraint("device", name="pk_departed"),
    )
