"""The node's one connection to its control plane: dialled from here, and dialled again forever."""

import asyncio
import contextlib
import logging
import random
from collections import deque
from typing import Any, Protocol

from pydantic import TypeAdapter, ValidationError
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from .errors import LlmsterError
from .protocol.node import (
    Command,
    CommandResult,
    Downward,
    NodeHello,
    NodeReport,
    PoolFeed,
    RouteRecord,
)

log = logging.getLogger(__name__)

REPORT_INTERVAL_S = 1.0
CONNECT_TIMEOUT_S = 5.0
FIRST_RETRY_S = 0.25
MAX_RETRY_S = 5.0
MAX_ROUTES_KEPT = 2000
"""Routes that wait for the control plane to come back; the oldest are dropped."""
MAX_MESSAGE_BYTES = 16 << 20
PATH = "/pool/v1/connect"

_downward: TypeAdapter[Downward] = TypeAdapter(Downward)


class Reporter(Protocol):
    """The node, as the link needs it."""

    def hello(self) -> NodeHello:
        """Who it is. May block."""
        ...

    def report(self, routes: tuple[RouteRecord, ...]) -> NodeReport | None:
        """How it is."""
        ...

    async def obey(self, command: Command) -> dict[str, Any]:
        """Carry out an order."""
        ...


class PoolLink:
    """Reports upwards, takes the feed and commands."""

    def __init__(self, node: Reporter) -> None:
        self.feed: PoolFeed | None = None
        """What the control plane last told; kept while it is away, since peers live on."""
        self.connected = False
        self._node = node
        self._routes: deque[RouteRecord] = deque(maxlen=MAX_ROUTES_KEPT)
        self._soon = asyncio.Event()

    def add_route(self, route: RouteRecord) -> None:
        """Report a route with the next report."""
        self._routes.append(route)
        self._soon.set()

    def report_soon(self) -> None:
        """Something changed: do not wait for the next second."""
        self._soon.set()

    async def run(self, control_url: str) -> None:
        """Stay connected until cancelled."""
        url = control_url.replace("http", "ws", 1) + PATH
        retry_s = FIRST_RETRY_S
        told = False
        while True:
            try:
                async with connect(
                    url, open_timeout=CONNECT_TIMEOUT_S, max_size=MAX_MESSAGE_BYTES, proxy=None
                ) as socket:
                    log.info("joined the pool at %s", control_url)
                    told = False
                    await self._talk(socket)
            except* (OSError, WebSocketException) as errors:
                if not told:
                    error = errors.exceptions[0]
                    log.warning("no control plane at %s (%s): trying on", control_url, error)
                    told = True
            finally:
                if self.connected:
                    # Not before it was let in: one that is turned away must not come at once.
                    retry_s = FIRST_RETRY_S
                self.connected = False
            # Jitter, so that a restarted control plane is not met by every node at once.
            await asyncio.sleep(retry_s * random.uniform(0.5, 1.0))  # noqa: S311 - no secret
            retry_s = min(MAX_RETRY_S, retry_s * 2)

    async def _talk(self, socket: ClientConnection) -> None:
        hello = await asyncio.to_thread(self._node.hello)
        await socket.send(hello.model_dump_json())
        async with asyncio.TaskGroup() as group:
            reports = group.create_task(self._report(socket), name="reports")
            try:
                async for data in socket:
                    self._take(data, socket, group)
                # Commands under way must not keep the node from connecting again.
                raise ConnectionResetError("the control plane closed the connection")
            finally:
                reports.cancel()

    def _take(self, data: str | bytes, socket: ClientConnection, group: asyncio.TaskGroup) -> None:
        try:
            message = _downward.validate_json(data)
        except ValidationError as error:
            log.warning("a message of the control plane makes no sense: %s", error)
            return
        if isinstance(message, PoolFeed):
            self.feed = message
            self.connected = True
        else:
            group.create_task(self._obey(message, socket), name=f"command-{message.name}")

    async def _obey(self, command: Command, socket: ClientConnection) -> None:
        try:
            result = CommandResult(id=command.id, value=await self._node.obey(command))
        except LlmsterError as error:
            body = {**error.body(), "status": error.status}
            result = CommandResult(id=command.id, error=body)
        except (KeyError, ValueError, TypeError) as error:
            body = LlmsterError("bad_command", f"{command.name}: {error!r}", "", 400).body()
            result = CommandResult(id=command.id, error={**body, "status": 400})
        except Exception as error:
            # A command that fails must not take the node out of the pool.
            log.exception("command %s failed", command.name)
            what = f"{command.name}: an unforeseen error ({type(error).__name__})"
            hint = "this is a bug in llmster; the node's log has the details"
            body = LlmsterError("internal_error", what, hint).body()
            result = CommandResult(id=command.id, error={**body, "status": 500})
        self.report_soon()
        with contextlib.suppress(WebSocketException):
            await socket.send(result.model_dump_json())

    async def _report(self, socket: ClientConnection) -> None:
        while True:
            self._soon.clear()
            routes = tuple(self._routes)
            report = self._node.report(routes)
            if report is not None:
                await socket.send(report.model_dump_json())
                for route in routes:
                    # A full queue may have dropped it meanwhile.
                    if self._routes[0] is route:
                        self._routes.popleft()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPORT_INTERVAL_S if report else 0.1):
                    await self._soon.wait()
            # At most ten a second, however fast things change.
            await asyncio.sleep(0.1 if report else 0)


def result_error(result: CommandResult) -> LlmsterError | None:
    """The error of a command's result, if it failed."""
    if result.error is None:
        return None
    status = result.error.get("status")
    return LlmsterError.from_body(result.error, status if isinstance(status, int) else None)
