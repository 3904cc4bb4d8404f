"""Keeps the database off the request path: what is put here is written a little later."""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Final

from sqlalchemy.exc import DataError, IntegrityError

from llmster_daemon.errors import LlmsterError
from llmster_daemon.protocol.node import InstanceInfo, RouteRecord

from .store import KnownNode, Store

log = logging.getLogger(__name__)

FLUSH_INTERVAL_S: Final = 0.5
MAX_BACKOFF_S: Final = 30.0
"""The longest wait between two attempts to write to a database that can't be written."""
MAX_ROUTES: Final = 20_000
ROUTES_PER_WRITE: Final = 1_000
"""Keeps a transaction well below a second, so that other writers get their turn."""

Route = tuple[str | None, RouteRecord]
"""A route with the id of the node that reported it."""

_BAD_DATA: Final = (DataError, IntegrityError, OverflowError, ValueError)
"""What databases and their drivers raise for a value that they can't hold, such as 2**64."""


@dataclass
class _Buffer:
    """What waits to be written. The latest value of a node or its instances is enough."""

    nodes: dict[str, KnownNode] = field(default_factory=dict)
    instances: dict[str, tuple[InstanceInfo, ...]] = field(default_factory=dict)
    routes: deque[Route] = field(default_factory=deque)

    def __len__(self) -> int:
        return len(self.nodes) + len(self.instances) + len(self.routes)


class StoreWriter:
    """Write-behind for a `Store`. Used from one event loop; only its threads touch the database.

    `sleep` takes seconds; a test gives its own.
    """

    def __init__(
        self,
        store: Store,
        *,
        interval_s: float = FLUSH_INTERVAL_S,
        max_routes: int = MAX_ROUTES,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._store = store
        self._interval_s = interval_s
        self._max_routes = max_routes
        self._sleep = sleep
        self._buffer = _Buffer()
        self._lock = asyncio.Lock()
        self._trouble: str | None = None
        self._dropped = 0
        self._dropped_told = 0

    @property
    def pending(self) -> int:
        """How many nodes, nodes' instances and routes wait to be written."""
        return len(self._buffer)

    @property
    def dropped_routes(self) -> int:
        """How many routes were given up, ever, because the database could not be written."""
        return self._dropped

    def put_node(self, node: KnownNode) -> None:
        """Takes a node to be saved. Does not block."""
        self._buffer.nodes[node.id] = node

    def put_instances(self, node_id: str, instances: Sequence[InstanceInfo]) -> None:
        """Takes the instances that a node has now. Does not block."""
        self._buffer.instances[node_id] = tuple(instances)

    def put_routes(self, routes: Sequence[Route]) -> None:
        """Takes routes, each with the id of the node that reported it. Does not block.

        Beyond `max_routes` waiting, the oldest are dropped.
        """
        self._buffer.routes.extend(routes)
        self._drop_oldest()

    async def forget_node(self, node_id: str) -> None:
        """Forgets a node for good: in the database and in what waits to be written.

        Raises what `Store.forget_node` raises; what the database has of it then stays.
        """
        async with self._lock:
            try:
                await _in_thread(partial(self._store.forget_node, node_id))
            finally:
                # Cancelled, too: the last write of `run` must not bring the node back.
                self._buffer.nodes.pop(node_id, None)
                self._buffer.instances.pop(node_id, None)

    async def run(self) -> None:
        """Writes what was put, every `interval_s`, until cancelled; then once more.

        While the database can't be written it keeps what it has and tries less and less often.
        """
        wait_s = self._interval_s
        try:
            while True:
                await self._sleep(wait_s)
                if await self._try_flush():
                    wait_s = self._interval_s
                else:
                    wait_s = min(wait_s * 2, MAX_BACKOFF_S)
        finally:
            if not await self._try_flush():
                log.error("%d records of the pool are lost: they were not written", self.pending)

    async def flush(self) -> None:
        """Writes all that waits. Raises what `Store` raises; the unwritten then goes on waiting."""
        async with self._lock:
            batch, self._buffer = self._buffer, _Buffer()
            try:
                await _in_thread(partial(_write, self._store, batch))
            finally:
                self._put_back(batch)

    async def _try_flush(self) -> bool:
        """True where all was written. Logs once when that changes, and what was dropped."""
        try:
            await self.flush()
        except Exception as error:
            # An unforeseen error must not stop the pool from serving: its records wait as well.
            trouble = error.code if isinstance(error, LlmsterError) else type(error).__name__
            if self._trouble != trouble:
                log.warning(
                    "the pool's records can't be written, and wait: %s",
                    error,
                    exc_info=not isinstance(error, LlmsterError),
                )
            self._trouble = trouble
            return False
        if self._trouble:
            log.info("the pool's records are written again")
        self._trouble = None
        if self._dropped != self._dropped_told:
            log.warning("%d routes were dropped unwritten", self._dropped - self._dropped_told)
        self._dropped_told = self._dropped
        return True

    def _put_back(self, batch: _Buffer) -> None:
        """Returns what was not written to the buffer, behind what was put since."""
        self._buffer.nodes = batch.nodes | self._buffer.nodes
        self._buffer.instances = batch.instances | self._buffer.instances
        self._buffer.routes.extendleft(reversed(batch.routes))
        self._drop_oldest()

    def _drop_oldest(self) -> None:
        excess = len(self._buffer.routes) - self._max_routes
        if excess <= 0:
            return
        if self._dropped == self._dropped_told:
            log.warning(
                "%d routes wait to be written; the oldest are dropped from now on",
                self._max_routes,
            )
        self._dropped += excess
        for _ in range(excess):
            self._buffer.routes.popleft()


async def _in_thread(call: Callable[[], None]) -> None:
    """Runs a blocking call in a thread, and waits for its end even when cancelled.

    Without that a late write would race with the next one, and overwrite it with older values.
    Not `asyncio.to_thread`: a loop that ends cancels its task, and we would not see the end.
    """
    work = asyncio.get_running_loop().run_in_executor(None, call)
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled:
        # Read, so that asyncio does not report it as forgotten.
        work.exception()
        raise cancelled
    work.result()


def _write(store: Store, batch: _Buffer) -> None:
    """Writes a batch, in a thread, and removes from it what is done with."""
    for node_id, node in list(batch.nodes.items()):
        _save(f"node {node_id!a}", partial(store.save_node, node))
        del batch.nodes[node_id]
    for node_id, instances in list(batch.instances.items()):
        what = f"the instances of node {node_id!a}"
        _save(what, partial(store.save_instances, node_id, instances))
        del batch.instances[node_id]
    while chunk := list(islice(batch.routes, ROUTES_PER_WRITE)):
        try:
            store.add_routes(chunk)
        except _BAD_DATA:
            for route in chunk:
                _save(f"route {route[1].request_id!a}", partial(store.add_routes, [route]))
        for _ in chunk:
            batch.routes.popleft()


def _save(what: str, write: Callable[[], None]) -> None:
    """Writes one record. One that the database does not take is dropped, as it never will be."""
    try:
        write()
    except _BAD_DATA as error:
        log.warning("%s can't be stored and is dropped: %s", what, getattr(error, "orig", error))
