"""Frames between the node daemon and an engine process: u32 length, then msgpack.

One frame per step carries the output of every sequence: a socket message costs tens of
microseconds, so one message per token would cost more than the tokens.
"""

import contextlib
import socket
import struct
import threading
from collections import deque
from typing import Any

import msgpack

MAX_FRAME_BYTES = 64 << 20
MAX_BACKLOG_BYTES = 64 << 20
"""A daemon that reads slower than this is treated as gone, so that it can't hold the engine up."""

LENGTH = struct.Struct(">I")


class FrameError(ValueError):
    """The peer sent something that is not a frame."""


def pack(message: dict[str, Any]) -> bytes:
    """A whole frame. Raises FrameError."""
    try:
        body: bytes = msgpack.packb(message, use_bin_type=True)
    except (OverflowError, ValueError) as error:  # a number beyond 64 bits, half a character
        raise FrameError(f"it holds what msgpack can't carry: {error}") from error
    if len(body) > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {len(body):,} bytes; at most {MAX_FRAME_BYTES:,} are allowed")
    return LENGTH.pack(len(body)) + body


def unpack(body: bytes) -> dict[str, Any]:
    """The message in a frame's body. Raises FrameError."""
    try:
        message = msgpack.unpackb(body, raw=False, strict_map_key=True)
    except Exception as error:
        raise FrameError(f"not msgpack: {error}") from error
    if not isinstance(message, dict):
        raise FrameError("a frame must hold a map")
    return message


def frame_length(header: bytes) -> int:
    """The body's length in bytes. Raises FrameError."""
    (length,) = LENGTH.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {length:,} bytes announced")
    return int(length)


def read_exactly(sock: socket.socket, count: int) -> bytes | None:
    """`count` bytes, or None when the peer has closed. Blocks."""
    buffer = bytearray(count)
    view = memoryview(buffer)
    while view:
        received = sock.recv_into(view)
        if received == 0:
            return None
        view = view[received:]
    return bytes(buffer)


def read_frame(sock: socket.socket) -> dict[str, Any] | None:
    """The next message, or None when the peer has closed. Blocks. Raises FrameError."""
    header = read_exactly(sock, LENGTH.size)
    if header is None:
        return None
    body = read_exactly(sock, frame_length(header))
    return None if body is None else unpack(body)


class Connection:
    """The sending side of one connection: never blocks the caller.

    A frame goes out at once if the socket takes it; what it does not take, a thread sends later.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.closed = False
        self._backlog: deque[bytes] = deque()
        self._backlog_bytes = 0
        self._lock = threading.Lock()
        self._more = threading.Condition(self._lock)
        self._writer: threading.Thread | None = None

    def send(self, message: dict[str, Any]) -> None:
        """Send, or queue. A peer that is gone or far behind is closed, silently."""
        data = pack(message)
        with self._lock:
            if self.closed:
                return
            if not self._backlog:
                try:
                    sent = self.sock.send(data, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    sent = 0
                except OSError:
                    self._close()
                    return
                if sent == len(data):
                    return
                data = data[sent:]
            self._backlog.append(data)
            self._backlog_bytes += len(data)
            if self._backlog_bytes > MAX_BACKLOG_BYTES:
                self._close()
                return
            if self._writer is None:
                self._writer = threading.Thread(target=self._drain, daemon=True, name="ipc-writer")
                self._writer.start()
            self._more.notify()

    def close(self) -> None:
        """Close both directions; the reader sees the end."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if not self.closed:
            self.closed = True
            self._backlog.clear()
            self._backlog_bytes = 0
            self._more.notify()
            with contextlib.suppress(OSError):  # it may be gone already
                self.sock.shutdown(socket.SHUT_RDWR)

    def _drain(self) -> None:
        while True:
            with self._lock:
                while not self._backlog and not self.closed:
                    self._more.wait()
                if self.closed:
                    return
                data = self._backlog[0]
            try:
                self.sock.sendall(data)
            except OSError:
                self.close()
                return
            with self._lock:
                # The entry stays in the queue while it is sent, so that `send` keeps the order.
                if self._backlog:
                    self._backlog.popleft()
                    self._backlog_bytes -= len(data)
