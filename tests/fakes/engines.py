"""Real engine processes for tests, and what goes wrong between them."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Self

from llmster_daemon.engines.base import Chunk, GenerateParams, Generation
from llmster_daemon.engines.local import LocalEngine
from llmster_daemon.engines.worker.backend import EngineSpec

READY_LIMIT_S = 60.0
EXIT_LIMIT_S = 15.0
IDLE_LIMIT_S = 10.0
POLL_S = 0.01


async def until(condition: Callable[[], bool], what: str, limit_s: float = IDLE_LIMIT_S) -> None:
    """Wait for a condition; fails with `what` when it does not come true in time."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        await asyncio.sleep(POLL_S)


class EngineProcess:
    """A process of `llmster_daemon.engines.worker.main`, and engines connected to it.

    As an async context manager it starts, connects `engine`, waits until the model is loaded, and
    stops. A test that shares a process between event loops uses `start`, `connect` and `stop`.
    `options` are those of the fake model.
    """

    def __init__(
        self,
        backend: str = "fake",
        model_path: Path | str = "",
        *,
        digest: str = "0" * 64,
        context_length: int = 1024,
        slots: int = 4,
        orphan_timeout_s: float = 60.0,
        **options: Any,
    ) -> None:
        # Not pytest's tmp_path: a socket's path must be short.
        self.directory = Path(tempfile.mkdtemp(prefix="llmster-test-"))
        self.spec = EngineSpec(
            instance_id=f"test-{backend}",
            backend=backend,
            model_path=str(model_path),
            digest=digest,
            socket_path=str(self.directory / "engine.sock"),
            fatal_path=str(self.directory / "fatal.json"),
            context_length=context_length,
            slots=slots,
            orphan_timeout_s=orphan_timeout_s,
            options=options,
        )
        self.events: list[dict[str, Any]] = []
        """States that the process told: progress, ready."""
        self.lost = 0
        """How many connections ended."""
        self._process: subprocess.Popen[bytes] | None = None
        self._engine: LocalEngine | None = None

    async def __aenter__(self) -> Self:
        self.start()
        try:
            self._engine = await self.connect()
        except BaseException:
            self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            if self._engine is not None:
                await self._engine.close()
        finally:
            self.stop()

    @property
    def engine(self) -> LocalEngine:
        """The engine that the context manager connected."""
        assert self._engine is not None, "use `async with`"
        return self._engine

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """What the process wrote to stdout and stderr."""
        return (self.directory / "log").read_text(errors="replace")

    @property
    def fatal(self) -> dict[str, Any]:
        """The reason that the process left behind."""
        value: dict[str, Any] = json.loads(Path(self.spec.fatal_path).read_text())
        return value

    def start(self) -> None:
        """Start the process; does not wait for it."""
        spec_path = self.directory / "spec.json"
        spec_path.write_text(self.spec.model_dump_json())
        command = [sys.executable, "-m", "llmster_daemon.engines.worker.main", str(spec_path)]
        with (self.directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    async def connect(self) -> LocalEngine:
        """Another connection, once the model is loaded."""
        deadline = time.monotonic() + READY_LIMIT_S
        ready = asyncio.Event()

        def on_state(event: dict[str, Any]) -> None:
            self.events.append(event)
            if event["ev"] == "ready":
                ready.set()

        def on_lost() -> None:
            self.lost += 1
            ready.set()

        while True:
            assert self.running, f"the engine process ended: {self.log}"
            assert time.monotonic() < deadline, f"the engine can't be reached: {self.log}"
            with contextlib.suppress(OSError):
                engine = await LocalEngine.connect(self.spec.socket_path, on_state, on_lost)
                break
            await asyncio.sleep(POLL_S)
        async with asyncio.timeout_at(asyncio.get_running_loop().time() + READY_LIMIT_S):
            await ready.wait()
        assert not engine.lost, f"the engine process ended: {self.log}"
        return engine

    async def exit_code(self, limit_s: float = EXIT_LIMIT_S) -> int:
        """Wait for the process to end by itself; minus the signal's number if one ended it."""
        assert self._process is not None, "not started"
        return await asyncio.to_thread(self._process.wait, limit_s)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send the process a signal."""
        os.kill(self.pid, number)

    def stop(self) -> None:
        """End the process for certain and remove its files."""
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait(EXIT_LIMIT_S)
        shutil.rmtree(self.directory, ignore_errors=True)
