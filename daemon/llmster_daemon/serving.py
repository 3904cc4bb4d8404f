"""From an accepted request to its tokens, on this node: colocated, or with its prompt elsewhere.

`Serving.start` returns once the first token is there, so that everything that can go wrong before
it still becomes a proper status, and the response's headers can say how it was served.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal, Protocol

import httpx

from .engines.base import Chunk, Engine, GenerateParams, Generation, Prefilled, Reservation
from .errors import EngineLost, LlmsterError, Unavailable
from .protocol.node import Peer, PrefillRequest, RouteRecord, ServePlan
from .supervisor.instance import Instance

log = logging.getLogger(__name__)

PEER_CONNECT_TIMEOUT_S = 3.0
PEER_TIMEOUT = httpx.Timeout(None, connect=PEER_CONNECT_TIMEOUT_S)
"""No limit on the answer: it comes when the prompt is computed. The engines watch each other."""


class PoolView(Protocol):
    """What serving needs of the pool."""

    @property
    def name(self) -> str:
        """This node's name in the pool."""
        ...

    def peer(self, node_id: str) -> Peer | None:
        """Another node, if this one knows it."""
        ...

    def record(self, route: RouteRecord) -> None:
        """Report how a request was served; does not block."""
        ...


@dataclass(frozen=True, slots=True)
class Job:
    """A request that this node can serve."""

    request_id: str
    model: str
    params: GenerateParams
    plan: ServePlan
    received_s: float
    """Monotonic time at which the request came in."""


@dataclass(slots=True)
class Answer:
    """A request whose first token is there. Iterate `chunks`, and always `close`."""

    job: Job
    generation: Generation
    kind: Literal["colocated", "split"]
    prefill_node: str | None
    decode_node: str
    first: Chunk
    ttft_s: float
    _serving: "Serving"
    _engine: Engine
    _helper: asyncio.Task[None] | None
    _status: Literal["ok", "failed", "cancelled"] = "cancelled"
    _error_code: str | None = None
    _last_s: float = 0.0
    _closed: bool = False

    def route_header(self) -> str:
        """`x-llmster-route`: a structured field (RFC 8941)."""
        if self.kind == "colocated":
            text = f'colocated;node="{self.decode_node}"'
            if self.generation.recomputed:
                text += ';recomputed="handover-failed"'
            return text
        handover_ms = (self.generation.handover_s or 0.0) * 1000
        return (
            f'split;prefill="{self.prefill_node}";decode="{self.decode_node}"'
            f";kv_bytes={self.generation.kv_bytes};handover_ms={handover_ms:.1f}"
        )

    async def chunks(self) -> AsyncIterator[Chunk]:
        """All chunks, the first included. Raises EngineLost if the engine dies on the way."""
        try:
            chunk = self.first
            while True:
                self._last_s = time.monotonic()
                if chunk.finish is not None:
                    self._status = "ok"
                yield chunk
                if chunk.finish is not None:
                    # To the end of the iteration, where the engine forgets the request's id.
                    await anext(self.generation.chunks, None)
                    return
                chunk = await anext(self.generation.chunks)
        except LlmsterError as error:
            self._status, self._error_code = "failed", error.code
            raise
        except StopAsyncIteration:
            self._status, self._error_code = "failed", "engine_lost"
            raise EngineLost from None

    async def close(self) -> None:
        """Free the engine if the answer was left early, and record the route. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._status != "ok":
            await self._engine.cancel(self.job.request_id)
        await end_task(self._helper)
        generation, now = self.generation, time.monotonic()
        steps = generation.completion_tokens - 1
        decode_s = self._last_s - self.job.received_s - self.ttft_s
        self._serving.pool.record(
            RouteRecord(
                request_id=self.job.request_id,
                at=time.time() - (now - self.job.received_s),
                model=self.job.model,
                kind=self.kind,
                prefill_node=self.prefill_node,
                decode_node=self.decode_node,
                reason=self._reason(),
                attempts=self.job.plan.attempt,
                prompt_tokens=generation.prompt_tokens,
                completion_tokens=generation.completion_tokens,
                ttft_s=self.ttft_s,
                tpot_s=decode_s / steps if steps > 0 else None,
                duration_s=now - self.job.received_s,
                kv_bytes=generation.kv_bytes,
                handover_s=generation.handover_s,
                status=self._status,
                error_code=self._error_code,
            )
        )

    def _reason(self) -> str:
        if self.generation.recomputed:
            return f"recomputed here: {self.generation.recomputed}"
        return self.job.plan.reason


class Serving:
    """Serves requests with this node's instances."""

    def __init__(self, pool: PoolView, client: httpx.AsyncClient, node_id: str) -> None:
        self.pool = pool
        self._client = client
        self._node_id = node_id

    async def start(self, job: Job, instance: Instance) -> Answer:
        """Run the request to its first token.

        Raises ContextOverflow, EngineLost, and whatever else the engine refuses it with.
        """
        engine = instance.engine
        if engine is None:
            raise EngineLost("the engine is being started again")
        peer = self._prefill_peer(job.plan)
        helper: asyncio.Task[None] | None = None
        try:
            if peer is None:
                generation = await engine.generate(job.request_id, job.params)
            else:
                generation, reservation = await engine.expect(job.request_id, job.params)
                helper = asyncio.create_task(
                    self._fetch_kv(engine, job, instance, peer, reservation), name="ask-prefill"
                )
            first = await anext(generation.chunks, None)
            if first is None:
                raise EngineLost
        except BaseException:
            await engine.cancel(job.request_id)
            await end_task(helper)
            raise
        # KV that did not come whole does not make a split: this node did the work.
        split = peer is not None and generation.recomputed is None
        return Answer(
            job,
            generation,
            "split" if split else "colocated",
            peer.name if split and peer is not None else None,
            self.pool.name,
            first,
            time.monotonic() - job.received_s,
            self,
            engine,
            helper,
        )

    async def prefill(self, instance: Instance, request: PrefillRequest) -> Prefilled:
        """Compute a prompt here and push its KV to the node that asked."""
        engine = instance.engine
        peer = self.pool.peer(request.decode_node_id)
        if engine is None:
            raise EngineLost("the engine is being started again")
        if peer is None:
            # Only to members of the pool: anyone else could have KV sent to any address.
            raise Unavailable(
                "unknown_peer",
                f"this node knows no node '{request.decode_node_id}'",
                "`llmster nodes` shows the members of the pool",
                409,
            )
        host = httpx.URL(peer.url).host
        return await engine.prefill(
            f"{request.request_id}-prefill",
            request.tokens,
            host,
            request.kv_port,
            request.ticket,
        )

    def _prefill_peer(self, plan: ServePlan) -> Peer | None:
        if plan.kind != "split" or plan.prefill_node_id is None:
            return None
        peer = self.pool.peer(plan.prefill_node_id)
        if peer is None:
            log.warning("the plan names a prefill node that is not known here: computing alone")
        return peer

    async def _fetch_kv(
        self, engine: Engine, job: Job, instance: Instance, peer: Peer, reservation: Reservation
    ) -> None:
        """Have the peer compute the prompt; if it can't, have the own engine do it."""
        request = PrefillRequest(
            request_id=job.request_id,
            model=job.model,
            digest=instance.handle.digest,
            tokens=reservation.tokens,
            decode_node_id=self._node_id,
            kv_port=reservation.kv_port,
            ticket=reservation.ticket,
        )
        try:
            response = await self._client.post(
                f"{peer.url}/node/v1/prefill",
                content=request.model_dump_json(),
                headers={"content-type": "application/json"},
                timeout=PEER_TIMEOUT,
            )
            if response.status_code != 200:
                body = response.json().get("error", {})
                raise LlmsterError.from_body(body, response.status_code)
        except (httpx.HTTPError, LlmsterError, ValueError) as error:
            reason = f"{peer.name}: {str(error) or type(error).__name__}"
            log.warning("hand-over of %s failed: %s", job.request_id, reason)
            with contextlib.suppress(LlmsterError):
                await engine.recompute(job.request_id, reason)


async def end_task(task: asyncio.Task[None] | None) -> None:
    """Cancel a task and wait for it."""
    if task is not None:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def new_request_id() -> str:
    """An id for a request; unique."""
    return f"req-{uuid.uuid4().hex[:20]}"
