"""What the console shows, made from a `PoolState`: pure values and words, no colours, no clock.

A value that nobody knows shows as a dash (`UNKNOWN`), never as 0.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from llmster_control.protocol import Liveness, NodeView, PoolState
from llmster_daemon.protocol.base import InstanceState, Role, RouteKind
from llmster_daemon.protocol.node import InstanceInfo, RouteRecord, Telemetry

UNKNOWN = "\u2013"

Tone = Literal["good", "busy", "warn", "bad", "plain"]
"""How much attention a row wants; the glyph and the word beside it say the same."""

_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_LIVENESS: dict[Liveness, tuple[str, Tone]] = {
    "online": ("●", "good"),
    "suspect": ("◐", "warn"),
    "lost": ("○", "bad"),
}
_INSTANCE: dict[InstanceState, tuple[str, Tone]] = {
    "starting": ("◌", "busy"),
    "loading": ("◔", "busy"),
    "ready": ("●", "good"),
    "backoff": ("↻", "warn"),
    "failed": ("✕", "bad"),
    "stopping": ("◌", "busy"),
}
_LOST_INSTANCE: tuple[str, Tone] = ("?", "bad")
_STATUS: dict[str, tuple[str, Tone]] = {
    "ok": ("✓", "good"),
    "failed": ("✕", "bad"),
    "cancelled": ("■", "warn"),
}
_ROLES: tuple[Role, ...] = ("mixed", "prefill", "decode")


@dataclass(frozen=True, slots=True)
class Summary:
    """The pool in one line. Instances on lost nodes count for nothing."""

    nodes: int
    online: int
    ready: int
    active: int
    waiting: int
    gateway_url: str
    version: str


@dataclass(frozen=True, slots=True)
class NodeRow:
    """A node. Fractions are 0 to 1; None where unknown, as everything measured is once lost."""

    key: str
    name: str
    role: Role
    glyph: str
    state: str
    tone: Tone
    draining: bool
    hardware: str
    memory: Literal["VRAM", "RAM"]
    mem_used_bytes: int | None
    mem_total_bytes: int | None
    mem_fraction: float | None
    gpu_utilisation: float | None
    cpu_utilisation: float | None
    loaded: int | None
    on_disk: int
    detail: str


@dataclass(frozen=True, slots=True)
class InstanceRow:
    """A loaded model. `slots` and `context` are None until it is ready to say."""

    key: str
    id: str
    node: str
    model: str
    glyph: str
    state: str
    tone: Tone
    active: int
    slots: int | None
    waiting: int
    context_length: int | None
    note: str
    detail: str


@dataclass(frozen=True, slots=True)
class RouteRow:
    """A request that was served, or was not. `path` shows its phases: `ws-1 ▶ ws-2`."""

    key: str
    age: str
    id: str
    kind: RouteKind
    path: str
    model: str
    prompt: str
    completion: str
    ttft: str
    tpot: str
    kv: str
    handover: str
    glyph: str
    status: str
    tone: Tone
    detail: str


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A model on a node's disk, to choose from."""

    key: str
    quantisation: str
    size: str
    parameters: str
    context_length: int
    state: Literal["loaded", "loading", ""]


def summary(state: PoolState) -> Summary:
    """The pool in one line."""
    reachable = [node for node in state.nodes if node.liveness != "lost"]
    instances = [instance for node in reachable for instance in node.instances]
    return Summary(
        nodes=len(state.nodes),
        online=sum(node.liveness == "online" for node in state.nodes),
        ready=sum(instance.state == "ready" for instance in instances),
        active=sum(instance.active for instance in instances),
        waiting=sum(instance.waiting for instance in instances),
        gateway_url=state.gateway_url,
        version=state.version,
    )


def node_rows(state: PoolState) -> tuple[NodeRow, ...]:
    """The nodes, by name."""
    return tuple(_node_row(node) for node in sorted(state.nodes, key=lambda node: node.name))


def instance_rows(state: PoolState) -> tuple[InstanceRow, ...]:
    """The instances of every node, by node and model."""
    pairs = [(node, instance) for node in state.nodes for instance in node.instances]
    pairs.sort(key=lambda pair: (pair[0].name, pair[1].model, pair[1].id))
    return tuple(_instance_row(node, instance) for node, instance in pairs)


def route_rows(state: PoolState) -> tuple[RouteRow, ...]:
    """The last requests, newest first; ages are relative to the moment of the state."""
    # A record may name a node by its id; people know the name.
    names = {node.id: node.name for node in state.nodes}
    seen: dict[str, int] = {}
    rows = []
    for route in reversed(state.routes):
        count = seen[route.request_id] = seen.get(route.request_id, 0) + 1
        key = route.request_id if count == 1 else f"{route.request_id}#{count}"
        rows.append(_route_row(route, key, state.at, names))
    return tuple(reversed(rows))


def model_rows(node: NodeView) -> tuple[ModelRow, ...]:
    """The models on a node's disk, by key."""
    states = {(instance.model, instance.state) for instance in node.instances}

    def state_of(key: str) -> Literal["loaded", "loading", ""]:
        if (key, "ready") in states:
            return "loaded"
        return "loading" if states & {(key, "starting"), (key, "loading")} else ""

    return tuple(
        ModelRow(
            key=model.key,
            quantisation=model.quantisation,
            size=human_bytes(model.size_bytes),
            parameters=human_count(model.parameters),
            context_length=model.context_length,
            state=state_of(model.key),
        )
        for model in sorted(node.models, key=lambda model: model.key)
    )


def next_role(role: Role) -> Role:
    """The role after this one, in a circle."""
    return _ROLES[(_ROLES.index(role) + 1) % len(_ROLES)]


def _node_row(node: NodeView) -> NodeRow:
    telemetry = None if node.liveness == "lost" else node.telemetry
    memory, used, total = _memory(node, telemetry)
    glyph, tone = _LIVENESS[node.liveness]
    words: list[str] = [node.liveness]
    if node.liveness != "online":
        words.append(human_age(node.last_report_s))
    state = " ".join(words)
    if node.draining:
        # An online node that drains is best told by that word alone.
        glyph, tone = ("◒", "warn") if node.liveness == "online" else (glyph, tone)
        state = "draining" if node.liveness == "online" else f"{state}, draining"
    loaded = {instance.model for instance in node.instances if instance.state == "ready"}
    return NodeRow(
        key=node.id,
        name=node.name,
        role=node.role,
        glyph=glyph,
        state=state,
        tone=tone,
        draining=node.draining,
        hardware=_hardware(node),
        memory=memory,
        mem_used_bytes=used,
        mem_total_bytes=total,
        mem_fraction=None if used is None or not total else min(1.0, used / total),
        gpu_utilisation=_mean(gpu.utilisation for gpu in telemetry.gpus) if telemetry else None,
        cpu_utilisation=telemetry.cpu_utilisation if telemetry else None,
        loaded=None if node.liveness == "lost" else len(loaded),
        on_disk=len(node.models),
        detail=_node_detail(node, telemetry),
    )


def _memory(
    node: NodeView, telemetry: Telemetry | None
) -> tuple[Literal["VRAM", "RAM"], int | None, int | None]:
    """The memory that models fill: of the cards where they have their own, else the machine's."""
    totals = [gpu.mem_total_bytes for gpu in node.inventory.gpus]
    known = [total for total in totals if total is not None]
    if not known or len(known) < len(totals):
        used_bytes = telemetry.mem_used_bytes if telemetry else None
        return "RAM", used_bytes, node.inventory.mem_total_bytes
    used = [gpu.mem_used_bytes for gpu in telemetry.gpus] if telemetry else []
    readings = [value for value in used if value is not None]
    # A sum over some of the cards would look like room that is not there.
    return "VRAM", sum(readings) if len(readings) == len(known) else None, sum(known)


def _hardware(node: NodeView) -> str:
    counts: dict[str, int] = {}
    for gpu in node.inventory.gpus:
        name = gpu.name.replace("NVIDIA ", "").replace("GeForce ", "")
        counts[name] = counts.get(name, 0) + 1
    if not counts:
        return f"CPU, {node.inventory.cpu_cores} cores"
    return " + ".join(f"{n}x {name}" if n > 1 else name for name, n in counts.items())


def _node_detail(node: NodeView, telemetry: Telemetry | None) -> str:
    inventory = node.inventory
    parts = [node.name, f"{inventory.cpu_name}, {inventory.cpu_cores} cores"]
    watts = [gpu.power_w for gpu in telemetry.gpus if gpu.power_w is not None] if telemetry else []
    if watts:
        parts.append(f"{sum(watts):.0f} W")
    parts += [
        node.url,
        f"llmster {node.version}",
        f"last report {human_age(node.last_report_s)} ago",
    ]
    return " · ".join(parts)


def _instance_row(node: NodeView, instance: InstanceInfo) -> InstanceRow:
    lost = node.liveness == "lost"
    glyph, tone = _LOST_INSTANCE if lost else _INSTANCE[instance.state]
    state: str = "unknown" if lost else instance.state
    if state == "loading" and instance.progress is not None:
        state = f"loading {human_percent(instance.progress)}"
    notes = []
    if lost:
        notes.append(f"the node is lost; it was {instance.state}")
    if instance.reason:
        notes.append(instance.reason)
    if instance.restarts:
        notes.append(f"{instance.restarts} restart{'s' if instance.restarts > 1 else ''}")
    parts = [f"{instance.model} on {node.name}", f"instance {instance.id}"]
    if instance.pid is not None and not lost:
        parts.append(f"pid {instance.pid}")
    if instance.context_length and not lost:
        parts.append(f"{instance.kv_used_cells:,} KV cells in use")
    if instance.reason:
        parts.append(instance.reason)
    return InstanceRow(
        key=f"{node.id}/{instance.id}",
        id=instance.id,
        node=node.name,
        model=instance.model,
        glyph=glyph,
        state=state,
        tone=tone,
        active=instance.active,
        slots=None if lost else instance.slots or None,
        waiting=instance.waiting,
        context_length=instance.context_length or None,
        note=" · ".join(notes),
        detail=" · ".join(parts),
    )


def _route_row(route: RouteRecord, key: str, at: float, names: dict[str, str]) -> RouteRow:
    glyph, tone = _STATUS[route.status]
    status: str = route.status
    if route.attempts > 1:
        status += f", attempt {route.attempts}"
    if route.error_code:
        status += f": {route.error_code}"
    hops = [hop for hop in (route.prefill_node, route.decode_node) if hop is not None]
    hops = [names.get(hop, hop) for hop in hops]
    if route.kind == "colocated":
        hops = hops[-1:]
    split = route.kind == "split"
    took = f"{status} after {human_s(route.duration_s)}"
    parts = [route.request_id, route.model, took, route.reason]
    return RouteRow(
        key=key,
        age=human_age(at - route.at),
        id=route.request_id[-8:],
        kind=route.kind,
        path=" ▶ ".join(hops) or UNKNOWN,
        model=route.model,
        # What no node took, nobody counted.
        prompt=UNKNOWN if route.kind == "none" else f"{route.prompt_tokens:,}",
        completion=UNKNOWN if route.kind == "none" else f"{route.completion_tokens:,}",
        ttft=human_s(route.ttft_s),
        tpot=human_s(route.tpot_s),
        kv=human_bytes(route.kv_bytes if split else None),
        handover=human_s(route.handover_s if split else None),
        glyph=glyph,
        status=status,
        tone=tone,
        detail=" · ".join(part for part in parts if part),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def human_bytes(value: int | None) -> str:
    """`19.6 GiB`, `512 B`. Units of 1,024."""
    if value is None:
        return UNKNOWN
    amount = float(value)
    for unit in _BYTE_UNITS:
        digits = 0 if unit == "B" or amount >= 99.95 else 1
        if round(amount, digits) < 1024 or unit == _BYTE_UNITS[-1]:
            break
        amount /= 1024
    return f"{amount:.{digits}f} {unit}"


def human_usage(used: int | None, total: int | None) -> str:
    """`19.6/24.0 GiB`: both in the unit of the total."""
    if not total:
        return human_bytes(used)
    whole, unit = human_bytes(total).split()
    if used is None:
        return f"{UNKNOWN}/{whole} {unit}"
    digits = len(whole.partition(".")[2])
    return f"{used / 1024 ** _BYTE_UNITS.index(unit):.{digits}f}/{whole} {unit}"


def human_s(value_s: float | None) -> str:
    """A duration in two or three digits: `11.8 ms`, `412 ms`, `3.24 s`, `2 min 5 s`."""
    if value_s is None:
        return UNKNOWN
    if value_s <= 0:
        return "0 s"
    if value_s < 0.9995:
        return f"{value_s * 1e3:.{1 if value_s < 0.09995 else 0}f} ms"
    if value_s < 59.95:
        return f"{value_s:.{2 if value_s < 9.995 else 1}f} s"
    seconds = round(value_s)
    for size_s, unit, small_s, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if seconds >= size_s:
            rest = seconds % size_s // small_s
            return f"{seconds // size_s} {unit}" + (f" {rest} {small}" if rest else "")
    rest = seconds % 60
    return f"{seconds // 60} min" + (f" {rest} s" if rest else "")


def human_age(value_s: float | None) -> str:
    """How old, in the largest whole unit: `0 s`, `5 s`, `2 min`.

    Negative, as clocks of machines differ, is `0 s`.
    """
    if value_s is None:
        return UNKNOWN
    for size_s, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if value_s >= size_s:
            return f"{int(value_s // size_s)} {unit}"
    return "0 s"


def human_percent(fraction: float | None) -> str:
    """`45%`."""
    return UNKNOWN if fraction is None else f"{fraction * 100:.0f}%"


def human_count(value: int | None) -> str:
    """`135 M`, `8.2 B`: a number of parameters."""
    if value is None:
        return UNKNOWN
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if value >= size:
            amount = value / size
            return f"{amount:.{1 if amount < 99.95 and size >= 10**9 else 0}f} {unit}"
    return str(value)


def bar(fraction: float | None, width: int) -> str:
    """`width` cells, filled to the fraction; more than nothing always fills a cell."""
    if fraction is None:
        return "·" * width
    filled = min(width, max(round(fraction * width), 1 if fraction > 0 else 0))
    return "█" * filled + "░" * (width - filled)
