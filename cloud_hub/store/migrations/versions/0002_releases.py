"""Releases and their certificates."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Create the tables of releases and certificates."""
    op.create_table(
        "release",
        sa.Column("model", sa.String(63), nullable=False),
        sa.Column("number", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("version", sa.String(64), nullable=False),
        sa.Column("bundle_sha256", sa.String(64), nullable=False),
        sa.Column("escalates_to", sa.String(63)),
        sa.Column("escalates_to_sha256", sa.String(64)),
        sa.Column("accepted_at", sa.Float, nullable=False),
        sa.Column("forced", sa.Boolean, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("document", sa.Text, nullable=False),
        sa.Column("index_document", sa.Text, nullable=False),
        sa.Column("self_test", sa.Text, nullable=False),
        sa.Column("report", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("model", "number", name="pk_release"),
        sa.UniqueConstraint("bundle_sha256", name="uq_release_bundle_sha256"),
        sa.UniqueConstraint("model", "version", name="uq_release_model"),
    )
    op.create_table(
        "certificate",
        sa.Column("model", sa.String(63), nullable=False),
        sa.Column("release", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("id", sa.String(16), nullable=False),
        sa.Column("variant", sa.String(64), nullable=False),
        sa.Column("hardware_class", sa.String(200), nullable=False),
        sa.Column("issued_at", sa.Float, nullable=False),
        sa.Column("expires_at", sa.Float, nullable=False),
        sa.Column("document", sa.Text, nullable=False),
        sa.Column("attached_at", sa.Float, nullable=False),
        sa.Column("withdrawn_at", sa.Float),
        sa.Column("reason", sa.String(500), nullable=False),
        sa.PrimaryKeyConstraint("model", "release", "id", name="pk_certificate"),
        sa.ForeignKeyConstraint(
            ["model", "release"], ["release.model", "release.number"], name="fk_certificate_model"
        ),
    )
