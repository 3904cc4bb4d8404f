"""What the node expects of an engine, whichever it is."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

from ..protocol.base import Frozen


class GenerateParams(Frozen):
    """What to generate. Exactly one of `prompt` and `tokens` is given.

    `max_tokens` None: until the model ends or the context is full. `temperature` 0 is greedy.
    Defaults of the sampling fields are LM Studio's.
    """

    prompt: str | None = None
    tokens: list[int] | None = None
    add_bos: bool = True
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 40
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repeat_last_n: int = 64
    """Tokens that the three penalties look back at, the prompt's included."""
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_last_n: int = 1024
    dry_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: str | None = None
    """GBNF; the rule `root` is what the answer must be."""
    logprobs: int | None = None
    """How many alternatives to tell with every token's log probability; None: neither."""

    @property
    def penalises(self) -> bool:
        """True if any of the three penalties does something."""
        changed = self.repeat_penalty != 1 or self.frequency_penalty or self.presence_penalty
        return bool(changed and self.repeat_last_n)

    @property
    def looks_back(self) -> bool:
        """True if earlier tokens matter for sampling."""
        return self.penalises or self.dry_multiplier > 0

    @property
    def greedy(self) -> bool:
        """True if the likeliest token is always the answer."""
        shaped = self.looks_back or self.logit_bias or self.grammar is not None
        return (self.temperature <= 0 or self.top_k == 1) and not shaped


@dataclass(slots=True)
class Chunk:
    """What one step added to a request: text (perhaps empty) and how many tokens it took.

    `finish` is set on the last chunk: `stop` or `length`.
    """

    text: str
    tokens: int
    finish: str | None = None
    logprob: "TokenLogprob | None" = None


@dataclass(slots=True)
class TokenLogprob:
    """A token, its log probability, and the likeliest tokens in its place."""

    piece: bytes
    logprob: float
    alternatives: list[tuple[bytes, float]]


async def _nothing() -> AsyncIterator[Chunk]:
    return
    yield


@dataclass(slots=True)
class Generation:
    """A request under way in an engine.

    `chunks` raises LlmsterError when the engine refuses the request or dies. Leaving the iteration
    early does not stop the engine: call `cancel`. Counters are filled in as chunks arrive.
    """

    id: str
    chunks: AsyncIterator[Chunk] = field(default_factory=lambda: _nothing())
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens whose KV was there already."""
    kv_bytes: int = 0
    handover_s: float | None = None
    recomputed: str | None = None
    """Why an awaited KV cache was not used, where one was awaited and did not come whole."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """A slot held for a KV cache that is to come from another node.

    `tokens` is the prompt as the engine reads it; `ticket` proves the sender's right to push.
    """

    tokens: list[int]
    kv_port: int
    ticket: str


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prompt computed and its KV cache delivered. Seconds, bytes."""

    kv_bytes: int
    queue_s: float
    prefill_s: float


@dataclass(slots=True)
class EngineStatus:
    """What an engine last said of itself.

    `kv_used_cells` counts tokens whose KV is worked on, `kv_kept_cells` those that are kept for
    prompts that begin alike, and go when their room is needed.
    """

    context_length: int = 0
    slots: int = 0
    kv_port: int = 0
    active: int = 0
    waiting: int = 0
    kv_used_cells: int = 0
    kv_kept_cells: int = 0


class Engine(Protocol):
    """A loaded model that can be asked."""

    @property
    def status(self) -> EngineStatus:
        """The latest state; does not block."""
        ...

    async def generate(self, request_id: str, params: GenerateParams) -> Generation:
        """Start a request that this engine computes alone."""
        ...

    async def expect(
        self, request_id: str, params: GenerateParams
    ) -> tuple[Generation, Reservation]:
        """Start a request whose KV cache will be pushed; returns when its slot is reserved."""
        ...

    async def recompute(self, request_id: str, reason: str) -> None:
        """Stop waiting for an expected KV cache: compute what is missing of it here."""
        ...

    async def prefill(
        self, request_id: str, tokens: list[int], host: str, port: int, ticket: str
    ) -> Prefilled:
        """Compute a prompt and push its KV cache to another engine; returns when that has it."""
        ...

    async def cancel(self, request_id: str) -> None:
        """Stop a request and free what it holds. Unknown ids are ignored."""
        ...

    async def tokenize(self, text: str, add_bos: bool) -> list[int]:
        """The tokens of a text."""
        ...
