"""The radix tree of shared KV against a plain model of it: a set of real cells per sequence."""

import itertools

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from llmster_daemon.engines.worker.prefix import PrefixIndex

TOKENS = st.lists(st.integers(0, 2), max_size=6)


class PrefixMachine(RuleBasedStateMachine):
    """Each token of each sequence has a cell; copies share cells."""

    active = Bundle("active")
    kept = Bundle("kept")

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.names = itertools.count()
        self.cell = itertools.count()
        self.sequences: dict[int, list[tuple[int, int]]] = {}
        self.is_kept: list[int] = []

    @rule(target=active, tokens=TOKENS)
    def begin(self, tokens: list[int]) -> int:
        key = next(self.names)
        source, length = self.index.match(tokens, len(tokens))
        best = max((self.shared(k, tokens) for k in self.sequences), default=0)
        assert length == best
        if source is None:
            assert length == 0
            self.index.add(key)
            self.sequences[key] = []
        else:
            assert [t for t, _ in self.sequences[source]][:length] == tokens[:length]  # type: ignore[index]
            self.index.add(key, source, length)
            self.sequences[key] = self.sequences[source][:length]  # type: ignore[index]
            if source in self.is_kept:
                self.is_kept.remove(source)  # type: ignore[arg-type]
                self.is_kept.append(source)  # type: ignore[arg-type]
        return key

    @rule(key=active, tokens=TOKENS)
    def extend(self, key: int, tokens: list[int]) -> None:
        if key in self.sequences and key not in self.is_kept:
            self.index.extend(key, tokens)
            self.sequences[key] += [(t, next(self.cell)) for t in tokens]

    @rule(key=active, length=st.integers(0, 12))
    def truncate(self, key: int, length: int) -> None:
        if key in self.sequences and key not in self.is_kept:
            length = min(length, len(self.sequences[key]))
            self.index.truncate(key, length)
            del self.sequences[key][length:]

    @rule(target=kept, key=consumes(active))
    def keep(self, key: int) -> int:
        self.index.keep(key)
        self.is_kept.append(key)
        return key

    @rule(key=consumes(active))
    def drop_active(self, key: int) -> None:
        self.index.drop(key)
        del self.sequences[key]

    @rule()
    def evict(self) -> None:
        oldest = self.index.oldest()
        assert oldest == (self.is_kept[0] if self.is_kept else None)
        if oldest is not None:
            self.index.drop(oldest)
            del self.sequences[self.is_kept.pop(0)]

    def shared(self, key: int, tokens: list[int]) -> int:
        length = 0
        for (token, _), wanted in zip(self.sequences[key], tokens, strict=False):
            if token != wanted:
                break
            length += 1
        return length

    @invariant()
    def cells_are_counted_once(self) -> None:
        cells = {cell for s in self.sequences.values() for _, cell in s}
        active = {cell for k, s in self.sequences.items() if k not in self.is_kept for _, cell in s}
        assert self.index.cells == len(cells)
        assert self.index.active_cells == len(active)
        assert self.index.kept == len(self.is_kept)
        for key, sequence in self.sequences.items():
            assert self.index.length(key) == len(sequence)


TestPrefixIndex = PrefixMachine.TestCase
TestPrefixIndex.settings = settings(max_examples=400, stateful_step_count=50, deadline=None)
