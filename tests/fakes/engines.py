"""Real engine processes for tests, and what goes wrong between them."""

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Self

from llmster_daemon.engines.base import Chunk, GenerateParams, Generation, Prefilled
from llmster_daemon.engines.local import LocalEngine
from llmster_daemon.engines.worker.backend import EngineSpec
from llmster_daemon.errors import LlmsterError
from llmster_daemon.kv.wire import FRAME, Kind

READY_LIMIT_S = 60.0
EXIT_LIMIT_S = 15.0
IDLE_LIMIT_S = 10.0
POLL_S = 0.01


def greedy(**fields: Any) -> GenerateParams:
    """What to generate; without chance unless told otherwise."""
    return GenerateParams(**{"temperature": 0.0, **fields})


async def collect(generation: Generation) -> list[Chunk]:
    """All chunks of a request."""
    return [chunk async for chunk in generation.chunks]


def text_of(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


_ids = itertools.count()


def new_id() -> str:
    """A request id that was not used before."""
    return f"request-{next(_ids)}"


async def ask(engine: LocalEngine, **fields: Any) -> str:
    """The text of one greedy answer."""
    return text_of(await collect(await engine.generate(new_id(), greedy(**fields))))


DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def weekdays(first: int, count: int) -> str:
    """A prompt that real models go on with beyond doubt, each `first` in its own way.

    Sums of floats differ a little with the number of rows in a batch: where two tokens are about
    as likely, an answer depends on what else is computed. Here they never are.
    """
    return "".join(f" {DAYS[(first + number) % 7]}," for number in range(count))


async def tokens_of(engine: LocalEngine, text: str, count: int) -> list[int]:
    """A prompt of exactly `count` tokens, made of a text again and again."""
    piece = await engine.tokenize(text, False)
    return (piece * (count // len(piece) + 1))[:count]


async def idle(*engines: LocalEngine) -> None:
    """Wait until engines hold nothing; fails if some slot or cell is never given back."""
    deadline = time.monotonic() + IDLE_LIMIT_S
    for engine in engines:
        while True:
            # The event that ends a request tells what is left without it: no need for a beat.
            await ask(engine, tokens=[5], max_tokens=1)
            status = engine.status
            if not (status.active or status.waiting or status.kv_used_cells):
                break
            assert time.monotonic() < deadline, f"something is still held: {status}"
            await asyncio.sleep(POLL_S)


async def until(condition: Callable[[], bool], what: str, limit_s: float = IDLE_LIMIT_S) -> None:
    """Wait for a condition; fails with `what` when it does not come true in time."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        await asyncio.sleep(POLL_S)


class EngineProcess:
    """A process of `llmster_daemon.engines.worker.main`, and engines connected to it.

    As an async context manager it starts, connects `engine`, waits until the model is loaded, and
    stops. A test that shares a process between event loops uses `start`, `connect` and `stop`.
    `options` are those of the fake model.
    """

    def __init__(
        self,
        backend: str = "fake",
        model_path: Path | str = "",
        *,
        digest: str = "0" * 64,
        context_length: int = 1024,
        slots: int = 4,
        orphan_timeout_s: float = 60.0,
        **options: Any,
    ) -> None:
        # Not pytest's tmp_path: a socket's path must be short.
        self.directory = Path(tempfile.mkdtemp(prefix="llmster-test-"))
        self.spec = EngineSpec(
            instance_id=f"test-{backend}",
            backend=backend,
            model_path=str(model_path),
            digest=digest,
            socket_path=str(self.directory / "engine.sock"),
            fatal_path=str(self.directory / "fatal.json"),
            context_length=context_length,
            slots=slots,
            orphan_timeout_s=orphan_timeout_s,
            options=options,
        )
        self.events: list[dict[str, Any]] = []
        """States that the process told: progress, ready."""
        self.lost = 0
        """How many connections ended."""
        self._process: subprocess.Popen[bytes] | None = None
        self._engine: LocalEngine | None = None

    async def __aenter__(self) -> Self:
        self.start()
        try:
            self._engine = await self.connect()
        except BaseException:
            self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            if self._engine is not None:
                await self._engine.close()
        finally:
            self.stop()

    @property
    def engine(self) -> LocalEngine:
        """The engine that the context manager connected."""
        assert self._engine is not None, "use `async with`"
        return self._engine

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """What the process wrote to stdout and stderr."""
        return (self.directory / "log").read_text(errors="replace")

    @property
    def fatal(self) -> dict[str, Any]:
        """The reason that the process left behind."""
        value: dict[str, Any] = json.loads(Path(self.spec.fatal_path).read_text())
        return value

    def start(self) -> None:
        """Start the process; does not wait for it."""
        spec_path = self.directory / "spec.json"
        spec_path.write_text(self.spec.model_dump_json())
        command = [sys.executable, "-m", "llmster_daemon.engines.worker.main", str(spec_path)]
        with (self.directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    async def connect(self) -> LocalEngine:
        """Another connection, once the model is loaded."""
        deadline = time.monotonic() + READY_LIMIT_S
        ready = asyncio.Event()

        def on_state(event: dict[str, Any]) -> None:
            self.events.append(event)
            if event["ev"] == "ready":
                ready.set()

        def on_lost() -> None:
            self.lost += 1
            ready.set()

        while True:
            assert self.running, f"the engine process ended: {self.log}"
            assert time.monotonic() < deadline, f"the engine can't be reached: {self.log}"
            with contextlib.suppress(OSError):
                engine = await LocalEngine.connect(self.spec.socket_path, on_state, on_lost)
                break
            await asyncio.sleep(POLL_S)
        async with asyncio.timeout_at(asyncio.get_running_loop().time() + READY_LIMIT_S):
            await ready.wait()
        assert not engine.lost, f"the engine process ended: {self.log}"
        return engine

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[LocalEngine]:
        """Another connection, for as long as the context lasts."""
        engine = await self.connect()
        try:
            yield engine
        finally:
            await engine.close()

    async def exit_code(self, limit_s: float = EXIT_LIMIT_S) -> int:
        """Wait for the process to end by itself; minus the signal's number if one ended it."""
        assert self._process is not None, "not started"
        return await asyncio.to_thread(self._process.wait, limit_s)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send the process a signal."""
        os.kill(self.pid, number)

    def stop(self) -> None:
        """End the process for certain and remove its files."""
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait(EXIT_LIMIT_S)
        shutil.rmtree(self.directory, ignore_errors=True)


class HandOver:
    """A request on one engine whose prompt another one computes. `start` it, then `chunks`."""

    def __init__(self, prefill: LocalEngine, decode: LocalEngine, port: int | None = None) -> None:
        """`port` stands for the decode engine's own, as a proxy's does."""
        self.id = new_id()
        self.prefill = prefill
        self.decode = decode
        self.port = port
        self.generation = Generation(self.id)
        self.prefilling: asyncio.Task[Prefilled] | None = None

    async def start(self, **fields: Any) -> None:
        """Reserve the slot and have the prompt computed."""
        self.generation, reservation = await self.decode.expect(self.id, greedy(**fields))
        self.prefilling = asyncio.create_task(
            self.prefill.prefill(
                f"{self.id}-prefill",
                reservation.tokens,
                "127.0.0.1",
                self.port or reservation.kv_port,
                reservation.ticket,
            )
        )

    async def text(self) -> str:
        """The whole answer."""
        return text_of(await collect(self.generation))

    async def prefilled(self) -> Prefilled | LlmsterError:
        """What came of the prompt's computation."""
        assert self.prefilling is not None, "not started"
        try:
            return await self.prefilling
        except LlmsterError as error:
            return error


class KvProxy:
    """A bad network between two engines: passes a hand-over on, frame by frame, up to a point.

    `cut_at`: cuts both sides when this share of the KV has passed. `corrupt`: flips one bit of
    the KV. `hold_after`: after that many ranges (infinite: before the logits) nothing passes any
    more, which sets `held`; the connections stay.
    """

    def __init__(
        self,
        port: int,
        *,
        cut_at: float | None = None,
        corrupt: bool = False,
        hold_after: float | None = None,
    ) -> None:
        self.port = 0
        self.held = asyncio.Event()
        self.ranges = 0
        """How many ranges have passed whole."""
        self._target = port
        self._cut_at = cut_at
        self._corrupt = corrupt
        self._hold_after = hold_after
        self._tokens = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        ends = [writer]
        try:
            back, forth = await asyncio.open_connection("127.0.0.1", self._target)
            ends.append(forth)
            ways = [
                asyncio.create_task(self._pass_frames(reader, forth)),
                asyncio.create_task(self._pass_bytes(back, writer)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        finally:
            for end in ends:
                end.close()
            for end in ends:
                with contextlib.suppress(OSError):
                    await end.wait_closed()

    async def _pass_bytes(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()

    async def _pass_frames(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Until the sender is gone or the connection is to be cut."""
        while True:
            header = await reader.readexactly(FRAME.size)
            _, _, kind, start, end, length, _ = FRAME.unpack(header)
            body = bytearray(await reader.readexactly(length))
            if kind == Kind.HELLO:
                self._tokens = json.loads(body)["tokens"]
            if self._hold_after is not None and (
                kind == Kind.DONE or (kind == Kind.RANGE and self.ranges == self._hold_after)
            ):
                self.held.set()
            if self.held.is_set():
                continue
            if kind == Kind.RANGE and self._corrupt:
                body[length // 2] ^= 1
            if kind == Kind.RANGE and self._cut_at is not None:
                share = (self._cut_at * self._tokens - start) / (end - start)
                if share <= 1:
                    writer.write((header + body)[: int((FRAME.size + length) * share)])
                    await writer.drain()
                    return
            writer.write(header + body)
            await writer.drain()
            self.ranges += kind == Kind.RANGE
