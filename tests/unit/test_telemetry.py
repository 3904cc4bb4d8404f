"""Telemetry: NVML through a fake library, the processor, and the sampler around both.

pynvml keeps the library that it loaded for the life of a process, so each test of NVML runs the
probe in a process of its own, with the fake library first in LD_LIBRARY_PATH.
"""

import asyncio
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from llmster_daemon.protocol.node import GpuInfo, GpuReading
from llmster_daemon.telemetry.cpu import HostCpu
from llmster_daemon.telemetry.fake import FakeCpu, FakeGpus
from llmster_daemon.telemetry.nvml import RETRY_INIT_S
from llmster_daemon.telemetry.probe import CpuProbe, GpuProbe, NoGpu
from llmster_daemon.telemetry.sampler import GPU_READ_TIMEOUT_S, HISTORY_SAMPLES, Sampler

NVML_C = Path(__file__).parents[1] / "fakes" / "nvml" / "nvml.c"
PROCESS_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 10.0

CARD_A = (
    "card uuid=GPU-a mem_total=34190917632 mem_used=1073741824 util=37 power_mw=412500 temp=61"
    " name=NVIDIA GeForce RTX 5090"
)
CARD_B = (
    "card uuid=GPU-b mem_total=34190917632 mem_used=524288 util=0 power_mw=21034 temp=33"
    " name=NVIDIA GeForce RTX 5090"
)
DRIVER = "driver 570.86.15"

READ_A = {
    "index": 0,
    "mem_used_bytes": 1 << 30,
    "utilisation": 0.37,
    "power_w": 412.5,
    "temperature_c": 61.0,
}
READ_B = {
    "index": 1,
    "mem_used_bytes": 524288,
    "utilisation": 0.0,
    "power_w": 21.034,
    "temperature_c": 33.0,
}

# Takes steps as JSON, prints what each one returned.
PROBE_SCRIPT = """
import ctypes, json, logging, os, pathlib, sys
from llmster_daemon.telemetry.nvml import NvmlProbe

logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(message)s")
now = 1000.0
probe = NvmlProbe(clock=lambda: now)
library = ctypes.CDLL("libnvidia-ml.so.1")
results = []
for verb, *args in json.loads(sys.argv[1]):
    if verb == "box":
        pathlib.Path(os.environ["FAKE_NVML_BOX"]).write_text(args[0])
    elif verb == "advance":
        now += args[0]
    elif verb == "counts":
        results.append({"inits": library.fake_inits(), "open": library.fake_open()})
    elif verb == "close":
        probe.close()
    else:
        results.append([value.model_dump() for value in getattr(probe, verb)()])
print(json.dumps(results))
"""

OPEN_SCRIPT = """
import logging, sys
from llmster_daemon.telemetry.nvml import open_gpu_probe

logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(message)s")
probe = open_gpu_probe()
print(type(probe).__name__, probe.inventory(), probe.read())
probe.close()
"""

HANG_SCRIPT = """
import asyncio, json
from llmster_daemon.telemetry.fake import FakeCpu
from llmster_daemon.telemetry.nvml import open_gpu_probe
from llmster_daemon.telemetry.sampler import Sampler

async def main():
    sampler = Sampler(open_gpu_probe(), FakeCpu(), gpu_timeout_s=0.05)
    samples = [await sampler.sample() for _ in range(3)]
    sampler.close()
    print(json.dumps([len(sampler.inventory().gpus), *(len(sample.gpus) for sample in samples)]))

asyncio.run(main())
"""


def box(*lines: str) -> str:
    return "\n".join((DRIVER, *lines)) + "\n"


def lost(index: int) -> dict[str, Any]:
    return GpuReading(index=index).model_dump()


@pytest.fixture(scope="session")
def fake_nvml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a freshly compiled libnvidia-ml.so.1."""
    folder = tmp_path_factory.mktemp("nvml")
    flags = ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-pthread"]
    output = folder / "libnvidia-ml.so.1"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", *flags, "-o", str(output), str(NVML_C)],
        check=True,
        timeout=PROCESS_TIMEOUT_S,
    )
    return folder


RunPython = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_python(tmp_path: Path) -> RunPython:
    """Runs a script in a process that finds its libnvidia-ml.so.1 in the folder given."""

    def run(library: Path, text: str, script: str, *args: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "box.txt").write_text(text)
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", script, *args],
            env={
                **os.environ,
                "LD_LIBRARY_PATH": str(library),
                "FAKE_NVML_BOX": str(tmp_path / "box.txt"),
            },
            check=True,
            capture_output=True,
            text=True,
            timeout=PROCESS_TIMEOUT_S,
        )

    return run


@pytest.fixture
def probe(run_python: RunPython, fake_nvml: Path) -> Callable[..., list[Any]]:
    """Opens an NvmlProbe on a box, takes steps with it, returns what those returned."""

    def run(text: str, *steps: tuple[Any, ...]) -> list[Any]:
        done = run_python(fake_nvml, text, PROBE_SCRIPT, json.dumps(steps))
        results: list[Any] = json.loads(done.stdout)
        return results

    return run


# --- NVML -----------------------------------------------------------------------------------


def test_two_cards(probe: Callable[..., list[Any]]) -> None:
    inventory, readings = probe(box(CARD_A, CARD_B), ("inventory",), ("read",))
    described = {
        "name": "NVIDIA GeForce RTX 5090",
        "mem_total_bytes": 34190917632,
        "driver_version": "570.86.15",
    }
    assert inventory == [
        {"index": 0, "uuid": "GPU-a", **described},
        {"index": 1, "uuid": "GPU-b", **described},
    ]
    assert readings == [READ_A, READ_B]


def test_what_a_card_does_not_support_is_none_not_zero(probe: Callable[..., list[Any]]) -> None:
    partial = "card uuid=GPU-p mem_total=8589934592 mem_used=0 temp=40 name=Old Card"
    bare = "card name=Barer Card"
    out_of_range = CARD_B.replace("util=0", "util=4294967295")
    inventory, readings, later, counts = probe(
        f"{partial}\n{bare}\n{out_of_range}\n",
        ("inventory",),
        ("read",),
        ("advance", 10 * RETRY_INIT_S),
        ("read",),
        ("counts",),
    )
    assert [(gpu["uuid"], gpu["mem_total_bytes"], gpu["driver_version"]) for gpu in inventory] == [
        ("GPU-p", 8589934592, None),
        ("index-1", None, None),
        ("GPU-b", 34190917632, None),
    ]
    assert readings == [
        {**lost(0), "mem_used_bytes": 0, "temperature_c": 40.0},
        lost(1),
        {**READ_B, "index": 2, "utilisation": None},
    ]
    assert later == readings
    assert counts == {"inits": 1, "open": 1}, "an unsupported value is no reason to start again"


def test_a_lost_card_reads_none_and_the_other_goes_on(probe: Callable[..., list[Any]]) -> None:
    one, two, three, four, inventory = probe(
        box(f"card lost_after=2 {CARD_A.removeprefix('card ')}", CARD_B),
        *[("read",)] * 4,
        ("inventory",),
    )
    assert one == two == [READ_A, READ_B]
    assert three == four == [lost(0), READ_B]
    assert [gpu["uuid"] for gpu in inventory] == ["GPU-b"], "nothing can be placed on a lost card"


def test_a_lost_card_comes_back_after_a_restart_of_nvml(probe: Callable[..., list[Any]]) -> None:
    gone, too_early, back, inventory, counts, closed_counts = probe(
        box(CARD_A, CARD_B),
        ("box", box(f"card lost {CARD_A.removeprefix('card ')}", CARD_B)),
        ("read",),
        ("box", box(CARD_A, CARD_B)),
        ("advance", RETRY_INIT_S - 1),
        ("read",),
        ("advance", 1),
        ("read",),
        ("inventory",),
        ("counts",),
        ("close",),
        ("close",),
        ("counts",),
    )
    assert gone == too_early == [lost(0), READ_B]
    assert back == [READ_A, READ_B]
    assert [gpu["uuid"] for gpu in inventory] == ["GPU-a", "GPU-b"]
    assert counts == {"inits": 2, "open": 1}
    assert closed_counts == {"inits": 2, "open": 0}


def test_a_card_keeps_its_index_when_one_before_it_disappears(
    probe: Callable[..., list[Any]],
) -> None:
    added = CARD_A.replace("GPU-a", "GPU-c")
    without, inventory, with_another = probe(
        box(CARD_A, CARD_B),
        ("box", box(CARD_B)),
        ("read",),
        ("advance", RETRY_INIT_S),
        ("read",),
        ("inventory",),
        ("box", box(CARD_B, added)),
        ("advance", 2 * RETRY_INIT_S),
        ("read",),
    )[1:]
    assert without == [lost(0), READ_B]
    assert [(gpu["index"], gpu["uuid"]) for gpu in inventory] == [(1, "GPU-b")]
    assert with_another == [lost(0), READ_B, {**READ_A, "index": 2}]


def test_a_driver_that_goes_and_comes_back(probe: Callable[..., list[Any]]) -> None:
    gone, none_left, still_gone, back, counts, after_close = probe(
        box(CARD_A, CARD_B),
        ("box", "down\n"),
        ("read",),
        ("inventory",),
        ("advance", RETRY_INIT_S),
        ("read",),
        ("box", box(CARD_A, CARD_B)),
        ("advance", 2 * RETRY_INIT_S),
        ("read",),
        ("counts",),
        ("close",),
        ("read",),
    )
    assert gone == still_gone == [lost(0), lost(1)]
    assert none_left == []
    assert back == [READ_A, READ_B]
    assert counts == {"inits": 3, "open": 1}
    assert after_close == []


def test_starts_become_rarer_for_a_card_that_stays_away(probe: Callable[..., list[Any]]) -> None:
    hour = [step for _ in range(3600) for step in (("advance", 1), ("read",))]
    *_, counts = probe(
        box(CARD_A), ("box", box(f"card lost {CARD_A[5:]}")), ("read",), *hour, ("counts",)
    )
    # After 10, 20, 40, 80, 160 s, then every 300 s; and the first.
    assert counts == {"inits": 1 + 5 + (3600 - 310) // 300, "open": 1}


def test_a_card_lost_before_the_start_appears_later(probe: Callable[..., list[Any]]) -> None:
    first, later = probe(
        box(f"card lost {CARD_A.removeprefix('card ')}", CARD_B),
        ("read",),
        ("box", box(CARD_A, CARD_B)),
        ("advance", RETRY_INIT_S),
        ("read",),
    )
    assert first == [READ_B]
    assert later == [READ_A, READ_B]


def test_a_card_without_permission_is_left_out(probe: Callable[..., list[Any]]) -> None:
    readings, counts = probe(
        box(f"card denied {CARD_A.removeprefix('card ')}", CARD_B),
        ("advance", RETRY_INIT_S),
        ("read",),
        ("counts",),
    )
    assert readings == [READ_B]
    assert counts["inits"] == 1


def test_open_gives_the_cards(run_python: RunPython, fake_nvml: Path) -> None:
    done = run_python(fake_nvml, box(CARD_A), OPEN_SCRIPT)
    assert done.stdout.startswith("NvmlProbe")
    assert "GPU-a" in done.stdout
    assert done.stderr == ""


def test_without_a_library_there_is_no_gpu(run_python: RunPython, tmp_path: Path) -> None:
    # A file that is no library hides a real one where the test runs on a machine with cards.
    (tmp_path / "libnvidia-ml.so.1").write_text("not a library")
    done = run_python(tmp_path, "", OPEN_SCRIPT)
    assert done.stdout == "NoGpu () ()\n"
    assert done.stderr == "INFO no GPU is read: NVML says: NVML Shared Library Not Found\n"


def test_without_a_driver_there_is_no_gpu(run_python: RunPython, fake_nvml: Path) -> None:
    done = run_python(fake_nvml, "down\n", OPEN_SCRIPT)
    assert done.stdout == "NoGpu () ()\n"
    assert done.stderr == "INFO no GPU is read: NVML says: Driver Not Loaded\n"


def test_nvml_that_hangs_keeps_no_process_from_ending(
    run_python: RunPython, fake_nvml: Path
) -> None:
    done = run_python(fake_nvml, box(f"card hang {CARD_A.removeprefix('card ')}"), HANG_SCRIPT)
    assert json.loads(done.stdout) == [1, 0, 0, 0]


# --- processor and memory --------------------------------------------------------------------


def test_the_processor_is_real() -> None:
    cpu: CpuProbe = HostCpu()
    info, reading = cpu.inventory(), cpu.read()
    assert info.name
    assert 1 <= info.cores <= (psutil.cpu_count() or 1)
    assert 0 < info.mem_total_bytes <= psutil.virtual_memory().total
    assert 0 <= reading.utilisation <= 1
    assert 0 < reading.mem_used_bytes <= info.mem_total_bytes


def test_utilisation_is_that_since_the_last_read_in_whichever_thread(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def at(user: float, idle: float, iowait: float, guest: float = 0.0) -> None:
        # As psutil's named tuple: a sequence of all fields.
        class Times(SimpleNamespace):
            def __iter__(self) -> Iterator[float]:
                return iter(vars(self).values())

        times = Times(user=user, idle=idle, iowait=iowait, guest=guest, guest_nice=0.0)
        monkeypatch.setattr(psutil, "cpu_times", lambda: times)

    def read() -> float:
        results: list[float] = []
        thread = threading.Thread(target=lambda: results.append(cpu.read().utilisation))
        thread.start()
        thread.join(ANSWER_TIMEOUT_S)
        return results[0]

    at(user=100, idle=1000, iowait=10)
    cpu = HostCpu(proc=tmp_path)
    at(user=106, idle=1001, iowait=11, guest=4)
    # The guests' 4 s are part of the 6 s in user: busy for 6 of 8 s.
    assert read() == pytest.approx(0.75)
    at(user=109, idle=1003, iowait=12, guest=4)
    assert read() == pytest.approx(0.5)
    assert read() == pytest.approx(0.5), "no time has passed: the last value stands"
    at(user=109, idle=1013, iowait=12, guest=4)
    assert read() == 0.0
    at(user=112, idle=1012, iowait=12, guest=4)
    assert read() == 1.0, "idle time that goes back is no more than all"


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (
            "processor\t: 0\nmodel name\t: AMD Ryzen 9 9950X 16-Core Processor\n",
            "AMD Ryzen 9 9950X",
        ),
        ("processor\t: 0\nmodel name\t:\n", ""),
        ("processor\t: 0\nCPU implementer\t: 0x41\n", ""),
    ],
)
def test_the_name_of_the_processor(tmp_path: Path, cpuinfo: str, name: str) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    found = HostCpu(proc=tmp_path).inventory().name
    assert found.startswith(name)
    assert found


LIMIT = 64 << 20


@pytest.mark.parametrize(
    ("own", "files", "limited"),
    [
        (
            "0::/pool.slice/llmster.service\n",
            {
                "pool.slice/memory.max": LIMIT,
                "pool.slice/memory.current": 48 << 20,
                "pool.slice/memory.stat": f"anon 5\ninactive_file {8 << 20}",
                "pool.slice/llmster.service/memory.max": "max",
                "pool.slice/llmster.service/memory.current": 1,
            },
            True,
        ),
        (
            "5:cpu,cpuacct:/\n4:memory:/docker/abc\n0::/\n",
            {
                "memory/docker/abc/memory.limit_in_bytes": LIMIT,
                "memory/docker/abc/memory.usage_in_bytes": 48 << 20,
                "memory/docker/abc/memory.stat": f"inactive_file 1\ntotal_inactive_file {8 << 20}",
                "memory/memory.limit_in_bytes": 9223372036854771712,
                "memory/memory.usage_in_bytes": 1 << 40,
            },
            True,
        ),
        ("0::/\n", {"memory.max": "max", "memory.current": 1}, False),
        ("0::/\n", {"memory.max": 1 << 60, "memory.current": 1}, False),
        ("0::/gone\n", {}, False),
    ],
)
def test_a_memory_limit_of_a_control_group(
    tmp_path: Path, own: str, files: dict[str, object], limited: bool
) -> None:
    cpu = _in_groups(tmp_path, own, files)
    if limited:
        assert cpu.inventory().mem_total_bytes == LIMIT
        assert cpu.read().mem_used_bytes == 40 << 20
    else:
        assert cpu.inventory().mem_total_bytes == psutil.virtual_memory().total
        assert cpu.read().mem_used_bytes > 1 << 20


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/a/b\n", {"a/cpu.max": "250000 100000", "a/b/cpu.max": "max 100000"}, 3),
        ("0::/a\n", {"a/cpu.max": "5000 100000"}, 1),
        ("3:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": -1, "cpu/a/cpu.cfs_period_us": 100}, 8),
        ("3:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": 400, "cpu/a/cpu.cfs_period_us": 100}, 4),
        ("", {}, 8),
    ],
)
def test_cores_by_affinity_and_quota(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own: str,
    files: dict[str, object],
    cores: int,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert _in_groups(tmp_path, own, files).inventory().cores == cores


def _in_groups(root: Path, own: str, files: dict[str, object]) -> HostCpu:
    """The processor as a process in control groups sees it."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(own)
    for name, text in files.items():
        file = root / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    return HostCpu(root / "proc", root / "cgroup")


# --- sampler ---------------------------------------------------------------------------------

GPU = GpuInfo(index=0, uuid="GPU-a", name="Fake")
FRAMES = [
    [GpuReading(index=0, utilisation=0.1)],
    [GpuReading(index=0, utilisation=0.9)],
]


class HangingGpus(FakeGpus):
    """Cards whose read waits for `release`. `reads` counts the threads that went in."""

    def __init__(self) -> None:
        super().__init__([GPU], FRAMES)
        self.entered = threading.Event()
        self.release = threading.Event()
        self.left = threading.Event()

    def read(self) -> tuple[GpuReading, ...]:
        readings = super().read()
        self.entered.set()
        assert self.release.wait(ANSWER_TIMEOUT_S)
        self.left.set()
        return readings


async def test_a_sample_holds_what_the_probes_say() -> None:
    gpus: GpuProbe = FakeGpus([GPU], FRAMES)
    ticks = iter([100.0, 101.0, 102.0])
    sampler = Sampler(gpus, FakeCpu(), clock=lambda: next(ticks))
    samples = [await sampler.sample() for _ in range(3)]
    assert [sample.at for sample in samples] == [100.0, 101.0, 102.0]
    assert [sample.gpus[0].utilisation for sample in samples] == [0.1, 0.9, 0.1]
    assert samples[0].cpu_utilisation == 0.25
    assert samples[0].mem_used_bytes == 8 << 30
    assert sampler.history() == tuple(samples)


async def test_the_inventory_names_the_machine() -> None:
    sampler = Sampler(FakeGpus([GPU]), FakeCpu())
    inventory = sampler.inventory()
    assert inventory.gpus == (GPU,)
    assert (inventory.cpu_name, inventory.cpu_cores) == ("Fake CPU", 8)
    assert inventory.mem_total_bytes == 32 << 30
    assert inventory.hostname
    assert (await sampler.sample()).gpus == (GpuReading(index=0),)


async def test_history_forgets_what_is_older_than_an_hour() -> None:
    assert HISTORY_SAMPLES == 3600
    now = iter(range(HISTORY_SAMPLES + 5))
    sampler = Sampler(NoGpu(), FakeCpu(), clock=lambda: float(next(now)))
    for _ in range(HISTORY_SAMPLES + 5):
        await sampler.sample()
    history = sampler.history()
    assert len(history) == HISTORY_SAMPLES
    assert (history[0].at, history[-1].at) == (5.0, HISTORY_SAMPLES + 4.0)


async def test_a_probe_that_hangs_holds_up_neither_samples_nor_threads(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    assert GPU_READ_TIMEOUT_S < 1, "reports are sent every second"
    gpus = HangingGpus()
    sampler = Sampler(gpus, FakeCpu(), gpu_timeout_s=0.05)
    threads = set(threading.enumerate())
    samples = [await sampler.sample() for _ in range(20)]
    assert all(sample.gpus == () for sample in samples)
    assert all(sample.cpu_utilisation == 0.25 for sample in samples)
    assert gpus.reads == 1
    added = set(threading.enumerate()) - threads
    assert [thread.name for thread in added].count("gpu-read") == 1

    gpus.release.set()
    assert await asyncio.to_thread(gpus.left.wait, ANSWER_TIMEOUT_S)
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        while not (await sampler.sample()).gpus:
            pass
    assert gpus.reads >= 2, "the late answer is dropped, as old"
    assert [record.getMessage() for record in caplog.records if "GPU" in record.getMessage()] == [
        "the GPUs did not answer in 0.05 s",
        "the GPUs answer again",
    ]


async def test_a_probe_that_hangs_is_not_closed() -> None:
    gpus = HangingGpus()
    sampler = Sampler(gpus, FakeCpu(), gpu_timeout_s=0.01)
    await sampler.sample()
    sampler.close()
    assert not gpus.closed
    gpus.release.set()
    assert gpus.left.wait(ANSWER_TIMEOUT_S)


async def test_close_closes_the_probe() -> None:
    gpus = FakeGpus([GPU], FRAMES)
    sampler = Sampler(gpus, FakeCpu())
    await sampler.sample()
    sampler.close()
    assert gpus.closed
    assert sampler.inventory().gpus == ()


async def test_a_sample_that_is_cancelled_leaves_the_next_one_well() -> None:
    gpus = HangingGpus()
    sampler = Sampler(gpus, FakeCpu(), gpu_timeout_s=ANSWER_TIMEOUT_S)
    task = asyncio.create_task(sampler.sample())
    assert await asyncio.to_thread(gpus.entered.wait, ANSWER_TIMEOUT_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sampler.history() == ()
    gpus.release.set()
    assert await asyncio.to_thread(gpus.left.wait, ANSWER_TIMEOUT_S)
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        while not (await sampler.sample()).gpus:
            pass


async def test_what_a_probe_raises_comes_out_of_sample() -> None:
    class Broken(NoGpu):
        def read(self) -> tuple[GpuReading, ...]:
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        await Sampler(Broken(), FakeCpu()).sample()
