"""The tables of the hub, as they are after the last migration.

Times are seconds since the epoch by the hub's clock. Counts only grow.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
    }
)

# The last migration, and where alembic keeps the one that a database is at: a hub that has
# nothing to migrate need not import it.
REVISION = "0006"
version = Table(
    "alembic_version",
    MetaData(),
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)

# Who may call from another machine. The secret itself is never stored.
token = Table(
    "token",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("sha256", String(64), nullable=False, unique=True),
    Column("tenant", String(63), nullable=False),
    Column("label", String(200), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("revoked", Boolean, nullable=False),
    # What its bearer may do (migration 0004); 0: no limit.
    Column("rate", Float, nullable=False, server_default="0"),  # requests a second
    Column("burst", Integer, nullable=False, server_default="0"),
    Column("concurrency", Integer, nullable=False, server_default="0"),
)

# Devices that have reported, as they last described themselves.
device = Table(
    "device",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("first_seen", Float, nullable=False),
    Column("last_seen", Float, nullable=False),
    Column("agent_version", String(64), nullable=False),
    Column("hardware_class", String(200), nullable=False),
    Column("link", String(32), nullable=False),
    Column("rss_bytes", BigInteger, nullable=False),
)

# The last report of each of a device's recent starts: increments are differences to it, and
# it is written in the same transaction as the increments, so nothing counts twice.
boot = Table(
    "boot",
    metadata,
    Column("device", String(63), ForeignKey("device.name"), primary_key=True),
    Column("boot_id", String(64), primary_key=True),
    Column("sequence", BigInteger, nullable=False),
    Column("reported_at", Float, nullable=False),
    Column("telemetry", LargeBinary, nullable=False),
)

# Rows answered, by minute and outcome.
outcome = Table(
    "outcome",
    metadata,
    Column("minute", Integer, primary_key=True, autoincrement=False),  # since the epoch
    Column("device", String(63), ForeignKey("device.name"), primary_key=True),
    Column("model", String(63), primary_key=True),
    Column("release", String(200), primary_key=True),
    Column("tier", String(16), primary_key=True),
    Column("quality", String(16), primary_key=True),
    Column("reason", String(32), primary_key=True),
    Column("rows", BigInteger, nullable=False),
)

# Requests by duration: `counts` is a JSON list beside `bounds_s`.
latency = Table(
    "latency",
    metadata,
    Column("minute", Integer, primary_key=True, autoincrement=False),
    Column("device", String(63), ForeignKey("device.name"), primary_key=True),
    Column("model", String(63), primary_key=True),
    Column("release", String(200), primary_key=True),
    Column("tier", String(16), primary_key=True),
    Column("bounds_s", Text, primary_key=True),
    Column("counts", Text, nullable=False),
)

# Bytes between devices and hub for escalations.
traffic = Table(
    "traffic",
    metadata,
    Column("minute", Integer, primary_key=True, autoincrement=False),
    Column("device", String(63), ForeignKey("device.name"), primary_key=True),
    Column("sent", BigInteger, nullable=False),
    Column("received", BigInteger, nullable=False),
)

Index("ix_device_last_seen", device.c.last_seen)

# --- Releases and certificates (migration 0002); written by fleet/releases and fleet/certificates.
#
# A row exists when everything it speaks of is complete: blobs, signed index, signed
# certificates. So these two tables are what the hub believes, and what is signed follows them.

release = Table(
    "release",
    metadata,
    Column("model", String(63), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),  # from 1, per model
    Column("version", String(64), nullable=False),
    Column("bundle_sha256", String(64), nullable=False, unique=True),
    Column("escalates_to", String(63)),  # a model, and the digest of its bundle
    Column("escalates_to_sha256", String(64)),
    Column("accepted_at", Float, nullable=False),
    Column("forced", Boolean, nullable=False),  # past a self-test that it did not pass
    Column("size_bytes", BigInteger, nullable=False),
    Column("document", Text, nullable=False),  # bundle.json
    Column("index_document", Text, nullable=False),  # what is signed
    Column("self_test", Text, nullable=False),  # JSON: figures by variant
    Column("report", Text, nullable=False),  # report.json of the bundle, or empty
    UniqueConstraint("model", "version", name="uq_release_model"),
)

certificate = Table(
    "certificate",
    metadata,
    Column("model", String(63), primary_key=True),
    Column("release", Integer, primary_key=True, autoincrement=False),
    Column("id", String(16), primary_key=True),
    Column("variant", String(64), nullable=False),
    Column("hardware_class", String(200), nullable=False),
    Column("issued_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("document", Text, nullable=False),  # the very bytes that are signed
    Column("attached_at", Float, nullable=False),
    Column("withdrawn_at", Float),
    Column("reason", String(500), nullable=False),  # why it was withdrawn; empty while it holds
    ForeignKeyConstraint(
        ["model", "release"], ["release.model", "release.number"], name="fk_certificate_model"
    ),
)

# --- What the hub wants of each device and what the device says (migration 0003); written by
# fleet/controller, arrivals and outbox. `published_generation < generation` is the outbox.

twin = Table(
    "twin",
    metadata,
    Column("device", String(63), primary_key=True),
    Column("desired", Text, nullable=False, default="{}"),  # JSON: model -> release number
    Column("generation", BigInteger, nullable=False, default=0),
    Column("published_generation", BigInteger, nullable=False, default=0),
    Column("report_sequence", BigInteger, nullable=False, default=0),
    Column("reported", LargeBinary, nullable=False, default=b""),  # the Reported message
    Column("reported_at", Float),
    Column("boot", BigInteger, nullable=False, default=0),
    Column("connection", BigInteger, nullable=False, default=0),
    Column("connected", Boolean, nullable=False, default=False),
)

# Changes of phase, as devices reported them.
device_event = Table(
    "device_event",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("device", String(63), nullable=False),
    Column("at", Float, nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("model", String(63), nullable=False),
    Column("release", BigInteger, nullable=False),
    Column("phase", String(32), nullable=False),
    Column("code", String(64), nullable=False),
    Column("sentence", Text, nullable=False),
)

Index("ix_device_event_device", device_event.c.device, device_event.c.id)

# Devices that were forgotten, until the broker has nothing for them any more (migration 0006).
departed = Table("departed", metadata, Column("device", String(63), primary_key=True))

# The epoch published last: finding it on the broker tells that the broker remembers.
hub_epoch = Table("hub_epoch", metadata, Column("epoch", String(64), primary_key=True))

# --- Examples that devices let the hub keep (migration 0005); written by insight/examples.
#
# An example is one content of one tenant's device model, and lies on the disk; a sighting is one
# way in which it came: from whom, why, and what both tiers said. So a device can be forgotten
# without forgetting what others sent, too.

example = Table(
    "example",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("tenant", String(63), nullable=False),
    Column("model", String(63), nullable=False),
    Column("sha256", String(64), nullable=False),  # of the packed inputs, and the file's name
    Column("layout", Text, nullable=False),  # names, datatypes and shapes of the inputs
    Column("bytes", BigInteger, nullable=False),  # on the disk
    Column("last_at", Float, nullable=False),
    UniqueConstraint("tenant", "model", "sha256", name="uq_example_tenant"),
)

sighting = Table(
    "sighting",
    metadata,
    Column("example", Integer, ForeignKey("example.id"), nullable=False),
    Column("key", String(64), nullable=False),  # a hash of what tells sightings apart
    Column("device", String(63), nullable=False),
    Column("source", String(200), nullable=False),  # empty: none was named
    Column("reason", String(32), nullable=False),
    Column("propensity", Float, nullable=False),
    Column("score", Float, nullable=False),
    Column("release", String(200), nullable=False),  # of the device, MODEL@VERSION
    Column("edge_sha256", String(64), nullable=False),
    Column("hub_model", String(200), nullable=False),
    Column("hub_sha256", Text, nullable=False),  # empty: the upstream does not say
    Column("edge", LargeBinary, nullable=False),  # packed outputs
    Column("hub", LargeBinary, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("times", BigInteger, nullable=False),
    Column("last_at", Float, nullable=False),
    PrimaryKeyConstraint("example", "key", name="pk_sighting"),
)

Index("ix_example_last_at", example.c.last_at)
Index("ix_sighting_device", sighting.c.device)
Index("ix_sighting_last_at", sighting.c.last_at)
