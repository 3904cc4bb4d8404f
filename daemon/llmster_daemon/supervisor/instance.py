"""One loaded model: the task that owns its process, and nobody else touches it."""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..engines.local import LocalEngine
from ..engines.worker.backend import EngineSpec
from ..engines.worker.main import EXIT_CANNOT_LOAD
from ..errors import HomeError, LlmsterError
from ..protocol.node import InstanceInfo
from .process import (
    PYTHON,
    Handle,
    Watched,
    describe_exit,
    is_alive,
    spawn,
    started_ticks,
    tail,
    write_atomically,
)
from .state import Life

log = logging.getLogger(__name__)

CONNECT_INTERVAL_S = 0.02
CONNECT_LIMIT_S = 30.0
STOP_LIMIT_S = 5.0
HANG_LIMIT_S = 120.0
"""An engine that shows no sign of life for this long is killed; one step can take long."""
ORPHAN_TIMEOUT_S = 300.0
"""An engine that no daemon is connected to for this long ends by itself."""
MAX_SOCKET_PATH = 100
"""The kernel allows 107 bytes."""


@dataclass(frozen=True, slots=True)
class InstancePaths:
    """Where the files of an instance are, below a node's home."""

    handle: Path
    spec: Path
    fatal: Path
    log: Path
    socket: Path

    @classmethod
    def under(cls, home: Path, instance_id: str) -> "InstancePaths":
        """Paths from an id, which may hold characters that file names must not."""
        name = quote(instance_id, safe="@.-_")
        run = home / "run"
        short = hashlib.sha256(f"{home}\0{instance_id}".encode()).hexdigest()[:12]
        socket_path = run / f"{short}.sock"
        if len(str(socket_path).encode()) > MAX_SOCKET_PATH:
            private = Path(tempfile.gettempdir()) / f"llmster-{os.getuid()}"
            private.mkdir(mode=0o700, exist_ok=True)
            if private.stat().st_uid != os.getuid():
                raise LlmsterError("unsafe_directory", f"{private} belongs to another user")
            socket_path = private / f"{short}.sock"
        return cls(
            run / f"{name}.handle.json",
            run / f"{name}.spec.json",
            run / f"{name}.fatal.json",
            home / "logs" / f"engine-{name}.log",
            socket_path,
        )


class Instance:
    """A model that should be loaded. `run` owns it until it is unloaded or detached."""

    def __init__(
        self,
        handle: Handle,
        paths: InstancePaths,
        threads: int,
        on_change: Callable[[], None],
        hang_limit_s: float = HANG_LIMIT_S,
        orphan_timeout_s: float = ORPHAN_TIMEOUT_S,
    ) -> None:
        self.handle = handle
        self.life = Life()
        self.engine: LocalEngine | None = None
        self.home_error: HomeError | None = None
        """Why the last start failed, where that was the home's fault."""
        self._paths = paths
        self._threads = threads
        self._on_change = on_change
        self._hang_limit_s = hang_limit_s
        self._orphan_timeout_s = orphan_timeout_s
        self._process: Watched | None = None
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self._halting = False
        self._verdict: str | None = None
        """Why we killed the process, where it did not end by itself."""

    def info(self) -> InstanceInfo:
        """What the pool is told."""
        status = self.engine.status if self.engine is not None else None
        options = self.handle.options
        return InstanceInfo(
            id=self.handle.instance_id,
            model=self.handle.model,
            digest=self.handle.digest,
            state="stopping" if self.life.state == "gone" else self.life.state,
            progress=self.life.progress,
            pid=self.handle.pid if self._process is not None else None,
            context_length=options.context_length or 0,
            slots=options.slots,
            active=status.active if status else 0,
            waiting=status.waiting if status else 0,
            kv_used_cells=status.kv_used_cells if status else 0,
            restarts=self.life.restarts,
            reason=self.life.reason,
        )

    @property
    def ready(self) -> bool:
        """True if it can be asked now."""
        return self.life.state == "ready" and self.engine is not None and not self.engine.lost

    async def settled(self) -> None:
        """Until it is ready, failed or gone, or waits to be started again."""
        await self._settled.wait()

    def unload(self) -> None:
        """Have `run` stop the engine and end."""
        self._become(self.life.unloaded())
        self._wake.set()

    async def halt(self) -> None:
        """Stop the engine but keep the instance wanted: it comes back with the next daemon."""
        self._halting = True
        self._wake.set()
        process = self._process
        if process is None:
            return
        if self.engine is not None:
            await self.engine.stop()
        else:
            process.signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_LIMIT_S):
                await process.wait()
        await process.kill()

    async def run(self) -> None:
        """Keep the engine running until it is unloaded. Cancelling this leaves it running."""
        try:
            while self.life.state != "gone" and not self._halting:
                if self.life.state == "failed":
                    self._wake.clear()
                    await self._wake.wait()
                elif self.life.state == "backoff":
                    await self._sleep_until(self.life.retry_at_s or 0.0)
                    self._become(self.life.ticked(time.monotonic()))
                else:
                    await self._live_once()
            if self.life.state == "gone":
                self._forget()
        finally:
            if self.engine is not None:
                await self.engine.close()
            if self._process is not None:
                self._process.close()

    async def _live_once(self) -> None:
        """From a start (or from finding the process again) to its end."""
        try:
            self._process = self._find() or self._start()
        except (LlmsterError, OSError) as error:
            self.home_error = error if isinstance(error, HomeError) else None
            self._become(self.life.exited(time.monotonic(), str(error)))
            return
        process = self._process
        self.home_error = self._verdict = None
        self._become(self.life.spawned())
        try:
            await self._attend(process)
        finally:
            if process.ended:
                process.close()
                self._process = None
        if self.engine is not None:
            await self.engine.close()
            self.engine = None
        reason, permanent = self._post_mortem(process.status)
        if self.life.state != "stopping" and not self._halting:
            log.warning("instance %s: %s", self.handle.instance_id, reason)
        self._become(self.life.exited(time.monotonic(), reason, permanent))

    async def _attend(self, process: Watched) -> None:
        """Connect, then wait until the process has ended; stop it when that is wanted."""
        loop = asyncio.get_running_loop()
        end = loop.create_task(process.wait())
        stop_at: float | None = None
        started = time.monotonic()
        try:
            while not end.done():
                now = time.monotonic()
                if self.life.state == "stopping":
                    if stop_at is None:
                        stop_at = now + STOP_LIMIT_S
                        if self.engine is not None:
                            await self.engine.stop()
                        else:
                            process.signal(signal.SIGTERM)
                    elif now > stop_at:
                        await process.kill()
                elif self.engine is None or self.engine.lost:
                    await self._connect()
                    if self.engine is None and now - started > CONNECT_LIMIT_S:
                        self._verdict = "the engine process could not be reached and was killed"
                        await process.kill()
                elif now - self.engine.last_event_s > self._hang_limit_s and self.ready:
                    self._verdict = (
                        f"the engine process did not answer for {self._hang_limit_s:g} s"
                        " and was killed"
                    )
                    await process.kill()
                connecting = self.engine is None and self.life.state != "stopping"
                self._wake.clear()
                wake = loop.create_task(self._wake.wait())
                await asyncio.wait(
                    (end, wake),
                    timeout=CONNECT_INTERVAL_S if connecting else 0.5,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                wake.cancel()
        finally:
            end.cancel()

    async def _connect(self) -> None:
        if self.engine is not None:
            await self.engine.close()
            self.engine = None
        with contextlib.suppress(OSError, TimeoutError):
            self.engine = await LocalEngine.connect(
                self.handle.socket_path, self._on_engine_state, self._wake.set
            )

    def _on_engine_state(self, event: dict[str, Any]) -> None:
        if event["ev"] == "progress":
            self._become(self.life.progressed(float(event["value"])))
        elif event["ev"] == "ready":
            self._become(self.life.became_ready(time.monotonic()))

    def _find(self) -> Watched | None:
        """The process that an earlier daemon started, if it still runs."""
        if not is_alive(self.handle) or self.handle.pid is None:
            return None
        try:
            process = Watched(self.handle.pid)
        except ProcessLookupError:
            return None
        log.info("instance %s: found again, pid %s", self.handle.instance_id, process.pid)
        return process

    def _start(self) -> Watched:
        handle = self.handle
        options = handle.options
        spec = EngineSpec(
            instance_id=handle.instance_id,
            backend=handle.engine,
            model_path=handle.model_path,
            digest=handle.digest,
            socket_path=str(self._paths.socket),
            fatal_path=str(self._paths.fatal),
            context_length=options.context_length or 0,
            slots=options.slots,
            threads=options.threads or self._threads,
            gpu_layers=options.gpu_layers,
            prefix_cache=options.prefix_cache,
            orphan_timeout_s=self._orphan_timeout_s,
            options=dict(handle.extra),
        )
        write_atomically(self._paths.spec, spec.model_dump_json())
        self._paths.fatal.unlink(missing_ok=True)
        self._paths.socket.unlink(missing_ok=True)
        # The handle comes first: a process without one would be lost if we died just here.
        self._save(handle.model_copy(update={"pid": None, "started_ticks": None}))
        pid = spawn(
            [PYTHON, "-m", "llmster_daemon.engines.worker.main", str(self._paths.spec)],
            self._paths.log,
        )
        process = Watched(pid)
        self._save(handle.model_copy(update={"pid": pid, "started_ticks": started_ticks(pid)}))
        return process

    def _save(self, handle: Handle) -> None:
        self.handle = handle
        write_atomically(self._paths.handle, handle.model_dump_json(indent=1))

    def _post_mortem(self, status: int | None) -> tuple[str, bool]:
        """Why the process ended, and whether that is for good."""
        if self._verdict is not None:
            return self._verdict, False
        try:
            reason = str(json.loads(self._paths.fatal.read_text())["message"])
        except (OSError, ValueError, KeyError):
            reason = describe_exit(status)
            last = tail(self._paths.log)
            if status not in (0, None, -signal.SIGKILL) and last:
                reason += f": {last}"
        return reason, status == EXIT_CANNOT_LOAD

    def _forget(self) -> None:
        for path in (self._paths.spec, self._paths.fatal, self._paths.socket, self._paths.handle):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                # The handle then brings the instance back with the next daemon.
                log.warning("files of %s can't be removed: %s", self.handle.instance_id, error)
                return

    async def _sleep_until(self, when_s: float) -> None:
        self._wake.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, when_s - time.monotonic())):
                await self._wake.wait()

    def _become(self, life: Life) -> None:
        if life == self.life:
            return
        changed = life.state != self.life.state
        self.life = life
        if life.state in ("ready", "failed", "backoff", "gone"):
            self._settled.set()
        elif changed:
            self._settled.clear()
        self._on_change()
