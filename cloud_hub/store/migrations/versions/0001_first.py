"""Tokens, devices, and what they counted."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create the first tables."""
    op.create_table(
        "token",
        sa.Column("id", sa.String(16), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("label", sa.String(200), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("expires_at", sa.Float, nullable=False),
        sa.Column("revoked", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_token"),
        sa.UniqueConstraint("sha256", name="uq_token_sha256"),
    )
    op.create_table(
        "device",
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("first_seen", sa.Float, nullable=False),
        sa.Column("last_seen", sa.Float, nullable=False),
        sa.Column("agent_version", sa.String(64), nullable=False),
        sa.Column("hardware_class", sa.String(200), nullable=False),
        sa.Column("link", sa.String(32), nullable=False),
        sa.Column("rss_bytes", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_device"),
    )
    op.create_index("ix_device_last_seen", "device", ["last_seen"])
    op.create_table(
        "boot",
        sa.Column("device", sa.String(63), nullable=False),
        sa.Column("boot_id", sa.String(64), nullable=False),
        sa.Column("sequence", sa.BigInteger, nullable=False),
        sa.Column("reported_at", sa.Float, nullable=False),
        sa.Column("telemetry", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("device", "boot_id", name="pk_boot"),
        sa.ForeignKeyConstraint(["device"], ["device.name"], name="fk_boot_device"),
    )
    op.create_table(
        "outcome",
        sa.Column("minute", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("device", sa.String(63), nullable=False),
        sa.Column("model", sa.String(63), nullable=False),
        sa.Column("release", sa.String(200), nullable=False),
        sa.Column("tier", sa.String(16), nullable=False),
        sa.Column("quality", sa.String(16), nullable=False),
        sa.Column("reason", sa.String(32), nullable=False),
        sa.Column("rows", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint(
            "minute", "device", "model", "release", "tier", "quality", "reason", name="pk_outcome"
        ),
        sa.ForeignKeyConstraint(["device"], ["device.name"], name="fk_outcome_device"),
    )
    op.create_table(
        "latency",
        sa.Column("minute", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("device", sa.String(63), nullable=False),
        sa.Column("model", sa.String(63), nullable=False),
        sa.Column("release", sa.String(200), nullable=False),
        sa.Column("tier", sa.String(16), nullable=False),
        sa.Column("bounds_s", sa.Text, nullable=False),
        sa.Column("counts", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint(
            "minute", "device", "model", "release", "tier", "bounds_s", name="pk_latency"
        ),
        sa.ForeignKeyConstraint(["device"], ["device.name"], name="fk_latency_device"),
    )
    op.create_table(
        "traffic",
        sa.Column("minute", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("device", sa.String(63), nullable=False),
        sa.Column("sent", sa.BigInteger, nullable=False),
        sa.Column("received", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("minute", "device", name="pk_traffic"),
        sa.ForeignKeyConstraint(["device"], ["device.name"], name="fk_traffic_device"),
    )
