"""The owner of the context: takes messages in, computes step after step, tells what came out.

One thread runs `run`. Others only `post` to its inbox; they never see a sequence or the model.
"""

import queue
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..base import GenerateParams
from .backend import Backend, BackendError, Batch, Logits, RequestError, Sampler
from .kvport import KvReceiver, KvSender
from .scheduler import Phase, Scheduler, Sequence, Step
from .text import TextStream

RESERVATION_TIMEOUT_S = 5.0
"""A reserved slot whose KV does not begin to come for this long is computed here instead."""
IDLE_WAIT_S = 0.5
"""How often deadlines are looked at while there is nothing to compute."""

BEAT_S = 1.0
CONGESTION_WAIT_S = 0.005
"""How often a sender is looked at that is all that computing waits for."""

Emit = Callable[[dict[str, Any]], None]


@dataclass(slots=True, eq=False)
class Work:
    """A request, from its first message to its last event."""

    sequence: Sequence
    max_total: int
    """Tokens, prompt included, at which it ends."""
    text: TextStream
    sampler: Sampler | None = None
    sender: KvSender | None = None
    exported: int = 0
    logprobs: int | None = None
    kv_bytes: int = 0
    handover_s: float | None = None
    recomputed: str | None = None
    reserved_until_s: float | None = None
    added_s: float = 0.0
    admitted_s: float = 0.0
    first: bool = True
    saved: bytearray | None = None
    """The KV while it is swapped out."""


class EngineLoop:
    """Serves one model. `emit` is called with events; `clock` is monotonic seconds."""

    def __init__(
        self,
        backend: Backend,
        emit: Emit,
        receiver_for: Callable[[Callable[..., None]], KvReceiver],
        sender_for: Callable[..., KvSender],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backend = backend
        self._emit = emit
        self._clock = clock
        self._inbox: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._scheduler = Scheduler(
            backend.cells, backend.slots, backend.batch_tokens, backend.kept_slots
        )
        self._work: dict[str, Work] = {}
        self._connecting: dict[str, tuple[KvSender, list[int]]] = {}
        self._receiver = receiver_for(self.post)
        self._sender_for = sender_for
        self._stopping = False
        self._next_beat_s = 0.0
        self.kv_port = self._receiver.port
        self._handlers: dict[str, Callable[..., None]] = {
            "generate": self._generate,
            "prefill": self._prefill,
            "cancel": self._cancel,
            "cancel_all": self._cancel_all,
            "recompute": self._recompute,
            "kv_connected": self._kv_connected,
            "kv_range": self._kv_range,
            "kv_done": self._kv_done,
            "kv_failed": self._recompute,
            "prefill_connected": self._prefill_connected,
            "prefill_delivered": self._prefill_delivered,
            "prefill_failed": self._prefill_failed,
            "stop": self._stop,
        }

    def post(self, name: str, *args: Any) -> None:
        """Put a message into the inbox. Thread-safe, never blocks."""
        self._inbox.put((name, *args))

    def run(self) -> None:
        """Serve until a `stop` message."""
        while not self._stopping:
            self._take_messages()
            self._beat()
            self._expire_reservations()
            step = self._scheduler.plan()
            self._move(step)
            if step.parts:
                self._compute(step)
        self._receiver.close()

    def stats(self) -> list[int]:
        """Active and waiting sequences, cells in use, and cells kept for prompts to come."""
        scheduler = self._scheduler
        index = scheduler.index
        kept = index.cells - index.active_cells
        return [len(scheduler.resident), len(scheduler.waiting), scheduler.used_cells, kept]

    def _beat(self) -> None:
        """Show that the loop turns: a daemon kills an engine that hangs."""
        now = self._clock()
        if now >= self._next_beat_s:
            self._next_beat_s = now + BEAT_S
            self._emit({"ev": "beat", "stats": self.stats()})

    # Messages

    def _wait_s(self) -> float:
        """How long the loop may sleep: not at all while there is something to compute."""
        resident = self._scheduler.resident
        if any(s.phase is Phase.RUNNING for s in resident):
            return 0.0
        prefilling = [s for s in resident if s.phase is Phase.PREFILLING]
        if prefilling:
            return CONGESTION_WAIT_S if all(s.stalled for s in prefilling) else 0.0
        return IDLE_WAIT_S if resident or not self._scheduler.waiting else 0.0

    def _take_messages(self) -> None:
        wait_s = self._wait_s()
        try:
            message = self._inbox.get(timeout=wait_s) if wait_s else self._inbox.get_nowait()
            while True:
                self._handlers[message[0]](*message[1:])
                message = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _generate(
        self, request_id: str, params: GenerateParams, awaits_kv: bool, tokens: list[int]
    ) -> None:
        work = self._add(request_id, tokens, awaits_kv)
        if work is None:
            return
        try:
            work.sampler = self._backend.sampler(params, tokens)
        except RequestError as error:
            self._error(request_id, error.code, str(error), 400)
            self._end(work)
            return
        if params.max_tokens is not None:
            work.max_total = min(work.max_total, len(tokens) + params.max_tokens)
        work.text = TextStream(params.stop)
        work.logprobs = params.logprobs
        if work.max_total <= len(tokens):
            self._output(work, "", 0, "length")
            self._end(work)

    def _prefill(self, request_id: str, params: dict[str, Any]) -> None:
        tokens = list(params["tokens"])
        if not self._check(request_id, tokens):
            return
        sender = self._sender_for(
            request_id,
            (str(params["host"]), int(params["port"])),
            {"ticket": params["ticket"], "tokens": len(tokens), "layout": self._backend.layout},
            self.post,
        )
        self._connecting[request_id] = (sender, tokens)
        sender.start()

    def _prefill_connected(self, request_id: str) -> None:
        entry = self._connecting.pop(request_id, None)
        if entry is None:
            return
        sender, tokens = entry
        work = self._add(request_id, tokens, False)
        if work is None:
            sender.abort()
            return
        work.sender = sender

    def _prefill_delivered(self, request_id: str, kv_bytes: int) -> None:
        work = self._work.get(request_id)
        if work is None:
            return
        now = self._clock()
        self._emit(
            {
                "ev": "prefilled",
                "id": request_id,
                "kv_bytes": kv_bytes,
                "queue_s": work.admitted_s - work.added_s,
                "prefill_s": now - work.admitted_s,
            }
        )
        self._end(work)

    def _prefill_failed(self, request_id: str, reason: str) -> None:
        self._connecting.pop(request_id, None)
        self._error(request_id, "handover_failed", f"the KV could not be delivered: {reason}", 502)
        work = self._work.get(request_id)
        if work is not None:
            self._end(work)

    def _cancel(self, request_id: str) -> None:
        entry = self._connecting.pop(request_id, None)
        if entry is not None:
            entry[0].abort()
        work = self._work.get(request_id)
        if work is not None:
            self._end(work)

    def _cancel_all(self) -> None:
        for request_id in [*self._connecting, *self._work]:
            self._cancel(request_id)

    def _recompute(self, request_id: str, reason: str) -> None:
        work = self._work.get(request_id)
        if work is None or not work.sequence.awaits_kv:
            return
        self._receiver.forget(request_id)
        work.recomputed = reason
        work.reserved_until_s = None
        sequence = work.sequence
        self._scheduler.stop_awaiting(sequence)
        if sequence.computed == sequence.prompt_tokens:
            # All of the KV came, but not the logits: the last token has to be computed again.
            self._scheduler.compute_again(sequence, sequence.computed - 1)
            self._backend.truncate(sequence.slot, sequence.computed)

    def _kv_connected(self, request_id: str) -> None:
        work = self._work.get(request_id)
        if work is not None:
            # From here on the receiver notices if nothing comes any more.
            work.reserved_until_s = None

    def _kv_range(
        self, request_id: str, start: int, end: int, blob: bytearray, release: Callable[[], None]
    ) -> None:
        release()
        work = self._work.get(request_id)
        if work is None or work.sequence.phase is not Phase.AWAITING:
            return
        sequence = work.sequence
        try:
            if start != sequence.computed or not start < end <= sequence.prompt_tokens:
                raise BackendError(f"range {start} to {end} after {sequence.computed}")
            size = len(blob)
            self._backend.import_range(sequence.slot, start, end, blob)
        except BackendError as error:
            self._recompute(request_id, f"bad KV: {error}")
            return
        self._scheduler.received(sequence, end)
        work.kv_bytes += size

    def _kv_done(
        self,
        request_id: str,
        logits: bytearray,
        computed_at_s: float,
        reply: Callable[[str], None],
    ) -> None:
        work = self._work.get(request_id)
        if work is None or work.sequence.phase is not Phase.AWAITING:
            reply("the request is gone")
            return
        sequence = work.sequence
        row = np.frombuffer(logits, dtype="<f4") if len(logits) % 4 == 0 else np.zeros(0)
        if sequence.computed != sequence.prompt_tokens or not self._backend.valid(len(row) - 1):
            reply("the KV is not whole")
            self._recompute(request_id, "the KV was not whole")
            return
        if self._backend.valid(len(row)) or np.isnan(row).any():
            reply("these are not logits of this model")
            self._recompute(request_id, "the logits were not this model's")
            return
        reply("")
        work.handover_s = max(0.0, self._clock() - computed_at_s)
        self._scheduler.kv_arrived(sequence)
        out = self._sample(work, row.astype(np.float32, copy=False))
        if out is not None:
            self._emit({"ev": "step", "out": [out], "stats": self.stats()})

    def _stop(self) -> None:
        self._cancel_all()
        self._stopping = True

    # Steps

    def _move(self, step: Step) -> None:
        for sequence in step.swap_out:
            if sequence.computed:
                blob = self._backend.export_range(sequence.slot, 0, sequence.computed)
                self._work[sequence.id].saved = blob
                self._backend.truncate(sequence.slot, 0)
            self._scheduler.swapped_out(sequence)
        for move in step.moves:
            if move.source is not None:
                self._backend.share(move.source, move.slot, move.length)
            elif move.restore is not None:
                self._restore(move.restore, step)
            else:
                self._backend.truncate(move.slot, 0)
        for sequence in step.admitted:
            work = self._work[sequence.id]
            work.admitted_s = work.admitted_s or self._clock()
            if sequence.phase is Phase.AWAITING:
                self._reserve(work)

    def _restore(self, sequence: Sequence, step: Step) -> None:
        """Bring back the KV of a sequence that was swapped out, or have it computed again."""
        work = self._work[sequence.id]
        saved, work.saved = work.saved, None
        try:
            if saved is None:
                raise BackendError("nothing was saved")
            self._backend.import_range(sequence.slot, 0, sequence.computed, saved)
        except BackendError:
            self._backend.truncate(sequence.slot, 0)
            self._scheduler.compute_again(sequence, 0)
            # It was planned from where it was; the next step begins at its start.
            step.parts = [part for part in step.parts if part.sequence is not sequence]

    def _reserve(self, work: Work) -> None:
        sequence = work.sequence
        work.reserved_until_s = self._clock() + RESERVATION_TIMEOUT_S
        self._emit(
            {
                "ev": "reserved",
                "id": sequence.id,
                "tokens": sequence.tokens,
                "kv_port": self.kv_port,
                "ticket": self._receiver.expect(sequence.id, sequence.prompt_tokens),
            }
        )

    def _expire_reservations(self) -> None:
        now = self._clock()
        for sequence in list(self._scheduler.resident):
            work = self._work[sequence.id]
            if work.reserved_until_s is not None and now > work.reserved_until_s:
                self._recompute(sequence.id, "the prefill node sent nothing")
            if work.sender is not None:
                sequence.stalled = work.sender.congested

    def _compute(self, step: Step) -> None:
        parts = step.parts
        rows = sum(part.count for part in parts)
        batch = Batch(
            np.empty(rows, dtype=np.int32),
            np.empty(rows, dtype=np.int32),
            np.empty(rows, dtype=np.int32),
            np.zeros(rows, dtype=np.int8),
        )
        last_rows = []
        at = 0
        for part in parts:
            end = at + part.count
            batch.tokens[at:end] = part.sequence.tokens[part.start : part.start + part.count]
            batch.positions[at:end] = np.arange(part.start, part.start + part.count)
            batch.slots[at:end] = part.sequence.slot
            batch.wants[end - 1] = part.wants
            last_rows.append(end - 1)
            at = end
        self._backend.decode(batch)
        out = []
        for part, row in zip(parts, last_rows, strict=True):
            self._scheduler.advance(part)
            work = self._work[part.sequence.id]
            logits = self._backend.logits(row) if part.wants else None
            if work.sender is not None:
                self._push(work, work.sender, logits)
            elif logits is not None:
                item = self._sample(work, logits)
                if item is not None:
                    out.append(item)
        if out:
            self._emit({"ev": "step", "out": out, "stats": self.stats()})

    def _push(self, work: Work, sender: KvSender, logits: Logits | None) -> None:
        """Send what this step added to the prompt's KV."""
        now = self._clock()
        sequence = work.sequence
        # Not more, while KV that has left already is computed again.
        if sequence.computed > work.exported:
            blob = self._backend.export_range(sequence.slot, work.exported, sequence.computed)
            sender.push_range(work.exported, sequence.computed, blob)
            work.exported = sequence.computed
        if logits is not None:
            sender.push_done(logits.tobytes(), now)
            # Its slot is free; the request itself ends when the other side has the KV.
            self._scheduler.remove(sequence)

    def _sample(self, work: Work, logits: Logits) -> list[Any] | None:
        """Choose the next token of a sequence, and end it if that was the last.

        None if it can't have one: the request has then been refused.
        """
        assert work.sampler is not None  # noqa: S101 - set for everything that generates
        sequence = work.sequence
        try:
            token = work.sampler.sample(logits)
        except RequestError as error:
            self._error(sequence.id, error.code, str(error), 400)
            self._end(work)
            return None
        sequence.tokens.append(token)
        finish = None
        text = ""
        logprob = None
        if self._backend.is_end(token):
            finish = "stop"
        else:
            piece = self._backend.piece(token)
            if work.logprobs is not None:
                logprob = self._logprob(token, piece, logits, work.logprobs)
            text = work.text.push(piece)
            if work.text.stopped:
                finish = "stop"
            elif len(sequence.tokens) >= work.max_total:
                finish = "length"
        if finish is not None:
            text += work.text.finish()
        out = self._item(work, text, 1, finish, logprob)
        if finish is not None:
            self._end(work)
        return out

    def _logprob(self, token: int, piece: bytes, logits: Logits, count: int) -> list[Any]:
        """[piece, log probability, alternatives], of the model's own distribution."""
        highest = float(logits.max())
        count = min(max(count, 0), len(logits))
        normaliser = highest + float(np.log(np.exp(logits - highest).sum()))
        best = np.argpartition(logits, -count)[-count:] if count else np.empty(0, dtype=np.int64)
        best = best[np.argsort(-logits[best])]
        alternatives = [[self._backend.piece(int(i)), float(logits[i]) - normaliser] for i in best]
        return [piece, float(logits[token]) - normaliser, alternatives]

    def _item(
        self,
        work: Work,
        text: str,
        tokens: int,
        finish: str | None,
        logprob: list[Any] | None = None,
    ) -> list[Any]:
        """[id, text, tokens, finish, log probability], and on the first one what was before it."""
        item: list[Any] = [work.sequence.id, text, tokens, finish, logprob]
        if work.first:
            work.first = False
            item.append(
                [
                    work.sequence.prompt_tokens,
                    work.kv_bytes,
                    work.handover_s,
                    work.recomputed,
                    work.sequence.shared,
                ]
            )
        return item

    def _output(self, work: Work, text: str, tokens: int, finish: str | None) -> None:
        item = self._item(work, text, tokens, finish)
        self._emit({"ev": "step", "out": [item], "stats": self.stats()})

    # Beginning and end of requests

    def _check(self, request_id: str, tokens: list[int]) -> bool:
        if not tokens:
            self._error(request_id, "empty_prompt", "the prompt has no tokens", 400)
        elif not all(self._backend.valid(token) for token in tokens):
            self._error(request_id, "bad_tokens", "a token is not in the vocabulary", 400)
        elif len(tokens) >= self._backend.cells:
            self._emit(
                {"ev": "overflow", "id": request_id, "prompt_tokens": len(tokens)},
            )
        elif request_id in self._work or request_id in self._connecting:
            self._error(request_id, "duplicate_id", "a request of this id is under way", 409)
        else:
            return True
        return False

    def _add(self, request_id: str, tokens: list[int], awaits_kv: bool) -> Work | None:
        if not self._check(request_id, tokens):
            return None
        sequence = self._scheduler.add(request_id, tokens, awaits_kv)
        work = Work(sequence, self._backend.cells, TextStream(()), added_s=self._clock())
        self._work[request_id] = work
        return work

    def _end(self, work: Work) -> None:
        sequence = work.sequence
        if work.sequence.awaits_kv:
            self._receiver.forget(sequence.id)
        if work.sender is not None:
            work.sender.abort()
        if work.sampler is not None:
            work.sampler.close()
        self._scheduler.remove(sequence)
        del self._work[sequence.id]

    def _error(self, request_id: str, code: str, message: str, status: int) -> None:
        self._emit(
            {"ev": "error", "id": request_id, "code": code, "message": message, "status": status}
        )
