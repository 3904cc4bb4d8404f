"""A child process that outlives its parent, and can be watched by whoever finds it again."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, ValidationError

from ..errors import HomeError
from ..protocol.base import Frozen
from ..protocol.node import LoadOptions

HANDLE_VERSION = 1
MAX_LOG_BYTES = 8 << 20
TAIL_BYTES = 4096
KILL_WAIT_S = 5.0


class Handle(Frozen):
    """All that a restarted daemon needs to find an engine again. One JSON file per instance.

    The file exists as long as the instance is wanted, whether its process lives or not.
    """

    version: int = HANDLE_VERSION
    instance_id: str
    model: str
    digest: str
    model_path: str
    engine: str = "llamacpp"
    options: LoadOptions = LoadOptions()
    extra: dict[str, object] = Field(default_factory=dict)
    socket_path: str
    pid: int | None = None
    started_ticks: int | None = None
    """Start time of the process in kernel ticks: tells it from a later one of the same pid."""


def read_handles(directory: Path) -> list[Handle]:
    """The handles in a directory; files that are not handles of this version are left alone."""
    handles = []
    for path in sorted(directory.glob("*.handle.json")):
        try:
            handle = Handle.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            continue
        if handle.version == HANDLE_VERSION:
            handles.append(handle)
    return handles


def write_atomically(path: Path, text: str) -> None:
    """Replace a file as a whole, readable by the owner only. Raises HomeError."""
    temporary = path.with_name(path.name + ".new")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise HomeError(
            "home_unwritable",
            f"can't write {path}: {error.strerror}",
            "free some space there, or start with another `--home`",
        ) from error


def started_ticks(pid: int) -> int | None:
    """When a process started, in kernel ticks since boot (proc(5), field 22); None if gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The command name may hold any bytes; what follows its last parenthesis is regular.
    fields = stat[stat.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def is_alive(handle: Handle) -> bool:
    """True if the very process of this handle still runs."""
    if handle.pid is None or handle.started_ticks is None:
        return False
    return started_ticks(handle.pid) == handle.started_ticks


def spawn(argv: Sequence[str], log: Path) -> int:
    """Start a process in a session of its own, its output appended to `log`; returns the pid.

    Not asyncio's or subprocess's: those kill or complain about children that outlive them.
    """
    with contextlib.suppress(OSError):
        if log.stat().st_size > MAX_LOG_BYTES:
            log.replace(log.with_suffix(".old"))
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        raise HomeError(
            "home_unwritable",
            f"can't write {log}: {error.strerror}",
            "free some space there, or start with another `--home`",
        ) from error
    try:
        return os.posix_spawn(
            argv[0],
            list(argv),
            {**os.environ, "PYTHONUNBUFFERED": "1"},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, out, 1),
                (os.POSIX_SPAWN_DUP2, out, 2),
            ],
            setsid=True,
            setsigmask=[],
        )
    finally:
        os.close(out)


class Watched:
    """A process, our child or not, whose end can be waited for (pidfd_open(2))."""

    def __init__(self, pid: int) -> None:
        """Raises ProcessLookupError if it is gone."""
        self.pid = pid
        self._fd = os.pidfd_open(pid)
        self._ended = asyncio.Event()
        self.status: int | None = None
        """Exit code, or minus the signal; None while it runs, or if it is not our child."""
        asyncio.get_running_loop().add_reader(self._fd, self._on_end)

    @property
    def ended(self) -> bool:
        """True once it has ended."""
        return self._ended.is_set()

    async def wait(self) -> None:
        """Until it has ended."""
        await self._ended.wait()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it still runs."""
        if not self.ended:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._fd, number)

    async def kill(self) -> None:
        """End it for certain."""
        self.signal(signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(KILL_WAIT_S):
                await self.wait()

    def close(self) -> None:
        """Stop watching."""
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _on_end(self) -> None:
        with contextlib.suppress(ChildProcessError):
            result = os.waitid(os.P_PIDFD, self._fd, os.WEXITED | os.WNOHANG)
            if result is not None:
                killed = result.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
                self.status = -result.si_status if killed else result.si_status
        asyncio.get_running_loop().remove_reader(self._fd)
        self._ended.set()


def tail(log: Path, lines: int = 3) -> str:
    """The last lines of a log, as one line of text."""
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return " / ".join([line.strip() for line in text.splitlines() if line.strip()][-lines:])


def describe_exit(status: int | None) -> str:
    """How a process ended, in words."""
    if status is None:
        return "the engine process ended"
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        cause = " (out of memory?)" if -status == signal.SIGKILL else ""
        return f"the engine process was ended by {name}{cause}"
    return f"the engine process ended with exit code {status}"


PYTHON = sys.executable
