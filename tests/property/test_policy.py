"""What the routing policy promises, whatever the pool looks like."""

from itertools import product
from typing import Any

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from llmster_control.routing.policy import SPLIT_FROM_BYTES, choose
from llmster_control.routing.snapshot import (
    Ask,
    Candidate,
    Colocated,
    Decision,
    NoRoute,
    Snapshot,
    Split,
)

MODEL = "m"


def a_candidate(name: str, **changes: Any) -> Candidate:
    fields: dict[str, Any] = {
        "node_id": f"id-{name}",
        "node": name,
        "url": f"http://{name}",
        "instance": MODEL,
        "digest": "d",
        "role": "mixed",
        "liveness": "online",
        "draining": False,
        "slots": 4,
        "busy": 0,
    }
    return Candidate(**(fields | changes))


def snapshot_of(*candidates: Candidate) -> Snapshot:
    return Snapshot({MODEL: candidates})


@st.composite
def pools(draw: st.DrawFn) -> tuple[Candidate, ...]:
    """Up to six nodes, each with one or two instances of the model."""
    found = []
    for name in draw(st.lists(st.sampled_from("abcdef"), unique=True, max_size=6)):
        node = {
            "role": draw(st.sampled_from(["prefill", "decode", "mixed"])),
            "liveness": draw(st.sampled_from(["online", "online", "suspect"])),
            "draining": draw(st.sampled_from([False, False, True])),
        }
        for number in range(draw(st.integers(1, 2))):
            instance = {
                "instance": f"{MODEL}:{number}",
                "digest": draw(st.sampled_from(["d1", "d2"])),
                "slots": draw(st.integers(1, 4)),
                "busy": draw(st.integers(0, 8)),
            }
            found.append(a_candidate(name, **node, **instance))
    return tuple(found)


ASKS = st.builds(
    Ask,
    model=st.just(MODEL),
    prompt_bytes=st.sampled_from([0, SPLIT_FROM_BYTES - 1, SPLIT_FROM_BYTES, 1 << 20]),
    prefer=st.sampled_from([None, None, "colocated", "split"]),
    excluded=st.frozensets(st.sampled_from([f"id-{name}" for name in "abcdef"]), max_size=2),
    in_flight=st.dictionaries(
        st.sampled_from([f"id-{name}" for name in "abcdef"]), st.integers(0, 9)
    ),
)


def able(pool: tuple[Candidate, ...], ask: Ask) -> list[Candidate]:
    """Who may serve at all."""
    return [c for c in pool if not c.draining and c.node_id not in ask.excluded]


def usable(pool: tuple[Candidate, ...], ask: Ask) -> list[Candidate]:
    """Who may serve, now that suspect nodes are for emergencies only."""
    fit = able(pool, ask)
    return [c for c in fit if c.liveness == "online"] or fit


def chosen(decision: Decision) -> list[Candidate]:
    if isinstance(decision, Split):
        return [decision.prefill, decision.decode]
    return [decision.node] if isinstance(decision, Colocated) else []


def busyness(candidate: Candidate, ask: Ask) -> float:
    return max(candidate.busy, ask.in_flight.get(candidate.node_id, 0)) / candidate.slots


def pairs(prefill: list[Candidate], decode: list[Candidate]) -> list[tuple[Candidate, Candidate]]:
    return [
        (p, d)
        for p, d in product(prefill, decode)
        if p.node_id != d.node_id and p.digest == d.digest
    ]


def of_role(candidates: list[Candidate], role: str) -> list[Candidate]:
    return [c for c in candidates if c.role == role]


@given(pools(), ASKS)
def test_it_takes_only_nodes_that_may_serve(pool: tuple[Candidate, ...], ask: Ask) -> None:
    for candidate in chosen(choose(snapshot_of(*pool), ask)):
        assert not candidate.draining
        assert candidate.node_id not in ask.excluded
        assert candidate in usable(pool, ask)


@given(pools(), ASKS)
def test_a_split_is_between_two_nodes_with_the_same_file(
    pool: tuple[Candidate, ...], ask: Ask
) -> None:
    decision = choose(snapshot_of(*pool), ask)
    if isinstance(decision, Split):
        assert decision.prefill.node_id != decision.decode.node_id
        assert decision.prefill.digest == decision.decode.digest


@given(st.data(), pools(), ASKS)
def test_the_order_of_candidates_does_not_matter(
    data: st.DataObject, pool: tuple[Candidate, ...], ask: Ask
) -> None:
    shuffled = tuple(data.draw(st.permutations(pool)))
    assert choose(snapshot_of(*pool), ask) == choose(snapshot_of(*shuffled), ask)


@given(pools(), ASKS, st.booleans())
def test_no_route_only_where_nobody_may_serve(
    pool: tuple[Candidate, ...], ask: Ask, reviving: bool
) -> None:
    snapshot = Snapshot({MODEL: pool}, frozenset({MODEL} if reviving else ()))
    decision = choose(snapshot, ask)
    assert isinstance(decision, NoRoute) == (not able(pool, ask))
    if isinstance(decision, NoRoute):
        assert decision.known == bool(pool)
        # Whoever has just failed may be back in a moment.
        assert decision.reviving == (reviving or bool(ask.excluded))


# Pools where nobody is able are many, and say nothing here.
@settings(suppress_health_check=[HealthCheck.filter_too_much])
@given(pools(), ASKS)
def test_the_clients_preference_holds_where_it_can(pool: tuple[Candidate, ...], ask: Ask) -> None:
    fit = usable(pool, ask)
    assume(fit and ask.prefer is not None)
    decision = choose(snapshot_of(*pool), ask)
    if ask.prefer == "colocated":
        assert isinstance(decision, Colocated)
    else:
        assert isinstance(decision, Split) == bool(pairs(fit, fit))


@given(pools(), ASKS)
def test_roles_decide_where_the_client_does_not(pool: tuple[Candidate, ...], ask: Ask) -> None:
    fit = usable(pool, ask)
    assume(fit and ask.prefer is None)
    decision = choose(snapshot_of(*pool), ask)
    mixed = of_role(fit, "mixed")
    pair = pairs(of_role(fit, "prefill"), of_role(fit, "decode"))
    if pair and (not mixed or ask.prompt_bytes >= SPLIT_FROM_BYTES):
        assert isinstance(decision, Split)
        assert (decision.prefill, decision.decode) in pair
    else:
        assert isinstance(decision, Colocated)
        assert not mixed or decision.node.role == "mixed"


@given(pools(), ASKS)
def test_of_equals_the_least_busy_serves(pool: tuple[Candidate, ...], ask: Ask) -> None:
    fit = usable(pool, ask)
    decision = choose(snapshot_of(*pool), ask)
    if isinstance(decision, Colocated):
        rivals = of_role(fit, decision.node.role)
        assert busyness(decision.node, ask) == min(busyness(c, ask) for c in rivals)
    elif isinstance(decision, Split):
        prefill = of_role(fit, decision.prefill.role)
        decode = of_role(fit, decision.decode.role)
        matching = pairs(prefill, decode)
        least = min(busyness(d, ask) for _, d in matching)
        assert busyness(decision.decode, ask) == least
        partners = [p for p, d in matching if d == decision.decode]
        assert busyness(decision.prefill, ask) == min(busyness(p, ask) for p in partners)


def test_requests_under_way_count_before_a_report_tells_of_them() -> None:
    pool = snapshot_of(a_candidate("a", busy=1), a_candidate("b", busy=2))
    assert chosen(choose(pool, Ask(MODEL))) == [a_candidate("a", busy=1)]
    ask = Ask(MODEL, in_flight={"id-a": 3})
    assert chosen(choose(pool, ask)) == [a_candidate("b", busy=2)]


def test_more_slots_make_a_node_less_busy() -> None:
    small, large = a_candidate("a", busy=1, slots=1), a_candidate("b", busy=3, slots=4)
    assert chosen(choose(snapshot_of(small, large), Ask(MODEL))) == [large]


def test_a_suspect_node_serves_when_nobody_else_can() -> None:
    suspect = a_candidate("a", liveness="suspect")
    online = a_candidate("b", busy=8)
    assert chosen(choose(snapshot_of(suspect, online), Ask(MODEL))) == [online]
    ask = Ask(MODEL, excluded=frozenset({"id-b"}))
    assert chosen(choose(snapshot_of(suspect, online), ask)) == [suspect]


def test_a_model_is_found_in_any_case_and_an_unknown_one_is_not() -> None:
    pool = snapshot_of(a_candidate("a"))
    assert chosen(choose(pool, Ask("M"))) == [a_candidate("a")]
    assert choose(pool, Ask("other")) == NoRoute(known=False, reviving=False)


def test_a_lone_prefill_or_decode_node_does_both_phases() -> None:
    for role in ("prefill", "decode"):
        alone = a_candidate("a", role=role)
        decision = choose(snapshot_of(alone), Ask(MODEL))
        other = {"prefill": "decode", "decode": "prefill"}[role]
        assert decision == Colocated(alone, f"no {other} node can be used")


def test_other_files_of_the_same_model_make_no_pair() -> None:
    prefill = a_candidate("a", role="prefill", digest="d1")
    decode = a_candidate("b", role="decode", digest="d2")
    decision = choose(snapshot_of(prefill, decode), Ask(MODEL))
    assert isinstance(decision, Colocated)
    assert decision.node == decode


def test_beside_mixed_nodes_only_long_prompts_are_split() -> None:
    pool = snapshot_of(
        a_candidate("a", role="prefill"), a_candidate("b", role="decode"), a_candidate("c")
    )
    for prompt_bytes, kind in [(SPLIT_FROM_BYTES - 1, Colocated), (SPLIT_FROM_BYTES, Split)]:
        assert isinstance(choose(pool, Ask(MODEL, prompt_bytes)), kind)
