"""Whatever the batches, usage is the sum over the requests, each as it was told last."""

from collections import Counter
from contextlib import closing

from hypothesis import given, settings
from hypothesis import strategies as st

from llmster_control.store.store import Store
from llmster_daemon.protocol.node import RouteRecord

Route = tuple[str | None, RouteRecord]

RECORDS = st.builds(
    RouteRecord,
    # Few values, so that requests are told again, by other nodes and for other models.
    request_id=st.sampled_from([f"r{n}" for n in range(12)]),
    at=st.sampled_from([1.0, 2.0, 3.0]),
    model=st.sampled_from(["m", "l"]),
    kind=st.sampled_from(["colocated", "split", "none"]),
    prompt_tokens=st.integers(0, 1 << 20),
    completion_tokens=st.integers(0, 1 << 20),
    kv_bytes=st.integers(0, 1 << 40),
    status=st.sampled_from(["ok", "failed", "cancelled"]),
)
BATCHES = st.lists(st.lists(st.tuples(st.sampled_from(["n1", "n2", None]), RECORDS), max_size=20))


def expected_usage(told: list[Route]) -> dict[tuple[str, str], Counter[str]]:
    """What the requests add up to, by model and node."""
    usage: dict[tuple[str, str], Counter[str]] = {}
    for node_id, record in {
        record.request_id: (node_id, record) for node_id, record in told
    }.values():
        usage.setdefault((record.model, node_id or ""), Counter()).update(
            requests=1,
            failed=record.status == "failed",
            prompt_tokens=record.prompt_tokens,
            completion_tokens=record.completion_tokens,
            kv_bytes=record.kv_bytes,
        )
    return usage


def check(store: Store, told: list[Route]) -> None:
    found = {
        (used.model, used.node): Counter(used.model_dump(exclude={"model", "node"}))
        for used in store.usage()
    }
    assert found == expected_usage(told)


@settings(max_examples=60, deadline=None)
@given(BATCHES)
def test_usage_is_the_sum_over_the_requests(batches: list[list[Route]]) -> None:
    told: list[Route] = []
    with closing(Store.open("sqlite://")) as store:
        for batch in batches:
            store.add_routes(batch)
            told += batch
            check(store, told)
        latest = {record.request_id: record for _, record in told}
        routes = store.routes(limit=100)
        assert {route.request_id: route for route in routes} == latest
        assert len(routes) == len(latest)
        assert [route.at for route in routes] == sorted((r.at for r in routes), reverse=True)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.just("n1"), RECORDS), max_size=30), st.integers(0, 15))
def test_pruning_keeps_the_newest_and_all_usage(told: list[Route], keep: int) -> None:
    with closing(Store.open("sqlite://")) as store:
        store.add_routes(told)
        before = store.routes(limit=100)
        assert store.prune_routes(keep) == max(0, len(before) - keep)
        assert store.routes(limit=100) == before[:keep]
        check(store, told)
