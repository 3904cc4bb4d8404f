"""Engine processes: their daemons come and go, they are killed, and some models can't be loaded."""

import asyncio
import contextlib
import resource
import signal
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fakes.engines import (
    EngineProcess,
    HandOver,
    ask,
    collect,
    greedy,
    idle,
    new_id,
    text_of,
    tokens_of,
    until,
    weekdays,
)
from fakes.gguf import gguf_bytes
from llmster_daemon.engines.local import LocalEngine
from llmster_daemon.engines.worker.ipc import pack
from llmster_daemon.errors import EngineLost, LlmsterError

NewProcess = Callable[..., EngineProcess]

LOST_LIMIT_S = 2.0
SLOW = {"step_s": 0.02, "answer": 1 << 30}


@pytest.fixture
def fake() -> NewProcess:
    """Makes processes of the model of arithmetic, for what does not depend on the model."""
    return lambda **options: EngineProcess("fake", **options)


# Daemons come and go


async def test_a_daemon_that_goes_takes_its_requests_along_and_no_others(
    decode: LocalEngine, decode_process: EngineProcess
) -> None:
    prompt = weekdays(0, 14)
    expected = await ask(decode, prompt=prompt, max_tokens=20)
    kept = await decode.generate(new_id(), greedy(prompt=prompt, max_tokens=20))
    async with decode_process.connection() as other:
        for _ in range(3):
            generation = await other.generate(new_id(), greedy(prompt=prompt, max_tokens=900))
            await anext(generation.chunks)
        await other.expect(new_id(), greedy(prompt=prompt))
    assert text_of(await collect(kept)) == expected
    await idle(decode)


async def test_requests_of_a_closed_connection_end_as_lost(decode_process: EngineProcess) -> None:
    engine = await decode_process.connect()
    generation = await engine.generate(new_id(), greedy(prompt="a b c", max_tokens=900))
    await anext(generation.chunks)
    lost = decode_process.lost
    await engine.close()
    with pytest.raises(EngineLost):
        await collect(generation)
    assert engine.lost
    assert decode_process.lost == lost + 1
    for call in (
        engine.generate(new_id(), greedy(prompt="a")),
        engine.expect(new_id(), greedy(prompt="a")),
        engine.tokenize("a", False),
        engine.prefill(new_id(), [40], "127.0.0.1", 1, "t"),
        engine.recompute("a", "b"),
    ):
        with pytest.raises(EngineLost, match="not running"):
            await call
    await engine.cancel(generation.id)
    await engine.stop()
    assert decode_process.running


async def test_a_daemon_that_comes_back_is_told_the_state_and_served(
    decode_process: EngineProcess,
) -> None:
    for _ in range(3):
        async with decode_process.connection() as engine:
            assert (engine.status.context_length, engine.status.slots) == (4096, 8)
            assert engine.status.kv_port > 0
            assert await ask(engine, prompt=weekdays(0, 7), max_tokens=2)


async def test_each_daemon_hears_only_of_its_own_requests(
    decode: LocalEngine, decode_process: EngineProcess
) -> None:
    prompts = [weekdays(first, 14) for first in range(2)]
    alone = [await ask(decode, prompt=prompt, max_tokens=6) for prompt in prompts]
    async with decode_process.connection() as other:
        both = await asyncio.gather(
            *[
                ask(engine, prompt=prompt, max_tokens=6)
                for engine, prompt in zip((decode, other), prompts, strict=True)
            ]
        )
    assert both == alone


async def test_only_the_user_of_the_daemon_may_connect(decode_process: EngineProcess) -> None:
    mode = Path(decode_process.spec.socket_path).stat().st_mode  # noqa: ASYNC240
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


async def test_progress_is_told_while_the_model_loads(fake: NewProcess) -> None:
    async with fake(load_s=0.5) as process:
        values = [event["value"] for event in process.events if event["ev"] == "progress"]
    assert values == sorted(values)
    assert len(values) > 3


async def test_a_request_that_comes_while_the_model_loads_is_refused(fake: NewProcess) -> None:
    process = fake(load_s=30)
    process.start()
    try:
        path = Path(process.spec.socket_path)
        await until(path.exists, "it listens")
        engine = await LocalEngine.connect(str(path), lambda _: None, lambda: None)
        generation = await engine.generate(new_id(), greedy(prompt="a"))
        with pytest.raises(LlmsterError, match="still loading"):
            await collect(generation)
        await engine.stop()
        assert await process.exit_code() == 0
        await engine.close()
    finally:
        process.stop()


async def test_a_daemon_that_does_not_read_holds_nobody_up(fake: NewProcess) -> None:
    """Its socket fills up; another one is served as ever."""
    async with fake(answer=1 << 30) as process:
        with socket.socket(socket.AF_UNIX) as silent:
            silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            silent.connect(process.spec.socket_path)
            for number in range(200):
                message = {"op": "tokenize", "id": str(number), "text": "x" * 5000}
                silent.sendall(pack(message))
            assert await ask(process.engine, prompt="a", max_tokens=5)


# They end


async def test_a_killed_engine_fails_what_it_worked_on_at_once(new_process: NewProcess) -> None:
    async with new_process() as process, new_process() as other:
        engine = process.engine
        generations = [
            await engine.generate(new_id(), greedy(prompt="a b c", max_tokens=900))
            for _ in range(3)
        ]
        for generation in generations:
            await anext(generation.chunks)
        tokens = await tokens_of(engine, weekdays(0, 7), 20)
        awaited, _ = await engine.expect(new_id(), greedy(tokens=tokens, max_tokens=3))
        hand_over = HandOver(engine, other.engine)
        killed_at = time.monotonic()
        process.kill()
        for generation in [*generations, awaited]:
            with pytest.raises(EngineLost):
                await collect(generation)
        await hand_over.start(tokens=tokens)
        assert isinstance(await hand_over.prefilled(), EngineLost)
        assert time.monotonic() - killed_at < LOST_LIMIT_S
        assert process.lost == 1
        assert await process.exit_code() == -signal.SIGKILL


async def test_an_engine_that_crashes_in_a_step_fails_what_it_worked_on(fake: NewProcess) -> None:
    async with fake(die_after_steps=5, answer=1 << 30) as process:
        generation = await process.engine.generate(new_id(), greedy(prompt="a", max_tokens=100))
        with pytest.raises(EngineLost):
            await collect(generation)
        assert generation.completion_tokens == 4
        assert await process.exit_code() == 70


async def test_an_engine_that_hangs_in_a_step_shows_no_sign_of_life(fake: NewProcess) -> None:
    async with fake(hang_after_steps=5, answer=1 << 30) as process:
        generation = await process.engine.generate(new_id(), greedy(prompt="a", max_tokens=100))
        for _ in range(4):
            await anext(generation.chunks)
        silent_since = process.engine.last_event_s
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.5):  # it beats every second while it lives
                await anext(generation.chunks)
        assert process.engine.last_event_s == silent_since


async def test_an_idle_engine_shows_that_it_lives(decode: LocalEngine) -> None:
    seen = decode.last_event_s
    await until(lambda: decode.last_event_s > seen, "a sign of life", limit_s=3)


async def test_an_engine_that_is_told_to_stop_ends_and_tidies_up(new_process: NewProcess) -> None:
    async with new_process() as process:
        generation = await process.engine.generate(new_id(), greedy(prompt="a b", max_tokens=900))
        await anext(generation.chunks)
        await process.engine.stop()
        with pytest.raises(EngineLost):
            await collect(generation)
        assert await process.exit_code() == 0
        assert not Path(process.spec.socket_path).exists()  # noqa: ASYNC240
        assert not Path(process.spec.fatal_path).exists()  # noqa: ASYNC240


async def test_an_engine_ignores_the_terminals_interrupt(fake: NewProcess) -> None:
    async with fake() as process:
        process.kill(signal.SIGINT)
        assert await ask(process.engine, prompt="a", max_tokens=3)


async def test_an_engine_without_a_daemon_ends_by_itself(new_process: NewProcess) -> None:
    async with new_process(orphan_timeout_s=0.2) as process:
        begun = time.monotonic()
        # It lives longer than it would alone.
        await until(lambda: process.engine.last_event_s > begun + 1.2, "a sign of life")
        await process.engine.close()
        assert await process.exit_code() == 0


async def test_an_engine_that_a_daemon_comes_back_to_does_not_end(fake: NewProcess) -> None:
    async with fake(orphan_timeout_s=5) as process:
        await process.engine.close()
        async with process.connection() as engine:
            assert await ask(engine, prompt="a", max_tokens=3)


async def test_an_engine_out_of_file_descriptors_recovers(fake: NewProcess) -> None:
    async with fake() as process, fake() as other:
        soft = len(list(Path(f"/proc/{process.pid}/fd").iterdir())) + 4  # noqa: ASYNC240
        _, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (soft, hard))
        with contextlib.ExitStack() as crowd:
            for _ in range(20):
                sock = socket.create_connection(("127.0.0.1", process.engine.status.kv_port))
                crowd.enter_context(sock)
            with pytest.raises(TimeoutError):  # until it can't take another daemon
                for _ in range(8):
                    late = crowd.enter_context(socket.socket(socket.AF_UNIX))
                    late.connect(process.spec.socket_path)
                    late.settimeout(0.5)
                    late.recv(1)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (hard, hard))
        hand_over = HandOver(other.engine, process.engine)
        await hand_over.start(prompt="a b c", max_tokens=3)
        await hand_over.text()
        assert hand_over.generation.recomputed is None
        async with process.connection() as again:
            assert await ask(again, prompt="a", max_tokens=3)


# They can't begin


async def ends_with(
    process: EngineProcess, mem_bytes: int | None = None
) -> tuple[int, dict[str, Any] | None]:
    """The exit code of a process that can't load, and the reason that it left."""
    process.start()
    try:
        if mem_bytes is not None:
            resource.prlimit(process.pid, resource.RLIMIT_AS, (mem_bytes, mem_bytes))
        code = await process.exit_code()
        left = Path(process.spec.fatal_path).exists()  # noqa: ASYNC240
        return code, process.fatal if left else None
    finally:
        process.stop()


async def test_a_model_that_cannot_be_loaded_ends_the_process_with_a_reason(
    fake: NewProcess,
) -> None:
    code, fatal = await ends_with(fake(fail_load="it is haunted"))
    assert (code, fatal) == (3, {"code": "load_failed", "message": "it is haunted"})


async def test_an_abort_while_loading_ends_the_process_with_a_signal(fake: NewProcess) -> None:
    assert await ends_with(fake(abort_load=True)) == (-signal.SIGABRT, None)


async def test_an_unknown_engine_ends_the_process_with_a_reason() -> None:
    code, fatal = await ends_with(EngineProcess("steam"))
    assert (code, fatal) == (3, {"code": "load_failed", "message": "unknown engine 'steam'"})


UNLOADABLE: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda _: b"",
    "random bytes": lambda _: bytes(range(256)) * 400,
    "only the magic": lambda whole: whole[:4],
    "cut off in the metadata": lambda whole: whole[:100_000],
    "cut off in the weights": lambda whole: whole[: len(whole) // 2],
    "cut off by a byte": lambda whole: whole[:-1],
    "another architecture": lambda _: gguf_bytes(),
}


@pytest.mark.live
@pytest.mark.parametrize("damage", list(UNLOADABLE))
async def test_a_damaged_model_file_ends_the_process_with_a_reason(
    sample_model: Path, tmp_path: Path, damage: str
) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(UNLOADABLE[damage](sample_model.read_bytes()))  # noqa: ASYNC240
    code, fatal = await ends_with(EngineProcess("llamacpp", damaged))
    # llama.cpp aborts at some damages: a signal is the daemon's to tell.
    assert code == 3 or code < 0
    if code == 3:
        assert fatal is not None
        assert fatal["code"] == "load_failed"
        assert fatal["message"].startswith("llama.cpp can't load the file: ")
        assert "no reason" not in fatal["message"]


@pytest.mark.live
async def test_a_model_file_that_is_not_there_ends_the_process_with_a_reason(
    tmp_path: Path,
) -> None:
    code, fatal = await ends_with(EngineProcess("llamacpp", tmp_path / "none.gguf"))
    assert code == 3
    assert fatal is not None
    assert "none.gguf" in fatal["message"]


@pytest.mark.live
async def test_a_context_larger_than_memory_ends_the_process_with_a_reason(
    sample_model: Path,
) -> None:
    process = EngineProcess("llamacpp", sample_model, context_length=1 << 19)
    code, fatal = await ends_with(process, mem_bytes=6 << 30)
    assert code == 3
    assert fatal is not None
    assert fatal["message"].startswith("no memory for a context of 524,288 tokens: ")
