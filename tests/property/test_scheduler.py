"""The scheduler under any mix of arrivals, cancels, hand-overs, stalls and lost KV."""

import itertools

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from llmster_daemon.engines.worker.scheduler import (
    MIN_SHARED_TOKENS,
    Move,
    Part,
    Phase,
    Scheduler,
    Sequence,
    Step,
)

DRAIN_STEPS = 20_000
"""Far more steps than any run below needs, so reaching it means that nothing moves."""

PICK = st.integers(0, 1 << 16)
ARRIVAL = st.tuples(
    st.sampled_from([0, 1, 3, 5, 8, 8, 10, 12, 15, 20, 40, 200]),
    st.sampled_from([1, 2, 20, 60, 100, 100, 200]),
    st.sampled_from([False, False, True]),
    st.integers(0, 2),
)
"""Prompt tokens (modulo what fits), tokens to generate, whether its KV comes from elsewhere, and
which of three texts the prompt is the beginning of: prompts of one text can share KV."""
KV_ENDS = st.sampled_from(["", "", "", "", "whole", "fails"])


class SchedulerMachine(RuleBasedStateMachine):
    """Drives a Scheduler as the engine loop does, with a model of the KV cache next to it."""

    @initialize(
        # Around what a few requests need, so that most runs are short of cells.
        cells=st.sampled_from([2, 3, 10, 40, 60, 64, 80, 100, 120]),
        slots=st.sampled_from([6, 5, 4, 3, 2, 1]),
        batch_tokens=st.sampled_from([40, 16, 8, 1]),
        kept_slots=st.sampled_from([0, 1, 2, 8]),
        shared_chunk=st.sampled_from([40, 16, 3, 1]),
    )
    def build(
        self, cells: int, slots: int, batch_tokens: int, kept_slots: int, shared_chunk: int
    ) -> None:
        # llama.cpp's batch is never smaller than the number of its slots.
        self.batch_tokens = max(batch_tokens, slots)
        self.shared_chunk = shared_chunk
        self.cells = cells
        self.slots = slots
        self.all_slots = slots + kept_slots
        self.scheduler = Scheduler(cells, slots, self.batch_tokens, kept_slots, shared_chunk)
        self.limits: dict[Sequence, int] = {}
        """Tokens at which a request ends; holds those that have not ended."""
        self.kv: dict[int, list[tuple[int, int]]] = {}
        """What lies in the cache: slot -> (token, cell) of every position."""
        self.new_cells = itertools.count()
        self.saved: dict[Sequence, int] = {}
        self.first_admissions: list[int] = []
        self.finished = 0

    # What the outside does

    @rule(arrivals=st.lists(ARRIVAL, min_size=2, max_size=6))
    def arrive(self, arrivals: list[tuple[int, int, bool]]) -> None:
        for prompt, answer, awaits_kv, text in arrivals:
            tokens = 1 + prompt % (self.cells - 1)
            words = [(i * i + text) % 7 + 10 * text for i in range(tokens)]
            sequence = self.scheduler.add(f"r{len(self.limits)}", words, awaits_kv)
            self.limits[sequence] = min(self.cells, tokens + answer)

    @precondition(lambda self: self.limits)
    @rule(pick=PICK, whether=st.integers(0, 2))
    def cancel(self, pick: int, whether: int) -> None:
        if not whether:  # seldom, or few requests would ever meet
            self.end(self.pick(list(self.limits), pick))

    @rule(pick=PICK, share=st.sampled_from([0.0, 0.3, 0.5, 1.0]), end=KV_ENDS)
    def kv_arrives(self, pick: int, share: float, end: str) -> None:
        """Some more of an awaited KV; it may fail midway, or with only the logits missing."""
        awaiting = self.in_phase(Phase.AWAITING)
        if awaiting:
            sequence = self.pick(awaiting, pick)
            missing = sequence.prompt_tokens - sequence.computed
            self.receive(sequence, sequence.computed + round(missing * share))
            if end == "whole":
                self.deliver(sequence)
            elif end == "fails":
                self.fail_kv(sequence)

    @rule(pick=PICK)
    def handover_is_called_off_while_waiting(self, pick: int) -> None:
        awaiting = [s for s in self.scheduler.waiting if s.awaits_kv]
        if awaiting:
            self.fail_kv(self.pick(awaiting, pick))

    @rule(pick=PICK, stalled=st.booleans())
    def sender_congests(self, pick: int, stalled: bool) -> None:
        resident = self.in_phase(Phase.PREFILLING)
        if resident:
            self.pick(resident, pick).stalled = stalled

    @rule(steps=st.sampled_from([1, 3, 10, 40]), restores=st.booleans())
    def compute(self, steps: int, restores: bool) -> None:
        for _ in range(steps):
            self.step(restores)

    # What must always hold

    @invariant()
    def cells_and_slots_are_never_oversold(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        scheduler = self.scheduler
        slots = [s.slot for s in scheduler.resident]
        assert len(set(slots)) == len(slots) <= self.slots
        assert all(0 <= slot < self.all_slots for slot in slots)
        assert 0 <= scheduler.used_cells <= self.cells
        self.check_room()
        for sequence in scheduler.resident:
            lies = [token for token, _ in self.kv.get(sequence.slot, [])]
            assert lies == sequence.tokens[: sequence.computed]
        assert all(s.computed < len(s.tokens) or s.awaits_kv for s in scheduler)
        assert set(scheduler) == set(self.limits)
        assert [s.order for s in scheduler.waiting] == sorted(s.order for s in scheduler.waiting)

    def teardown(self) -> None:
        """Once nothing new comes and senders flow again, every request ends."""
        if not hasattr(self, "scheduler"):
            return
        for count in range(DRAIN_STEPS):
            if not self.limits:
                break
            for sequence in self.limits:
                sequence.stalled = False
            for sequence in self.in_phase(Phase.AWAITING):
                if count % 2:
                    self.deliver(sequence)
                else:
                    self.fail_kv(sequence)
            self.step(restores=True)
        assert not self.limits, "some request starves"
        assert self.scheduler.free_cells == self.cells
        assert self.scheduler.index.active_cells == 0
        assert self.first_admissions == sorted(self.first_admissions)

    # The engine loop, without an engine

    def step(self, restores: bool) -> None:
        before = list(self.scheduler.resident)
        step = self.scheduler.plan()
        self.check(step, before)
        for sequence in step.swap_out:
            self.saved[sequence] = len(self.kv.pop(sequence.slot, []))
            assert self.saved[sequence] == sequence.computed
            self.scheduler.swapped_out(sequence)
        for move in step.moves:
            self.move(move, restores)
            self.check_room()
        for sequence in step.admitted:
            if sequence.order not in self.first_admissions:
                self.first_admissions.append(sequence.order)
            assert len(self.kv.setdefault(sequence.slot, [])) == sequence.computed
        for part in step.parts:
            if part.start == part.sequence.computed:  # not one whose KV was lost just now
                self.advance(part)
                self.check_room()

    def move(self, move: Move, restores: bool) -> None:
        if move.source is not None:
            assert not self.kv.get(move.slot), "the slot of another sequence's KV"
            assert MIN_SHARED_TOKENS <= move.length <= len(self.kv[move.source])
            self.kv[move.slot] = self.kv[move.source][: move.length]
        elif move.restore is not None:
            assert not self.kv.get(move.slot), "the slot of another sequence's KV"
            sequence = move.restore
            assert sequence.computed == self.saved.pop(sequence)
            if restores:
                self.fill(move.slot, sequence.tokens[: sequence.computed])
            else:
                self.scheduler.compute_again(sequence, 0)
        else:
            self.kv.pop(move.slot, None)

    def fill(self, slot: int, tokens: list[int]) -> None:
        row = self.kv.setdefault(slot, [])
        row += [(token, next(self.new_cells)) for token in tokens]

    def check_room(self) -> None:
        assert len({cell for row in self.kv.values() for _, cell in row}) <= self.cells

    def receive(self, sequence: Sequence, end: int) -> None:
        self.fill(sequence.slot, sequence.tokens[sequence.computed : end])
        self.scheduler.received(sequence, end)

    def advance(self, part: Part) -> None:
        sequence = part.sequence
        self.fill(sequence.slot, sequence.tokens[part.start : part.start + part.count])
        self.scheduler.advance(part)
        if part.wants:
            self.sample(sequence)

    def check(self, step: Step, before: list[Sequence]) -> None:
        rows = sum(part.count for part in step.parts)
        assert rows <= self.batch_tokens
        assert self.scheduler.used_cells + rows <= self.cells
        assert len({part.sequence for part in step.parts}) == len(step.parts)
        for part in step.parts:
            assert part.sequence in self.scheduler.resident
            assert part.sequence.phase in (Phase.RUNNING, Phase.PREFILLING)
            assert part.start == part.sequence.computed
            assert part.count > 0
            assert part.start + part.count <= len(part.sequence.tokens)
            assert part.wants == (part.start + part.count == len(part.sequence.tokens))
        running = self.in_phase(Phase.RUNNING)
        assert [p.count for p in step.parts if p.sequence in running] == [1] * len(running)
        if running:
            assert rows - len(running) <= self.shared_chunk
        movable = [s for s in before if s.phase is not Phase.AWAITING]
        assert not any(s.awaits_kv for s in step.swap_out)
        if step.swap_out and all(s.phase is not Phase.AWAITING for s in before):
            assert movable[0] not in step.swap_out, "the oldest gave way"
        kept = [s for s in before if s not in step.swap_out and s.phase is not Phase.AWAITING]
        assert all(k.order < s.order for k in kept for s in step.swap_out), "not the youngest"
        assert all(a.order < w.order for a in step.admitted for w in self.scheduler.waiting)

    def sample(self, sequence: Sequence) -> None:
        sequence.tokens.append(len(sequence.tokens) % 3)
        if len(sequence.tokens) >= self.limits[sequence]:
            self.finished += 1
            self.end(sequence)

    def deliver(self, sequence: Sequence) -> None:
        self.receive(sequence, sequence.prompt_tokens)
        self.scheduler.kv_arrived(sequence)
        self.sample(sequence)

    def fail_kv(self, sequence: Sequence) -> None:
        self.scheduler.stop_awaiting(sequence)
        if sequence.computed == sequence.prompt_tokens:
            self.scheduler.compute_again(sequence, sequence.computed - 1)
            self.kv[sequence.slot].pop()

    def end(self, sequence: Sequence) -> None:
        self.saved.pop(sequence, None)
        del self.limits[sequence]
        self.scheduler.remove(sequence)
        assert sequence.phase is Phase.GONE
        self.scheduler.remove(sequence)  # a second time changes nothing

    def in_phase(self, phase: Phase) -> list[Sequence]:
        return [s for s in self.scheduler.resident if s.phase is phase]

    @staticmethod
    def pick(sequences: list[Sequence], pick: int) -> Sequence:
        return sequences[pick % len(sequences)]


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=200, stateful_step_count=30, deadline=None, report_multiple_bugs=False
)
