"""Writes down what devices say: births, wills and reports, each in the row of its device.

A report is taken if its sequence number is above the last one, so repetition and order mean
nothing; births and wills likewise by start and connection of the device.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, Connection, Row, delete, insert, select, update

from cloud_hub.fleet.link import MAX_COUNTER, Arrival
from cloud_hub.store import schema
from fogline_protocol.v1 import fleet_pb2 as pb

log = logging.getLogger("fogline.arrivals")

MAX_GENERATION = MAX_COUNTER - 1  # a device refuses any beyond it
EVENTS_KEPT = 200  # of one device
MAX_SENTENCE = 500  # characters; an agent's are no longer

twin = schema.twin
event = schema.device_event


@dataclass(frozen=True, slots=True)
class Taken:
    """What came of some arrivals."""

    states: Sequence[pb.DeviceState]  # births and wills that count, in their order
    due: bool  # whether something is to be published


def take(
    connection: Connection,
    arrivals: Sequence[Arrival],
    now: float,
    doubt: Callable[[Connection, Sequence[str]], None],
) -> Taken:
    """Write down ``arrivals`` in this order, inside a transaction; telemetry is passed over.

    Args:
        connection: the transaction.
        arrivals: checked documents.
        now: seconds since the epoch.
        doubt: is called, in the transaction, with devices that lack what was sent to them.
    """
    states: list[pb.DeviceState] = []
    due = False
    for arrival in arrivals:
        document = arrival.document
        if isinstance(document, pb.Telemetry):
            continue
        will = isinstance(document, pb.DeviceState) and not document.online
        row = _row(connection, arrival.device, new=not will)
        if row is None:
            continue  # it was forgotten, and only now its broker notices that it is gone
        if isinstance(document, pb.Reported):
            due |= _take_report(connection, row, document, now)
        elif _moment(document) > (row.boot, row.connection, not row.connected):
            due |= _take_state(connection, row, document, doubt)
            states.append(document)
    return Taken(states, due)


def _take_state(
    connection: Connection,
    row: Row[Any],
    state: pb.DeviceState,
    doubt: Callable[[Connection, Sequence[str]], None],
) -> bool:
    ahead = _ahead(row, state.generation)
    changes = {
        "boot": state.boot,
        "connection": state.connection,
        "connected": state.online,
        **ahead,
    }
    connection.execute(update(twin).where(twin.c.device == row.device).values(**changes))
    if state.online and state.generation < row.generation:
        # It has not got what was published: perhaps the broker has not either.
        doubt(connection, [row.device])
        return True
    return bool(ahead)


def _take_report(connection: Connection, row: Row[Any], report: pb.Reported, now: float) -> bool:
    if report.sequence <= row.report_sequence:
        return False
    before = {m.model: m for m in pb.Reported.FromString(row.reported).models}
    for model in report.models:
        last = before.get(model.model)
        swapped = last is not None and _swapped(last, model)
        if last is None or swapped or _notable(last) != _notable(model):
            connection.execute(
                insert(event).values(
                    device=row.device,
                    at=now,
                    generation=report.generation,
                    model=_text(event.c.model, model.model),
                    release=min(model.desired_release or model.active_release, MAX_COUNTER),
                    phase=_text(event.c.phase, model.phase),
                    code=_text(event.c.code, model.code),
                    sentence=_text(
                        event.c.sentence,
                        model.sentence or (_answers(model.serving) if swapped else ""),
                    ),
                )
            )
    ahead = _ahead(row, report.generation)
    connection.execute(
        update(twin)
        .where(twin.c.device == row.device)
        .values(
            report_sequence=report.sequence,
            reported=report.SerializeToString(deterministic=True),
            reported_at=now,
            **ahead,
        )
    )
    oldest = (
        select(event.c.id)
        .where(event.c.device == row.device)
        .order_by(event.c.id.desc())
        .offset(EVENTS_KEPT)
    )
    connection.execute(delete(event).where(event.c.id.in_(oldest)))
    return bool(ahead)


def _row(connection: Connection, device: str, *, new: bool) -> Row[Any] | None:
    """Return a device's row, which is made if it is ``new``."""
    query = select(twin).where(twin.c.device == device)
    row = connection.execute(query).one_or_none()
    if row is None and new:
        connection.execute(insert(twin).values(device=device))
        row = connection.execute(query).one()
    return row


def _moment(state: pb.DeviceState) -> tuple[int, int, bool]:
    """Return what orders the births and wills of one device; a will follows its own birth."""
    return state.boot, state.connection, not state.online


def _text(column: Column[str], value: str) -> str:
    """Return what a device said in a form that every database takes."""
    length: int = getattr(column.type, "length", None) or MAX_SENTENCE
    return value.replace("\0", "?")[:length]


def _ahead(row: Row[Any], generation: int) -> dict[str, Any]:
    """Return the changes for a device that has been told by a database that we lost.

    Below its generation it would ignore everything we want for ever, so ours goes above it.
    """
    if generation <= row.generation:
        return {}
    if generation >= MAX_GENERATION:
        log.error(
            "device %s claims generation %d, above which there is none: it cannot be told "
            "anything until its data directory is replaced",
            row.device,
            generation,
        )
        return {}
    log.warning("device %s is at generation %d, above ours", row.device, generation)
    return {"generation": generation + 1, "published_generation": 0}


def _notable(model: pb.ReportedModel) -> tuple[object, ...]:
    return model.phase, model.desired_release, model.active_release, model.code, model.attempt


def _swapped(before: pb.ReportedModel, now: pb.ReportedModel) -> bool:
    """Return whether something else of the same release answers, without an update."""
    return (
        before.active_release == now.active_release
        and before.HasField("serving")
        and now.HasField("serving")
        and _place(before.serving) != _place(now.serving)
    )


def _place(serving: pb.Serving) -> str:
    return f"{serving.variant} on {serving.provider}"


def _answers(serving: pb.Serving) -> str:
    said = f"answers with {_place(serving)} now"
    return f"{said}: {serving.aside}" if serving.aside else said
