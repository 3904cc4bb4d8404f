"""Probes that say what they are told to, for demonstrations and for tests of other parts."""

from collections.abc import Iterable, Sequence
from itertools import cycle

from ..protocol.node import GpuInfo, GpuReading
from .probe import CpuInfo, CpuReading


class FakeGpus:
    """Cards with scripted readings: `frames` are what successive reads return, over and over.

    Without frames each card reads as None. `reads` counts the reads; `closed` says what it says.
    """

    def __init__(
        self,
        gpus: Iterable[GpuInfo],
        frames: Sequence[Sequence[GpuReading]] = (),
    ) -> None:
        self._gpus = tuple(gpus)
        self._frames = cycle(frames or [[GpuReading(index=gpu.index) for gpu in self._gpus]])
        self.reads = 0
        self.closed = False

    def inventory(self) -> tuple[GpuInfo, ...]:
        """The cards as given; none once closed."""
        return () if self.closed else self._gpus

    def read(self) -> tuple[GpuReading, ...]:
        """The next frame; nothing once closed."""
        if self.closed:
            return ()
        self.reads += 1
        return tuple(next(self._frames))

    def close(self) -> None:
        """Makes the cards disappear."""
        self.closed = True


class FakeCpu:
    """A processor with a fixed reading."""

    def __init__(
        self,
        info: CpuInfo | None = None,
        reading: CpuReading | None = None,
    ) -> None:
        self._info = info or CpuInfo("Fake CPU", cores=8, mem_total_bytes=32 << 30)
        self._reading = reading or CpuReading(utilisation=0.25, mem_used_bytes=8 << 30)

    def inventory(self) -> CpuInfo:
        """The processor as given."""
        return self._info

    def read(self) -> CpuReading:
        """The reading as given."""
        return self._reading
