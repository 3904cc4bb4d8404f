"""What the sampler asks of a machine, whatever answers it."""

from dataclasses import dataclass
from typing import Protocol

from ..protocol.node import GpuInfo, GpuReading


class GpuProbe(Protocol):
    """The cards of a machine. Every method may block; call them in a thread, one at a time."""

    def inventory(self) -> tuple[GpuInfo, ...]:
        """The cards that can be used, by index. An index stays with its card."""

    def read(self) -> tuple[GpuReading, ...]:
        """One reading per card, by index. A lost card reads as None; nothing is raised for it."""

    def close(self) -> None:
        """Lets go of the library. Closing twice does no harm; a closed probe has no cards."""


class NoGpu:
    """The probe of a machine without a card that NVML can read."""

    def inventory(self) -> tuple[GpuInfo, ...]:
        """Nothing."""
        return ()

    def read(self) -> tuple[GpuReading, ...]:
        """Nothing."""
        return ()

    def close(self) -> None:
        """Does nothing."""


@dataclass(frozen=True, slots=True)
class CpuInfo:
    """The processor and the memory that this process may use. Bytes."""

    name: str
    cores: int
    mem_total_bytes: int


@dataclass(frozen=True, slots=True)
class CpuReading:
    """`utilisation` 0..1 since the reading before, bytes in use now."""

    utilisation: float
    mem_used_bytes: int


class CpuProbe(Protocol):
    """The processor and the memory of a machine. Methods may read files."""

    def inventory(self) -> CpuInfo:
        """What this process may use."""

    def read(self) -> CpuReading:
        """What is in use."""
