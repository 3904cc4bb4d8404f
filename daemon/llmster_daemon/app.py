"""Builds the node's HTTP application, and runs it."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator

import uvicorn
from fastapi import FastAPI

from . import __version__
from .api import http, openai, relay
from .api import node as node_api
from .config import NodeConfig
from .home import bind, identity, locked, prepare, require_loopback
from .models.store import ModelStore
from .node import Node
from .telemetry.cpu import HostCpu
from .telemetry.nvml import open_gpu_probe
from .telemetry.sampler import Sampler

log = logging.getLogger(__name__)

GRACE_S = 5.0
"""How long requests under way may still take when the daemon is stopped."""


def build_app(node: Node) -> FastAPI:
    """The HTTP application of a node."""
    app = FastAPI(title="llmster node", version=__version__, openapi_url="/node/v1/openapi.json")
    app.include_router(openai.router(node))
    app.include_router(node_api.router(node))
    http.install(app)
    return app


@contextlib.asynccontextmanager
async def running_node(config: NodeConfig) -> AsyncIterator[Node]:
    """A node with everything it needs; its engines outlive it unless `detach` stops them."""
    sampler = await asyncio.to_thread(lambda: Sampler(open_gpu_probe(), HostCpu()))
    try:
        async with relay.new_client() as client, asyncio.TaskGroup() as group:
            node = Node(
                config,
                identity(config.home),
                ModelStore(config.home / "models"),
                sampler,
                client,
                group,
            )
            run = group.create_task(node.run(), name="node")
            yield node
            run.cancel()
    finally:
        sampler.close()


class Server(uvicorn.Server):
    """uvicorn, told to stop by our own signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def] # uvicorn's own hook, untyped there
        """Leave signals to `serve_until_signal`."""
        yield


def make_server(app: FastAPI) -> Server:
    """A server for one of our applications."""
    return Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=int(GRACE_S),
            timeout_keep_alive=75,
            ws_max_size=16 << 20,
            server_header=False,
        )
    )


async def serve_until_signal(server: Server, sock: socket.socket) -> signal.Signals:
    """Serve until SIGTERM or SIGINT; returns which one came."""
    loop = asyncio.get_running_loop()
    got: list[signal.Signals] = []

    def stop(number: signal.Signals) -> None:
        got.append(number)
        server.should_exit = True
        # A second one is meant: do not wait for requests under way.
        server.force_exit = len(got) > 1

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    await server.serve(sockets=[sock])
    return got[0] if got else signal.SIGTERM


async def run_daemon(config: NodeConfig) -> None:
    """Run a node until it is told to stop.

    SIGTERM leaves the engines running, for the next daemon to find; SIGINT (Ctrl-C) stops them.
    Raises HomeError, Conflict (`port_in_use`, `home_in_use`).
    """
    require_loopback(config.host)
    prepare(config.home, "models", "run", "logs")
    with locked(config.home, "daemon"), bind(config.host, config.port) as sock:
        async with running_node(config) as node:
            server = make_server(build_app(node))
            log.info("node %s on %s, home %s", config.name, config.url, config.home)
            got = await serve_until_signal(server, sock)
            await node.instances.detach(stop_engines=got == signal.SIGINT)


def default_threads() -> int:
    """Threads per engine: the cores this process may use."""
    return max(1, len(os.sched_getaffinity(0)))
