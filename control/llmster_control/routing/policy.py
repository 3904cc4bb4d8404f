"""The routing policy: one pure function, `choose`."""

from llmster_control.routing.snapshot import (
    Ask,
    Candidate,
    Colocated,
    Decision,
    NoRoute,
    Snapshot,
    Split,
)

SPLIT_FROM_BYTES = 1024
"""Where a pool has mixed nodes as well as a prefill and decode pair: shorter prompts stay whole."""


def choose(snapshot: Snapshot, ask: Ask) -> Decision:
    """The route for a request.

    Nodes with roles are used by their roles: a prefill and a decode node make a split. Mixed nodes
    serve alone. A node does the other phase too where the pool has nobody else for it. Suspect
    nodes come last, draining and excluded ones not at all; ties go to the least busy, then by
    name, so that equal inputs give equal routes.
    """
    model = ask.model.lower()
    everything = snapshot.candidates.get(model, ())
    able = [c for c in everything if not c.draining and c.node_id not in ask.excluded]
    if not able:
        return NoRoute(bool(everything), model in snapshot.reviving or bool(ask.excluded))
    online = [c for c in able if c.liveness == "online"]
    able = online or able

    def load(candidate: Candidate) -> tuple[float, str, str]:
        busy = max(candidate.busy, ask.in_flight.get(candidate.node_id, 0))
        return (busy / candidate.slots, candidate.node, candidate.instance)

    mixed = sorted((c for c in able if c.role == "mixed"), key=load)
    prefill = sorted((c for c in able if c.role == "prefill"), key=load)
    decode = sorted((c for c in able if c.role == "decode"), key=load)

    if ask.prefer == "split":
        pair = _pair(prefill + mixed + decode, decode + mixed + prefill)
        if pair:
            return Split(*pair, "asked for by the client")
    if ask.prefer == "colocated":
        return Colocated((mixed + decode + prefill)[0], "asked for by the client")
    pair = _pair(prefill, decode)
    if pair and not mixed:
        return Split(*pair, "prefill and decode nodes")
    if pair and ask.prompt_bytes >= SPLIT_FROM_BYTES:
        return Split(*pair, f"a prompt of {ask.prompt_bytes:,} bytes")
    if mixed:
        return Colocated(mixed[0], "the least busy mixed node")
    alone = (decode + prefill)[0]
    other = "prefill" if alone.role == "decode" else "decode"
    return Colocated(alone, f"no {other} node can be used")


def _pair(prefill: list[Candidate], decode: list[Candidate]) -> tuple[Candidate, Candidate] | None:
    """The first two on different nodes that hold the very same model file."""
    for second in decode:
        for first in prefill:
            if first.node_id != second.node_id and first.digest == second.digest:
                return first, second
    return None
