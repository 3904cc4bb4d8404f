"""The daemon's side of an engine process of our own: requests out, events in, over one socket."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from ..errors import BadRequest, Conflict, ContextOverflow, EngineLost, LlmsterError
from .base import (
    Chunk,
    EngineStatus,
    GenerateParams,
    Generation,
    Prefilled,
    Reservation,
    TokenLogprob,
)
from .worker.ipc import LENGTH, FrameError, frame_length, pack, unpack

CONNECT_TIMEOUT_S = 5.0
REPLY_TIMEOUT_S = 10.0

_Item = tuple[str, Any]
OnState = Callable[[dict[str, Any]], None]


class LocalEngine:
    """An `Engine` in another process. Build it with `connect`.

    `on_state` is called with the process's own events (progress, ready), `on_lost` once when the
    connection ends, whoever ended it. Every request under way then fails with EngineLost.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        on_state: OnState,
        on_lost: Callable[[], None],
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._on_state = on_state
        self._on_lost = on_lost
        self._status = EngineStatus()
        self._queues: dict[str, asyncio.Queue[_Item]] = {}
        self._numbers = itertools.count()
        self._lost = False
        self.last_event_s = time.monotonic()
        """When the process last showed that it lives."""
        self._task = asyncio.create_task(self._read(), name="engine-events")

    @classmethod
    async def connect(
        cls, socket_path: str, on_state: OnState, on_lost: Callable[[], None]
    ) -> "LocalEngine":
        """Connect to a running process. Raises OSError or TimeoutError."""
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            reader, writer = await asyncio.open_unix_connection(socket_path)
        return cls(reader, writer, on_state, on_lost)

    @property
    def status(self) -> EngineStatus:
        """What the process last said."""
        return self._status

    @property
    def lost(self) -> bool:
        """True once the connection has ended."""
        return self._lost

    async def generate(self, request_id: str, params: GenerateParams) -> Generation:
        """Start a request; refusals of the engine surface in the first chunk."""
        events = self._open(request_id)
        generation = Generation(request_id)
        generation.chunks = self._chunks(generation, events)
        try:
            await self._send({"op": "generate", "id": request_id, **params.model_dump()})
        except BaseException:
            await self.cancel(request_id)
            raise
        return generation

    async def expect(
        self, request_id: str, params: GenerateParams
    ) -> tuple[Generation, Reservation]:
        """Start a request whose KV comes from elsewhere; waits until its slot is reserved."""
        events = self._open(request_id)
        generation = Generation(request_id)
        generation.chunks = self._chunks(generation, events)
        try:
            await self._send(
                {"op": "generate", "id": request_id, "await_kv": True, **params.model_dump()}
            )
            kind, value = await events.get()
            if kind == "error":
                raise value
            if kind != "reserved":
                raise EngineLost(f"the engine answered '{kind}' where a reservation was due")
        except BaseException:
            self._queues.pop(request_id, None)
            await self.cancel(request_id)
            raise
        return generation, Reservation(value["tokens"], value["kv_port"], value["ticket"])

    async def recompute(self, request_id: str, reason: str) -> None:
        """Stop waiting for the KV."""
        await self._send({"op": "recompute", "id": request_id, "reason": reason})

    async def prefill(
        self, request_id: str, tokens: list[int], host: str, port: int, ticket: str
    ) -> Prefilled:
        """Compute a prompt and push its KV. Cancelling this stops both."""
        events = self._open(request_id)
        try:
            await self._send(
                {
                    "op": "prefill",
                    "id": request_id,
                    "tokens": tokens,
                    "host": host,
                    "port": port,
                    "ticket": ticket,
                }
            )
            kind, value = await events.get()
        except BaseException:
            await self.cancel(request_id)
            raise
        finally:
            self._queues.pop(request_id, None)
        if kind == "error":
            raise value
        return Prefilled(value["kv_bytes"], value["queue_s"], value["prefill_s"])

    async def cancel(self, request_id: str) -> None:
        """Stop a request. Never raises."""
        self._queues.pop(request_id, None)
        with contextlib.suppress(LlmsterError):
            await self._send({"op": "cancel", "id": request_id})

    async def tokenize(self, text: str, add_bos: bool) -> list[int]:
        """The tokens of a text."""
        request_id = f"tokenize-{next(self._numbers)}"
        events = self._open(request_id)
        try:
            await self._send({"op": "tokenize", "id": request_id, "text": text, "add_bos": add_bos})
            async with asyncio.timeout(REPLY_TIMEOUT_S):
                kind, value = await events.get()
        finally:
            self._queues.pop(request_id, None)
        if kind == "error":
            raise value
        tokens: list[int] = value["tokens"]
        return tokens

    async def stop(self) -> None:
        """Ask the process to end. Never raises."""
        with contextlib.suppress(LlmsterError):
            await self._send({"op": "stop"})

    async def close(self) -> None:
        """End the connection only; the process lives on."""
        self._task.cancel()
        self._writer.close()
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await self._task
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def _open(self, request_id: str) -> asyncio.Queue[_Item]:
        if self._lost:
            raise EngineLost("the engine is not running")
        if request_id in self._queues:
            raise Conflict("duplicate_id", f"a request '{request_id}' is under way")
        events: asyncio.Queue[_Item] = asyncio.Queue()
        self._queues[request_id] = events
        return events

    async def _send(self, message: dict[str, Any]) -> None:
        if self._lost:
            raise EngineLost("the engine is not running")
        try:
            self._writer.write(pack(message))
            await self._writer.drain()
        except FrameError as error:
            raise BadRequest(
                "bad_request", f"the request can't be sent to the engine: {error}", "shorten it"
            ) from error
        except OSError as error:
            raise EngineLost from error

    async def _chunks(
        self, generation: Generation, events: asyncio.Queue[_Item]
    ) -> AsyncIterator[Chunk]:
        try:
            while True:
                kind, value = await events.get()
                if kind == "error":
                    raise value
                if kind != "step":
                    continue
                if len(value) > 5:
                    first = value[5]
                    generation.prompt_tokens = first[0]
                    generation.kv_bytes = first[1]
                    generation.handover_s = first[2]
                    generation.recomputed = first[3]
                    generation.cached_tokens = first[4]
                generation.completion_tokens += value[2]
                yield Chunk(value[1], value[2], value[3], _logprob(value[4]))
                if value[3] is not None:
                    return
        finally:
            self._queues.pop(generation.id, None)

    async def _read(self) -> None:
        try:
            while True:
                body = await self._reader.readexactly(
                    frame_length(await self._reader.readexactly(LENGTH.size))
                )
                self._dispatch(unpack(body))
        except (asyncio.IncompleteReadError, OSError, FrameError):
            pass  # the end of the connection, for whatever reason, is told below
        finally:
            self._lost = True
            self._writer.close()
            for events in self._queues.values():
                events.put_nowait(("error", EngineLost()))
            self._on_lost()

    def _dispatch(self, event: dict[str, Any]) -> None:
        kind = event.get("ev")
        self.last_event_s = time.monotonic()
        if kind == "beat":
            status = self._status
            status.active, status.waiting, status.kv_used_cells, status.kv_kept_cells = event[
                "stats"
            ]
            return
        if kind == "step":
            status = self._status
            status.active, status.waiting, status.kv_used_cells, status.kv_kept_cells = event[
                "stats"
            ]
            for item in event["out"]:
                events = self._queues.get(item[0])
                if events is not None:
                    events.put_nowait(("step", item))
            return
        if kind in ("progress", "ready", "hello"):
            if kind == "ready":
                self._status = EngineStatus(
                    event["context_length"], event["slots"], event["kv_port"]
                )
            self._on_state(event)
            return
        events = self._queues.get(str(event.get("id")))
        if events is None:
            return
        if kind == "error":
            hint = "ask again" if int(event["status"]) >= 500 else ""
            error = LlmsterError(event["code"], event["message"], hint, int(event["status"]))
            events.put_nowait(("error", error))
        elif kind == "overflow":
            overflow = ContextOverflow(event["prompt_tokens"], None, self._status.context_length)
            events.put_nowait(("error", overflow))
        else:
            events.put_nowait((str(kind), event))


def _logprob(value: list[Any] | None) -> TokenLogprob | None:
    return TokenLogprob(value[0], value[1], [(p, x) for p, x in value[2]]) if value else None
