"""A connection ends when its peer has what it was sent and is quiet, or when it takes too long."""

import socket

import pytest

from fogline_protocol import lingering
from fogline_protocol.lingering import LINGER_S, UNREAD_S, Lingering


class Clock:
    """The part of a loop that ``Lingering`` needs; ``pass_by`` lets time pass."""

    def __init__(self):
        self.now = 0.0
        self.due = []

    def time(self):
        return self.now

    def call_later(self, delay, callback):
        self.due.append((self.now + delay, callback))

    def pass_by(self, seconds, meanwhile=lambda: None):
        end = self.now + seconds
        while self.due and self.due[0][0] <= end:
            self.now, callback = self.due.pop(0)
            meanwhile()
            callback()
        self.now = end


class Transport:
    """What ``Lingering`` asks of a transport; half-closing it is not possible with TLS."""

    def __init__(self, ours, encrypted):
        self.ours, self.encrypted = ours, encrypted
        self.unsent = 0
        self.closed = self.ended = False

    def can_write_eof(self):
        return not self.encrypted

    def write_eof(self):
        assert not self.encrypted
        self.ended = True

    def get_write_buffer_size(self):
        return self.unsent

    def get_extra_info(self, name):
        return self.ours

    def is_closing(self):
        return self.closed

    def close(self):
        self.closed = True


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(lingering.asyncio, "get_running_loop", lambda: clock)
    return clock


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.fixture(params=[False, True])
def transport(request, pair):
    return Transport(pair[0], request.param)


def test_a_quiet_peer_that_has_everything_is_closed_after_a_moment(clock, transport):
    Lingering(transport)
    assert transport.ended != transport.encrypted
    clock.pass_by(0.9 * LINGER_S)
    assert not transport.closed
    clock.pass_by(0.2 * LINGER_S)
    assert transport.closed
    assert not clock.due


def test_bytes_that_wait_on_our_side_keep_it_open(clock, transport):
    transport.unsent = 1
    Lingering(transport)
    clock.pass_by(UNREAD_S / 2)
    assert not transport.closed
    transport.unsent = 0
    clock.pass_by(1.1 * LINGER_S)
    assert transport.closed


def test_bytes_that_the_kernel_holds_for_the_peer_keep_it_open(clock, transport, pair):
    ours, theirs = pair
    ours.send(b"not read yet")
    Lingering(transport)
    clock.pass_by(UNREAD_S / 2)
    assert not transport.closed
    theirs.recv(100)
    clock.pass_by(1.1 * LINGER_S)
    assert transport.closed


def test_a_peer_that_still_sends_keeps_it_open(clock, transport):
    end = Lingering(transport)
    clock.pass_by(UNREAD_S / 2, meanwhile=end.heard)
    assert not transport.closed
    clock.pass_by(1.1 * LINGER_S)
    assert transport.closed


def test_neither_keeps_it_open_for_ever(clock, transport):
    transport.unsent = 1
    end = Lingering(transport)
    clock.pass_by(1.1 * UNREAD_S, meanwhile=end.heard)
    assert transport.closed


def test_nothing_is_done_to_what_the_peer_has_closed(clock, transport):
    Lingering(transport)
    transport.closed = True
    clock.pass_by(LINGER_S)
    assert not clock.due
