"""Which tokens of which sequences go into the next batch. Pure: no clock, no I/O.

The cache has `cells`, one per token of any sequence, and `slots`, one per resident sequence.

    waiting -> (awaiting ->) prefilling -> running -> gone
                                ^             |
                                `-- waiting <-'   swapped out when the cache is full

Rules:
- First come, first served: a sequence keeps its place when it is swapped out, so none starves.
- Every running sequence gets its one row in every step; prompts share what is left of the budget,
  the oldest and the short ones first.
- When the cache is full, the youngest resident gives way. The oldest never does, so some
  sequence always advances.
- A sequence that awaits its KV from elsewhere holds cells for its whole prompt and is never
  swapped out.
- With `kept_slots`, a sequence that has ended leaves its KV behind until the room is needed, and a
  new prompt that begins like it shares those cells. Without, nothing is kept or shared.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from .prefix import PrefixIndex

MIN_SHARED_TOKENS = 8
"""A shorter common prefix is not worth a slot's bookkeeping; chat templates begin alike."""


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
    shared: int = 0
    """Tokens whose KV was there already when it was first admitted."""
    stalled: bool = False
    """True while its KV leaves more slowly than it is computed."""


@dataclass(slots=True)
class Part:
    """`count` tokens of a sequence, from its `start`; `wants` the logits of the last one."""

    sequence: Sequence
    start: int
    count: int
    wants: bool


@dataclass(slots=True)
class Move:
    """A change of what lies in a slot: shared from another, restored, or forgotten."""

    slot: int
    source: int | None = None
    length: int = 0
    restore: Sequence | None = None


@dataclass(slots=True)
class Step:
    """What to do next, in this order: `swap_out`, `moves` one by one, then compute `parts`."""

    swap_out: list[Sequence] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    """Newly resident."""
    parts: list[Part] = field(default_factory=list)


class Scheduler:
    """Holds the sequences of one engine. All lists are in order of arrival."""

    def __init__(
        self,
        cells: int,
        slots: int,
        batch_tokens: int,
        kept_slots: int = 0,
        shared_chunk: int = 128,
    ) -> None:
        self.cells = cells
        self.slots = slots
        self.batch_tokens = batch_tokens
        self.shared_chunk = shared_chunk
        """Prompt tokens per step while others generate: bounds how long those are held up."""
        self.waiting: list[Sequence] = []
        self.resident: list[Sequence] = []
        self.index = PrefixIndex()
        """Whose KV lies where; its keys are slots."""
        self._free_slots = list(range(slots + kept_slots))
        self._moves: list[Move] = []
        self._shares = kept_slots > 0
        self._order = 0

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.resident
        yield from self.waiting

    @property
    def used_cells(self) -> int:
        """Cells that residents have KV in or hold for it. Kept KV does not count: it can go."""
        return self.index.active_cells + self._reserved()

    @property
    def free_cells(self) -> int:
        """Cells that no resident needs."""
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
        """End a sequence, wherever it is. Its KV is kept for prompts that begin alike."""
        if sequence.phase is Phase.GONE:
            return
        if sequence.slot >= 0:
            self.resident.remove(sequence)
            worth = sequence.computed >= MIN_SHARED_TOKENS
            if self._shares and worth and sequence.phase is not Phase.AWAITING:
                self.index.keep(sequence.slot)
                sequence.slot = -1
            else:
                self._forget(sequence.slot)
                sequence.slot = -1
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

    def received(self, sequence: Sequence, end: int) -> None:
        """Awaited KV has come, up to position `end`."""
        self.index.extend(sequence.slot, sequence.tokens[sequence.computed : end])
        sequence.computed = end

    def compute_again(self, sequence: Sequence, start: int) -> None:
        """The KV of a resident sequence is lost from position `start` on."""
        self.index.truncate(sequence.slot, start)
        sequence.computed = start
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
        self._share_out(step, min(budget, free))
        self._evict(sum(part.count for part in step.parts))
        step.moves, self._moves = self._moves, []
        return step

    def _share_out(self, step: Step, budget: int) -> None:
        """Give prompts their share of the budget.

        The shortest come first, so that a short question does not wait behind a long document; but
        half of the budget is the oldest's, so that it always advances.
        """
        prompts = [s for s in self.resident if s.phase is Phase.PREFILLING and not s.stalled]
        if not prompts:
            return
        oldest = prompts[0]
        held = min(_missing(oldest), (budget + 1) // 2)
        shares: dict[int, int] = {}
        for sequence in sorted(prompts, key=lambda s: (_missing(s), s.order)):
            if sequence is oldest:
                held = 0
            shares[sequence.slot] = min(_missing(sequence), budget - held)
            budget -= shares[sequence.slot]
        for sequence in prompts:
            count = shares[sequence.slot]
            if count:
                whole = count == _missing(sequence)
                step.parts.append(Part(sequence, sequence.computed, count, whole))

    def advance(self, part: Part) -> None:
        """A part of the plan was computed."""
        sequence = part.sequence
        end = part.start + part.count
        self.index.extend(sequence.slot, sequence.tokens[part.start : end])
        sequence.computed = end
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
        self.index.drop(sequence.slot)
        sequence.phase = Phase.WAITING
        at = next((i for i, s in enumerate(self.waiting) if s.order > sequence.order), None)
        self.waiting.insert(len(self.waiting) if at is None else at, sequence)

    def swapped_out(self, sequence: Sequence) -> None:
        """The KV of a sequence in `swap_out` is saved, and gone from its slot."""
        # Not before: until then the slot must not be given to another.
        self._free_slots.append(sequence.slot)
        sequence.slot = -1

    def _admit(self, step: Step) -> None:
        if step.swap_out:
            return
        while self.waiting and len(self.resident) < self.slots:
            sequence = self.waiting[0]
            source, shared = self._shareable(sequence)
            # Shared cells of ended sequences become needed again; those in use cost nothing.
            cells = len(sequence.tokens) - shared
            if source is not None:
                cells += self.index.idle_tokens(source, shared)
            # Room for the whole of it, and for everyone to grow a little: without that, the
            # sequence would be swapped out again at once.
            residents = len(self.resident)
            growth = 1 + 16 * residents if residents else 0
            if cells + growth > self.free_cells - self._promised():
                return
            self.waiting.pop(0)
            self._take_slot(sequence, source, shared)
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

    def _shareable(self, sequence: Sequence) -> tuple[int | None, int]:
        """The slot whose KV a prompt can begin with, and for how many tokens."""
        if not self._shares or sequence.awaits_kv or sequence.computed:
            return None, 0
        # The last token is always computed: its logits are needed.
        source, shared = self.index.match(sequence.tokens, len(sequence.tokens) - 1)
        if shared < MIN_SHARED_TOKENS:
            return None, 0
        return source, shared

    def _take_slot(self, sequence: Sequence, source: int | None, shared: int) -> None:
        if not self._free_slots:
            if source == self.index.oldest() and self.index.kept == 1:
                # The only slot that can be freed is the one to share with.
                source, shared = None, 0
            self._forget_oldest(spare=source)
        slot = self._free_slots.pop()
        sequence.slot = slot
        self.index.add(slot, source, shared)
        if source is not None:
            sequence.computed = sequence.shared = shared
            self._moves.append(Move(slot, source, shared))
        elif sequence.computed:
            self._evict(sequence.computed)
            self.index.extend(slot, sequence.tokens[: sequence.computed])
            self._moves.append(Move(slot, restore=sequence))

    def _evict(self, cells: int) -> None:
        """Forget kept KV until `cells` more fit beside all that lies in the cache."""
        while self.index.cells + self._reserved() + cells > self.cells and self.index.kept:
            self._forget_oldest(spare=None)

    def _forget_oldest(self, spare: int | None) -> None:
        """Forget the least recently used kept sequence. `spare` was used just now, so is last."""
        oldest = self.index.oldest()
        if oldest == spare and oldest is not None:
            self.index.touch(oldest)
            oldest = self.index.oldest()
        assert oldest is not None  # noqa: S101 - callers know that something is kept
        self._forget(oldest)

    def _forget(self, slot: int) -> None:
        self.index.drop(slot)
        self._free_slots.append(slot)
        self._moves.append(Move(slot))

    def _reserved(self) -> int:
        """Cells held for awaited KV that has not come yet."""
        return sum(s.prompt_tokens - s.computed for s in self.resident if s.phase is Phase.AWAITING)

    def _promised(self) -> int:
        """Cells that admitted prompts will still take."""
        return sum(len(s.tokens) - s.computed for s in self.resident if s.phase is Phase.PREFILLING)


def _missing(sequence: Sequence) -> int:
    """Tokens of a sequence that have no KV yet."""
    return len(sequence.tokens) - sequence.computed
