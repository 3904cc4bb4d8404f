"""Hand-over, engine to engine: `KvSender` pushes a prompt's KV, `KvReceiver` takes it in.

Both run on threads of their own and talk to the context's owner only through `post`, which puts a
message (name, request id, ...) into its inbox; they never touch the model.

    sender posts    prefill_connected, prefill_delivered (kv bytes), prefill_failed (reason)
    receiver posts  kv_connected, kv_range (start, end, blob, credit), kv_failed (reason),
                    kv_done (logits, clock, reply)
"""

import contextlib
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from ...kv.wire import (
    MAX_TEXT_BYTES,
    Kind,
    WireError,
    json_body,
    read_frame,
    send_frame,
    send_json,
)

CONNECT_TIMEOUT_S = 5.0
IDLE_TIMEOUT_S = 5.0
"""Without a byte for this long the other side is taken for dead; it beats every second."""
BEAT_S = 1.0
ACK_TIMEOUT_S = 30.0
ACCEPT_RETRY_S = 0.1
MAX_RANGES_UNDER_WAY = 8
"""Received ranges that the owner has not imported yet: bounds memory on the decode side."""
MAX_QUEUED_BYTES = 256 << 20
"""Exported ranges not sent yet: beyond this the prefill pauses, which bounds memory there."""

Post = Callable[..., None]
LOST = (OSError, WireError)


class KvReceiver:
    """Listens for hand-overs that were announced with `expect`; everyone else is refused."""

    def __init__(
        self, host: str, digest: str, layout: str, max_body_bytes: int, post: Post
    ) -> None:
        self._digest = digest
        self._layout = layout
        self._max_body_bytes = max_body_bytes
        self._post = post
        self._expected: dict[str, tuple[str, int]] = {}
        self._open: dict[str, socket.socket] = {}
        self._lock = threading.Lock()
        self._listener = socket.create_server((host, 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True, name="kv-accept").start()

    def expect(self, request_id: str, prompt_tokens: int) -> str:
        """A new ticket: whoever shows it may push the KV of that request, once."""
        ticket = secrets.token_urlsafe(24)
        with self._lock:
            self._expected[ticket] = (request_id, prompt_tokens)
        return ticket

    def forget(self, request_id: str) -> None:
        """Refuse or cut the hand-over of a request from now on."""
        with self._lock:
            for ticket, (expected_id, _) in list(self._expected.items()):
                if expected_id == request_id:
                    del self._expected[ticket]
            sock = self._open.pop(request_id, None)
        if sock is not None:
            shut(sock)

    def close(self) -> None:
        """Stop listening."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                if self._listener.fileno() < 0:
                    return
                time.sleep(ACCEPT_RETRY_S)  # no file descriptors left: that passes
                continue
            threading.Thread(
                target=self._serve, args=(sock,), daemon=True, name="kv-receive"
            ).start()

    def _serve(self, sock: socket.socket) -> None:
        request_id = ""
        try:
            with sock:
                sock.settimeout(IDLE_TIMEOUT_S)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                frame = read_frame(sock, MAX_TEXT_BYTES)
                if frame.kind is not Kind.HELLO:
                    raise WireError("the first message must be HELLO")
                hello = json_body(frame)
                with self._lock:
                    request_id, tokens = self._expected.pop(str(hello.get("ticket", "")), ("", 0))
                    if request_id:
                        self._open[request_id] = sock
                refusal = self._refusal(request_id, tokens, hello)
                if refusal:
                    send_json(sock, Kind.REFUSE, {"reason": refusal})
                    raise WireError(refusal)
                send_json(sock, Kind.OK, {"clock_s": time.monotonic()})
                self._post("kv_connected", request_id)
                self._receive(sock, request_id)
        except LOST as error:
            if request_id:
                self._post("kv_failed", request_id, reason_of(error))
        finally:
            with self._lock:
                self._open.pop(request_id, None)

    def _refusal(self, request_id: str, tokens: int, hello: dict[str, Any]) -> str:
        if not request_id:
            return "unknown ticket"
        if hello.get("digest") != self._digest:
            return "the model files differ"
        if hello.get("layout") != self._layout:
            return "the KV caches have different layouts"
        if hello.get("tokens") != tokens:
            return f"a prompt of {hello.get('tokens')} tokens; {tokens} were announced"
        return ""

    def _receive(self, sock: socket.socket, request_id: str) -> None:
        credit = threading.BoundedSemaphore(MAX_RANGES_UNDER_WAY)
        while True:
            frame = read_frame(sock, self._max_body_bytes)
            if frame.kind is Kind.BEAT:
                continue
            if frame.kind is Kind.REFUSE:
                raise WireError(f"the prefill node gave up: {json_body(frame).get('reason')}")
            if frame.kind is Kind.RANGE:
                if not credit.acquire(timeout=ACK_TIMEOUT_S):
                    raise WireError("the engine did not take in the KV in time")
                self._post(
                    "kv_range", request_id, frame.start, frame.end, frame.body, credit.release
                )
                continue
            if frame.kind is not Kind.DONE:
                raise WireError(f"unexpected message {frame.kind.name}")
            computed_at_s = ((frame.start << 32) | frame.end) / 1e6
            reply: queue.SimpleQueue[str] = queue.SimpleQueue()
            self._post("kv_done", request_id, frame.body, computed_at_s, reply.put)
            try:
                refusal = reply.get(timeout=ACK_TIMEOUT_S)
            except queue.Empty:
                refusal = "the engine did not take in the KV in time"
            if refusal:
                send_json(sock, Kind.REFUSE, {"reason": refusal})
            else:
                send_frame(sock, Kind.ACK)
            return


class KvSender:
    """Pushes the KV of one prompt. Connects at once, so that a refusal costs no computation."""

    def __init__(
        self,
        request_id: str,
        address: tuple[str, int],
        hello: dict[str, Any],
        post: Post,
    ) -> None:
        self.queued_bytes = 0
        self._request_id = request_id
        self._address = address
        self._hello = hello
        self._post = post
        self._items: queue.SimpleQueue[tuple[Kind, int, int, Any] | None] = queue.SimpleQueue()
        self._sock: socket.socket | None = None
        self._lock = threading.Lock()
        self._aborted = False

    def start(self) -> None:
        """Connect and send in a thread."""
        threading.Thread(target=self._run, daemon=True, name="kv-send").start()

    @property
    def congested(self) -> bool:
        """True while more is queued than memory should hold."""
        return self.queued_bytes > MAX_QUEUED_BYTES

    def push_range(self, start: int, end: int, blob: bytearray) -> None:
        """Queue the KV of positions [start, end)."""
        with self._lock:
            self.queued_bytes += len(blob)
        self._items.put((Kind.RANGE, start, end, blob))

    def push_done(self, logits: bytes, computed_at_s: float) -> None:
        """Queue the end: the logits of the last token, and when they were there (monotonic)."""
        self._items.put((Kind.DONE, 0, 0, (logits, computed_at_s)))

    def abort(self) -> None:
        """Cut the connection; the receiver falls back at once."""
        self._aborted = True
        self._items.put(None)
        with self._lock:
            if self._sock is not None:
                shut(self._sock)

    def _run(self) -> None:
        try:
            with socket.create_connection(self._address, timeout=CONNECT_TIMEOUT_S) as sock:
                with self._lock:
                    self._sock = sock
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                offset_s = self._greet(sock)
                self._post("prefill_connected", self._request_id)
                sent = self._send(sock, offset_s)
            if sent is not None:
                self._post("prefill_delivered", self._request_id, sent)
        except Exception as error:
            # Not only LOST: for what a bad host or a strange answer raises, someone waits too.
            if not self._aborted:
                self._post("prefill_failed", self._request_id, reason_of(error))
        finally:
            with self._lock:
                self._sock = None

    def _greet(self, sock: socket.socket) -> float:
        """Shows the ticket; returns the receiver's clock minus ours, true to half a round trip."""
        sock.settimeout(IDLE_TIMEOUT_S)
        before = time.monotonic()
        send_json(sock, Kind.HELLO, self._hello)
        answer = read_frame(sock, MAX_TEXT_BYTES)
        after = time.monotonic()
        body = json_body(answer)
        if answer.kind is not Kind.OK:
            raise WireError(f"the decode engine refused: {body.get('reason')}")
        return float(body["clock_s"]) - (before + after) / 2

    def _send(self, sock: socket.socket, offset_s: float) -> int | None:
        """Sends until the end; returns the bytes of KV sent, or None if aborted."""
        sent = 0
        while True:
            try:
                item = self._items.get(timeout=BEAT_S)
            except queue.Empty:
                send_frame(sock, Kind.BEAT)
                continue
            if item is None:
                return None
            kind, start, end, body = item
            if kind is Kind.RANGE:
                send_frame(sock, kind, body, start, end)
                sent += len(body)
                with self._lock:
                    self.queued_bytes -= len(body)
                continue
            logits, computed_at_s = body
            stamp = max(0, int((computed_at_s + offset_s) * 1e6))
            send_frame(sock, kind, logits, stamp >> 32, stamp & 0xFFFFFFFF)
            sock.settimeout(ACK_TIMEOUT_S)
            answer = read_frame(sock, MAX_TEXT_BYTES)
            if answer.kind is not Kind.ACK:
                raise WireError(f"the decode engine refused: {json_body(answer).get('reason')}")
            return sent


def shut(sock: socket.socket) -> None:
    """Cut a connection that another thread is blocked on."""
    with contextlib.suppress(OSError):  # it may be gone already
        sock.shutdown(socket.SHUT_RDWR)


def reason_of(error: Exception) -> str:
    """A failure in words."""
    if isinstance(error, TimeoutError):
        return f"nothing came for {IDLE_TIMEOUT_S:g} s"
    return str(error) or type(error).__name__
