"""The door for what devices report: reads, checks limits, hands on.

What a device says of itself is a stranger's text until checked here: names, numbers of
entries and histograms are held to limits, so that one device cannot fill the hub.
"""

import logging
import math
from collections.abc import Callable, Mapping

from google.protobuf.message import DecodeError

from fogline_protocol.errors import BadRequest, Unavailable
from fogline_protocol.grpc_calls import Context, Method
from fogline_protocol.release import MODEL_NAME
from fogline_protocol.v1.fleet_pb2 import (
    ContactRequest,
    ContactResponse,
    Telemetry,
    TelemetryReceipt,
)

SERVICE = "fogline.v1.Fleet"
MAX_BYTES = 256 << 10
MAX_MODELS = 64
MAX_OUTCOMES = 256  # per model: tiers x qualities x reasons are far fewer
MAX_BOUNDS = 64
MAX_DECISIONS = 100
MAX_TEXT = 200
# A million rows a second for nine years; sums of thousands still fit the database's 63 bits.
MAX_COUNT = 1 << 48

log = logging.getLogger("fogline.reports")

Accept = Callable[[Telemetry], None]
Contact = Callable[[], ContactResponse]

NOT_YET = ContactResponse()  # ask again in a moment


def too_early(_report: Telemetry) -> None:
    """Take no report: there is no database yet to count in, and the next one says it all again."""
    raise Unavailable("the hub is starting: report again in a moment")


def methods(accept: Accept, contact: Contact) -> Mapping[str, Method]:
    """Return the gRPC methods that take reports and tell devices where the rest is."""

    async def report(data: bytes, _context: Context) -> bytes:
        accept(parse(data))
        return TelemetryReceipt().SerializeToString()

    async def tell(data: bytes, _context: Context) -> bytes:
        try:
            request = ContactRequest.FromString(data)
        except DecodeError:
            raise BadRequest("malformed ContactRequest") from None
        check_device(request.device)
        return contact().SerializeToString()

    return {f"/{SERVICE}/Report": report, f"/{SERVICE}/Contact": tell}


def checked(accept: Accept) -> Accept:
    """Return ``accept`` for reports that came another way and were read, but not held to limits.

    Nobody waits there to be told: what is refused is logged and dropped.
    """

    def take(report: Telemetry) -> None:
        try:
            check(report)
        except BadRequest as error:
            log.warning("a report of %r is dropped: %s", report.device[:64], error)
        else:
            accept(report)

    return take


def check_device(name: str) -> None:
    """Refuse a name that could not become part of topics and paths.

    Raises:
        BadRequest: it is no device name.
    """
    # The rule is the same as for models.
    if not MODEL_NAME.fullmatch(name):
        raise BadRequest(f"device name {name!r} must be lower-case letters, digits, '_' and '-'")


def parse(data: bytes) -> Telemetry:
    """Read a report.

    Raises:
        BadRequest: malformed, or beyond what an agent ever sends; the text names the part.
    """
    if len(data) > MAX_BYTES:
        raise BadRequest(f"a report of {len(data)} bytes, at most {MAX_BYTES} are accepted")
    try:
        report = Telemetry.FromString(data)
    except DecodeError:
        raise BadRequest("the report is not a Telemetry message: malformed protobuf") from None
    check(report)
    return report


def check(report: Telemetry) -> None:
    """Hold a report to limits.

    Raises:
        BadRequest: it is beyond what an agent ever sends; the text names the part.
    """
    check_device(report.device)
    if not 0 < len(report.boot_id) <= 64:
        raise BadRequest("boot_id must have 1 to 64 characters")
    if report.sequence >= 1 << 63:
        raise BadRequest("sequence is absurd")
    texts = [report.agent_version, report.hardware_class, report.link]
    numbers = [report.rss_bytes, report.escalation_bytes_sent, report.escalation_bytes_received]
    if len(report.models) > MAX_MODELS:
        raise BadRequest(f"{len(report.models)} models, at most {MAX_MODELS} are accepted")
    if len(report.recent) > MAX_DECISIONS:
        raise BadRequest(f"{len(report.recent)} decisions, at most {MAX_DECISIONS} are accepted")
    for one in report.recent:
        texts += [one.model, one.release, one.tier, one.quality, one.reason]
        if not (math.isfinite(one.at) and math.isfinite(one.seconds)):
            raise BadRequest("a decision's time must be a number")
    for model in report.models:
        if max(len(model.outcomes), len(model.latencies)) > MAX_OUTCOMES:
            raise BadRequest(f"model {model.model!r} has more than {MAX_OUTCOMES} outcomes")
        texts += [model.model, model.release]
        for outcome in model.outcomes:
            texts += [outcome.tier, outcome.quality, outcome.reason]
            numbers.append(outcome.rows)
        for latency in model.latencies:
            texts.append(latency.tier)
            numbers += latency.counts
            bounds = list(latency.bounds_s)
            if len(latency.counts) != len(bounds) + 1 or len(bounds) > MAX_BOUNDS:
                raise BadRequest(
                    f"a histogram has one count more than bounds, and at most {MAX_BOUNDS} bounds"
                )
            if (
                not bounds
                or any(map(math.isnan, bounds))
                or bounds != sorted(bounds)
                or not 0 < bounds[0] <= bounds[-1] < 1e6
            ):
                raise BadRequest("the bounds of a histogram must be positive and ascending")
    if any(len(text) > MAX_TEXT for text in texts):
        raise BadRequest(f"a text is longer than {MAX_TEXT} characters")
    if max(numbers) > MAX_COUNT:
        raise BadRequest(f"a count is larger than {MAX_COUNT}")
