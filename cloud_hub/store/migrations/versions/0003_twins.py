"""What the hub wants of each device, what the device says, and the hub's epoch."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Create the tables of desired and reported state."""
    op.create_table(
        "twin",
        sa.Column("device", sa.String(63), nullable=False),
        sa.Column("desired", sa.Text, nullable=False),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.Column("published_generation", sa.BigInteger, nullable=False),
        sa.Column("report_sequence", sa.BigInteger, nullable=False),
        sa.Column("reported", sa.LargeBinary, nullable=False),
        sa.Column("reported_at", sa.Float),
        sa.Column("boot", sa.BigInteger, nullable=False),
        sa.Column("connection", sa.BigInteger, nullable=False),
        sa.Column("connected", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("device", name="pk_twin"),
    )
    op.create_table(
        "device_event",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("device", sa.String(63), nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.Column("model", sa.String(63), nullable=False),
        sa.Column("release", sa.BigInteger, nullable=False),
        sa.Column("phase", sa.String(32), nullable=False),
        sa.Column("code", sa.String(64), nullable=False),
        sa.Column("sentence", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_device_event"),
    )
    op.create_index("ix_device_event_device", "device_event", ["device", "id"])
    op.create_table(
        "hub_epoch",
        sa.Column("epoch", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("epoch", name="pk_hub_epoch"),
    )
