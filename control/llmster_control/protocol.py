"""What the control plane tells the console and other clients: views of the pool, and requests.

Served as JSON under `/pool/v1`: `GET state` is all of it at once (`PoolState`).
"""

from typing import Literal

from pydantic import Field

from llmster_daemon.protocol.base import Frozen, Role
from llmster_daemon.protocol.node import (
    InstanceInfo,
    Inventory,
    LoadOptions,
    ModelInfo,
    RouteRecord,
    Telemetry,
)

Liveness = Literal["online", "suspect", "lost"]
"""`suspect`: missed reports, used only when nothing else can serve. `lost`: gets no traffic."""


class NodeView(Frozen):
    """A node as the pool sees it. `last_report_s` is how long ago it reported, in seconds."""

    id: str
    name: str
    role: Role
    liveness: Liveness
    draining: bool = False
    url: str
    home: str
    version: str
    inventory: Inventory
    telemetry: Telemetry | None = None
    last_report_s: float
    models: tuple[ModelInfo, ...] = ()
    instances: tuple[InstanceInfo, ...] = ()


class UsageView(Frozen):
    """What a model on a node has done since the pool began."""

    model: str
    node: str
    requests: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    kv_bytes: int


class PoolState(Frozen):
    """The pool at one moment. `at` is Unix time; routes are newest first."""

    at: float
    version: str
    gateway_url: str
    nodes: tuple[NodeView, ...] = ()
    routes: tuple[RouteRecord, ...] = ()


class LoadRequest(Frozen):
    """Load a model; without `node`, on the online node that has it and the fewest instances."""

    model: str = Field(min_length=1)
    node: str | None = None
    options: LoadOptions = LoadOptions()


class UnloadRequest(Frozen):
    """Unload an instance by its id, or every instance of a model."""

    target: str = Field(min_length=1)
    node: str | None = None


class ImportRequest(Frozen):
    """Take a GGUF file on the nodes' own disk into their stores."""

    path: str = Field(min_length=1)
    node: str | None = None
    hostname: str | None = None
    """Only nodes on this machine can read the path."""


class NodePatch(Frozen):
    """Change a node: stop giving it new requests (`draining`), or give it another role."""

    draining: bool | None = None
    role: Role | None = None
