"""Which tokens of which sequences go into the next batch. Pure: no clock, no I/O.

The cache has `cells`, one per token of any sequence, and `slots`, one per resident sequence.

    waiting -> (awaiting ->) prefilling -> running -> gone
                                ^             |
                                `-- waiting <-'   swapped out when the cache is full

Rules:
- First come, first served: a sequence keeps its place when it is swapped out, so none starves.
- Every running sequence gets its one row in every step; prompts share what is left of the budget.
- When the cache is full, the youngest resident gives way. The oldest never does, so some
  sequence always advances.
- A sequence that awaits its KV from elsewhere holds cells for its whole prompt and is never
  swapped out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum


class Phase(Enum):
    WAITING = "waiting"
    AWAITING = "awaiting"
    PREFILLING = "prefilling"
    RUNNING = "running"
    GONE = "gone"


@dataclass(slots=True, eq=False)
class Sequence:
    """A request as the scheduler sees it.

    `tokens` is the prompt and what was generated; the first `computed` of them have KV.
    """

    id: str
    order: int
    tokens: list[int]
    prompt_tokens: int
    awaits_kv: bool = False
    phase: Phase = Phase.WAITING
    slot: int = -1
    computed: int = 0
    stalled: bool = False
    """True while its KV leaves more slowly than it is computed."""

    @property
    def reserved_cells(self) -> int:
        """Cells it holds: those in use, or the whole prompt while that is to come."""
        return self.prompt_tokens if self.phase is Phase.AWAITING else self.computed


@dataclass(slots=True)
class Part:
    """`count` tokens of a sequence, from its `start`; `wants` the logits of the last one."""

    sequence: Sequence
    start: int
    count: int
    wants: bool


@dataclass(slots=True)
class Step:
    """What to do next. First `swap_out`, then `swap_in`, then compute `parts`."""

    swap_out: list[Sequence] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    """Newly resident; those with `computed` > 0 were swapped out before and need their KV back."""
    parts: list[Part] = field(default_factory=list)


class Scheduler:
    """Holds the sequences of one engine. All lists are in order of arrival."""

    def __init__(self, cells: int, slots: int, batch_tokens: int, shared_chunk: int = 128) -> None:
        self.cells = cells
        self.batch_tokens = batch_tokens
        self.shared_chunk = shared_chunk
        """Prompt tokens per step while others generate: bounds how long those are held up."""
        self.waiting: list[Sequence] = []
        self.resident: list[Sequence] = []
        self._free_slots = list(range(slots))
        self._order = 0

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.resident
        yield from self.waiting

    @property
    def used_cells(self) -> int:
        """Cells held by resident sequences."""
        return sum(sequence.reserved_cells for sequence in self.resident)

    @property
    def free_cells(self) -> int:
        """Cells nobody holds."""
        return self.cells - self.used_cells

    def add(self, request_id: str, tokens: list[int], awaits_kv: bool = False) -> Sequence:
        """Queue a request. Its prompt must be shorter than the cache."""
        if not 0 < len(tokens) < self.cells:
            raise ValueError(f"{len(tokens)} prompt tokens for a cache of {self.cells}")
        sequence = Sequence(request_id, self._order, list(tokens), len(tokens), awaits_kv)
        self._order += 1
        self.waiting.append(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """End a sequence, wherever it is. Its slot and cells are free at once."""
        if sequence.phase is Phase.GONE:
            return
        if sequence.slot >= 0:
            self.resident.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.phase = Phase.GONE

    def stop_awaiting(self, sequence: Sequence) -> None:
        """The awaited KV will not come whole: compute here what is missing."""
        sequence.awaits_kv = False
        if sequence.phase is Phase.AWAITING:
            sequence.phase = Phase.PREFILLING

    def kv_arrived(self, sequence: Sequence) -> None:
        """The awaited KV is whole: generate from it."""
        sequence.awaits_kv = False
        sequence.phase = Phase.RUNNING

    def start_over(self, sequence: Sequence) -> None:
        """The KV of a resident sequence is lost: compute it again."""
        sequence.computed = 0
        sequence.phase = Phase.PREFILLING

    def plan(self) -> Step:
        """The next step. Updates residence; `computed` moves only by `advance`."""
        step = Step()
        self._make_room(step)
        self._admit(step)
        budget = self.batch_tokens
        free = self.free_cells
        running = [s for s in self.resident if s.phase is Phase.RUNNING]
        for sequence in running[:budget]:
            step.parts.append(Part(sequence, sequence.computed, 1, True))
        budget -= len(step.parts)
        free -= len(step.parts)
        if running:
            budget = min(budget, self.shared_chunk)
        for sequence in self.resident:
            if sequence.phase is not Phase.PREFILLING or sequence.stalled:
                continue
            missing = len(sequence.tokens) - sequence.computed
            count = min(missing, budget, free)
            if count <= 0:
                continue
            step.parts.append(Part(sequence, sequence.computed, count, count == missing))
            budget -= count
            free -= count
        return step

    def advance(self, part: Part) -> None:
        """A part of the plan was computed."""
        sequence = part.sequence
        sequence.computed = part.start + part.count
        if sequence.computed == len(sequence.tokens):
            sequence.phase = Phase.RUNNING

    def _make_room(self, step: Step) -> None:
        while True:
            needed = sum(1 for s in self.resident if s.phase is Phase.RUNNING)
            prefilling = any(s.phase is Phase.PREFILLING and not s.stalled for s in self.resident)
            # A prompt under way needs at least one cell, or nothing would move at all.
            if not needed and prefilling:
                needed = 1
            if needed <= self.free_cells:
                return
            movable = [s for s in self.resident if s.phase is not Phase.AWAITING]
            if len(movable) <= 1 and len(movable) == len(self.resident):
                return
            if not movable:
                return
            self._swap_out(movable[-1], step)

    def _swap_out(self, sequence: Sequence, step: Step) -> None:
        self.resident.remove(sequence)
        step.swap_out.append(sequence)
        # The slot is free for others only from the next plan on: its KV still lies there.
        sequence.phase = Phase.WAITING
        at = next((i for i, s in enumerate(self.waiting) if s.order > sequence.order), None)
        self.waiting.insert(len(self.waiting) if at is None else at, sequence)

    def swapped_out(self, sequence: Sequence) -> None:
        """The KV of a sequence in `swap_out` is saved (or forgotten, `computed` = 0)."""
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._free_slots.append(sequence.slot)
        sequence.slot = -1

    def _admit(self, step: Step) -> None:
        if step.swap_out:
            return
        while self.waiting and self._free_slots:
            sequence = self.waiting[0]
            residents = len(self.resident)
            # Room for the whole of it, and for everyone to grow a little: without that, the
            # sequence would be swapped out again at once.
            growth = 1 + 16 * residents if residents else 0
            if len(sequence.tokens) + growth > self.free_cells - self._promised():
                return
            self.waiting.pop(0)
            sequence.slot = self._free_slots.pop()
            if sequence.awaits_kv:
                sequence.phase = Phase.AWAITING
            elif sequence.computed == len(sequence.tokens) - 1 >= sequence.prompt_tokens:
                sequence.phase = Phase.RUNNING
            else:
                sequence.phase = Phase.PREFILLING
            at = next(
                (i for i, s in enumerate(self.resident) if s.order > sequence.order),
                len(self.resident),
            )
            self.resident.insert(at, sequence)
            step.admitted.append(sequence)

    def _promised(self) -> int:
        """Cells that admitted prompts will still take."""
        return sum(len(s.tokens) - s.computed for s in self.resident if s.phase is Phase.PREFILLING)
