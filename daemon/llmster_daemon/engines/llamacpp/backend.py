"""A GGUF model in llama.cpp: the checked edge between Python and C.

llama.cpp aborts the process, or silently accepts nonsense, where it is called wrongly. So every
batch, slot and blob is checked here first; `BackendError` is the worst that a caller sees.
"""

import ctypes
import sys
from collections.abc import Callable, Sequence
from typing import Any

import llama_cpp
import numpy as np

from ...kv.blob import BlobError, KvLayout
from ..base import GenerateParams
from ..worker.backend import BackendError, Batch, EngineSpec, LoadError, Logits, RequestError
from ..worker.backend import Sampler as SamplerProtocol
from .sampling import Candidates, ChainSampler, GreedySampler

BATCH_TOKENS = 512
FLASH_ATTENTION_ON = 1
KEPT_SLOTS = 32
MAX_SEQUENCES = 256
"""What llama.cpp is built for."""
LOG_WARN, LOG_ERROR, LOG_CONTINUE = 3, 4, 5
"""ggml_log_level."""


class Log:
    """llama.cpp's log: warnings and errors to stderr; the last errors kept as a reason."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self._level = 0
        # ctypes does not keep the callback alive; this attribute does.
        self._callback = llama_cpp.llama_log_callback(self._line)
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _line(self, level: int, text: bytes, _: Any) -> None:
        line = text.decode("utf-8", "replace")
        level = self._level if level == LOG_CONTINUE else level
        self._level = level
        if level in (LOG_WARN, LOG_ERROR):
            sys.stderr.write(line)
        if level == LOG_ERROR and line.strip():
            self.errors = [*self.errors[-4:], line.strip()]


class LlamaBackend:
    """See `worker.backend.Backend`. Owned by one thread."""

    def __init__(self, spec: EngineSpec, on_progress: Callable[[float], None]) -> None:
        """Load. Blocks for as long as that takes. Raises LoadError."""
        self._log = Log()
        llama_cpp.llama_backend_init()
        self._model = self._load(spec, on_progress)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocabulary = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        self.slots = spec.slots
        self.kept_slots = min(
            KEPT_SLOTS if spec.prefix_cache else 0, MAX_SEQUENCES - 1 - spec.slots
        )
        self._scratch = self.slots + self.kept_slots
        """A sequence of our own, through which ranges are exported and imported."""
        self._context = self._open(spec)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self.cells = int(llama_cpp.llama_n_ctx(self._context))
        self.batch_tokens = int(llama_cpp.llama_n_batch(self._context))
        self._batch = llama_cpp.llama_batch_init(self.batch_tokens, 0, 1)
        self._rows = _BatchViews(self._batch, self.batch_tokens)
        self._next = [0] * self._scratch
        """Next position of every sequence: what a batch and a blob must continue."""
        self._wanted: set[int] = set()
        self._candidates = Candidates(self._vocabulary)
        self._pieces: dict[int, bytes] = {}
        self._kv_layout = self._learn_layout()
        self.cell_bytes = self._kv_layout.size(1)
        self.layout = f"llamacpp;{self._kv_layout.describe()}"

    def tokenize(self, text: str, add_bos: bool) -> list[int]:
        """The tokens of a text."""
        data = text.encode("utf-8", "replace")
        room = len(data) + 2
        tokens = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), tokens, room, add_bos, True)
        if count < 0:
            raise BackendError("the text can't be tokenised")
        return list(tokens[:count])

    def piece(self, token: int) -> bytes:
        """The bytes of a token."""
        piece = self._pieces.get(token)
        if piece is None:
            buffer = ctypes.create_string_buffer(256)
            length = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, 256, 0, False)
            piece = buffer.raw[:length] if length > 0 else b""
            self._pieces[token] = piece
        return piece

    def is_end(self, token: int) -> bool:
        """True if the token ends an answer."""
        return bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))

    def valid(self, token: int) -> bool:
        """True if the vocabulary has it."""
        return 0 <= token < self._vocabulary

    def decode(self, batch: Batch) -> None:
        """Compute one step."""
        count = len(batch.tokens)
        if not 0 < count <= self.batch_tokens:
            raise BackendError(f"a batch of {count} rows; 1 to {self.batch_tokens} are possible")
        for slot, position in zip(batch.slots.tolist(), batch.positions.tolist(), strict=True):
            if not 0 <= slot < self._scratch or position != self._next[slot]:
                raise BackendError(f"slot {slot} can't continue at position {position}")
            self._next[slot] += 1
        if batch.tokens.min() < 0 or batch.tokens.max() >= self._vocabulary:
            raise BackendError("a token is not in the vocabulary")
        self._rows.fill(batch)
        self._batch.n_tokens = count
        result = llama_cpp.llama_decode(self._context, self._batch)
        if result != 0:
            raise BackendError(f"llama_decode returned {result}")
        self._wanted = set(np.flatnonzero(batch.wants).tolist())

    def logits(self, row: int) -> Logits:
        """The logits of a wanted row."""
        if row not in self._wanted:
            raise BackendError(f"row {row} has no logits")
        pointer = llama_cpp.llama_get_logits_ith(self._context, row)
        if not pointer:
            raise BackendError(f"llama.cpp has no logits for row {row}")
        return np.ctypeslib.as_array(pointer, shape=(self._vocabulary,))

    def sampler(self, params: GenerateParams, prompt: Sequence[int]) -> SamplerProtocol:
        """A sampler; temperature 0 is greedy."""
        if params.greedy:
            return GreedySampler()
        if any(not self.valid(token) for token, _ in params.logit_bias):
            raise RequestError("bad_bias", "logit_bias names a token that does not exist")
        return ChainSampler(self._vocab, self._candidates, params, prompt)

    def export_range(self, slot: int, start: int, end: int) -> bytearray:
        """The KV of [start, end), copied through the scratch sequence."""
        if not 0 <= slot < self._scratch or not 0 <= start < end <= self._next[slot]:
            raise BackendError(f"slot {slot} has no KV of positions {start} to {end}")
        llama_cpp.llama_memory_seq_cp(self._memory, slot, self._scratch, start, end)
        try:
            return self._export(self._scratch)
        finally:
            llama_cpp.llama_memory_seq_rm(self._memory, self._scratch, -1, -1)

    def import_range(self, slot: int, start: int, end: int, blob: bytearray) -> None:
        """Append KV. The blob's structure is written anew; only its K and V rows are used."""
        if not 0 <= slot < self._scratch or start != self._next[slot] or end > self.cells:
            raise BackendError(f"slot {slot} can't take positions {start} to {end}")
        try:
            self._kv_layout.stamp(blob, self._scratch, start, end)
        except BlobError as error:
            raise BackendError(str(error)) from error
        data = (ctypes.c_uint8 * len(blob)).from_buffer(blob)
        read = llama_cpp.llama_state_seq_set_data(self._context, data, len(blob), self._scratch)
        if read != len(blob):
            llama_cpp.llama_memory_seq_rm(self._memory, self._scratch, -1, -1)
            raise BackendError("llama.cpp refused the KV (no contiguous room, or another layout)")
        llama_cpp.llama_memory_seq_cp(self._memory, self._scratch, slot, start, end)
        llama_cpp.llama_memory_seq_rm(self._memory, self._scratch, -1, -1)
        self._next[slot] = end

    def share(self, source: int, slot: int, length: int) -> None:
        """Both sequences then hold the same cells."""
        if self._next[slot] or not 0 < length <= self._next[source]:
            raise BackendError(f"slot {slot} can't share {length} positions of {source}")
        llama_cpp.llama_memory_seq_cp(self._memory, source, slot, 0, length)
        self._next[slot] = length

    def truncate(self, slot: int, length: int) -> None:
        """Forget the KV from position `length` on."""
        llama_cpp.llama_memory_seq_rm(self._memory, slot, length, -1)
        self._next[slot] = min(self._next[slot], length)

    def close(self) -> None:
        """Free batch, context and model."""
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def _load(self, spec: EngineSpec, on_progress: Callable[[float], None]) -> Any:
        params = llama_cpp.llama_model_default_params()
        if spec.gpu_layers >= 0:
            params.n_gpu_layers = spec.gpu_layers

        def progress(value: float, _: Any) -> bool:
            on_progress(value)
            return True

        callback = llama_cpp.llama_progress_callback(progress)
        params.progress_callback = callback
        model = llama_cpp.llama_model_load_from_file(spec.model_path.encode(), params)
        if not model:
            raise LoadError(
                "llama.cpp can't load the file: " + ("; ".join(self._log.errors) or "no reason")
            )
        return model

    def _open(self, spec: EngineSpec) -> Any:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = spec.context_length
        params.n_batch = BATCH_TOKENS
        params.n_ubatch = BATCH_TOKENS
        params.n_seq_max = self._scratch + 1
        # One pool of cells for all sequences; ranges can only be copied within such a cache.
        params.kv_unified = True
        # Without it, exporting interleaved sequences is 20 times slower.
        params.flash_attn_type = FLASH_ATTENTION_ON
        params.n_threads = spec.threads
        params.n_threads_batch = spec.threads
        params.no_perf = True
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise LoadError(
                f"no memory for a context of {spec.context_length:,} tokens: "
                + ("; ".join(self._log.errors) or "no reason given")
            )
        return context

    def _learn_layout(self) -> KvLayout:
        """Compute one token and read how llama.cpp writes its KV: nothing about it is assumed."""
        one = np.zeros(1, dtype=np.int32)
        self.decode(Batch(one, one, one, np.ones(1, dtype=np.int8)))
        try:
            return KvLayout.parse(self._export(0))
        except BlobError as error:
            raise LoadError(f"this model's KV cache can't be handed over: {error}") from error
        finally:
            self.truncate(0, 0)

    def _export(self, sequence: int) -> bytearray:
        size = llama_cpp.llama_state_seq_get_size(self._context, sequence)
        blob = bytearray(size)
        data = (ctypes.c_uint8 * size).from_buffer(blob)
        written = llama_cpp.llama_state_seq_get_data(self._context, data, size, sequence)
        del data  # releases the buffer, so that the blob can be resized or freed
        if written != size:
            raise BackendError(f"llama.cpp exported {written} of {size} bytes")
        return blob


class _BatchViews:
    """numpy views of a llama_batch: filling it item by item through ctypes is 50 times slower."""

    def __init__(self, batch: Any, capacity: int) -> None:
        self.token = np.ctypeslib.as_array(batch.token, shape=(capacity,))
        self.pos = np.ctypeslib.as_array(batch.pos, shape=(capacity,))
        self.n_seq = np.ctypeslib.as_array(batch.n_seq_id, shape=(capacity,))
        self.logits = np.ctypeslib.as_array(batch.logits, shape=(capacity,))
        # llama.cpp allocates an array of one sequence id for every row.
        self._slots = [np.ctypeslib.as_array(batch.seq_id[i], shape=(1,)) for i in range(capacity)]
        self.n_seq[:] = 1

    def fill(self, batch: Batch) -> None:
        """Copy a batch in."""
        count = len(batch.tokens)
        self.token[:count] = batch.tokens
        self.pos[:count] = batch.positions
        self.logits[:count] = batch.wants
        for view, slot in zip(self._slots, batch.slots.tolist(), strict=False):
            view[0] = slot
