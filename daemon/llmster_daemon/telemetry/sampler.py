"""Reads a machine once a second without ever waiting long for it."""

import asyncio
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from ..protocol.node import GpuReading, Inventory, Telemetry
from .probe import CpuProbe, GpuProbe

GPU_READ_TIMEOUT_S = 0.8
"""How long a sample waits for the cards: under a second, so that reports keep their pace."""

HISTORY_SAMPLES = 3600
"""An hour, at one sample a second."""

log = logging.getLogger(__name__)

T = TypeVar("T")


class Sampler:
    """What this machine has and is doing. `clock` is Unix time in seconds."""

    def __init__(
        self,
        gpu: GpuProbe,
        cpu: CpuProbe,
        clock: Callable[[], float] = time.time,
        gpu_timeout_s: float = GPU_READ_TIMEOUT_S,
    ) -> None:
        self._gpu = gpu
        self._cpu = cpu
        self._clock = clock
        self._gpu_timeout_s = gpu_timeout_s
        self._gpu_read: Future[tuple[GpuReading, ...]] | None = None
        self._hanging = False
        self._history: deque[Telemetry] = deque(maxlen=HISTORY_SAMPLES)

    def inventory(self) -> Inventory:
        """What this machine has. Blocks for a few milliseconds."""
        cpu = self._cpu.inventory()
        return Inventory(
            hostname=socket.gethostname(),
            cpu_name=cpu.name,
            cpu_cores=cpu.cores,
            mem_total_bytes=cpu.mem_total_bytes,
            gpus=self._gpu.inventory(),
        )

    async def sample(self) -> Telemetry:
        """What this machine is doing now; also kept in `history`. One caller at a time.

        Without GPU readings when the cards do not answer within `gpu_timeout_s`, and from then on
        until they do. Raises what the probes raise.
        """
        at = self._clock()
        cpu = await asyncio.to_thread(self._cpu.read)
        telemetry = Telemetry(
            at=at,
            cpu_utilisation=cpu.utilisation,
            mem_used_bytes=cpu.mem_used_bytes,
            gpus=await self._read_gpus(),
        )
        self._history.append(telemetry)
        return telemetry

    def history(self) -> tuple[Telemetry, ...]:
        """The samples of the last hour, oldest first."""
        return tuple(self._history)

    def close(self) -> None:
        """Closes the GPU probe, unless a read hangs in it. Call it after the last `sample`.

        Blocks for up to `gpu_timeout_s`.
        """
        if self._gpu_read is not None and wait([self._gpu_read], self._gpu_timeout_s).not_done:
            log.warning("the GPUs still do not answer; their library is left open")
            return
        self._gpu.close()

    async def _read_gpus(self) -> tuple[GpuReading, ...]:
        if self._gpu_read is not None and not self._gpu_read.done():
            # Another thread would hang beside the first.
            return ()
        self._gpu_read = _in_daemon_thread(self._gpu.read)
        try:
            async with asyncio.timeout(self._gpu_timeout_s):
                readings = await asyncio.wrap_future(self._gpu_read)
        except TimeoutError:
            if not self._hanging:
                log.warning("the GPUs did not answer in %g s", self._gpu_timeout_s)
            self._hanging = True
            return ()
        if self._hanging:
            log.info("the GPUs answer again")
            self._hanging = False
        return readings


def _in_daemon_thread(call: Callable[[], T]) -> Future[T]:
    """What `call` will return, from a thread of its own.

    Not asyncio.to_thread: the loop and the interpreter wait for the pool's threads when they end,
    and one that hangs in a driver would keep the daemon from ever stopping.
    """
    future: Future[T] = Future()
    # From here on a waiter that gives up cannot cancel it, and the thread can always answer.
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="gpu-read", daemon=True).start()
    return future
