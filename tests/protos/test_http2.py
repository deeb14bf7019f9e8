"""HTTP/2 by our hand: h2, another one, as its peer, the rules of RFC 9113, and what attackers do."""

import struct

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fogline_protocol import header_blocks, http2, http2_frames
from fogline_protocol.http2 import Closed, Connection, Data, Request, Reset
from fogline_protocol.http2_frames import Block, Code, Kind, frame

ASKED = header_blocks.write(
    [(b":method", b"POST"), (b":path", b"/s/M"), (b":scheme", b"http"), (b"te", b"trailers")]
)
HEAD = Block(((b":status", b"200"),))
DONE = Block(((b"grpc-status", b"0"),))
BEGIN = http2_frames.PREFACE + frame(Kind.SETTINGS, 0, 0)
END = http2_frames.END_STREAM | http2_frames.END_HEADERS


def begun():
    connection = Connection(list)
    assert connection.receive(BEGIN, 0.0) == []
    connection.take(0)
    return connection


def ask(stream, flags=http2_frames.END_HEADERS):
    return frame(Kind.HEADERS, flags, stream, ASKED)


def frames(data):
    at, found = 0, []
    while at < len(data):
        length, kind = int.from_bytes(data[at : at + 3], "big"), data[at + 3]
        stream = int.from_bytes(data[at + 5 : at + 9], "big")
        found.append((Kind(kind), data[at + 4], stream, data[at + 9 : at + 9 + length]))
        at += 9 + length
    return found


def kinds(connection):
    return [(kind, stream) for kind, _, stream, _ in frames(connection.take(1 << 20))]


def number(value):
    return struct.pack(">I", value)


def setting(key, value):
    return struct.pack(">HI", key, value)


class Peer:
    """A client by the h2 library, whose windows are as small as it is told."""

    def __init__(self, window, frame_bytes):
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding=None))
        codes = h2.settings.SettingCodes
        self.h2.local_settings = h2.settings.Settings(
            client=True,
            initial_values={codes.INITIAL_WINDOW_SIZE: window, codes.MAX_FRAME_SIZE: frame_bytes},
        )
        self.h2.max_inbound_frame_size = frame_bytes
        self.h2.initiate_connection()
        self.unsent, self.bodies, self.trailers = {}, {}, {}

    def ask(self, body):
        stream = self.h2.get_next_available_stream_id()
        self.h2.send_headers(
            stream,
            [(":method", "POST"), (":path", "/s/M"), (":scheme", "http"), (":authority", "x")],
        )
        self.unsent[stream], self.bodies[stream] = body, b""

    def sent(self):
        """What it sends now: of every body as much as our windows allow."""
        for stream, body in tuple(self.unsent.items()):
            while True:
                room = min(16_384, self.h2.local_flow_control_window(stream))
                piece, body = body[:room], body[room:]
                if not piece and body:
                    self.unsent[stream] = body
                    break
                self.h2.send_data(stream, piece, end_stream=not body)
                if not body:
                    del self.unsent[stream]
                    break
        return self.h2.data_to_send()

    def receive(self, data):
        for event in self.h2.receive_data(data):
            match event:
                case h2.events.DataReceived():
                    self.bodies[event.stream_id] += event.data
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                case h2.events.TrailersReceived():
                    self.trailers[event.stream_id] = dict(event.headers)
                case h2.events.ConnectionTerminated() | h2.events.StreamReset():
                    pytest.fail(f"{event}")


sizes = st.sampled_from([0, 1, 5, 1000, 16_384, 16_385, 70_000, 300_000])


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(sizes, sizes), min_size=1, max_size=8),
    st.sampled_from([1000, 65_535, 1 << 20]),
    st.sampled_from([16_384, 1 << 20]),
    st.sampled_from([1000, 1 << 18]),
)
def test_every_body_arrives_whole_in_both_directions_whatever_the_windows(
    calls, window, frame_bytes, turn
):
    peer, ours = Peer(window, frame_bytes), Connection(list)
    answers = [bytes(range(256)) * (size // 256) + b"e" * (size % 256) for _, size in calls]
    arrived = [0] * len(calls)
    for size, _ in calls:
        peer.ask(b"u" * size)
    for _ in range(20_000):
        for event in ours.receive(peer.sent(), 0.0):
            assert isinstance(event, Request | Data), event
            if isinstance(event, Data):
                call = event.stream // 2
                arrived[call] += len(event.data)
                ours.grant(event.stream, len(event.data))
                if event.ended:
                    ours.respond(event.stream, HEAD, DONE, answers[call][:7], answers[call][7:])
        peer.receive(ours.take(turn))
        if len(peer.trailers) == len(calls):
            break
    assert list(peer.bodies.values()) == answers
    assert all(trailers == {b"grpc-status": b"0"} for trailers in peer.trailers.values())
    assert arrived == [size for size, _ in calls]
    assert ours.streams == 0


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(Kind.HEADERS, END, 0, ASKED), Code.PROTOCOL_ERROR),
        (ask(2), Code.PROTOCOL_ERROR),
        (ask(1) + frame(Kind.DATA, 0, 3, b"x"), Code.PROTOCOL_ERROR),
        (frame(Kind.DATA, 0, 0, b"x"), Code.PROTOCOL_ERROR),
        (ask(1) + frame(Kind.DATA, http2_frames.PADDED, 1, b"\x05abc"), Code.PROTOCOL_ERROR),
        (ask(1) + frame(Kind.DATA, http2_frames.PADDED, 1, b""), Code.FRAME_SIZE_ERROR),
        (frame(Kind.HEADERS, END | http2_frames.PRIORITY, 1, b"\0\0"), Code.PROTOCOL_ERROR),
        (frame(Kind.HEADERS, 0, 1, ASKED) + frame(Kind.PING, 0, 0, b"8" * 8), Code.PROTOCOL_ERROR),
        (
            frame(Kind.HEADERS, 0, 1, ASKED) + frame(Kind.CONTINUATION, 4, 3, b""),
            Code.PROTOCOL_ERROR,
        ),
        (frame(Kind.CONTINUATION, 4, 1, b""), Code.PROTOCOL_ERROR),
        (frame(Kind.PUSH_PROMISE, 0, 1, b"\0\0\0\2"), Code.PROTOCOL_ERROR),
        (frame(Kind.PING, 0, 0, b"short"), Code.FRAME_SIZE_ERROR),
        (frame(Kind.PING, 0, 1, b"8" * 8), Code.PROTOCOL_ERROR),
        (frame(Kind.SETTINGS, 0, 0, b"12345"), Code.FRAME_SIZE_ERROR),
        (frame(Kind.SETTINGS, 0, 1, b""), Code.PROTOCOL_ERROR),
        (frame(Kind.SETTINGS, http2_frames.ACK, 0, setting(4, 9)), Code.FRAME_SIZE_ERROR),
        (frame(Kind.SETTINGS, 0, 0, setting(2, 2)), Code.PROTOCOL_ERROR),
        (frame(Kind.SETTINGS, 0, 0, setting(4, 1 << 31)), Code.FLOW_CONTROL_ERROR),
        (frame(Kind.SETTINGS, 0, 0, setting(5, 16_383)), Code.PROTOCOL_ERROR),
        (frame(Kind.SETTINGS, 0, 0, setting(5, 1 << 24)), Code.PROTOCOL_ERROR),
        (
            ask(1)
            + frame(Kind.WINDOW_UPDATE, 0, 1, number(http2_frames.LARGEST - 65_535))
            + frame(Kind.SETTINGS, 0, 0, setting(4, 65_536)),
            Code.FLOW_CONTROL_ERROR,
        ),
        (frame(Kind.WINDOW_UPDATE, 0, 0, number(0)), Code.PROTOCOL_ERROR),
        (frame(Kind.WINDOW_UPDATE, 0, 0, number(http2_frames.LARGEST)), Code.FLOW_CONTROL_ERROR),
        (frame(Kind.WINDOW_UPDATE, 0, 1, number(1)), Code.PROTOCOL_ERROR),
        (frame(Kind.WINDOW_UPDATE, 0, 0, b"123"), Code.FRAME_SIZE_ERROR),
        (frame(Kind.RST_STREAM, 0, 1, number(8)), Code.PROTOCOL_ERROR),
        (frame(Kind.RST_STREAM, 0, 0, number(8)), Code.PROTOCOL_ERROR),
        (ask(1) + frame(Kind.RST_STREAM, 0, 1, b"12"), Code.FRAME_SIZE_ERROR),
        (frame(Kind.GOAWAY, 0, 0, b"1234567"), Code.FRAME_SIZE_ERROR),
        (frame(Kind.PRIORITY, 0, 0, b"12345"), Code.PROTOCOL_ERROR),
        (frame(Kind.HEADERS, END, 1, b"\xff\xff"), Code.COMPRESSION_ERROR),
        (frame(Kind.HEADERS, END, 1, bytes([0x80 | 100])), Code.COMPRESSION_ERROR),
        (struct.pack(">HBBBI", 1 << 9, 0, 0, 0, 1), Code.FRAME_SIZE_ERROR),
    ],
)
def test_a_broken_rule_of_the_connection_ends_it_with_its_code(data, code):
    connection = begun()
    events = connection.receive(data, 0.0)
    assert isinstance(events[-1], Closed)
    assert events[-1].code == code
    assert events[-1].text
    kind, _, stream, payload = frames(connection.take(0))[-1]
    assert (kind, stream) == (Kind.GOAWAY, 0)
    assert payload[4:8] == number(code)
    assert connection.closed
    assert connection.receive(ask(9, END), 0.0) == []


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (ask(1, END) + frame(Kind.DATA, 0, 1, b"x"), Code.STREAM_CLOSED),
        (ask(1, END) + ask(1, END), Code.STREAM_CLOSED),
        (ask(1) + ask(1), Code.PROTOCOL_ERROR),  # trailers end a request
        (ask(1) + frame(Kind.WINDOW_UPDATE, 0, 1, number(0)), Code.PROTOCOL_ERROR),
        (
            ask(1) + frame(Kind.WINDOW_UPDATE, 0, 1, number(http2_frames.LARGEST)),
            Code.FLOW_CONTROL_ERROR,
        ),
        (ask(1) + frame(Kind.PRIORITY, 0, 1, b"123"), Code.FRAME_SIZE_ERROR),
    ],
)
def test_a_broken_rule_of_a_stream_ends_it_alone(data, code):
    connection = begun()
    events = connection.receive(data, 0.0)
    assert events[-1] == Reset(1, code)
    assert frames(connection.take(0))[-1] == (Kind.RST_STREAM, 0, 1, number(code))
    assert [type(e) for e in connection.receive(ask(3, END), 0.0)] == [Request]


def test_more_than_a_window_is_not_taken():
    connection = begun()
    piece = frame(Kind.DATA, 0, 1, b"x" * (1 << 16))
    count = http2.STREAM_WINDOW >> 16
    events = connection.receive(ask(1) + piece * count, 0.0)
    assert not any(isinstance(e, Reset) for e in events)
    assert connection.receive(frame(Kind.DATA, 0, 1, b"x"), 0.0) == [
        Reset(1, Code.FLOW_CONTROL_ERROR)
    ]


@pytest.mark.parametrize("first", [b"GET / HTTP/1.1\r\n", b"PRI * HTTP/3", b"\x16\x03\x01", b"PRX"])
def test_what_is_not_http2_is_seen_at_its_first_wrong_byte(first):
    (closed,) = Connection(list).receive(first, 0.0)
    assert closed.code == Code.PROTOCOL_ERROR


def test_the_first_frame_must_be_settings():
    (closed,) = Connection(list).receive(http2_frames.PREFACE + ask(1), 0.0)
    assert "SETTINGS" in closed.text


def test_padding_and_priority_are_left_out_and_padding_is_given_back():
    connection = begun()
    payload = b"\x04" + b"\x80\0\0\1\x10" + ASKED + b"\0" * 4
    flags = http2_frames.END_HEADERS | http2_frames.PADDED | http2_frames.PRIORITY
    (asked,) = connection.receive(frame(Kind.HEADERS, flags, 1, payload), 0.0)
    assert dict(asked.head)[b":path"] == b"/s/M"
    padded = frame(Kind.DATA, http2_frames.PADDED | http2_frames.END_STREAM, 1, b"\x03abc\0\0\0")
    more = frame(Kind.DATA, http2_frames.PADDED, 1, b"\x03abc\0\0\0")
    assert connection.receive(more + padded, 0.0) == [Data(1, b"abc", False), Data(1, b"abc", True)]
    assert (Kind.WINDOW_UPDATE, 1) in kinds(connection)


def test_headers_may_come_in_pieces():
    connection = begun()
    data = frame(Kind.HEADERS, http2_frames.END_STREAM, 1, ASKED[:5])
    data += frame(Kind.CONTINUATION, 0, 1, ASKED[5:9])
    data += frame(Kind.CONTINUATION, http2_frames.END_HEADERS, 1, ASKED[9:])
    (asked,) = connection.receive(data, 0.0)
    assert (asked.stream, asked.ended) == (1, True)


def test_unknown_frames_priorities_and_settings_are_ignored():
    connection = begun()
    data = frame(77, 0xFF, 5, b"whatever") + frame(Kind.PRIORITY, 0, 9, b"12345")
    data += frame(Kind.SETTINGS, 0, 0, setting(0x99, 7))
    assert connection.receive(data, 0.0) == []
    assert kinds(connection) == [(Kind.SETTINGS, 0)]


def test_a_ping_is_given_back_and_the_answer_to_one_is_not():
    connection = begun()
    connection.receive(frame(Kind.PING, 0, 0, b"12345678"), 0.0)
    connection.receive(frame(Kind.PING, http2_frames.ACK, 0, b"12345678"), 0.0)
    assert frames(connection.take(0)) == [(Kind.PING, http2_frames.ACK, 0, b"12345678")]


def test_an_answer_to_a_request_that_still_arrives_tells_its_peer_to_stop():
    connection = begun()
    connection.receive(ask(1), 0.0)
    connection.respond(1, HEAD, DONE, b"answer")
    found = frames(connection.take(0))
    assert [kind for kind, *_ in found] == [
        Kind.HEADERS, Kind.DATA, Kind.HEADERS, Kind.RST_STREAM
    ]  # fmt: skip
    assert found[-1][3] == number(Code.NO_ERROR)
    assert connection.receive(frame(Kind.DATA, http2_frames.END_STREAM, 1, b"late"), 0.0) == []


def test_a_large_answer_does_not_hold_up_a_small_one():
    connection = begun()
    wide = frame(Kind.WINDOW_UPDATE, 0, 0, number(1 << 24))
    connection.receive(wide + ask(1, END) + frame(Kind.WINDOW_UPDATE, 0, 1, number(1 << 24)), 0.0)
    connection.respond(1, HEAD, DONE, b"x" * (1 << 23))
    connection.take(1 << 18)
    connection.receive(ask(3, END), 0.0)
    connection.respond(3, HEAD, DONE, b"small")
    assert (Kind.DATA, 3) in kinds(connection)[:6]


def test_an_answer_without_a_window_waits_and_others_pass_it():
    connection = begun()
    connection.receive(frame(Kind.SETTINGS, 0, 0, setting(4, 0)) + ask(1, END), 0.0)
    connection.respond(1, HEAD, DONE, b"x" * 10)
    connection.receive(ask(3, END) + frame(Kind.WINDOW_UPDATE, 0, 3, number(10)), 0.0)
    connection.respond(3, HEAD, DONE, b"y" * 10)
    assert (Kind.DATA, 3) in kinds(connection)
    assert not connection.sendable
    assert connection.queued(1) == 10
    connection.receive(frame(Kind.SETTINGS, 0, 0, setting(4, 4)), 0.0)  # changed in mid-connection
    assert frames(connection.take(99))[-1] == (Kind.DATA, 0, 1, b"x" * 4)
    connection.receive(frame(Kind.WINDOW_UPDATE, 0, 1, number(6)), 0.0)
    assert kinds(connection) == [(Kind.DATA, 1), (Kind.HEADERS, 1)]
    assert connection.streams == 0


def test_streams_beyond_the_limit_are_refused_until_others_have_their_last_byte():
    connection = begun()
    connection.receive(frame(Kind.SETTINGS, 0, 0, setting(4, 0)), 0.0)
    for n in range(http2.MAX_STREAMS):
        connection.receive(ask(2 * n + 1, END), 0.0)
        connection.respond(2 * n + 1, HEAD, DONE, b"waits")
    connection.take(1 << 20)
    last = 2 * http2.MAX_STREAMS + 1
    assert connection.receive(ask(last, END), 0.0) == []
    assert frames(connection.take(0)) == [(Kind.RST_STREAM, 0, last, number(Code.REFUSED_STREAM))]
    connection.receive(frame(Kind.WINDOW_UPDATE, 0, 1, number(5)), 0.0)
    connection.take(99)
    assert len(connection.receive(ask(last + 2, END), 0.0)) == 1


def test_after_the_last_word_new_streams_are_not_for_us_and_old_ones_finish():
    connection = begun()
    connection.receive(ask(1, END), 0.0)
    connection.go_away(last=False)
    assert frames(connection.take(0))[0][3][:4] == number(http2_frames.LARGEST)
    assert len(connection.receive(ask(3, END), 0.0)) == 1
    connection.go_away(last=True)
    assert frames(connection.take(0))[0][3][:4] == number(3)
    assert connection.receive(ask(5, END), 0.0) == []
    connection.respond(3, HEAD, DONE, b"answer")
    assert (Kind.DATA, 3) in kinds(connection)


FLOODS = {
    "resets (CVE-2023-44487)": lambda n: ask(2 * n + 1) + frame(
        Kind.RST_STREAM, 0, 2 * n + 1, number(8)
    ),
    "resets that we are made to send": lambda n: ask(2 * n + 1, END) + frame(
        Kind.DATA, 0, 2 * n + 1, b"x"
    ),
    "pings (CVE-2019-9512)": lambda n: frame(Kind.PING, 0, 0, b"12345678"),
    "settings (CVE-2019-9515)": lambda n: frame(Kind.SETTINGS, 0, 0),
    "empty data (CVE-2019-9518)": lambda n: (ask(1) if n == 0 else b"") + frame(Kind.DATA, 0, 1),
    "priorities": lambda n: frame(Kind.PRIORITY, 0, 1, b"12345"),
    "windows that nobody reads through": lambda n: frame(Kind.WINDOW_UPDATE, 0, 0, number(1)),
    "unknown frames": lambda n: frame(99, 0, 0),
    "data for a stream that is over": lambda n: (
        ask(1) + frame(Kind.RST_STREAM, 0, 1, number(8)) if n == 0 else b""
    ) + frame(Kind.DATA, 0, 1, b""),
}  # fmt: skip


@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_ends_its_connection_and_the_same_spread_over_time_does_not(flood):
    connection = begun()
    for n in range(20_000):
        if any(isinstance(e, Closed) for e in connection.receive(FLOODS[flood](n), 1.0)):
            break
    assert connection.closed
    assert frames(connection.take(0))[-1][3][4:8] == number(Code.ENHANCE_YOUR_CALM)
    connection = begun()
    for n in range(20_000):
        connection.receive(FLOODS[flood](n), n / 30)
        connection.take(0)
    assert not connection.closed


def test_settings_that_change_every_stream_are_few():
    connection = begun()
    for n in range(http2.MAX_STREAMS):
        connection.receive(ask(2 * n + 1), 0.0)
    done = 0
    while not connection.closed:
        connection.receive(frame(Kind.SETTINGS, 0, 0, setting(4, done % 2)), 0.0)
        done += 1
    assert done < 2000


def test_requests_after_the_last_word_end_some_time():
    connection = begun()
    connection.go_away(last=True)
    for n in range(20_000):
        connection.receive(ask(2 * n + 1, END), 0.0)
    assert connection.closed


@pytest.mark.parametrize(("count", "size"), [(400, 400_000), (6000, 1000)])
def test_who_opens_windows_as_it_reads_is_no_flood(count, size):
    connection = begun()
    connection.receive(frame(Kind.SETTINGS, 0, 0, setting(4, 1 << 20)), 0.0)
    for n in range(count):
        stream = 2 * n + 1
        connection.receive(ask(stream, END), 0.0)
        connection.respond(stream, HEAD, DONE, b"x" * size)
        while connection.sendable:
            for kind, _, _, payload in frames(connection.take(1 << 20)):
                if kind is Kind.DATA:
                    more = frame(Kind.WINDOW_UPDATE, 0, 0, number(len(payload)))
                    connection.receive(more + frame(Kind.WINDOW_UPDATE, 0, stream, number(1)), 0.0)
    assert not connection.closed


def test_a_ping_of_ours_is_answered_by_any_peer():
    connection, peer = begun(), Peer(65_535, 16_384)
    connection = Connection(list)
    connection.receive(peer.sent(), 0.0)
    connection.ping()
    before = connection.frames
    peer.receive(connection.take(0))
    assert connection.receive(peer.sent(), 0.0) == []
    assert connection.frames > before


@pytest.mark.parametrize("piece", [b"", b"\0\x01a\x01b" * 100, b"\0" * 20_000])
def test_a_header_block_without_an_end_is_not_kept(piece):
    connection = begun()
    connection.receive(frame(Kind.HEADERS, 0, 1, ASKED), 0.0)
    for _ in range(http2.MAX_CONTINUATIONS + 1):
        connection.receive(frame(Kind.CONTINUATION, 0, 1, piece), 0.0)
    assert connection.closed


def test_a_frame_with_thousands_of_settings_is_not_carried_out():
    connection = begun()
    (closed,) = connection.receive(
        frame(Kind.SETTINGS, 0, 0, setting(4, 0) * (http2.MAX_SETTINGS + 1)), 0.0
    )
    assert closed.code == Code.ENHANCE_YOUR_CALM


payloads = st.sampled_from(
    [b"", ASKED, b"12345678", number(1), number(0), number(1 << 31), setting(4, 0), setting(4, 99),
     setting(5, 1 << 14), b"\0\0\0\0\5hello", b"\x01ab\0", b"\xbe", b"\x40\x01a\x01b"]
) | st.binary(max_size=30)  # fmt: skip
valid = st.builds(
    frame,
    st.integers(0, 10),
    st.sampled_from([0, 1, 4, 5, 5, 5, 8, 13, 0x20, 0x2D]),
    st.sampled_from([0, 1, 1, 3, 3, 5, 7, 2, 99]),
    payloads,
)
likely = st.sampled_from(
    [ask(n, flags) for n in (1, 3, 5, 7, 9) for flags in (END, http2_frames.END_HEADERS)]
    + [frame(Kind.DATA, n & 1, n | 1, b"\0\0\0\0\1x") for n in range(6)]
    + [frame(Kind.RST_STREAM, 0, n, number(8)) for n in (1, 3)]
    + [frame(Kind.WINDOW_UPDATE, 0, n, number(50)) for n in (0, 1, 3)]
)


@st.composite
def streams_of_bytes(draw):
    data = bytearray(BEGIN + b"".join(draw(st.lists(likely | valid, max_size=25))))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data) - 1))
        match draw(st.sampled_from(["change", "insert", "cut"])):
            case "change":
                data[at] = draw(st.integers(0, 255))
            case "insert":
                data[at:at] = draw(st.binary(max_size=5))
            case "cut":
                del data[at : at + draw(st.integers(1, 9))]
                data += b"\0"
    return bytes(data)


def outcome(pieces):
    """Everything that follows from bytes in pieces; requests are answered as they are whole."""
    connection, events, sent = Connection(list), [], b""
    for piece in pieces:
        for event in connection.receive(piece, 0.0):
            events.append(event)
            if not isinstance(event, Reset | Closed) and event.ended:
                connection.respond(event.stream, HEAD, DONE, b"an answer" * 3000)
    while connection.sendable:
        sent += connection.take(1 << 20)
    assert not (events and isinstance(events[-1], Closed)) or connection.closed
    assert sum(isinstance(event, Closed) for event in events) <= 1
    return events, connection.closed


@settings(deadline=None, max_examples=2000)
@given(streams_of_bytes(), st.data())
def test_whatever_arrives_in_whatever_pieces_the_same_follows_and_nothing_breaks(data, drawn):
    whole = outcome([data])
    assert outcome([data[n : n + 1] for n in range(len(data))]) == whole
    cuts = sorted(drawn.draw(st.lists(st.integers(0, len(data)), max_size=8)))
    assert (
        outcome([data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]) == whole
    )
