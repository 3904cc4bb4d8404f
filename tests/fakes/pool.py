"""A pool in a test: the real control plane on a real port, and scripted nodes that join it."""

import asyncio
import contextlib
import itertools
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
from websockets.asyncio.client import ClientConnection, connect

import llmster_control.app as control
from llmster_control.gateway.gateway import Gateway
from llmster_control.registry.members import Members
from llmster_daemon.app import make_server
from llmster_daemon.errors import LlmsterError
from llmster_daemon.home import bind
from llmster_daemon.protocol.base import Role
from llmster_daemon.protocol.node import (
    Command,
    CommandResult,
    InstanceInfo,
    Inventory,
    ModelInfo,
    NodeHello,
    NodeReport,
    PoolFeed,
    RouteRecord,
    Telemetry,
)

LIMIT_S = 8.0
"""How long a test waits for what must happen."""
CHAT = "/v1/chat/completions"
DIGEST = "d" * 64
INVENTORY = Inventory(hostname="box", cpu_name="CPU", cpu_cores=8, mem_total_bytes=1 << 34)
_moments = itertools.count(1)


async def eventually(true: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    """Returns when the condition holds; raises TimeoutError when it does not in time."""
    async with asyncio.timeout(limit_s):
        while not true():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.005)


def an_instance(model: str = "m", instance_id: str | None = None, **changes: Any) -> InstanceInfo:
    """A loaded model that can serve."""
    fields: dict[str, Any] = {"digest": DIGEST, "state": "ready", "slots": 4, "pid": 7}
    return InstanceInfo(id=instance_id or model, model=model, **(fields | changes))


def a_model(key: str = "m", **changes: Any) -> ModelInfo:
    """A model on a node's disk."""
    fields: dict[str, Any] = {
        "path": f"/models/{key}.gguf",
        "size_bytes": 105_000_000,
        "digest": DIGEST,
        "architecture": "llama",
        "quantisation": "Q4_K_M",
        "context_length": 8192,
        "parameters": 135_000_000,
    }
    return ModelInfo(key=key, **(fields | changes))


def a_hello(node_id: str = "a", name: str | None = None, **changes: Any) -> NodeHello:
    """A node's first message."""
    fields: dict[str, Any] = {
        "version": "0.1.0",
        "role": "mixed",
        "url": f"http://{node_id}",
        "home": "/home/llmster",
        "inventory": INVENTORY,
    }
    return NodeHello(node_id=node_id, name=name or node_id, **(fields | changes))


def a_report(*instances: InstanceInfo, **changes: Any) -> NodeReport:
    """A node's state; no two are equal."""
    telemetry = Telemetry(at=float(next(_moments)), cpu_utilisation=0.25, mem_used_bytes=1 << 33)
    return NodeReport(
        telemetry=telemetry, role=changes.pop("role", "mixed"), instances=instances, **changes
    )


def a_route(request_id: str = "req-1", **changes: Any) -> RouteRecord:
    """How a request was served."""
    fields: dict[str, Any] = {"at": 1.0, "model": "m", "kind": "colocated", "decode_node": "a"}
    return RouteRecord(request_id=request_id, **(fields | changes))


# A node's HTTP side, written to the wire by hand so that it can break off anywhere


@dataclass(frozen=True)
class Asked:
    """A request that reached a node."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def plan(self) -> dict[str, Any]:
        """The gateway's decision."""
        return json.loads(self.headers["x-llmster-plan"])


class Wire:
    """The answer of a scripted node."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        """A whole answer; `_` in header names stands for `-`."""
        headers = {"content_type": "application/json", **headers}
        await self._head(status, {**headers, "content_length": str(len(body))})
        await self._write(body)

    async def start(self, **headers: str) -> None:
        """The head of a stream of events."""
        headers = {"content_type": "text/event-stream", **headers}
        await self._head(200, {**headers, "transfer_encoding": "chunked"})

    async def send(self, data: bytes) -> None:
        """A piece of the stream."""
        await self._write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    async def end(self) -> None:
        """The proper end of the stream."""
        await self._write(b"0\r\n\r\n")

    async def head_of_whole(self, length: int) -> None:
        """The head of an answer that does not stream, without its body."""
        await self._head(200, {"content_type": "application/json", "content_length": str(length)})

    def cut(self) -> None:
        """The end of a process that is killed."""
        self._writer.transport.abort()

    async def gone(self) -> None:
        """Returns when the other side has closed the connection."""
        with contextlib.suppress(ConnectionError):
            while await self._reader.read(1024):
                pass

    async def _head(self, status: int, headers: dict[str, str]) -> None:
        lines = [f"HTTP/1.1 {status} Scripted", "connection: close"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await self._write("\r\n".join([*lines, "", ""]).encode())

    async def _write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()


Behaviour = Callable[[Asked, Wire], Awaitable[None]]


async def say_hello(_: Asked, wire: Wire) -> None:
    """Answers as a node that is well."""
    await wire.answer(b'{"object": "chat.completion"}', x_llmster_route="colocated")


def refuse(status: int, code: str = "busy", message: str = "not now") -> Behaviour:
    """Answers with an error envelope."""
    body = json.dumps(LlmsterError(code, message, "try again", status).envelope()).encode()

    async def behave(_: Asked, wire: Wire) -> None:
        await wire.answer(body, status, x_llmster_route="none")

    return behave


@dataclass(eq=False)
class FakeNode:
    """A member of the pool that does what the test says. Made by `Pool.join`."""

    name: str
    id: str
    role: Role = "mixed"
    behave: Behaviour = say_hello
    instances: tuple[InstanceInfo, ...] = ()
    models: tuple[ModelInfo, ...] = ()
    inventory: Inventory = INVENTORY
    asked: list[Asked] = field(default_factory=list)
    orders: list[Command] = field(default_factory=list)
    feeds: list[PoolFeed] = field(default_factory=list)
    failing: dict[str, LlmsterError] = field(default_factory=dict)
    """What commands of these names end with."""
    silent: bool = False
    """Takes commands and never says what became of them."""

    def __post_init__(self) -> None:
        # Bound and not listening: the port is ours, and refuses connections.
        self._sock = socket.socket()
        self._sock.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._sock.getsockname()[1]}"
        self._server: asyncio.Server | None = None
        self._requests: set[asyncio.Task[None]] = set()
        self._link: ClientConnection | None = None
        self._listening: asyncio.Task[None] | None = None
        self._members: Members | None = None

    async def listen(self) -> None:
        """Answer requests from now on."""
        self._server = await asyncio.start_server(self._serve, sock=self._sock)

    async def join(self, pool: "Pool") -> None:
        """Connect to the control plane and report once."""
        self._members = pool.members
        self._link = await connect(
            pool.url.replace("http", "ws", 1) + "/pool/v1/connect", proxy=None
        )
        hello = a_hello(self.id, self.name, role=self.role, url=self.url, inventory=self.inventory)
        await self._link.send(hello.model_dump_json())
        self._listening = asyncio.create_task(self._listen(self._link))
        await self.report()

    async def report(self, *routes: RouteRecord) -> None:
        """Report as it is now; returns when the control plane has it."""
        assert self._link is not None
        assert self._members is not None
        report = a_report(*self.instances, role=self.role, models=self.models, routes=routes)
        await self._link.send(report.model_dump_json())
        members, node_id = self._members, self.id
        await eventually(lambda: any(m.report == report for m in members.all()))
        assert members.find(node_id).report == report

    async def leave(self) -> None:
        """Close the connection to the control plane; returns when that knows."""
        if self._link is not None:
            await self._link.close()
            await self._stop_listening()
            if self._members is not None:
                member = self._members.find(self.id)
                await eventually(lambda: member.send is None)
            self._link = None

    async def close(self) -> None:
        """End everything of it."""
        if self._link is not None:
            await self._link.close()
            await self._stop_listening()
        if self._server is not None:
            self._server.close()
        self._sock.close()
        for request in self._requests:
            request.cancel()
        await asyncio.gather(*self._requests, return_exceptions=True)

    async def _stop_listening(self) -> None:
        if self._listening is not None:
            await self._listening

    async def _listen(self, link: ClientConnection) -> None:
        async for text in link:
            message = json.loads(text)
            if message["type"] == "feed":
                self.feeds.append(PoolFeed.model_validate(message))
                continue
            order = Command.model_validate(message)
            self.orders.append(order)
            if not self.silent:
                await link.send(self._obey(order).model_dump_json())

    def _obey(self, order: Command) -> CommandResult:
        if error := self.failing.get(order.name):
            return CommandResult(id=order.id, error={**error.body(), "status": error.status})
        if order.name == "load":
            loaded = an_instance(order.args["model"], context_length=4096)
            return CommandResult(id=order.id, value={"instance": loaded.model_dump()})
        if order.name == "unload":
            return CommandResult(id=order.id, value={"unloaded": [order.args["target"]]})
        if order.name == "import":
            return CommandResult(id=order.id, value={"model": a_model("new").model_dump()})
        self.role = order.args["role"]
        return CommandResult(id=order.id, value={"role": self.role})

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._requests.add(task)
        task.add_done_callback(self._requests.discard)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
            pairs = [line.split(": ", 1) for line in head[1:] if line]
            headers = {name.lower(): value for name, value in pairs}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            asked = Asked(head[0].split()[1], headers, body)
            self.asked.append(asked)
            await self.behave(asked, Wire(reader, writer))
        writer.close()


@dataclass(eq=False)
class Pool:
    """A running control plane."""

    url: str
    http: httpx.AsyncClient
    members: Members
    gateway: Gateway
    _stack: contextlib.AsyncExitStack

    async def join(self, name: str, *, listening: bool = True, **fields: Any) -> FakeNode:
        """A node that has joined and reported; by default one with the model `m` loaded."""
        fields.setdefault("id", name * 32)
        fields.setdefault("instances", (an_instance(),))
        fields.setdefault("models", (a_model(),))
        node = FakeNode(name, **fields)
        self._stack.push_async_callback(node.close)
        if listening:
            await node.listen()
        await node.join(self)
        return node

    async def chat(self, model: str = "m", **headers: str) -> httpx.Response:
        """Ask something of the gateway."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
        return await self.http.post(CHAT, json=body, headers=names)

    async def idle(self) -> None:
        """Returns when the gateway counts no request as under way."""
        await eventually(lambda: not self.gateway._in_flight)


@contextlib.asynccontextmanager
async def running_pool(home: Path) -> AsyncIterator[Pool]:
    """The control plane's own application in uvicorn, on a free port of loopback."""
    made: list[tuple[Members, Gateway]] = []

    def make_gateway(members: Members, client: httpx.AsyncClient) -> Gateway:
        made.append((members, Gateway(members, client)))
        return made[0][1]

    sock = bind("127.0.0.1", 0)
    config = control.ControlConfig(home, port=sock.getsockname()[1])
    with patch.object(control, "Gateway", make_gateway):
        async with control.control_app(config) as app:
            server = make_server(app)
            serving = asyncio.create_task(server.serve(sockets=[sock]))
            await eventually(lambda: server.started)
            client = httpx.AsyncClient(base_url=config.url, trust_env=False, timeout=LIMIT_S)
            try:
                async with client, contextlib.AsyncExitStack() as stack:
                    yield Pool(config.url, client, *made[0], stack)
            finally:
                server.should_exit = True
                await serving
