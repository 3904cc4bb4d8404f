"""Child processes that outlive their parent: started, watched, told apart, remembered."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from fakes.node import LIMIT_S
from llmster_daemon.errors import HomeError
from llmster_daemon.protocol.node import LoadOptions
from llmster_daemon.supervisor import process
from llmster_daemon.supervisor.process import (
    PYTHON,
    Handle,
    Watched,
    describe_exit,
    is_alive,
    read_handles,
    spawn,
    started_ticks,
    tail,
    write_atomically,
)

FOREVER = "import signal; signal.pause()"
HANDLE = Handle(
    instance_id="tiny",
    model="tiny",
    digest="d" * 64,
    model_path="/models/tiny.gguf",
    engine="fake",
    options=LoadOptions(slots=3),
    extra={"answer": 7},
    socket_path="/run/tiny.sock",
    pid=123,
    started_ticks=456,
)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "engine.log"


@pytest.fixture
def orphan() -> Iterator[int]:
    """The pid of a process whose parent has ended."""
    code = f"""
import subprocess, sys
argv = [sys.executable, "-c", {FOREVER!r}]
print(subprocess.Popen(argv, stdout=subprocess.DEVNULL, start_new_session=True).pid)
"""
    pid = int(subprocess.check_output([PYTHON, "-c", code]))
    ticks = started_ticks(pid)
    yield pid
    if started_ticks(pid) == ticks is not None:
        os.kill(pid, signal.SIGKILL)


@contextlib.asynccontextmanager
async def watched(log: Path, code: str) -> AsyncIterator[Watched]:
    child = Watched(spawn([PYTHON, "-c", code], log))
    try:
        yield child
    finally:
        await child.kill()
        child.close()


@contextlib.contextmanager
def child(code: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has begun to run `code`."""
    code = f"{code}; print(flush=True); {FOREVER}"
    with subprocess.Popen([sys.executable, "-c", code], text=True, stdout=subprocess.PIPE) as made:
        try:
            assert made.stdout is not None
            made.stdout.readline()
            yield made
        finally:
            made.kill()


def handle_of(pid: int) -> Handle:
    return HANDLE.model_copy(update={"pid": pid, "started_ticks": started_ticks(pid)})


async def ended(child: Watched) -> int | None:
    async with asyncio.timeout(LIMIT_S):
        await child.wait()
    return child.status


def run(log: Path, code: str) -> int | None:
    """The exit status of a child that ends by itself."""

    async def to_its_end() -> int | None:
        async with watched(log, code) as child:
            return await ended(child)

    return asyncio.run(to_its_end())


@pytest.mark.parametrize("code", [0, 3, 255])
def test_the_exit_code_of_a_child(log: Path, code: int) -> None:
    assert run(log, f"raise SystemExit({code})") == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGABRT])
async def test_the_signal_that_ended_a_child(log: Path, number: signal.Signals) -> None:
    async with watched(log, FOREVER) as child:
        assert not child.ended
        assert child.status is None
        child.signal(number)
        assert await ended(child) == -number
        assert child.ended


async def test_a_child_is_reaped(log: Path) -> None:
    async with watched(log, "") as child:
        await ended(child)
        with pytest.raises(ProcessLookupError):
            os.kill(child.pid, 0)


async def test_signals_to_an_ended_process_do_nothing(log: Path) -> None:
    async with watched(log, "") as child:
        await ended(child)
        child.signal(signal.SIGKILL)
        await child.kill()
        assert child.status == 0
        child.close()
        child.close()


async def test_a_process_of_someone_else_can_be_watched(orphan: int) -> None:
    """As after a restart of the daemon: its engines are then children of init."""
    other = Watched(orphan)
    try:
        assert not other.ended
        await other.kill()
        assert other.ended
        assert other.status is None
    finally:
        other.close()


async def test_watching_nobody(log: Path) -> None:
    async with watched(log, "") as gone:
        await ended(gone)
    with pytest.raises(ProcessLookupError):
        Watched(gone.pid)


async def test_a_child_has_a_session_of_its_own(log: Path) -> None:
    async with watched(log, FOREVER) as child:
        assert os.getsid(child.pid) == child.pid != os.getsid(0)


def test_output_goes_to_the_log_and_input_is_empty(log: Path) -> None:
    code = "import sys; print('out', repr(sys.stdin.read())); sys.stderr.write('err\\n')"
    log.write_text("before\n")
    assert run(log, code) == 0
    assert log.read_text() == "before\nout ''\nerr\n"


def test_a_new_log_is_private(log: Path) -> None:
    run(log, "")
    assert log.stat().st_mode & 0o777 == 0o600


def test_a_large_log_is_set_aside(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "MAX_LOG_BYTES", 100)
    for expected_old, text in ((None, "x" * 100), ("y" * 101, "y" * 101)):
        log.write_text(text)
        run(log, "print('new')")
        old = log.with_suffix(".old")
        assert (old.read_text() if old.exists() else None) == expected_old
    assert log.read_text() == "new\n"


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(HomeError, match="No such file") as caught:
        spawn([PYTHON, "-c", ""], tmp_path / "nowhere" / "engine.log")
    assert caught.value.code == "home_unwritable"
    assert "--home" in caught.value.hint


def test_a_program_that_is_not_there(log: Path) -> None:
    open_before = sorted(Path("/proc/self/fd").iterdir())
    with pytest.raises(FileNotFoundError):
        spawn(["/nowhere/engine"], log)
    assert sorted(Path("/proc/self/fd").iterdir()) == open_before


def test_start_times_tell_processes_apart() -> None:
    mine = started_ticks(os.getpid())
    assert mine is not None
    assert started_ticks(os.getpid()) == mine
    with child("pass") as other:
        theirs = started_ticks(other.pid)
        assert theirs is not None
        assert theirs > mine


def test_a_handle_of_a_running_process_is_alive() -> None:
    with child("pass") as other:
        assert is_alive(handle_of(other.pid))
    assert not is_alive(handle_of(other.pid))


def test_another_process_with_the_same_pid_is_not_it() -> None:
    with child("pass") as other:
        handle = handle_of(other.pid)
        earlier = handle.model_copy(update={"started_ticks": (handle.started_ticks or 0) - 1})
        assert not is_alive(earlier)


@pytest.mark.parametrize("missing", ["pid", "started_ticks"])
def test_a_handle_without_a_process_is_not_alive(missing: str) -> None:
    handle = handle_of(os.getpid())
    assert is_alive(handle)
    assert not is_alive(handle.model_copy(update={missing: None}))


def test_a_zombie_is_not_alive() -> None:
    with child("pass") as other:
        handle = handle_of(other.pid)
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        assert ") Z " in Path(f"/proc/{other.pid}/stat").read_text()
        assert not is_alive(handle)


@pytest.mark.parametrize("name", [b"a b) S (c", b"\xff\xfe\n) Z ("])
def test_names_of_processes_do_not_confuse(name: bytes) -> None:
    """A pid of an old handle may belong to anything by now."""
    with child(f"open('/proc/self/comm', 'wb').write({name!r})") as other:
        assert name in Path(f"/proc/{other.pid}/stat").read_bytes()
        assert is_alive(handle_of(other.pid))
        assert (started_ticks(other.pid) or 0) > (started_ticks(os.getpid()) or 0)


def test_a_handle_comes_back_as_it_was(tmp_path: Path) -> None:
    write_atomically(tmp_path / "tiny.handle.json", HANDLE.model_dump_json(indent=1))
    assert read_handles(tmp_path) == [HANDLE]


def test_files_are_private_and_leave_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "tiny.handle.json"
    old_mask = os.umask(0)
    try:
        write_atomically(path, "1")
    finally:
        os.umask(old_mask)
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    """Whoever has it open reads the old contents to the end: the file is replaced, not changed."""
    path = tmp_path / "tiny.handle.json"
    write_atomically(path, "old" * 1000)
    with path.open() as reader:
        write_atomically(path, "new")
        assert reader.read() == "old" * 1000
    assert path.read_text() == "new"


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiny.handle.json"
    write_atomically(path, "old")

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdopen", no_space)
    with pytest.raises(HomeError, match="No space left on device"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_handles_that_make_no_sense_are_left_alone(tmp_path: Path) -> None:
    good = HANDLE.model_dump_json()
    contents = {
        "a": b"",
        "b": b"not json",
        "c": b"\xff\x00\x80 not text",
        "d": b"[1, 2]",
        "e": b'{"version": 1}',
        "f": good.replace('"version":1', '"version":2').encode(),
        "g": b'{"version": 7, "something": "else"}',
        "h": good.replace('"pid":123', '"pid":"many"').encode(),
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.handle.json").write_bytes(content)
    (tmp_path / "z.handle.json").write_text(good)
    (tmp_path / "folder.handle.json").mkdir()
    (tmp_path / "tiny.spec.json").write_text(good)
    assert read_handles(tmp_path) == [HANDLE]
    for name, content in contents.items():
        assert (tmp_path / f"{name}.handle.json").read_bytes() == content


def test_no_handles_where_there_is_no_folder(tmp_path: Path) -> None:
    assert read_handles(tmp_path / "nowhere") == []


def test_the_tail_of_a_log(log: Path) -> None:
    assert tail(log) == ""
    log.write_bytes(b"")
    assert tail(log) == ""
    log.write_bytes(b"one\n\n  two  \nthree\n\nfour")
    assert tail(log) == "two / three / four"
    assert tail(log, lines=1) == "four"
    # The cut may go through a character.
    log.write_bytes("é".encode() * 100_000 + b"\nlast \xff word\n")
    assert tail(log).endswith("last \N{REPLACEMENT CHARACTER} word")
    assert len(tail(log)) <= process.TAIL_BYTES


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (None, "the engine process ended"),
        (0, "the engine process ended with exit code 0"),
        (70, "the engine process ended with exit code 70"),
        (-6, "the engine process was ended by SIGABRT"),
        (-9, "the engine process was ended by SIGKILL (out of memory?)"),
        (-44, "the engine process was ended by signal 44"),
    ],
)
def test_how_it_ended_in_words(status: int | None, text: str) -> None:
    assert describe_exit(status) == text
