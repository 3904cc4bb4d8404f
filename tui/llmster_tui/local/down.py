"""`llmster down`: stops what `llmster up` started in a home, and what it may have left behind."""

import contextlib
import os
import signal
import time
from pathlib import Path

from llmster_daemon.supervisor.process import is_alive, read_handles, started_ticks
from llmster_tui.local.layout import living, read_record

STOP_LIMIT_S = 30.0
KILL_LIMIT_S = 5.0
LOOK_INTERVAL_S = 0.05


def stop_pool(home: Path) -> list[str]:
    """Stop everything of the pool in `home`; returns what was stopped. Blocks."""
    record = read_record(home) or {}
    running = living(record)
    stopped = sorted(running)
    if "up" in running:
        _stop({"up": running["up"]}, signal.SIGTERM, STOP_LIMIT_S)
        running = living(record)
    # What is left has lost its supervisor. SIGINT makes nodes stop their engines.
    nodes = {name: pid for name, pid in running.items() if name.startswith("node-")}
    rest = {name: pid for name, pid in running.items() if name not in nodes}
    _stop(nodes, signal.SIGINT, STOP_LIMIT_S)
    _stop(rest, signal.SIGTERM, STOP_LIMIT_S)
    engines = stop_engines(home)
    # A record that stays behind names processes that are gone, which is seen when it is read.
    with contextlib.suppress(OSError):
        (home / "up.json").unlink()
    return stopped + [f"engine {name}" for name in engines]


def stop_engines(home: Path) -> list[str]:
    """Stop engines that outlived their node; returns their names. Blocks."""
    engines = {
        f"{run.parent.name}/{handle.instance_id}": handle.pid
        for run in sorted(home.glob("nodes/*/run"))
        for handle in read_handles(run)
        if is_alive(handle) and handle.pid is not None
    }
    _stop(engines, signal.SIGTERM, KILL_LIMIT_S)
    return sorted(engines)


def _stop(pids: dict[str, int], number: signal.Signals, limit_s: float) -> None:
    """Signal, wait, and kill what does not end."""
    started = {pid: started_ticks(pid) for pid in pids.values()}
    _signal(started, number)
    _wait(started, limit_s)
    _signal(started, signal.SIGKILL)
    _wait(started, KILL_LIMIT_S)


def _signal(started: dict[int, int | None], number: signal.Signals) -> None:
    for pid, ticks in started.items():
        if ticks is not None and started_ticks(pid) == ticks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _wait(started: dict[int, int | None], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if not any(t is not None and started_ticks(pid) == t for pid, t in started.items()):
            return
        time.sleep(LOOK_INTERVAL_S)
