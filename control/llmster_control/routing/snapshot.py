"""What a routing decision is made from, and what it can be."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from llmster_control.protocol import Liveness
from llmster_daemon.protocol.base import Role


@dataclass(frozen=True, slots=True)
class Candidate:
    """A ready instance on a node that is not lost. `busy`: requests active or waiting in it."""

    node_id: str
    node: str
    url: str
    instance: str
    digest: str
    role: Role
    liveness: Liveness
    draining: bool
    slots: int
    busy: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The pool at one moment: ready instances by the name of their model."""

    candidates: Mapping[str, tuple[Candidate, ...]] = field(default_factory=dict)
    reviving: frozenset[str] = frozenset()
    """Models of which some instance is about to come up, or back."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What the policy knows of a request. `excluded`: nodes that just failed it."""

    model: str
    prompt_bytes: int = 0
    prefer: Literal["colocated", "split"] | None = None
    excluded: frozenset[str] = frozenset()
    in_flight: Mapping[str, int] = field(default_factory=dict)
    """Requests per node id that this gateway has under way: newer than any report."""


@dataclass(frozen=True, slots=True)
class Colocated:
    """Both phases on one node."""

    node: Candidate
    reason: str


@dataclass(frozen=True, slots=True)
class Split:
    """Prefill on one node, decode on another, the KV handed over between them."""

    prefill: Candidate
    decode: Candidate
    reason: str


@dataclass(frozen=True, slots=True)
class NoRoute:
    """Nothing can serve it now. `known`: some node has the model; `reviving`: it may soon."""

    known: bool
    reviving: bool


Decision = Colocated | Split | NoRoute
