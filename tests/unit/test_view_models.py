"""What the console shows of a pool: the rows, and how values are written."""

from typing import Any

import pytest

from llmster_control.protocol import NodeView, PoolState
from llmster_daemon.protocol.node import (
    GpuInfo,
    GpuReading,
    InstanceInfo,
    Inventory,
    ModelInfo,
    RouteRecord,
    Telemetry,
)
from llmster_tui.state import (
    UNKNOWN,
    bar,
    human_age,
    human_bytes,
    human_count,
    human_percent,
    human_s,
    human_usage,
    instance_rows,
    model_rows,
    next_role,
    node_rows,
    route_rows,
    summary,
)

AT = 1_000_000.0
GIB = 1 << 30


def node(name: str = "ws-1", **fields: Any) -> NodeView:
    gpus = fields.pop("gpus", (24 * GIB,))
    used = fields.pop("used", (6 * GIB,) * len(gpus))
    defaults: dict[str, Any] = {
        "id": f"id-{name}",
        "name": name,
        "role": "mixed",
        "liveness": "online",
        "url": f"http://{name}:1234",
        "home": "/h",
        "version": "0.1.0",
        "last_report_s": 0.5,
        "inventory": Inventory(
            hostname=name,
            cpu_name="CPU",
            cpu_cores=8,
            mem_total_bytes=64 * GIB,
            gpus=tuple(
                GpuInfo(index=i, uuid=str(i), name="NVIDIA GeForce RTX 4090", mem_total_bytes=total)
                for i, total in enumerate(gpus)
            ),
        ),
        "telemetry": Telemetry(
            at=AT,
            cpu_utilisation=0.25,
            mem_used_bytes=16 * GIB,
            gpus=tuple(
                GpuReading(index=i, mem_used_bytes=value, utilisation=0.5)
                for i, value in enumerate(used)
            ),
        ),
    }
    return NodeView(**(defaults | fields))


def instance(state: Any = "ready", **fields: Any) -> InstanceInfo:
    return InstanceInfo(**({"id": "i-1", "model": "m", "digest": "d", "state": state} | fields))


def pool(*nodes: NodeView, routes: tuple[RouteRecord, ...] = ()) -> PoolState:
    return PoolState(at=AT, version="0.1.0", gateway_url="http://gw", nodes=nodes, routes=routes)


def route(**fields: Any) -> RouteRecord:
    defaults = {"request_id": "req-1234567890", "at": AT, "model": "m", "kind": "colocated"}
    return RouteRecord(**(defaults | fields))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, UNKNOWN),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1024 * 1024 - 1, "1.0 MiB"),  # never "1024 KiB"
        (int(19.6 * GIB), "19.6 GiB"),
        (640 * GIB, "640 GiB"),
        (5000 << 50, "5000 PiB"),
    ],
)
def test_bytes_are_written_in_the_largest_unit(value: int | None, text: str) -> None:
    assert human_bytes(value) == text


@pytest.mark.parametrize(
    ("used", "total", "text"),
    [
        (GIB // 2, 24 * GIB, "0.5/24.0 GiB"),
        (100 * GIB, 640 * GIB, "100/640 GiB"),
        (None, 24 * GIB, f"{UNKNOWN}/24.0 GiB"),
        (GIB, None, "1.0 GiB"),
        (None, None, UNKNOWN),
    ],
)
def test_usage_is_written_in_the_unit_of_the_total(
    used: int | None, total: int | None, text: str
) -> None:
    assert human_usage(used, total) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, UNKNOWN),
        (-1, "0 s"),
        (0, "0 s"),
        (0.0118, "11.8 ms"),
        (0.09996, "100 ms"),
        (0.412, "412 ms"),
        (0.9996, "1.00 s"),  # never "1000 ms"
        (3.244, "3.24 s"),
        (9.996, "10.0 s"),
        (59.97, "1 min"),
        (125, "2 min 5 s"),
        (3600, "1 h"),
        (11_100, "3 h 5 min"),
        (200_000, "2 d 7 h"),
    ],
)
def test_durations_keep_two_or_three_digits(value: float | None, text: str) -> None:
    assert human_s(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, UNKNOWN), (-5, "0 s"), (0.9, "0 s"), (59.9, "59 s"), (61, "1 min"), (90_000, "1 d")],
)
def test_ages_are_in_their_largest_whole_unit(value: float | None, text: str) -> None:
    assert human_age(value) == text


def test_fractions_and_counts() -> None:
    assert [human_percent(value) for value in (None, 0, 0.456, 1)] == [UNKNOWN, "0%", "46%", "100%"]
    counts = (None, 12, 134_500_000, 8_200_000_000, 671_000_000_000)
    assert [human_count(value) for value in counts] == [UNKNOWN, "12", "134 M", "8.2 B", "671 B"]


@pytest.mark.parametrize(
    ("fraction", "text"),
    [(None, "····"), (0.0, "░░░░"), (0.01, "█░░░"), (0.5, "██░░"), (1.0, "████"), (1.7, "████")],
)
def test_a_bar_shows_something_wherever_there_is_something(
    fraction: float | None, text: str
) -> None:
    assert bar(fraction, 4) == text


def test_a_node_shows_the_memory_of_its_cards() -> None:
    (row,) = node_rows(pool(node(gpus=(24 * GIB, 24 * GIB))))
    assert (row.memory, row.mem_fraction, row.hardware) == ("VRAM", 0.25, "2x RTX 4090")
    assert (row.gpu_utilisation, row.cpu_utilisation) == (0.5, 0.25)


def test_a_node_without_cards_shows_its_own_memory() -> None:
    (row,) = node_rows(pool(node(gpus=())))
    assert (row.memory, row.mem_fraction, row.gpu_utilisation) == ("RAM", 0.25, None)
    assert row.hardware == "CPU, 8 cores"


def test_a_card_that_does_not_tell_its_memory_makes_the_sum_unknown() -> None:
    (row,) = node_rows(pool(node(gpus=(24 * GIB, 24 * GIB), used=(GIB, None))))
    assert (row.mem_used_bytes, row.mem_fraction) == (None, None)
    (shared,) = node_rows(pool(node(gpus=(None,), used=(None,))))
    assert shared.memory == "RAM"


def test_nothing_measured_is_shown_of_a_lost_node() -> None:
    lost = node(liveness="lost", last_report_s=150, instances=(instance(slots=4, active=2),))
    (row,) = node_rows(pool(lost))
    assert (row.glyph, row.state) == ("○", "lost 2 min")
    assert (row.mem_fraction, row.gpu_utilisation, row.cpu_utilisation, row.loaded) == (None,) * 4
    (seen,) = instance_rows(pool(lost))
    assert (seen.state, seen.slots) == ("unknown", None)
    assert "it was ready" in seen.note


def test_draining_is_told_by_a_word_and_a_glyph() -> None:
    online, suspect = node_rows(
        pool(node("a", draining=True), node("b", draining=True, liveness="suspect"))
    )
    assert (online.glyph, online.state) == ("◒", "draining")
    assert (suspect.glyph, suspect.state) == ("◐", "suspect 0 s, draining")


def test_nodes_and_instances_are_in_a_stable_order() -> None:
    nodes = [node(name, instances=(instance(model="b"), instance(model="a"))) for name in "yxz"]
    assert [row.name for row in node_rows(pool(*nodes))] == ["x", "y", "z"]
    seen = [(row.node, row.model) for row in instance_rows(pool(*nodes))]
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("fields", "state", "note"),
    [
        ({"state": "loading", "progress": 0.45}, "loading 45%", ""),
        ({"state": "loading"}, "loading", ""),
        ({"state": "backoff", "restarts": 1, "reason": "killed"}, "backoff", "killed · 1 restart"),
        ({"state": "failed", "restarts": 5}, "failed", "5 restarts"),
        ({"state": "ready"}, "ready", ""),
    ],
)
def test_an_instance_says_where_it_is_and_why(
    fields: dict[str, Any], state: str, note: str
) -> None:
    (row,) = instance_rows(pool(node(instances=(instance(**fields),))))
    assert (row.state, row.note) == (state, note)


def test_an_instance_that_is_not_ready_has_no_slots_rather_than_none_of_them() -> None:
    (row,) = instance_rows(pool(node(instances=(instance("loading"),))))
    assert (row.slots, row.context_length) == (None, None)


def test_instances_of_the_same_id_on_two_nodes_are_two_rows() -> None:
    nodes = [node(name, instances=(instance(),)) for name in ("a", "b")]
    assert len({row.key for row in instance_rows(pool(*nodes))}) == 2


def test_a_split_route_shows_both_phases_and_the_hand_over() -> None:
    (row,) = route_rows(
        pool(
            node("ws-1"),
            node("ws-2"),
            routes=(
                route(
                    kind="split",
                    prefill_node="id-ws-1",
                    decode_node="ws-2",
                    at=AT - 12,
                    kv_bytes=2048,
                    handover_s=0.0095,
                    ttft_s=0.5,
                    prompt_tokens=3870,
                ),
            ),
        )
    )
    assert (row.age, row.id, row.path) == ("12 s", "34567890", "ws-1 ▶ ws-2")
    assert (row.kv, row.handover, row.ttft, row.tpot) == ("2.0 KiB", "9.5 ms", "500 ms", UNKNOWN)
    assert row.prompt == "3,870"


def test_a_route_on_one_node_has_no_hand_over() -> None:
    (row,) = route_rows(pool(routes=(route(prefill_node="a", decode_node="a", handover_s=0.0),)))
    assert (row.path, row.kv, row.handover) == ("a", UNKNOWN, UNKNOWN)


def test_a_route_that_no_node_took_counts_no_tokens() -> None:
    failed = route(kind="none", status="failed", error_code="pool_full", attempts=2)
    (row,) = route_rows(pool(routes=(failed,)))
    assert (row.path, row.prompt, row.completion) == (UNKNOWN,) * 3
    assert (row.glyph, row.status) == ("✕", "failed, attempt 2: pool_full")


def test_a_clock_that_is_ahead_gives_no_negative_age() -> None:
    (row,) = route_rows(pool(routes=(route(at=AT + 3),)))
    assert row.age == "0 s"


def test_two_records_of_one_request_keep_their_keys_as_newer_ones_arrive() -> None:
    first, second, other = route(at=AT - 9), route(at=AT - 5), route(request_id="req-x")
    before = [row.key for row in route_rows(pool(routes=(second, first)))]
    after = [row.key for row in route_rows(pool(routes=(other, second, first)))]
    assert len(set(before)) == 2
    assert after[1:] == before


def test_the_summary_leaves_out_what_a_lost_node_had() -> None:
    busy = (instance(active=3, waiting=1), instance("loading", id="i-2"))
    seen = summary(pool(node("a", instances=busy), node("b", liveness="lost", instances=busy)))
    assert (seen.online, seen.nodes) == (1, 2)
    assert (seen.ready, seen.active, seen.waiting) == (1, 3, 1)


def test_models_to_load_say_what_runs_already() -> None:
    models = tuple(
        ModelInfo(
            key=key,
            path="/p",
            size_bytes=GIB,
            digest="d",
            architecture="llama",
            quantisation="Q4_K_M",
            context_length=8192,
        )
        for key in ("c", "b", "a")
    )
    running = (instance(model="a"), instance("starting", model="b"), instance("failed", model="c"))
    rows = model_rows(node(models=models, instances=running))
    assert [(row.key, row.state) for row in rows] == [("a", "loaded"), ("b", "loading"), ("c", "")]
    assert rows[0].parameters == UNKNOWN


def test_roles_go_round() -> None:
    assert next_role(next_role(next_role("mixed"))) == "mixed"
    assert next_role("mixed") == "prefill"
