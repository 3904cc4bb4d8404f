"""Takes a request, decides where it goes, relays the answer, and tries again where it can.

Until the first byte has gone to the client a request can be sent elsewhere, and is: to another
node, or to the same one when its engine is back. After that, a node that dies ends the stream with
an error event.
"""

import asyncio
import contextlib
import time
from collections import Counter
from typing import Literal

import httpx
from fastapi import Request, Response
from pydantic import Field

from llmster_control.registry.members import Members
from llmster_control.routing.policy import choose
from llmster_control.routing.snapshot import Ask, Colocated, NoRoute, Split
from llmster_daemon.api import relay
from llmster_daemon.api.http import PREFER, parse, read_body, until_gone
from llmster_daemon.errors import BadRequest, LlmsterError, Unavailable, unknown_model
from llmster_daemon.protocol.base import Frozen
from llmster_daemon.protocol.node import RouteRecord, ServePlan

MAX_ATTEMPTS = 6
"""How often a request may fail on nodes that took it: it may be what kills their engines."""
REVIVAL_WAIT_S = 20.0
"""How long a request waits for an engine or a node that is coming back."""
LOOK_AGAIN_S = 0.25
RETRIED = frozenset({502, 503})


class Peek(Frozen):
    """All that the gateway must know of a request; the node checks the rest."""

    model: str = Field(min_length=1)


class Gateway:
    """Serves `/v1/chat/completions` and `/v1/completions` for the whole pool."""

    def __init__(self, members: Members, client: httpx.AsyncClient) -> None:
        self._members = members
        self._client = client
        self._in_flight: Counter[str] = Counter()

    async def handle(self, request: Request) -> Response:
        """The answer of whichever node can give one. Raises LlmsterError."""
        received_s = time.monotonic()
        body = await read_body(request)
        model = parse(Peek, body).model
        prefer = _prefer(request.headers.get(PREFER))
        request_id: str = request.state.request_id
        try:
            return await until_gone(request, self._route(request, body, model, prefer))
        except LlmsterError as error:
            if error.status >= 500:
                self._record_failure(request_id, model, received_s, error)
            raise

    async def _route(
        self,
        request: Request,
        body: bytes,
        model: str,
        prefer: Literal["colocated", "split"] | None,
    ) -> Response:
        deadline_s = time.monotonic() + REVIVAL_WAIT_S
        excluded: set[str] = set()
        last: LlmsterError | None = None
        attempt = failed = 0
        while failed < MAX_ATTEMPTS:
            ask = Ask(model, len(body), prefer, frozenset(excluded), self._in_flight)
            decision = choose(self._members.snapshot(), ask)
            if isinstance(decision, NoRoute):
                if not decision.reviving or time.monotonic() > deadline_s:
                    break
                await self._look_again()
                # Whoever failed may be back; a report says whether it is ready.
                excluded.clear()
                continue
            attempt += 1
            node = decision.decode if isinstance(decision, Split) else decision.node
            try:
                return await self._send(request, body, decision, attempt)
            except LlmsterError as error:
                last = error
                excluded.add(node.node_id)
                # A node that can't be reached may be starting again; only the deadline ends that.
                failed += error.code != "node_unreachable"
        raise last or self._no_route(model)

    async def _send(
        self, request: Request, body: bytes, decision: Colocated | Split, attempt: int
    ) -> Response:
        """Relay to the chosen node. Raises what may be tried again; other errors are answers."""
        if isinstance(decision, Split):
            node = decision.decode
            plan = ServePlan(
                kind="split",
                prefill_node_id=decision.prefill.node_id,
                reason=decision.reason,
                attempt=attempt,
            )
            busy: tuple[str, ...] = (node.node_id, decision.prefill.node_id)
        else:
            node = decision.node
            plan = ServePlan(kind="colocated", reason=decision.reason, attempt=attempt)
            busy = (node.node_id,)
        self._in_flight.update(busy)
        streaming = False
        try:
            response = await relay.forward(
                self._client,
                node.url + request.url.path,
                body,
                request.state.request_id,
                dict(request.headers),
                plan.model_dump_json(),
            )
            if response.status_code in RETRIED:
                raise relay.failure(response) or Unavailable("node_failed", "the node failed", "")
            streaming = not response.is_stream_consumed
            return relay.answer(response, lambda: self._release(busy))
        finally:
            if not streaming:
                self._release(busy)

    def _release(self, busy: tuple[str, ...]) -> None:
        self._in_flight.subtract(busy)
        for node_id in busy:
            if self._in_flight[node_id] <= 0:
                del self._in_flight[node_id]

    async def _look_again(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_AGAIN_S):
                await self._members.change()
        # A report that changes nothing must not become a busy loop.
        await asyncio.sleep(LOOK_AGAIN_S / 5)

    def _no_route(self, model: str) -> LlmsterError:
        snapshot = self._members.snapshot()
        name = model.lower()
        if name in snapshot.candidates:
            return Unavailable(
                "no_node_available",
                f"every node with '{model}' is draining or just failed",
                "run `llmster nodes`",
            )
        if name in snapshot.reviving:
            return Unavailable(
                "model_not_ready", f"'{model}' is being started", "run `llmster ps`, then ask again"
            )
        if not self._members.online():
            return Unavailable(
                "pool_empty", "no node is connected to the pool", "run `llmster nodes`"
            )
        return unknown_model(model, list(self._members.models()), self._members.on_disk(model))

    def _record_failure(
        self, request_id: str, model: str, received_s: float, error: LlmsterError
    ) -> None:
        duration_s = time.monotonic() - received_s
        route = RouteRecord(
            request_id=request_id,
            at=time.time() - duration_s,
            model=model[:200],
            kind="none",
            reason=error.message,
            duration_s=duration_s,
            status="failed",
            error_code=error.code,
        )
        self._members.add_routes(None, [route])


def _prefer(value: str | None) -> Literal["colocated", "split"] | None:
    if value is None or value == "":
        return None
    if value == "colocated":
        return "colocated"
    if value == "split":
        return "split"
    raise BadRequest(
        "bad_header",
        f"{PREFER}: '{value[:40]}' is not 'colocated' or 'split'",
        "",
        param=PREFER,
    )
