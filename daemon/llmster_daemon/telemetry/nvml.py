"""Cards through NVML. The only module that imports pynvml."""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import pynvml

from ..protocol.node import GpuInfo, GpuReading
from .probe import GpuProbe, NoGpu

RETRY_INIT_S = 10.0
"""How long after a loss NVML is started again; doubled each time that does not bring all back."""

RETRY_INIT_MAX_S = 300.0
"""Starting NVML can take seconds, in which no card is read: rarely, for a card that stays away."""

CLOSE_WAIT_S = 1.0
"""How long `close` waits for a read under way. A read that hangs in the driver never ends."""

# The card, or NVML as a whole, is gone; a new start may bring it back. Every other error is about
# the one value asked for. NVML_ERROR_UNKNOWN is not here: some cards and WSL answer it for ever to
# a query that they do not implement.
_GONE = frozenset(
    {
        pynvml.NVML_ERROR_UNINITIALIZED,
        pynvml.NVML_ERROR_INVALID_ARGUMENT,  # a handle from before a driver restart
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_GPU_IS_LOST,
        pynvml.NVML_ERROR_RESET_REQUIRED,
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
        pynvml.NVML_ERROR_GPU_NOT_FOUND,
    }
)

log = logging.getLogger(__name__)

T = TypeVar("T")


def open_gpu_probe() -> GpuProbe:
    """NVML's cards, or `NoGpu` where the library is missing or does not start. Blocks."""
    try:
        return NvmlProbe()
    except pynvml.NVMLError as error:
        log.info("no GPU is read: NVML says: %s", error)
        return NoGpu()


@dataclass(slots=True)
class _Card:
    """A card seen at least once. `handle` is None while it is lost."""

    info: GpuInfo
    handle: Any


class NvmlProbe:
    """The cards of this machine, as NVML reads them.

    A card keeps the index at which it was first seen, by its UUID: NVML's own order shifts when a
    card before it disappears. `clock` counts seconds, from any start. Raises `pynvml.NVMLError`
    when NVML cannot be started (nvmlInitWithFlags); after that, no method does.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._cards: dict[str, _Card] = {}
        self._started = False
        self._retry_at: float | None = None
        self._retry_s = RETRY_INIT_S
        self._start()

    def inventory(self) -> tuple[GpuInfo, ...]:
        """The cards that answered last time, by index. Does not call NVML, so never blocks."""
        usable = [card.info for card in list(self._cards.values()) if card.handle is not None]
        return tuple(sorted(usable, key=lambda info: info.index))

    def read(self) -> tuple[GpuReading, ...]:
        """A reading of every card ever seen, by index; all None for one that is lost.

        Starts NVML again when a card was lost and the wait for that is over. Blocks: NVML answers
        in milliseconds, starts in up to seconds, and can hang with a driver in trouble.
        """
        with self._lock:
            if self._retry_at is not None and self._clock() >= self._retry_at:
                self._restart()
            readings = [self._read_card(card) for card in self._cards.values()]
            return tuple(sorted(readings, key=lambda reading: reading.index))

    def close(self) -> None:
        """Forgets the cards and lets go of NVML (nvmlShutdown), unless a read hangs in it."""
        if not self._lock.acquire(timeout=CLOSE_WAIT_S):
            log.warning("NVML still hangs in a read; it is left open")
            return
        try:
            self._cards = {}
            self._retry_at = None
            self._shutdown()
        finally:
            self._lock.release()

    def _start(self) -> None:
        """Starts NVML and looks for cards: nvmlInitWithFlags, nvmlDeviceGetCount."""
        pynvml.nvmlInit()
        self._started = True
        try:
            driver = _supported(lambda: str(pynvml.nvmlSystemGetDriverVersion()))
            lost = [
                position
                for position in range(int(pynvml.nvmlDeviceGetCount()))
                if not self._find(position, driver)
            ]
        except pynvml.NVMLError:
            self._shutdown()
            raise
        if lost or any(card.handle is None for card in self._cards.values()):
            self._retry_later()
        else:
            self._retry_at = None
            self._retry_s = RETRY_INIT_S

    def _find(self, position: int, driver: str | None) -> bool:
        """Enters the card at NVML's `position`; False when it is there but lost.

        NVML calls: nvmlDeviceGetHandleByIndex, nvmlDeviceGetUUID, -Name, -MemoryInfo (total).
        """
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(position)
            uuid = _supported(lambda: str(pynvml.nvmlDeviceGetUUID(handle)))
            name = _supported(lambda: str(pynvml.nvmlDeviceGetName(handle)))
            total = _supported(lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).total))
        except pynvml.NVMLError as error:
            log.warning("card %d is not read: NVML says: %s", position, error)
            # Without permission, say, it is not ours: nothing to wait for.
            return error.value not in _GONE
        uuid = uuid or f"index-{position}"
        known = self._cards.get(uuid)
        info = GpuInfo(
            index=known.info.index if known else self._free_index(position),
            uuid=uuid,
            name=name or "unknown GPU",
            mem_total_bytes=total,
            driver_version=driver,
        )
        self._cards[uuid] = _Card(info, handle)
        return True

    def _free_index(self, position: int) -> int:
        taken = {card.info.index for card in self._cards.values()}
        return max(taken) + 1 if position in taken else position

    def _read_card(self, card: _Card) -> GpuReading:
        """One card now.

        NVML calls: nvmlDeviceGetMemoryInfo (bytes), -UtilizationRates (percent of the last second
        or less), -PowerUsage (mW), -Temperature (degrees Celsius).
        """
        index, handle = card.info.index, card.handle
        if handle is None:
            return GpuReading(index=index)
        try:
            used = _supported(lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used))
            percent = _supported(lambda: int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu))
            power_mw = _supported(lambda: int(pynvml.nvmlDeviceGetPowerUsage(handle)))
            temperature_c = _supported(
                lambda: float(
                    pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
                ),
            )
        except pynvml.NVMLError as error:
            log.warning("card %d (%s) is lost: NVML says: %s", index, card.info.uuid, error)
            card.handle = None
            if self._retry_at is None:
                self._retry_later()
            return GpuReading(index=index)
        return GpuReading(
            index=index,
            mem_used_bytes=used,
            # NVML's NVML_VALUE_NOT_AVAILABLE, where it comes without an error, is -1 unsigned.
            utilisation=percent / 100 if percent is not None and percent <= 100 else None,
            power_w=power_mw / 1000 if power_mw is not None else None,
            temperature_c=temperature_c,
        )

    def _restart(self) -> None:
        lost = [card.info for card in self._cards.values() if card.handle is None]
        self._shutdown()
        try:
            self._start()
        except pynvml.NVMLError as error:
            log.debug("NVML does not start again: %s", error)
            self._retry_later()
            return
        for info in lost:
            if self._cards[info.uuid].handle is not None:
                log.info("card %d (%s) is back", info.index, info.uuid)

    def _shutdown(self) -> None:
        for card in self._cards.values():
            card.handle = None
        if self._started:
            self._started = False
            # A driver that went away has shut NVML down already.
            with suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()

    def _retry_later(self) -> None:
        self._retry_at = self._clock() + self._retry_s
        self._retry_s = min(2 * self._retry_s, RETRY_INIT_MAX_S)


def _supported(call: Callable[[], T]) -> T | None:
    """What `call` returns, or None where this card, driver or user cannot have the value.

    Raises `pynvml.NVMLError` when the card or NVML is gone.
    """
    try:
        return call()
    except pynvml.NVMLError as error:
        if error.value in _GONE:
            raise
        return None
