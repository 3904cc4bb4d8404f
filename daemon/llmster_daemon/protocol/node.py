"""What a node tells the control plane, and what it is told.

One WebSocket, dialled by the node, carries all of it as JSON: `NodeHello` first, then a
`NodeReport` every second upwards, `PoolFeed` and `Command` downwards, `CommandResult` upwards.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from .base import Frozen, InstanceState, Role, RouteKind

PROTOCOL_VERSION = 1


class GpuInfo(Frozen):
    """A card as NVML describes it. A value that NVML does not support is None, never 0."""

    index: int
    uuid: str
    name: str
    mem_total_bytes: int | None = None
    driver_version: str | None = None


class GpuReading(Frozen):
    """One second of a card. None: not available."""

    index: int
    mem_used_bytes: int | None = None
    utilisation: float | None = Field(default=None, ge=0, le=1)
    power_w: float | None = None
    temperature_c: float | None = None


class Inventory(Frozen):
    """What a machine has."""

    hostname: str
    cpu_name: str
    cpu_cores: int
    mem_total_bytes: int
    gpus: tuple[GpuInfo, ...] = ()


class Telemetry(Frozen):
    """What a machine is doing, read once a second. `at` is Unix time in seconds."""

    at: float
    cpu_utilisation: float = Field(ge=0, le=1)
    mem_used_bytes: int
    gpus: tuple[GpuReading, ...] = ()


class ModelInfo(Frozen):
    """A model file in a node's store. `digest` is the sha256 of the file."""

    key: str
    path: str
    size_bytes: int
    digest: str
    architecture: str
    quantisation: str
    context_length: int
    parameters: int | None = None


class InstanceInfo(Frozen):
    """A loaded model: one engine process."""

    id: str
    model: str
    digest: str
    state: InstanceState
    progress: float | None = Field(default=None, ge=0, le=1)
    pid: int | None = None
    context_length: int = 0
    slots: int = 0
    active: int = 0
    waiting: int = 0
    kv_used_cells: int = 0
    restarts: int = 0
    reason: str | None = None
    """Why it is in `backoff` or `failed`, in words for a person."""


class LoadOptions(Frozen):
    """How to load a model. `context_length` None: what the model allows, 8,192 at most."""

    context_length: int | None = Field(default=None, ge=16, le=1 << 24)
    slots: int = Field(default=16, ge=1, le=128)
    threads: int | None = Field(default=None, ge=1, le=1024)
    gpu_layers: int = Field(default=-1, ge=-1)
    """Layers to offload; -1 is all of them, where there is a GPU."""
    prefix_cache: bool = False
    """Keep the KV of ended requests, for prompts that begin alike. Their first token then comes
    much sooner, but sums are formed in another order than without, so that a near tie between two
    tokens can fall the other way."""


class RouteRecord(Frozen):
    """How one request was served. Written by the node that answered it.

    Times: `at` is Unix time, `*_s` are seconds. `handover_s` is what the decode node waited
    between the end of the prefill computation's last chunk and having its KV.
    """

    request_id: str
    at: float
    model: str
    kind: RouteKind
    prefill_node: str | None = None
    decode_node: str | None = None
    reason: str = ""
    attempts: int = 1
    prompt_tokens: int = 0
    completion_tokens: int = 0
    ttft_s: float | None = None
    tpot_s: float | None = None
    duration_s: float = 0.0
    kv_bytes: int = 0
    handover_s: float | None = None
    status: Literal["ok", "failed", "cancelled"] = "ok"
    error_code: str | None = None


class NodeHello(Frozen):
    """The first message of a node."""

    type: Literal["hello"] = "hello"
    protocol: int = PROTOCOL_VERSION
    version: str
    node_id: str
    name: str
    role: Role
    url: str
    """Where the node's HTTP API answers, as other members of the pool reach it."""
    home: str
    inventory: Inventory


class NodeReport(Frozen):
    """The state of a node, whole; sent every second and whenever an instance changes."""

    type: Literal["report"] = "report"
    telemetry: Telemetry
    role: Role
    models: tuple[ModelInfo, ...] = ()
    instances: tuple[InstanceInfo, ...] = ()
    routes: tuple[RouteRecord, ...] = ()
    """Requests that ended since the last report."""


class Peer(Frozen):
    """Another node of the pool, as a node needs to know it for a hand-over."""

    node_id: str
    name: str
    url: str


class PoolFeed(Frozen):
    """What every node knows of the pool: its peers and the models it serves."""

    type: Literal["feed"] = "feed"
    gateway_url: str
    your_name: str | None = None
    """The receiver's name, where the control plane had to change it to keep names unique."""
    draining: bool = False
    """The receiver is to pass new requests on."""
    peers: tuple[Peer, ...] = ()
    models: tuple[str, ...] = ()


CommandName = Literal["load", "unload", "role", "import"]


class Command(Frozen):
    """An order to a node, by its control plane."""

    type: Literal["command"] = "command"
    id: str
    name: CommandName
    args: dict[str, Any] = Field(default_factory=dict)


class CommandResult(Frozen):
    """What became of a command. `error` is an error envelope's inner object."""

    type: Literal["result"] = "result"
    id: str
    value: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


Upward = Annotated[NodeHello | NodeReport | CommandResult, Field(discriminator="type")]
Downward = Annotated[PoolFeed | Command, Field(discriminator="type")]


class ServePlan(Frozen):
    """The gateway's decision, as it travels to the node that answers (`x-llmster-plan`)."""

    kind: Literal["colocated", "split"]
    prefill_node_id: str | None = None
    reason: str = ""
    attempt: int = 1


class PrefillRequest(Frozen):
    """Asks a node to compute a prompt and push its KV cache to another node's engine."""

    request_id: str
    model: str
    digest: str
    tokens: list[int] = Field(min_length=1)
    decode_node_id: str
    kv_port: int = Field(ge=1, le=65535)
    ticket: str = Field(min_length=16, max_length=128)
    """Proves to the decode engine that this is the hand-over it reserved a slot for."""


class PrefillResult(Frozen):
    """What the prefill did. Seconds."""

    kv_bytes: int
    queue_s: float
    prefill_s: float
