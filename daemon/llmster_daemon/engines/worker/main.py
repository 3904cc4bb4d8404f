"""Entry of an engine process: `python -m llmster_daemon.engines.worker.main SPEC_FILE`.

Listens on its Unix socket first, so that the daemon can follow the loading; loads; serves. Any
number of connections may come and go (a restarted daemon, for one). It survives its daemon, and
ends by itself when none has been connected for `orphan_timeout_s`.

Exit codes: 0 told to stop or orphaned, 3 the model can't be loaded (starting again won't help),
1 anything else. For 3 and 1 the reason is in the file `fatal_path`, as JSON.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ...protocol.base import Frozen
from ..base import GenerateParams
from .backend import Backend, BackendError, EngineSpec, LoadError
from .ipc import Connection, FrameError, read_frame
from .kvport import ACCEPT_RETRY_S, KvReceiver, KvSender
from .loop import EngineLoop

EXIT_CANNOT_LOAD = 3
ORPHAN_CHECK_S = 1.0
MIN_BODY_BYTES = 4 << 20


class GenerateMessage(GenerateParams):
    """What the loop relies on; everything else in a message is ignored."""

    await_kv: bool = False


class PrefillMessage(Frozen):
    """Where to push what."""

    tokens: list[int]
    host: str
    port: int
    ticket: str


class Server:
    """The socket of an engine process: connections in, messages to the loop, events out."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._connections: list[Connection] = []
        self._owners: dict[str, Connection] = {}
        self._lock = threading.Lock()
        self._state: dict[str, Any] = {"ev": "progress", "value": 0.0}
        self._loop: EngineLoop | None = None
        self._backend: Backend | None = None
        self._last_seen_s = time.monotonic()
        path = Path(spec.socket_path)
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Whoever can connect can generate: only the user that runs the daemon may.
        old = os.umask(0o177)
        try:
            self._listener.bind(str(path))
        finally:
            os.umask(old)
        self._listener.listen(8)
        threading.Thread(target=self._accept, daemon=True, name="ipc-accept").start()
        threading.Thread(target=self._watch_orphaned, daemon=True, name="orphan-watch").start()

    def announce(self, state: dict[str, Any]) -> None:
        """Tell all daemons, and those that connect later, how far the engine is."""
        with self._lock:
            self._state = state
            connections = list(self._connections)
        for connection in connections:
            connection.send(state)

    def serve(self, backend: Backend, loop: EngineLoop) -> None:
        """Run the loop until it is told to stop. Blocks."""
        self._backend = backend
        self._loop = loop
        self.announce(
            {
                "ev": "ready",
                "context_length": backend.cells,
                "slots": backend.slots,
                "kv_port": loop.kv_port,
            }
        )
        loop.run()

    def emit(self, event: dict[str, Any]) -> None:
        """Send an event to the connections whose requests it is about."""
        if event["ev"] == "beat":
            with self._lock:
                connections = list(self._connections)
            for connection in connections:
                connection.send(event)
            return
        if event["ev"] != "step":
            owner = self._owner(event["id"], event["ev"] in ("error", "prefilled", "overflow"))
            if owner is not None:
                owner.send(event)
            return
        by_owner: dict[Connection, list[Any]] = {}
        for item in event["out"]:
            owner = self._owner(item[0], item[3] is not None)
            if owner is not None:
                by_owner.setdefault(owner, []).append(item)
        for owner, items in by_owner.items():
            owner.send({"ev": "step", "out": items, "stats": event["stats"]})

    def _owner(self, request_id: str, ends: bool) -> Connection | None:
        """Whose request it is. One that ends frees its id before its daemon can hear of that."""
        if ends:
            return self._owners.pop(request_id, None)
        return self._owners.get(request_id)

    def _claim(self, request_id: str, connection: Connection) -> bool:
        """Make it the owner of a new request; False, and an answer, if the id is taken."""
        with self._lock:
            if request_id not in self._owners:
                self._owners[request_id] = connection
                return True
        connection.send(
            {
                "ev": "error",
                "id": request_id,
                "code": "duplicate_id",
                "message": "a request of this id is under way",
                "status": 409,
            }
        )
        return False

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                time.sleep(ACCEPT_RETRY_S)  # no file descriptors left: that passes
                continue
            connection = Connection(sock)
            with self._lock:
                self._connections.append(connection)
                state = self._state
            connection.send({"ev": "hello", "pid": os.getpid(), "id": self._spec.instance_id})
            connection.send(state)
            threading.Thread(
                target=self._read, args=(connection,), daemon=True, name="ipc-read"
            ).start()

    def _read(self, connection: Connection) -> None:
        try:
            while (message := read_frame(connection.sock)) is not None:
                self._take(connection, message)
        except (FrameError, OSError) as error:
            sys.stderr.write(f"a connection ends: {error}\n")
        finally:
            connection.close()
            with self._lock:
                self._connections.remove(connection)
                self._last_seen_s = time.monotonic()
            if self._loop is not None:
                for request_id, owner in list(self._owners.items()):
                    if owner is connection:
                        self._owners.pop(request_id, None)
                        self._loop.post("cancel", request_id)
            connection.sock.close()

    def _take(self, connection: Connection, message: dict[str, Any]) -> None:
        """One message of a daemon. A message that is not understood is answered, never fatal."""
        request_id = str(message.get("id", ""))
        try:
            self._dispatch(connection, str(message.get("op")), request_id, message)
        except (ValueError, TypeError, KeyError, BackendError) as error:
            # pydantic's ValidationError is a ValueError; its text may quote a prompt.
            detail = type(error).__name__ if isinstance(error, ValueError) else str(error)
            connection.send(
                {
                    "ev": "error",
                    "id": request_id,
                    "code": "bad_message",
                    "message": f"the engine did not understand the message ({detail})",
                    "status": 400,
                }
            )

    def _dispatch(
        self, connection: Connection, op: str, request_id: str, message: dict[str, Any]
    ) -> None:
        if op == "stop":
            if self._loop is None:
                os._exit(0)
            self._loop.post("stop")
            return
        loop, backend = self._loop, self._backend
        if loop is None or backend is None:
            raise BackendError("the model is still loading")
        if op == "generate":
            generate = GenerateMessage.model_validate(message)
            tokens = generate.tokens
            if tokens is None:
                tokens = backend.tokenize(generate.prompt or "", generate.add_bos)
            if self._claim(request_id, connection):
                loop.post("generate", request_id, generate, generate.await_kv, tokens)
        elif op == "prefill":
            prefill = PrefillMessage.model_validate(message)
            if self._claim(request_id, connection):
                loop.post("prefill", request_id, prefill.model_dump())
        elif op == "cancel":
            self._owners.pop(request_id, None)
            loop.post("cancel", request_id)
        elif op == "recompute":
            loop.post("recompute", request_id, str(message.get("reason", "")))
        elif op == "tokenize":
            tokens = backend.tokenize(str(message["text"]), bool(message.get("add_bos")))
            connection.send({"ev": "tokens", "id": request_id, "tokens": tokens})
        else:
            raise BackendError(f"unknown operation '{op[:40]}'")

    def _watch_orphaned(self) -> None:
        while True:
            time.sleep(ORPHAN_CHECK_S)
            with self._lock:
                alone = not self._connections
                since = time.monotonic() - self._last_seen_s
            if alone and since > self._spec.orphan_timeout_s:
                sys.stderr.write(f"no daemon for {since:.0f} s: the engine ends\n")
                os._exit(0)


def build_backend(spec: EngineSpec, server: Server) -> Backend:
    """Load the model. Raises LoadError."""
    shown = [-1.0]

    def progress(value: float) -> None:
        if value - shown[0] >= 0.02 or value >= 1.0:
            shown[0] = value
            server.announce({"ev": "progress", "value": value})

    if spec.backend == "fake":
        from ..fake import FakeBackend

        return FakeBackend(spec, progress)
    if spec.backend == "llamacpp":
        from ..llamacpp.backend import LlamaBackend

        return LlamaBackend(spec, progress)
    raise LoadError(f"unknown engine '{spec.backend}'")


def build_loop(spec: EngineSpec, backend: Backend, server: Server) -> EngineLoop:
    """The loop with its hand-over port."""
    # The largest body is a range of the whole cache, or the logits.
    largest = max(backend.cells * backend.cell_bytes, MIN_BODY_BYTES)
    return EngineLoop(
        backend,
        server.emit,
        lambda post: KvReceiver(spec.kv_host, spec.digest, backend.layout, largest, post),
        lambda request_id, address, hello, post: KvSender(
            request_id, address, {**hello, "digest": spec.digest}, post
        ),
    )


def main() -> int:
    """Run the process; returns its exit code."""
    faulthandler.enable()
    # Ctrl-C in a terminal is meant for the daemon, which decides about its engines.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    spec = EngineSpec.model_validate_json(Path(sys.argv[1]).read_text())
    server = Server(spec)
    fatal = Path(spec.fatal_path)
    try:
        backend = build_backend(spec, server)
        server.serve(backend, build_loop(spec, backend, server))
        backend.close()
    except LoadError as error:
        fatal.write_text(json.dumps({"code": "load_failed", "message": str(error)}))
        return EXIT_CANNOT_LOAD
    except Exception as error:
        fatal.write_text(json.dumps({"code": "engine_error", "message": f"{error!r}"}))
        raise
    finally:
        Path(spec.socket_path).unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # Threads may still sit in native calls; leaving through the interpreter would wait for them.
    os._exit(code)
