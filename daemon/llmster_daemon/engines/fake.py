"""A model of arithmetic instead of weights, for tests of everything around a model.

Its tokens are bytes; the next one is a hash of all before it, read back from its "KV cache", so a
lost, repeated or misplaced KV range changes the output. Ends after `options["answer"]` tokens.
It misbehaves on request (`options`):

    load_s, step_s          time that loading and each step take
    fail_load               can't be loaded, with this text
    abort_load              dies while loading, like an abort in native code
    die_after_steps         exits with code 70 in that step, counted from the start
    hang_after_steps        never returns from that step
"""

import itertools
import os
import threading
import time
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from .base import GenerateParams
from .worker.backend import BackendError, Batch, EngineSpec, LoadError, Logits

VOCABULARY = 257
END = 256
BYTES_PER_TOKEN = 64
"""Like a real cache, KV is larger than the text it stands for."""


class FakeBackend:
    """See `worker.backend.Backend`."""

    def __init__(self, spec: EngineSpec, on_progress: Callable[[float], None]) -> None:
        """'Load'. Raises LoadError where that is asked for."""
        options = spec.options
        for step in range(10):
            on_progress(step / 10)
            time.sleep(options.get("load_s", 0) / 10)
        if options.get("abort_load"):
            os.abort()
        if options.get("fail_load"):
            raise LoadError(str(options["fail_load"]))
        self.cells = spec.context_length
        self.slots = spec.slots
        self.kept_slots = 4 if spec.prefix_cache else 0
        self.batch_tokens = 64
        self.cell_bytes = BYTES_PER_TOKEN
        self.layout = "fake;1"
        self._options = options
        self._kv: list[list[int]] = [[] for _ in range(self.slots + self.kept_slots)]
        self._cells: list[list[int]] = [[] for _ in self._kv]
        """The cell of each position; sequences that share KV share cells."""
        self._new_cells = itertools.count()
        self._rows: dict[int, Logits] = {}
        self._steps = 0

    def tokenize(self, text: str, add_bos: bool) -> list[int]:
        """Its UTF-8 bytes."""
        return list(text.encode("utf-8", "replace"))

    def piece(self, token: int) -> bytes:
        """The byte itself."""
        return bytes([token]) if token != END else b""

    def is_end(self, token: int) -> bool:
        """True for 256."""
        return token == END

    def valid(self, token: int) -> bool:
        """True for 0 to 256."""
        return 0 <= token < VOCABULARY

    def decode(self, batch: Batch) -> None:
        """Append to the cache, and hash it for the wanted rows."""
        self._steps += 1
        if self._steps == self._options.get("die_after_steps"):
            os._exit(70)
        if self._steps == self._options.get("hang_after_steps"):
            threading.Event().wait()
        time.sleep(self._options.get("step_s", 0))
        self._rows = {}
        for row, (token, position, slot, wants) in enumerate(
            zip(
                batch.tokens.tolist(),
                batch.positions.tolist(),
                batch.slots.tolist(),
                batch.wants.tolist(),
                strict=True,
            )
        ):
            kv = self._kv[slot]
            if position != len(kv):
                raise BackendError(f"slot {slot} can't continue at position {position}")
            self._append(slot, [token])
            if wants:
                self._rows[row] = self._predict(kv)
        self._check_room()

    def logits(self, row: int) -> Logits:
        """What `decode` predicted."""
        return self._rows[row]

    def sampler(self, params: GenerateParams, prompt: Sequence[int]) -> "FakeSampler":
        """Greedy at temperature 0, else the seed chooses among the best eight."""
        return FakeSampler(params)

    def export_range(self, slot: int, start: int, end: int) -> bytearray:
        """Each token as 64 bytes."""
        kv = self._kv[slot][start:end]
        if len(kv) != end - start:
            raise BackendError(f"slot {slot} has no KV of positions {start} to {end}")
        return bytearray(
            np.repeat(np.array(kv, dtype="<u2"), BYTES_PER_TOKEN // 2).astype("<u2").tobytes()
        )

    def import_range(self, slot: int, start: int, end: int, blob: bytearray) -> None:
        """The reverse of `export_range`."""
        kv = self._kv[slot]
        if start != len(kv) or len(blob) != (end - start) * BYTES_PER_TOKEN:
            raise BackendError(f"slot {slot} can't take positions {start} to {end}")
        self._append(slot, np.frombuffer(blob, dtype="<u2")[:: BYTES_PER_TOKEN // 2].tolist())
        self._check_room()

    def share(self, source: int, slot: int, length: int) -> None:
        """Copy the first positions."""
        if self._kv[slot] or length > len(self._kv[source]):
            raise BackendError(f"slot {slot} can't share {length} positions of {source}")
        self._kv[slot] = self._kv[source][:length]
        self._cells[slot] = self._cells[source][:length]

    def truncate(self, slot: int, length: int) -> None:
        """Forget what lies behind."""
        del self._kv[slot][length:]
        del self._cells[slot][length:]

    def close(self) -> None:
        """Nothing to free."""

    def _append(self, slot: int, tokens: list[int]) -> None:
        self._kv[slot].extend(tokens)
        self._cells[slot].extend(next(self._new_cells) for _ in tokens)

    def _check_room(self) -> None:
        """Like a real cache: there are only so many cells."""
        used = len(set(itertools.chain.from_iterable(self._cells)))
        if used > self.cells:
            raise BackendError(f"{used} cells used of {self.cells}")

    def _predict(self, kv: list[int]) -> Logits:
        """High for a printable letter that depends on all of `kv`, and on its order."""
        logits = np.zeros(VOCABULARY, dtype=np.float32)
        digest = zlib.crc32(np.array(kv, dtype="<u2").tobytes())
        letters = np.arange(97, 123)
        logits[letters] = (digest ^ (letters * 2654435761)) % 1009
        if digest % int(self._options.get("answer", 64)) == 0:
            logits[END] = 2000
        return logits


class FakeSampler:
    """Greedy, or a seeded choice."""

    def __init__(self, params: GenerateParams) -> None:
        self._greedy = params.temperature <= 0
        self._random = np.random.default_rng(params.seed & 0xFFFFFFFF)

    def sample(self, logits: Logits) -> int:
        """The next token."""
        if self._greedy:
            return int(logits.argmax())
        return int(self._random.choice(np.argsort(logits)[-8:]))

    def close(self) -> None:
        """Nothing to free."""
