"""Builds the control plane's HTTP application, and runs it."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI

from llmster_control import __version__
from llmster_control.api import openai, pool
from llmster_control.gateway.gateway import Gateway
from llmster_control.registry.members import Members
from llmster_control.store.store import KEEP_ROUTES, Store
from llmster_control.store.writer import StoreWriter
from llmster_daemon.api import http, relay
from llmster_daemon.app import make_server, serve_until_signal
from llmster_daemon.config import DEFAULT_CONTROL_PORT
from llmster_daemon.home import bind, locked, prepare, require_loopback

log = logging.getLogger(__name__)

PRUNE_INTERVAL_S = 600.0
ROUTES_AT_START = 200


@dataclass(frozen=True, slots=True)
class ControlConfig:
    """`store_url` None: SQLite in the home."""

    home: Path
    host: str = "127.0.0.1"
    port: int = DEFAULT_CONTROL_PORT
    store_url: str | None = None

    @property
    def url(self) -> str:
        """Where the control plane answers."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"


@contextlib.asynccontextmanager
async def control_app(config: ControlConfig) -> AsyncIterator[FastAPI]:
    """The application, with its store and what runs beside it."""
    place: str | Path = config.store_url or config.home / "pool.sqlite"
    store = await asyncio.to_thread(Store.open, place)
    try:
        writer = StoreWriter(store)
        known = await asyncio.to_thread(store.known_nodes)
        routes = await asyncio.to_thread(store.routes, ROUTES_AT_START)
        members = Members(writer, config.url, known, reversed(routes))
        async with relay.new_client() as client, asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(writer.run(), name="store-writer"),
                group.create_task(_prune(store), name="store-prune"),
            ]
            app = FastAPI(title="llmster", version=__version__, openapi_url="/pool/v1/openapi.json")
            app.include_router(openai.router(members, Gateway(members, client)))
            app.include_router(pool.router(members, store, writer))
            http.install(app)
            yield app
            for task in tasks:
                task.cancel()
    finally:
        await asyncio.to_thread(store.close)


async def run_control(config: ControlConfig) -> None:
    """Run the control plane until SIGTERM or SIGINT.

    Raises HomeError, Conflict (`port_in_use`, `home_in_use`), and what `Store.open` raises.
    """
    require_loopback(config.host)
    prepare(config.home)
    with locked(config.home, "control"), bind(config.host, config.port) as sock:
        async with control_app(config) as app:
            log.info("control plane on %s, home %s", config.url, config.home)
            await serve_until_signal(make_server(app), sock)


async def _prune(store: Store) -> None:
    while True:
        await asyncio.sleep(PRUNE_INTERVAL_S)
        try:
            await asyncio.to_thread(store.prune_routes, KEEP_ROUTES)
        except Exception:
            # What can't be pruned now is pruned later; the store's own errors are logged there.
            log.exception("old routes could not be removed")
