"""Frames between daemon and engine process, over real sockets."""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmster_daemon.engines.worker import ipc
from llmster_daemon.engines.worker.ipc import (
    MAX_FRAME_BYTES,
    Connection,
    FrameError,
    frame_length,
    pack,
    read_frame,
    unpack,
)

LIMIT_S = 20.0
BLOCK = "x" * 100_000


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected sockets with small buffers: engine's side, daemon's side."""
    left, right = socket.socketpair()
    for sock in (left, right):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 13)
    right.settimeout(LIMIT_S)
    with left, right:
        yield left, right


def read_all(sock: socket.socket, count: int) -> list[Any]:
    messages = []
    while len(messages) < count:
        message = read_frame(sock)
        assert message is not None, f"the end after {len(messages)} messages"
        messages.append(message)
    return messages


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def test_a_message_arrives_as_it_was_sent(ends: tuple[socket.socket, socket.socket]) -> None:
    message = {"ev": "step", "out": [["r", "é\U0001f600", 1, None]], "blob": b"\0\xff", "f": 0.5}
    ends[0].sendall(pack(message))
    assert read_frame(ends[1]) == message


def test_the_end_of_a_connection_is_told_from_a_message(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ends[0].sendall(pack({"n": 1}))
    ends[0].close()
    assert read_frame(ends[1]) == {"n": 1}
    assert read_frame(ends[1]) is None


@pytest.mark.parametrize("cut", [1, 3, 4, 5])
def test_a_message_that_is_cut_off_is_an_end(
    ends: tuple[socket.socket, socket.socket], cut: int
) -> None:
    ends[0].sendall(pack({"n": 1})[:cut])
    ends[0].close()
    assert read_frame(ends[1]) is None


def test_a_message_too_large_is_refused_where_it_is_sent() -> None:
    with pytest.raises(FrameError, match="at most 67,108,864"):
        pack({"blob": bytes(MAX_FRAME_BYTES)})


def test_a_message_too_large_is_refused_before_it_is_read() -> None:
    assert frame_length(struct.pack(">I", MAX_FRAME_BYTES)) == MAX_FRAME_BYTES
    with pytest.raises(FrameError, match="announced"):
        frame_length(struct.pack(">I", MAX_FRAME_BYTES + 1))


@pytest.mark.parametrize("number", [1 << 64, -(1 << 63) - 1])
def test_a_number_that_the_format_cannot_carry_is_refused(number: int) -> None:
    with pytest.raises(FrameError):
        pack({"seed": number})


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xc1", id="never used byte"),
        pytest.param(msgpack.packb([1]), id="a list"),
        pytest.param(msgpack.packb(None), id="nil"),
        pytest.param(msgpack.packb({"a": 1}) + b"\0", id="something after"),
        pytest.param(msgpack.packb({"a": "xyz"})[:-1], id="cut off"),
        pytest.param(msgpack.packb({1: 2}), id="a number as key"),
        pytest.param(b"\xa2\xff\xfe", id="not UTF-8"),
        pytest.param(b"\x91" * 100_000, id="too deep"),
        pytest.param(b"\xdf\xff\xff\xff\xff", id="a map of four billion"),
    ],
)
def test_a_body_that_is_not_a_map_is_refused(body: bytes) -> None:
    with pytest.raises(FrameError):
        unpack(body)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=80))
def test_random_bytes_are_a_map_or_a_frame_error_and_nothing_else(body: bytes) -> None:
    with contextlib.suppress(FrameError):
        assert isinstance(unpack(body), dict)


def test_messages_keep_their_order_when_the_socket_takes_only_parts_of_them(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    connection = Connection(ends[0])
    for n in range(20):
        connection.send({"n": n, "text": BLOCK})
        connection.send({"n": n, "text": ""})
    received = read_all(ends[1], 40)
    assert [(m["n"], m["text"]) for m in received] == [
        (n, text) for n in range(20) for text in (BLOCK, "")
    ]
    connection.close()


def test_messages_keep_their_order_while_the_reader_catches_up(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    """The reader empties the backlog again and again while more is sent."""
    connection = Connection(ends[0])
    count = 2000

    def send_all() -> None:
        for n in range(count):
            connection.send({"n": n, "text": "y" * (n % 97) * 20})

    sender = threading.Thread(target=send_all)
    sender.start()
    received = read_all(ends[1], count)
    sender.join(LIMIT_S)
    assert [m["n"] for m in received] == list(range(count))
    connection.close()


def test_sending_never_waits_for_the_reader(ends: tuple[socket.socket, socket.socket]) -> None:
    connection = Connection(ends[0])
    began = time.monotonic()
    for n in range(100):
        connection.send({"n": n, "text": BLOCK})
    # Nobody reads: were it to block once, it would block for ever.
    assert time.monotonic() - began < LIMIT_S
    assert not connection.closed
    assert [m["n"] for m in read_all(ends[1], 100)] == list(range(100))
    connection.close()


def test_a_reader_that_is_too_slow_is_dropped(
    ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ipc, "MAX_BACKLOG_BYTES", 1 << 20)
    connection = Connection(ends[0])
    sent = 0
    while not connection.closed:
        connection.send({"n": sent, "text": BLOCK})
        sent += 1
        assert sent < 100
    connection.send({"n": -1})  # a dropped connection takes messages, and forgets them
    # Its own reader, which waits in `recv`, sees the end too.
    assert ends[0].recv(1) == b""
    received = []
    with contextlib.suppress(ConnectionError):
        while (message := read_frame(ends[1])) is not None:
            received.append(message["n"])
    assert received == list(range(len(received)))
    assert len(received) < sent


def test_a_reader_that_is_gone_closes_the_connection_and_raises_nothing(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    connection = Connection(ends[0])
    ends[1].close()
    connection.send({"n": 1})
    assert connection.closed
    connection.send({"n": 2})
    connection.close()


def test_a_reader_that_goes_while_a_backlog_waits_closes_the_connection(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    connection = Connection(ends[0])
    for n in range(10):
        connection.send({"n": n, "text": BLOCK})
    ends[1].close()
    wait_until(lambda: connection.closed, "the connection stays open")


def test_closing_with_a_backlog_ends_its_thread(ends: tuple[socket.socket, socket.socket]) -> None:
    connection = Connection(ends[0])
    for n in range(10):
        connection.send({"n": n, "text": BLOCK})
    writer = connection._writer
    assert writer is not None
    connection.close()
    writer.join(LIMIT_S)
    assert not writer.is_alive()
