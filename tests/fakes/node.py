"""For tests: a home with models, an instance manager, a whole node, and a control plane."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
import psutil
import pytest
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from fakes.gguf import gguf_bytes
from llmster_daemon.app import build_app, make_server, running_node
from llmster_daemon.config import NodeConfig
from llmster_daemon.home import bind, prepare
from llmster_daemon.models.store import ModelStore
from llmster_daemon.node import Node
from llmster_daemon.protocol.node import (
    Command,
    CommandResult,
    InstanceInfo,
    LoadOptions,
    PoolFeed,
)
from llmster_daemon.supervisor.manager import InstanceManager

LIMIT_S = 20.0
POLL_S = 0.01
CONTEXT = 2048
ENDLESS: dict[str, object] = {"answer": 1 << 40, "step_s": 0.02}
"""Options of a fake engine whose answers end with the context only, after a long while."""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk, as root only")

T = TypeVar("T")


def new_home(path: Path) -> Path:
    """A home as the daemon makes it."""
    prepare(path, "models", "run", "logs")
    return path


def add_model(home: Path, key: str = "tiny", template: str | None = None) -> str:
    """Put a small model file into a home's store; returns its key."""
    source = home / f"{key}.gguf"
    changes = {
        "general.name": key,
        "llama.context_length": CONTEXT,
        "tokenizer.chat_template": template,
    }
    source.write_bytes(gguf_bytes(changes))
    try:
        return ModelStore(home / "models").import_file(source).key
    finally:
        source.unlink()


@contextlib.contextmanager
def small_disk(path: Path, size: str = "4m") -> Iterator[Path]:
    """A disk of its own at this path. Root only."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def fill(folder: Path) -> Path:
    """Leave no room on the disk of this folder; returns the file that takes it."""
    path = folder / "ballast"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    return path


@contextlib.asynccontextmanager
async def managed(
    home: Path, *, stop: bool = True, hang_limit_s: float = 60.0, orphan_timeout_s: float = 60.0
) -> AsyncIterator[InstanceManager]:
    """A manager of a home's instances. `stop` False leaves the engines running at the end."""
    async with asyncio.TaskGroup() as group:
        store = ModelStore(home / "models")
        manager = InstanceManager(
            home, store, 1, group, lambda: None, hang_limit_s, orphan_timeout_s
        )
        try:
            yield manager
        finally:
            await manager.detach(stop_engines=stop)


async def load(
    manager: InstanceManager, key: str = "tiny", slots: int = 4, **extra: object
) -> InstanceInfo:
    """Load with the fake engine; `extra` are its options."""
    return await manager.load(key, LoadOptions(slots=slots), engine="fake", extra=extra)


def info(manager: InstanceManager, instance_id: str = "tiny") -> InstanceInfo:
    """What an instance says of itself."""
    return next(i for i in manager.infos() if i.id == instance_id)


def engine_pids(home: Path) -> set[int]:
    """Engine processes that belong to a home."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(str(home) in argument for argument in process.cmdline()):
                found.add(process.pid)
    return found


@contextlib.contextmanager
def no_engine_left(home: Path) -> Iterator[None]:
    """Kill at the end what still runs in a home, then fail if there was anything."""
    try:
        yield
    finally:
        left = engine_pids(home)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert not left, f"engines outlived the test: {left}"


async def until(condition: Callable[[], T], what: str, limit_s: float = LIMIT_S) -> T:
    """Wait for a condition; returns what it returned. Fails with `what` if it stays false."""
    deadline = time.monotonic() + limit_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        await asyncio.sleep(POLL_S)
    return value


class Control:
    """A control plane that remembers what it was told; `port` stays the same over restarts."""

    def __init__(self) -> None:
        with bind("127.0.0.1", 0) as sock:
            self.port = sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.welcome = True
        """False: every connection is closed at once, as of a node that is not wanted."""
        self.connections: list[ServerConnection] = []
        self.connected_at: list[float] = []
        self.messages: list[dict[str, Any]] = []
        self.told_at: list[float] = []
        self._server: Server | None = None

    async def start(self) -> None:
        self._server = await serve(self._serve, "127.0.0.1", self.port, max_size=None)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            self._server = None

    async def _serve(self, socket: ServerConnection) -> None:
        self.connections.append(socket)
        self.connected_at.append(time.monotonic())
        if not self.welcome:
            return
        with contextlib.suppress(ConnectionClosed):
            async for data in socket:
                self.messages.append(json.loads(data))
                self.told_at.append(time.monotonic())

    def told(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.messages if message["type"] == kind]

    def routes(self) -> list[str]:
        return [r["request_id"] for report in self.told("report") for r in report["routes"]]

    async def say(self, message: PoolFeed | Command | str | bytes) -> None:
        data = message if isinstance(message, (str, bytes)) else message.model_dump_json()
        await self.connections[-1].send(data)

    async def order(self, name: str, **args: Any) -> CommandResult:
        """Send a command and wait for what became of it."""
        number = str(len(self.told("result")))
        await self.say(Command.model_validate({"id": number, "name": name, "args": args}))
        await until(lambda: number in [r["id"] for r in self.told("result")], f"{name} is answered")
        return CommandResult.model_validate(
            next(r for r in self.told("result") if r["id"] == number)
        )


class LiveNode:
    """A node with a real HTTP server, in a thread of its own, for as long as `with` lasts."""

    def __init__(self, home: Path, **config: Any) -> None:
        self.home = home
        self._config = config
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="live-node")
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self.node: Node
        self.url = ""
        self.http: httpx.Client

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(LIMIT_S), "the node did not start"
        self.http = httpx.Client(base_url=self.url, trust_env=False, timeout=LIMIT_S)
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive(), "the node did not stop"

    def call(self, work: Awaitable[T]) -> T:
        """Run something in the node's event loop."""

        async def run() -> T:
            return await work

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(LIMIT_S)

    def load(self, key: str = "tiny", slots: int = 8, **extra: object) -> InstanceInfo:
        """Load with the fake engine; `extra` are its options."""
        return self.call(load(self.node.instances, key, slots, **extra))

    def instance(self, instance_id: str = "tiny") -> InstanceInfo:
        """What an instance says of itself."""
        return info(self.node.instances, instance_id)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        with bind("127.0.0.1", 0) as sock:
            port = sock.getsockname()[1]
            defaults: dict[str, Any] = {"control_url": None}
            config = NodeConfig(self.home, "test", port=port, **defaults | self._config)
            async with running_node(config) as node:
                self.node, self.url = node, config.url
                server = make_server(build_app(node))
                serving = asyncio.create_task(server.serve(sockets=[sock]))
                self._started.set()
                await self._stop.wait()
                server.should_exit = True
                await serving
                await node.instances.detach(stop_engines=True)
