"""`llmster up`: starts a control plane and nodes, and keeps them running until told to stop."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from llmster_control.protocol import LoadRequest, PoolState
from llmster_daemon.errors import LlmsterError, Unavailable
from llmster_daemon.home import bind, locked, prepare
from llmster_daemon.models.sample import ensure_sample
from llmster_daemon.models.store import ModelStore
from llmster_daemon.protocol.node import ModelInfo
from llmster_daemon.supervisor.process import (
    PYTHON,
    Watched,
    describe_exit,
    spawn,
    started_ticks,
    tail,
    write_atomically,
)
from llmster_daemon.supervisor.state import Life
from llmster_tui.client import PoolClient
from llmster_tui.local.down import stop_engines
from llmster_tui.local.layout import Layout

log = logging.getLogger(__name__)

START_LIMIT_S = 60.0
STOP_LIMIT_S = 20.0
LOOK_INTERVAL_S = 0.1

Say = Callable[[str], None]


class Child:
    """A supervised process of the pool: control plane or node daemon."""

    def __init__(self, name: str, argv: list[str], log_file: Path, stop: signal.Signals) -> None:
        self.name = name
        self.life = Life()
        self.process: Watched | None = None
        self._argv = argv
        self._log = log_file
        self._stop = stop
        self._stopping = asyncio.Event()

    async def run(self, on_start: Callable[[], None], say: Say) -> None:
        """Keep it running until `stop`. Raises LlmsterError if it never comes up."""
        while self.life.state != "gone":
            if self.life.state == "failed":
                raise Unavailable(
                    "start_failed", f"{self.name}: {self.life.reason}", f"see {self._log}"
                )
            if self.life.state == "backoff":
                wait_s = (self.life.retry_at_s or 0.0) - time.monotonic()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(0.0, wait_s)):
                        await self._stopping.wait()
                self.life = self.life.ticked(time.monotonic())
                continue
            self.process = Watched(spawn(self._argv, self._log))
            self.life = self.life.spawned()
            on_start()
            await self.process.wait()
            reason = describe_exit(self.process.status).replace("engine ", "")
            reason += f": {tail(self._log, 2)}"
            # Exit code 1 is our own refusal (port in use, bad home): it would only repeat itself.
            permanent = self.process.status == 1 and self.life.state != "ready"
            self.life = self.life.exited(time.monotonic(), reason, permanent)
            self.process.close()
            self.process = None
            if self.life.state == "backoff":
                say(f"{self.name}: {reason}; starting it again")

    def ready(self) -> None:
        """The pool sees it."""
        self.life = self.life.became_ready(time.monotonic())

    def stop(self) -> None:
        """Ask it to end."""
        self.life = self.life.unloaded()
        self._stopping.set()
        if self.process is not None:
            self.process.signal(self._stop)

    async def kill(self) -> None:
        """End it for certain."""
        if self.process is not None:
            await self.process.kill()


def children_of(layout: Layout) -> list[Child]:
    """The processes of a pool. Nodes stop their engines on SIGINT."""
    logs = layout.home / "logs"
    llmster = [PYTHON, "-m", "llmster_tui.cli"]
    control = [*llmster, "control", "--home", str(layout.control_home)]
    control += ["--port", str(layout.control_port)]
    found = [Child("control", control, logs / "control.log", signal.SIGTERM)]
    for i in range(layout.nodes):
        argv = [*llmster, "daemon", "--home", str(layout.node_home(i))]
        argv += ["--port", str(layout.node_port(i)), "--name", layout.node_name(i)]
        argv += ["--role", layout.role(i), "--control", layout.control_url]
        name = layout.node_name(i)
        found.append(Child(name, argv, logs / f"{name}.log", signal.SIGINT))
    return found


class LocalPool:
    """A pool of this machine, while it runs. Use as an async context manager."""

    def __init__(self, layout: Layout, say: Say) -> None:
        self.layout = layout
        self._say = say
        self._children = children_of(layout)
        self._tasks: list[asyncio.Task[None]] = []
        self._locks = contextlib.ExitStack()

    async def __aenter__(self) -> "LocalPool":
        layout = self.layout
        prepare(layout.home, "logs", "cache")
        self._locks.enter_context(locked(layout.home, "up"))
        try:
            self._check_ports()
            for child in self._children:
                work = child.run(self._write_record, self._say)
                self._tasks.append(asyncio.create_task(work, name=child.name))
            await self._until_joined()
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._end()

    async def load_everywhere(self, key: str) -> None:
        """Load a model on every node that has not got it loaded. Raises LlmsterError."""
        async with PoolClient(self.layout.control_url) as client:
            state = await client.state()
            # Nodes of an earlier, larger pool in this home are known but not here.
            missing = [
                node.name
                for node in state.nodes
                if node.liveness == "online" and not any(i.model == key for i in node.instances)
            ]
            await asyncio.gather(
                *(client.load(LoadRequest(model=key, node=name)) for name in missing)
            )
            await self._until(client, lambda s: self._serves(s, key), f"load {key}")

    async def wait(self) -> None:
        """Until a process of the pool fails for good. Raises LlmsterError then."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    def _serves(self, state: PoolState, key: str) -> bool:
        serving = [n for n in state.nodes if n.liveness == "online"]
        return len(serving) >= self.layout.nodes and all(
            any(i.model == key and i.state == "ready" for i in n.instances) for n in serving
        )

    async def _until_joined(self) -> None:
        names = {self.layout.node_name(i) for i in range(self.layout.nodes)}

        def joined(state: PoolState) -> bool:
            online = {n.name for n in state.nodes if n.liveness == "online" and n.telemetry}
            return names <= online

        async with PoolClient(self.layout.control_url) as client:
            await self._until(client, joined, "start the pool")
        for child in self._children:
            child.ready()

    async def _until(
        self, client: PoolClient, true: Callable[[PoolState], bool], what: str
    ) -> None:
        try:
            async with asyncio.timeout(START_LIMIT_S):
                while True:
                    for task in self._tasks:
                        if task.done():
                            task.result()
                    with contextlib.suppress(Unavailable):
                        if true(await client.state()):
                            return
                    await asyncio.sleep(LOOK_INTERVAL_S)
        except TimeoutError:
            raise Unavailable(
                "start_timeout",
                f"could not {what} within {START_LIMIT_S:g} s",
                f"see the logs in {self.layout.home / 'logs'}",
            ) from None

    def _check_ports(self) -> None:
        """Say which port is taken before anything is started."""
        bind("127.0.0.1", self.layout.control_port, "--control-port").close()
        for i in range(self.layout.nodes):
            bind("127.0.0.1", self.layout.node_port(i)).close()

    def _write_record(self) -> None:
        pids = {"up": os.getpid()}
        pids |= {c.name: c.process.pid for c in self._children if c.process is not None}
        record = {
            "control_url": self.layout.control_url,
            "endpoint": self.layout.endpoint,
            "processes": {name: [pid, started_ticks(pid)] for name, pid in pids.items()},
        }
        write_atomically(self.layout.record, json.dumps(record))

    async def _end(self) -> None:
        # Nodes first: they say good-bye to the control plane.
        for child in reversed(self._children):
            child.stop()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=STOP_LIMIT_S)
            if late:
                await asyncio.gather(*(child.kill() for child in self._children))
            await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(stop_engines, self.layout.home)
        self.layout.record.unlink(missing_ok=True)
        self._locks.close()


def put_sample(layout: Layout, say: Say) -> ModelInfo:
    """The sample model in every node's store, fetched once. Blocks. Raises LlmsterError."""
    model: ModelInfo | None = None
    for i in range(layout.nodes):
        root = layout.node_home(i) / "models"
        prepare(layout.node_home(i), "models")
        model = ensure_sample(ModelStore(root), cache=layout.cache)
    if model is None:
        raise LlmsterError("no_nodes", "a pool needs at least one node", "`--nodes 1`")
    say(f"model {model.key} is in the store ({model.size_bytes / 1e6:.0f} MB)")
    return model


async def run_up(layout: Layout, sample: bool, say: Say, ready_file: Path | None) -> None:
    """Run a pool until SIGINT or SIGTERM. Raises LlmsterError if it can't."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    prepare(layout.home, "logs", "cache")
    key = None
    if sample:
        say("looking for the sample model")
        key = (await asyncio.to_thread(put_sample, layout, say)).key
    say(f"starting a control plane and {layout.nodes} node(s)")
    async with LocalPool(layout, say) as pool:
        if key is not None:
            say(f"loading {key}")
            await pool.load_everywhere(key)
        say(ready_text(layout, key))
        if ready_file is not None:
            write_atomically(ready_file, "ready")
        failed = asyncio.create_task(pool.wait())
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait((failed, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if failed.done():
            failed.result()
        failed.cancel()
        say("stopping")


def ready_text(layout: Layout, key: str | None) -> str:
    """What to do now."""
    lines = [
        "",
        f"ready: the OpenAI endpoint is {layout.endpoint}",
        f"       control plane on {layout.control_url}, state in {layout.home}",
    ]
    if key is not None:
        body = json.dumps(
            {
                "model": key,
                "messages": [{"role": "user", "content": "Write one sentence about the sea."}],
            }
        )
        lines += ["", f"  curl {layout.endpoint}/chat/completions \\"]
        lines += ["    -H 'content-type: application/json' \\", f"    -d '{body}'", ""]
    extra = "" if layout.control_port == 1240 else f"LLMSTER_CONTROL={layout.control_url} "
    lines.append(f"see also: {extra}llmster nodes | ps | routes | tui")
    return "\n".join(lines)


def detach(layout: Layout, argv: list[str], say: Say) -> None:
    """Run `up` in the background; returns when it is ready. Raises LlmsterError if it fails."""
    prepare(layout.home, "logs")
    ready = layout.home / "up.ready"
    ready.unlink(missing_ok=True)
    log_file = layout.home / "logs" / "up.log"
    log_file.unlink(missing_ok=True)
    pid = spawn([PYTHON, "-m", "llmster_tui.cli", *argv, "--ready-file", str(ready)], log_file)
    shown = 0
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        text = log_file.read_text() if log_file.exists() else ""
        # Only whole lines, and not the error: that is raised below.
        whole = text[shown : text.rfind("\n") + 1]
        shown += len(whole)
        for line in whole.splitlines():
            if not ended and not line.startswith(("error:", "hint:")):
                say(line)
        if ready.exists():
            ready.unlink(missing_ok=True)
            return
        if ended:
            raise _failed_start(text, os.waitstatus_to_exitcode(status), log_file)
        time.sleep(LOOK_INTERVAL_S)


def _failed_start(text: str, code: int, log_file: Path) -> LlmsterError:
    lines = text.splitlines()
    message = next((line[7:] for line in lines if line.startswith("error: ")), None)
    hint = next((line[6:] for line in lines if line.startswith("hint: ")), f"see {log_file}")
    return Unavailable("start_failed", message or f"llmster ended with exit code {code}", hint)


def print_line(text: str) -> None:
    """Say something at once, whoever reads it."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
