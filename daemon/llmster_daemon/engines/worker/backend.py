"""What the engine process needs of a model: the seam between scheduling and arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ...protocol.base import Frozen
from ..base import GenerateParams

Logits = NDArray[np.float32]
"""Shape [vocabulary]; a view that is valid until the next `decode`."""


class EngineSpec(Frozen):
    """All that an engine process is told when it starts. Read from a file, never from argv."""

    instance_id: str
    backend: str
    model_path: str
    digest: str
    socket_path: str
    fatal_path: str
    kv_host: str = "127.0.0.1"
    context_length: int = 8192
    slots: int = 16
    threads: int = 1
    gpu_layers: int = -1
    prefix_cache: bool = False
    orphan_timeout_s: float = 300.0
    """Without a daemon for this long, the process ends by itself."""
    options: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one step. Arrays of equal length [rows]; `wants` marks rows whose logits are read."""

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    slots: NDArray[np.int32]
    wants: NDArray[np.int8]


class Sampler(Protocol):
    """Chooses the next token of one sequence; holds that sequence's random state."""

    def sample(self, logits: Logits) -> int:
        """The next token, already accepted into the sampler's history."""
        ...

    def close(self) -> None:
        """Free native memory."""
        ...


class Backend(Protocol):
    """A model with a KV cache of `cells` tokens, worked on by `slots` sequences at once.

    Slots count from 0 to `slots + kept_slots`: as many more hold the KV of ended sequences.

    All methods but `tokenize` are called by one thread, the owner of the context.
    """

    cells: int
    slots: int
    kept_slots: int
    batch_tokens: int
    cell_bytes: int
    """Bytes of KV per token, as exported; with what the format adds, at most."""
    layout: str
    """Describes the KV cache. Two backends can exchange KV if and only if these are equal."""

    def tokenize(self, text: str, add_bos: bool) -> list[int]:
        """The tokens of a text; special tokens in it are recognised. Thread-safe."""
        ...

    def piece(self, token: int) -> bytes:
        """The bytes of a token; empty for control tokens."""
        ...

    def is_end(self, token: int) -> bool:
        """True if the model ends its answer with this token."""
        ...

    def valid(self, token: int) -> bool:
        """True if the token exists in the vocabulary."""
        ...

    def decode(self, batch: Batch) -> None:
        """Compute one step. Raises BackendError; the batch must fit the free cells."""
        ...

    def logits(self, row: int) -> Logits:
        """The logits of a row of the last batch that was marked in `wants`."""
        ...

    def sampler(self, params: GenerateParams, prompt: Sequence[int]) -> Sampler:
        """A new sampler for a prompt. Raises RequestError."""
        ...

    def export_range(self, slot: int, start: int, end: int) -> bytearray:
        """The KV of positions [start, end) of a sequence, as one blob."""
        ...

    def import_range(self, slot: int, start: int, end: int, blob: bytearray) -> None:
        """Append the KV of positions [start, end). Raises BackendError for a wrong blob."""
        ...

    def share(self, source: int, slot: int, length: int) -> None:
        """Give an empty sequence the first `length` positions of another, without a copy."""
        ...

    def truncate(self, slot: int, length: int) -> None:
        """Keep the KV of the first `length` positions of a sequence; 0 forgets it."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


class RequestError(Exception):
    """A request that can't be carried out, by its own fault. The message is for its author."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class BackendError(Exception):
    """The model refused a step or a blob; the process itself is sound."""


class LoadError(Exception):
    """The model can't be loaded; trying again will not help. The text is for people."""
