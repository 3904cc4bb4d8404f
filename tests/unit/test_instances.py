"""Instances: real engine processes, with a fake model, through everything that happens to them."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.node import (
    CONTEXT,
    ENDLESS,
    add_model,
    engine_pids,
    fill,
    info,
    load,
    managed,
    needs_root,
    new_home,
    no_engine_left,
    small_disk,
    until,
)
from llmster_daemon.engines.base import GenerateParams
from llmster_daemon.errors import (
    BadModel,
    BadRequest,
    EngineLost,
    HomeError,
    LlmsterError,
    NotFound,
)
from llmster_daemon.protocol.node import InstanceInfo, LoadOptions
from llmster_daemon.supervisor import instance as instance_module
from llmster_daemon.supervisor.instance import InstancePaths
from llmster_daemon.supervisor.manager import InstanceManager
from llmster_daemon.supervisor.process import read_handles, started_ticks, write_atomically


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A home with the model `tiny`. Engines that a test leaves running make it fail."""
    home = new_home(tmp_path / "home")
    add_model(home)
    with no_engine_left(home):
        yield home


async def ask(manager: InstanceManager, name: str = "tiny", max_tokens: int | None = 8) -> str:
    """The greedy answer of an instance to a fixed prompt."""
    instance = manager.find(name)
    assert instance is not None
    assert instance.engine is not None
    params = GenerateParams(prompt="hello", temperature=0, max_tokens=max_tokens)
    generation = await instance.engine.generate("request-1", params)
    return "".join([chunk.text async for chunk in generation.chunks])


async def in_state(manager: InstanceManager, state: str) -> InstanceInfo:
    """The instance `tiny` once it is in this state."""
    await until(lambda: info(manager).state == state, f"tiny is {state}")
    return info(manager)


def files(home: Path) -> set[str]:
    """What instances leave on disk, except logs."""
    return {path.name for path in (home / "run").iterdir()}


def running(pid: int | None) -> bool:
    return pid is not None and started_ticks(pid) is not None


async def test_loaded_and_ready(home: Path) -> None:
    async with managed(home) as manager:
        loaded = await load(manager, slots=3)
        assert (loaded.id, loaded.model, loaded.state) == ("tiny", "tiny", "ready")
        assert (loaded.slots, loaded.context_length, loaded.restarts) == (3, CONTEXT, 0)
        assert loaded.reason is None
        assert manager.infos() == (loaded,)
        assert engine_pids(home) == {loaded.pid}
        assert len(await ask(manager)) == 8
        assert {name for name in files(home) if "tiny" in name} == {
            "tiny.handle.json",
            "tiny.spec.json",
        }
        (handle,) = read_handles(home / "run")
        assert (handle.pid, handle.digest) == (loaded.pid, loaded.digest)


async def test_names_are_found_in_any_case(home: Path) -> None:
    async with managed(home) as manager:
        loaded = await manager.load("TINY", LoadOptions(), engine="fake")
        assert manager.find("tInY") is manager.find("tiny") is not None
        assert manager.find("tin") is None
        assert manager.of_digest(loaded.digest) is manager.find("tiny")
        assert manager.of_digest("0" * 64) is None


async def test_a_killed_engine_comes_back(home: Path) -> None:
    async with managed(home) as manager:
        before = await load(manager)
        answer = await ask(manager)
        assert before.pid is not None
        os.kill(before.pid, signal.SIGKILL)
        waiting = await in_state(manager, "backoff")
        assert "SIGKILL" in (waiting.reason or "")
        assert (waiting.pid, manager.find("tiny")) == (None, None)
        after = await in_state(manager, "ready")
        assert (after.restarts, after.reason) == (1, None)
        assert after.pid not in (None, before.pid)
        assert engine_pids(home) == {after.pid}
        assert await ask(manager) == answer


async def test_requests_of_a_dead_engine_fail(home: Path) -> None:
    async with managed(home) as manager:
        await load(manager, die_after_steps=3)
        with pytest.raises(EngineLost):
            await ask(manager)
        assert "exit code 70" in ((await in_state(manager, "backoff")).reason or "")


async def test_an_engine_that_hangs_is_killed(home: Path) -> None:
    async with managed(home, hang_limit_s=2.5) as manager:
        before = await load(manager, hang_after_steps=3)
        idle = await load(manager)
        with pytest.raises(EngineLost):
            await ask(manager)
        waiting = await in_state(manager, "backoff")
        assert waiting.reason == "the engine process did not answer for 2.5 s and was killed"
        assert not running(before.pid)
        after = await in_state(manager, "ready")
        assert (after.restarts, after.pid != before.pid) == (1, True)
        # One with nothing to do says once a second that it lives.
        assert info(manager, "tiny:2") == idle


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"fail_load": "not enough memory for 9 GiB"}, "not enough memory for 9 GiB"),
        ({"abort_load": True}, "SIGABRT"),
    ],
)
async def test_what_cannot_be_loaded_leaves_nothing(
    home: Path, options: dict[str, object], reason: str
) -> None:
    async with managed(home) as manager:
        with pytest.raises(BadModel, match=reason) as caught:
            await load(manager, **options)
        assert caught.value.code == "load_failed"
        assert str(home / "logs") in caught.value.hint
        assert manager.infos() == ()
        assert files(home) == set()
        assert engine_pids(home) == set()
        assert (await load(manager)).id == "tiny"


async def test_an_unknown_engine(home: Path) -> None:
    async with managed(home) as manager:
        with pytest.raises(BadModel, match="unknown engine 'abacus'"):
            await manager.load("tiny", LoadOptions(), engine="abacus")


async def test_unloading_stops_the_process(home: Path) -> None:
    async with managed(home) as manager:
        loaded = await load(manager)
        assert await manager.unload("Tiny") == ["tiny"]
        assert not running(loaded.pid)
        assert manager.infos() == ()
        assert files(home) == set()
        with pytest.raises(NotFound, match="nothing called 'tiny'") as caught:
            await manager.unload("tiny")
        assert "llmster ps" in caught.value.hint


async def test_unloading_an_engine_that_hangs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instance_module, "STOP_LIMIT_S", 0.3)
    async with managed(home) as manager:
        loaded = await load(manager, hang_after_steps=2)
        asking = asyncio.create_task(ask(manager))
        await until(lambda: info(manager).active, "it works")
        assert await manager.unload("tiny") == ["tiny"]
        assert not running(loaded.pid)
        with pytest.raises(EngineLost):
            await asking


async def test_unloading_while_loading(home: Path) -> None:
    async with managed(home) as manager:
        loading = asyncio.create_task(load(manager, load_s=60))
        await until(lambda: manager.infos() and info(manager).progress is not None, "it loads")
        assert await manager.unload("tiny") == ["tiny"]
        with pytest.raises(BadModel, match="unloaded meanwhile"):
            await loading
        assert files(home) == set()


async def test_unloading_what_waits_to_be_started_again(home: Path) -> None:
    async with managed(home) as manager:
        loaded = await load(manager)
        os.kill(loaded.pid or 0, signal.SIGKILL)
        await in_state(manager, "backoff")
        assert await manager.unload("tiny") == ["tiny"]
        assert (manager.infos(), files(home), engine_pids(home)) == ((), set(), set())


async def test_a_model_can_be_loaded_twice(home: Path) -> None:
    async with managed(home) as manager:
        first = await load(manager, **ENDLESS)
        second = await load(manager)
        assert (first.id, second.id) == ("tiny", "tiny:2")
        assert (second.model, second.digest) == ("tiny", first.digest)
        assert first.pid != second.pid
        asking = asyncio.create_task(ask(manager, max_tokens=None))
        await until(lambda: info(manager).active, "the first is busy")
        assert await ask(manager, "tiny:2") == await ask(manager, "tiny:2")
        assert await manager.unload("tiny") == ["tiny"]
        with pytest.raises(EngineLost):
            await asking
        least_busy = manager.find("tiny")
        assert least_busy is not None
        assert least_busy.handle.instance_id == "tiny:2"
        # The free name is taken first.
        assert (await load(manager)).id == "tiny"


async def test_unloading_a_model_unloads_all_of_it(home: Path) -> None:
    async with managed(home) as manager:
        await load(manager)
        await load(manager)
        await manager.unload("tiny")
        assert await manager.unload("tiny") == ["tiny:2"]
        assert files(home) == set()


async def test_engines_outlive_their_daemon(home: Path) -> None:
    async with managed(home, stop=False) as manager:
        before = await load(manager)
        answer = await ask(manager)
    assert running(before.pid)
    async with managed(home) as manager:
        manager.restore()
        after = await in_state(manager, "ready")
        assert after == before
        assert await ask(manager) == answer
    assert not running(before.pid)


async def test_a_request_under_way_ends_with_the_daemon(home: Path) -> None:
    async with managed(home, stop=False) as manager:
        before = await load(manager, **ENDLESS)
        asking = asyncio.create_task(ask(manager, max_tokens=None))
        await until(lambda: info(manager).active, "it is asked")
    with pytest.raises(EngineLost):
        await asking
    async with managed(home) as manager:
        manager.restore()
        assert (await in_state(manager, "ready")).pid == before.pid
        await until(lambda: info(manager).active == 0, "nobody waits for that answer any more")


async def test_an_engine_is_found_again_while_it_loads(home: Path) -> None:
    async with managed(home, stop=False) as manager:
        loading = asyncio.create_task(load(manager, load_s=1.5))
        await until(lambda: manager.infos() and info(manager).progress, "it loads")
        pid = info(manager).pid
    loading.cancel()
    async with managed(home) as manager:
        manager.restore()
        assert (await in_state(manager, "loading")).pid == pid
        assert (await in_state(manager, "ready")).pid == pid


async def test_stopped_engines_come_back_with_the_next_daemon(home: Path) -> None:
    async with managed(home) as manager:
        before = await load(manager, slots=5, answer=1 << 40)
        await load(manager)
    assert engine_pids(home) == set()
    async with managed(home) as manager:
        manager.restore()
        after = await in_state(manager, "ready")
        assert [i.id for i in manager.infos()] == ["tiny", "tiny:2"]
        assert (after.slots, after.pid != before.pid) == (5, True)
        # It was loaded with the same options: the answer fills the context.
        assert len(await ask(manager, max_tokens=None)) == CONTEXT - len("hello")


async def test_no_engine_is_started_again_while_others_stop(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that hangs takes long to stop; the others must stay stopped meanwhile."""
    monkeypatch.setattr(instance_module, "STOP_LIMIT_S", 1.5)
    async with managed(home) as manager:
        hanging = await load(manager, hang_after_steps=2)
        asking = asyncio.create_task(ask(manager))
        await until(lambda: info(manager).active, "it works")
        quick = await load(manager)
        await manager.detach(stop_engines=True)
        assert (running(hanging.pid), running(quick.pid)) == (False, False)
        assert engine_pids(home) == set()
        with pytest.raises(EngineLost):
            await asking
    assert {handle.instance_id for handle in read_handles(home / "run")} == {"tiny", "tiny:2"}


async def test_an_engine_without_a_daemon_ends_by_itself(home: Path) -> None:
    async with managed(home, stop=False, orphan_timeout_s=0.5) as manager:
        loaded = await load(manager)
    assert running(loaded.pid)
    await until(lambda: not running(loaded.pid), "it ends")


async def test_a_process_that_only_has_the_same_pid_is_left_alone(home: Path) -> None:
    async with managed(home) as manager:
        await load(manager)
    (handle,) = read_handles(home / "run")
    other = await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", stdin=-1)
    try:
        stale = {"pid": other.pid, "started_ticks": 1}
        text = handle.model_copy(update=stale).model_dump_json()
        write_atomically(home / "run" / "tiny.handle.json", text)
        async with managed(home) as manager:
            manager.restore()
            assert (await in_state(manager, "ready")).pid != other.pid
            await manager.unload("tiny")
        assert running(other.pid)
    finally:
        await other.communicate(b"\n")


async def test_what_can_no_longer_be_loaded_stays_listed_as_failed(home: Path) -> None:
    async with managed(home) as manager:
        await load(manager)
    (handle,) = read_handles(home / "run")
    broken = handle.model_copy(update={"extra": {"fail_load": "the file is gone"}})
    write_atomically(home / "run" / "tiny.handle.json", broken.model_dump_json())
    async with managed(home) as manager:
        manager.restore()
        failed = await in_state(manager, "failed")
        assert (failed.reason, failed.pid) == ("the file is gone", None)
        assert await manager.unload("tiny") == ["tiny"]
    assert files(home) == set()


def test_a_home_with_a_long_path(tmp_path: Path) -> None:
    """The address of a Unix socket holds 107 bytes."""
    home = new_home(tmp_path / ("long" * 30) / ("path" * 30))
    add_model(home)
    socket = InstancePaths.under(home, "tiny").socket

    async def use() -> None:
        async with managed(home) as manager:
            await load(manager)
            assert socket.is_socket()
            assert len(await ask(manager)) == 8
            await manager.unload("tiny")

    with no_engine_left(home):
        asyncio.run(use())
    assert not socket.exists()
    assert socket.parent.stat().st_mode & 0o777 == 0o700


@needs_root
def test_sockets_are_not_put_into_a_folder_of_another_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"llmster-{os.getuid()}").mkdir()
    os.chown(tmp_path / f"llmster-{os.getuid()}", 12345, 12345)
    with pytest.raises(LlmsterError, match="another user"):
        InstancePaths.under(tmp_path / ("long" * 30), "tiny")


def test_names_of_instances_are_safe_names_of_files(home: Path) -> None:
    seen = set()
    for name in ("a/b", "../../x", "a b", "tiny:2", "tiny@q8_0", "."):
        paths = InstancePaths.under(home, name)
        assert {paths.handle.parent, paths.spec.parent, paths.fatal.parent} == {home / "run"}
        assert paths.log.parent == home / "logs"
        seen |= {paths.handle, paths.socket}
    assert len(seen) == 12


async def test_a_context_that_the_model_does_not_have(home: Path) -> None:
    async with managed(home) as manager:
        with pytest.raises(BadRequest, match="2,048 tokens, 2,049 were asked for") as caught:
            await manager.load("tiny", LoadOptions(context_length=CONTEXT + 1), engine="fake")
        assert (caught.value.status, caught.value.code) == (400, "context_too_long")
        assert (caught.value.param, caught.value.hint) == (
            "context_length",
            "load it with `--context 2048` or less",
        )
        loaded = await manager.load("tiny", LoadOptions(context_length=100), engine="fake")
        assert loaded.context_length == 100


async def test_a_model_that_nobody_has(home: Path) -> None:
    async with managed(home) as manager:
        await load(manager)
        with pytest.raises(NotFound, match="'huge' \\(loaded: tiny\\)") as caught:
            await load(manager, "huge")
        assert (caught.value.status, caught.value.code) == (404, "model_not_found")
        assert "llmster import" in caught.value.hint


@needs_root
def test_no_room_on_the_disk_of_the_home(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        home = new_home(disk / "home")
        add_model(home)

        async def try_to_load() -> None:
            async with managed(home) as manager:
                await load(manager)
                await manager.unload("tiny")
                ballast = fill(home)
                with pytest.raises(HomeError, match="No space left on device") as caught:
                    await load(manager)
                assert caught.value.code == "home_unwritable"
                assert str(home) in caught.value.message
                assert "--home" in caught.value.hint
                assert (manager.infos(), files(home), engine_pids(home)) == ((), set(), set())
                ballast.unlink()
                await load(manager)

        with no_engine_left(home):
            asyncio.run(try_to_load())


@needs_root
def test_a_disk_that_turns_read_only_does_not_end_the_daemon(tmp_path: Path) -> None:
    """As the kernel does when a disk has errors."""
    with small_disk(tmp_path / "disk") as disk:
        home = new_home(disk / "home")
        add_model(home)

        async def use() -> None:
            async with managed(home) as manager:
                loaded = await load(manager)
                # The engine has its log open, so only the daemon's view of the disk can change.
                with read_only(home / "run"):
                    assert len(await ask(manager)) == 8
                    assert await manager.unload("tiny") == ["tiny"]
                    assert not running(loaded.pid)
                    with pytest.raises(HomeError, match="Read-only file system"):
                        await load(manager)
                await load(manager)

        with no_engine_left(home):
            asyncio.run(use())


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    subprocess.run(["mount", "--bind", "-o", "ro", str(folder), str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)
