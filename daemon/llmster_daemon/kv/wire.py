"""The hand-over on a TCP connection, prefill engine to decode engine.

    HELLO {ticket, layout, digest, tokens}  ->        before the first byte of KV
                                            <-  OK | REFUSE {reason}
    RANGE start, end, KV                    ->        as prefill computes, in order
    BEAT                                    ->        at least once a second
    DONE logits of the last prompt token    ->
                                            <-  ACK   when the KV is imported
Either side may send REFUSE and close. Every body carries a CRC-32, checked before it is used.
"""

import json
import socket
import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

VERSION = 1
MAGIC = b"LKV"
FRAME = struct.Struct(">3sBBIIQI")
"""magic, version, kind, start, end, body bytes, CRC-32 of the body."""
MAX_TEXT_BYTES = 64 << 10


class Kind(IntEnum):
    HELLO = 1
    OK = 2
    REFUSE = 3
    RANGE = 4
    BEAT = 5
    DONE = 6
    ACK = 7


class WireError(Exception):
    """The peer broke the protocol, sent damaged bytes, or went away."""


@dataclass(slots=True)
class Frame:
    """One message; `start` and `end` are token positions where the kind has them."""

    kind: Kind
    start: int = 0
    end: int = 0
    body: bytearray | bytes | memoryview = b""


def send_frame(
    sock: socket.socket,
    kind: Kind,
    body: bytes | bytearray | memoryview = b"",
    start: int = 0,
    end: int = 0,
) -> None:
    """Send one message whole. Blocks; no pause in it is longer than the timeout. Raises OSError."""
    header = FRAME.pack(MAGIC, VERSION, kind, start, end, len(body), zlib.crc32(body))
    sock.sendall(header)
    # Not sendall: its timeout is for the whole body, which takes long on a slow link.
    view = memoryview(body)
    while view:
        view = view[sock.send(view) :]


def send_json(sock: socket.socket, kind: Kind, value: dict[str, Any]) -> None:
    """Send a message whose body is JSON. Blocks. Raises OSError."""
    send_frame(sock, kind, json.dumps(value).encode())


def _fill(sock: socket.socket, view: memoryview) -> None:
    while view:
        received = sock.recv_into(view)
        if received == 0:
            raise WireError("the peer closed the connection")
        view = view[received:]


def read_frame(sock: socket.socket, max_body_bytes: int) -> Frame:
    """The next message. Blocks up to the socket's timeout. Raises WireError or OSError."""
    header = bytearray(FRAME.size)
    _fill(sock, memoryview(header))
    magic, version, kind, start, end, length, checksum = FRAME.unpack(header)
    if magic != MAGIC:
        raise WireError("not a hand-over connection")
    if version != VERSION:
        raise WireError(f"the peer speaks hand-over version {version}, this is {VERSION}")
    if length > max_body_bytes:
        raise WireError(f"a body of {length:,} bytes; at most {max_body_bytes:,} are expected")
    try:
        known = Kind(kind)
    except ValueError:
        raise WireError(f"unknown message kind {kind}") from None
    body = bytearray(length)
    _fill(sock, memoryview(body))
    if zlib.crc32(body) != checksum:
        raise WireError("bytes were damaged on the way (CRC-32 differs)")
    return Frame(known, start, end, body)


def json_body(frame: Frame) -> dict[str, Any]:
    """The JSON of a message. Raises WireError."""
    try:
        value = json.loads(bytes(frame.body))
    except (ValueError, RecursionError) as error:
        raise WireError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise WireError("a JSON body must be an object")
    return value
