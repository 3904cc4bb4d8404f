"""The hand-over's frames over a real socket, sound and broken."""

import contextlib
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmster_daemon.kv import wire
from llmster_daemon.kv.wire import (
    FRAME,
    MAGIC,
    VERSION,
    Frame,
    Kind,
    WireError,
    json_body,
    read_frame,
    send_frame,
    send_json,
)

LIMIT = 1 << 16
TIMEOUT_S = 10.0


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected sockets: sender, receiver."""
    left, right = socket.socketpair()
    left.settimeout(TIMEOUT_S)
    right.settimeout(TIMEOUT_S)
    with left, right:
        yield left, right


def header(
    body: bytes = b"",
    magic: bytes = MAGIC,
    version: int = VERSION,
    kind: int = Kind.RANGE,
    length: int | None = None,
    checksum: int | None = None,
) -> bytes:
    """A header, sound unless told otherwise."""
    return FRAME.pack(
        magic,
        version,
        kind,
        1,
        2,
        len(body) if length is None else length,
        zlib.crc32(body) if checksum is None else checksum,
    )


def read_bytes(data: bytes, limit: int = LIMIT) -> Frame:
    """What comes of these bytes, after which the peer closes."""
    left, right = socket.socketpair()
    with right:
        with left:
            left.sendall(data)
        right.settimeout(TIMEOUT_S)
        return read_frame(right, limit)


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("body", [b"", b"x", b"\0" * 5000])
def test_a_message_arrives_as_it_was_sent(
    ends: tuple[socket.socket, socket.socket], kind: Kind, body: bytes
) -> None:
    send_frame(ends[0], kind, body, 7, (1 << 32) - 1)
    frame = read_frame(ends[1], LIMIT)
    assert (frame.kind, frame.start, frame.end, bytes(frame.body)) == (kind, 7, (1 << 32) - 1, body)


def test_messages_keep_their_order_and_borders(ends: tuple[socket.socket, socket.socket]) -> None:
    for count in range(5):
        send_frame(ends[0], Kind.RANGE, bytes([count]) * count, count, count + 1)
    frames = [read_frame(ends[1], LIMIT) for _ in range(5)]
    assert [(f.start, bytes(f.body)) for f in frames] == [(n, bytes([n]) * n) for n in range(5)]


def test_json_arrives_as_it_was_sent(ends: tuple[socket.socket, socket.socket]) -> None:
    send_json(ends[0], Kind.HELLO, {"ticket": "é", "tokens": 3})
    assert json_body(read_frame(ends[1], LIMIT)) == {"ticket": "é", "tokens": 3}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(header(magic=b"GET"), "not a hand-over connection", id="magic"),
        pytest.param(header(version=9), "the peer speaks hand-over version 9", id="version"),
        pytest.param(header(kind=99), "unknown message kind 99", id="kind"),
        pytest.param(header(length=LIMIT + 1), "65,537 bytes; at most 65,536", id="oversize"),
        pytest.param(header(length=(1 << 64) - 1), "at most 65,536", id="absurd size"),
        pytest.param(header(b"abc") + b"abd", "damaged", id="checksum"),
        pytest.param(header(b"abc", checksum=0) + b"abc", "damaged", id="wrong checksum"),
        pytest.param(b"", "closed", id="closed at once"),
        pytest.param(header()[:-1], "closed", id="closed in the header"),
        pytest.param(header(b"abc") + b"ab", "closed", id="closed in the body"),
    ],
)
def test_a_broken_message_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        read_bytes(data)


def test_a_body_of_exactly_the_limit_is_taken() -> None:
    body = b"x" * LIMIT
    assert read_bytes(header(body) + body).body == body


def test_a_peer_that_sends_nothing_times_out(ends: tuple[socket.socket, socket.socket]) -> None:
    ends[1].settimeout(0.05)
    with pytest.raises(TimeoutError):
        read_frame(ends[1], LIMIT)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"1", b"null", b'"x"', b"\xff\xfe", b"\0"),
        pytest.param(b"[" * 60_000, id="too deep a list"),
        pytest.param(b'{"a":' * 10_000, id="too deep an object"),
    ],
)
def test_a_body_that_is_not_a_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(WireError):
        json_body(Frame(Kind.REFUSE, body=body))


def test_a_slow_link_does_not_count_as_a_dead_peer_while_bytes_flow(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    """The whole message takes longer than the timeout; no pause in it does."""
    left, right = ends
    timeout_s, pause_s = 0.4, 0.1
    left.settimeout(timeout_s)
    left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    body = bytes(range(256)) * (8 << 10)
    received = bytearray()
    began = time.monotonic()

    def read_slowly() -> None:
        while len(received) < FRAME.size + len(body):
            chunk = right.recv(len(body) // 10)
            if not chunk:
                return
            received.extend(chunk)
            if time.monotonic() - began < 3 * timeout_s:
                threading.Event().wait(pause_s)

    reader = threading.Thread(target=read_slowly)
    reader.start()
    try:
        send_frame(left, Kind.RANGE, body)
        took_s = time.monotonic() - began
    finally:
        with contextlib.suppress(OSError):
            left.shutdown(socket.SHUT_WR)
        reader.join(TIMEOUT_S)
    assert bytes(received[FRAME.size :]) == body
    assert took_s > timeout_s, "the link was not slow enough for this test to mean anything"


def test_a_peer_that_takes_nothing_times_out_while_sending(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ends[0].settimeout(0.05)
    with pytest.raises(TimeoutError):
        send_frame(ends[0], Kind.RANGE, bytes(64 << 20))


def read_all(data: bytes) -> list[Frame]:
    """Every message in these bytes, until the end or a WireError."""
    left, right = socket.socketpair()
    frames = []
    with right:
        with left:
            left.sendall(data)
        right.settimeout(TIMEOUT_S)
        try:
            while True:
                frames.append(read_frame(right, LIMIT))
        except WireError:
            return frames


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_give_messages_or_a_wire_error_and_nothing_else(data: bytes) -> None:
    assert read_all(data) == []


MESSAGES = st.lists(
    st.tuples(st.sampled_from(list(Kind)), st.binary(max_size=50)), min_size=1, max_size=4
)


@settings(max_examples=300, deadline=None)
@given(MESSAGES, st.integers(0, 1 << 12), st.integers(1, 255))
def test_a_flipped_byte_never_changes_the_body_of_a_message(
    messages: list[tuple[Kind, bytes]], at: int, flip: int
) -> None:
    data = bytearray()
    for kind, body in messages:
        data += FRAME.pack(MAGIC, VERSION, kind, 0, 0, len(body), zlib.crc32(body)) + body
    data[at % len(data)] ^= flip
    bodies = [bytes(f.body) for f in read_all(bytes(data))]
    assert bodies == [body for _, body in messages][: len(bodies)]


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=60), JSON.map(lambda value: json.dumps(value).encode())))
def test_any_json_body_is_an_object_or_a_wire_error(body: bytes) -> None:
    try:
        value: Any = json_body(Frame(Kind.HELLO, body=body))
    except WireError:
        return
    assert isinstance(value, dict)


def test_the_header_has_the_size_that_version_one_promises() -> None:
    assert struct.calcsize(">3sBBIIQI") == wire.FRAME.size == 25
