"""Processor and memory, through psutil and the limits of this process's control groups."""

import math
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from .probe import CpuInfo, CpuReading

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")


class HostCpu:
    """The machine's processor, and the memory that this process and its engines may use.

    `proc` and `cgroup` say where the kernel's files are. In a control group with a memory limit
    below the physical memory, total and use are the group's; otherwise the machine's.
    """

    def __init__(self, proc: Path = PROC, cgroup: Path = CGROUP) -> None:
        self._proc = proc
        self._cgroup = cgroup
        self._times = _cpu_times()
        self._utilisation = 0.0

    def inventory(self) -> CpuInfo:
        """Name, cores by affinity and CPU quota (rounded up), bytes. Reads files."""
        limit = self._memory_limit()
        return CpuInfo(
            name=self._name(),
            cores=self._cores(),
            mem_total_bytes=limit.total_bytes if limit else psutil.virtual_memory().total,
        )

    def read(self) -> CpuReading:
        """Utilisation of all the machine's cores since the reading before (or the start); bytes.

        Memory in use is what a new process could not have: page cache does not count. Reads files.
        """
        # psutil.cpu_percent is not used: it keeps "since the last call" apart for each thread, and
        # readings come from whichever thread of the pool is free.
        before, now = self._times, _cpu_times()
        elapsed = now.total_s - before.total_s
        if elapsed > 0:
            # The kernel's idle counters can go back a little.
            busy = (now.busy_s - before.busy_s) / elapsed
            self._utilisation = min(max(busy, 0.0), 1.0)
            self._times = now
        limit = self._memory_limit()
        if limit:
            return CpuReading(self._utilisation, limit.used_bytes)
        memory = psutil.virtual_memory()
        return CpuReading(self._utilisation, memory.total - memory.available)

    def _name(self) -> str:
        for line in _text(self._proc / "cpuinfo").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
        # Arm's cpuinfo has no name.
        return platform.processor() or platform.machine() or "unknown CPU"

    def _cores(self) -> int:
        cores = len(os.sched_getaffinity(0))
        for group in self._groups("cpu"):
            quota = _cpu_quota(group)
            if quota is not None:
                cores = min(cores, max(1, math.ceil(quota)))
        return cores

    def _memory_limit(self) -> "_MemoryLimit | None":
        """The tightest limit on this process, None if it is no less than the physical memory."""
        limits = [limit for group in self._groups("memory") if (limit := _memory_limit(group))]
        tightest = min(limits, key=lambda limit: limit.total_bytes, default=None)
        if tightest and tightest.total_bytes < psutil.virtual_memory().total:
            return tightest
        return None

    def _groups(self, controller: str) -> Iterator[Path]:
        """This process's group and those above it: a limit on any of them holds.

        Version 2 has one tree, version 1 one per controller; a machine can have both.
        """
        for line in _text(self._proc / "self" / "cgroup").splitlines():
            _, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            if controllers == "":
                root = self._cgroup
            elif controller in controllers.split(","):
                root = self._cgroup / controller
            else:
                continue
            group = root / path.lstrip("/")
            while group != root:
                yield group
                group = group.parent
            yield root


@dataclass(frozen=True, slots=True)
class _CpuTimes:
    """Seconds of all cores together since boot."""

    total_s: float
    busy_s: float


@dataclass(frozen=True, slots=True)
class _MemoryLimit:
    total_bytes: int
    used_bytes: int


def _cpu_times() -> _CpuTimes:
    times = psutil.cpu_times()
    # Time of guests is in user and nice already.
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    total = sum(times) - guests
    return _CpuTimes(total, total - times.idle - getattr(times, "iowait", 0.0))


def _cpu_quota(group: Path) -> float | None:
    """Cores' worth of time that a group gets, None without a limit. cgroup v2, then v1."""
    fields = _text(group / "cpu.max").split() or [
        _text(group / "cpu.cfs_quota_us").strip(),
        _text(group / "cpu.cfs_period_us").strip(),
    ]
    # "max" in version 2 and -1 in version 1: no limit.
    if len(fields) == 2 and all(field.isdigit() for field in fields) and int(fields[1]) > 0:
        return int(fields[0]) / int(fields[1])
    return None


def _memory_limit(group: Path) -> _MemoryLimit | None:
    """A group's limit and its use less the file cache it can drop. cgroup v2, then v1."""
    for limit_file, used_file, cache_key in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, used = _text(group / limit_file).strip(), _text(group / used_file).strip()
        if limit.isdigit() and used.isdigit():
            stat = _text(group / "memory.stat").split()
            cache = int(stat[stat.index(cache_key) + 1]) if cache_key in stat else 0
            return _MemoryLimit(int(limit), max(0, int(used) - cache))
    return None


def _text(path: Path) -> str:
    """A file's text, "" where there is none that can be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
