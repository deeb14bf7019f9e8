"""Examples that devices let the hub keep, and the ways in which they came."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Create the tables of kept examples."""
    op.create_table(
        "example",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("model", sa.String(63), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("layout", sa.Text, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("last_at", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_example"),
        sa.UniqueConstraint("tenant", "model", "sha256", name="uq_example_tenant"),
    )
    op.create_index("ix_example_last_at", "example", ["last_at"])
    op.create_table(
        "sighting",
        sa.Column("example", sa.Integer, nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("device", sa.String(63), nullable=False),
        sa.Column("source", sa.String(200), nullable=False),
        sa.Column("reason", sa.String(32), nullable=False),
        sa.Column("propensity", sa.Float, nullable=False),
        sa.Column("score", sa.Float, nullable=False),
        sa.Column("release", sa.String(200), nullable=False),
        sa.Column("edge_sha256", sa.String(64), nullable=False),
        sa.Column("hub_model", sa.String(200), nullable=False),
        sa.Column("hub_sha256", sa.Text, nullable=False),
        sa.Column("edge", sa.LargeBinary, nullable=False),
        sa.Column("hub", sa.LargeBinary, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("times", sa.BigInteger, nullable=False),
        sa.Column("last_at", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("example", "key", name="pk_sighting"),
        sa.ForeignKeyConstraint(["example"], ["example.id"], name="fk_sighting_example"),
    )
    op.create_index("ix_sighting_device", "sighting", ["device"])
    op.create_index("ix_sighting_last_at", "sighting", ["last_at"])
