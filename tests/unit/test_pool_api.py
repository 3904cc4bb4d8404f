"""`/pool/v1`: the state of the pool, orders to its nodes, and the nodes' own connection."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from fakes.pool import (
    INVENTORY,
    FakeNode,
    Pool,
    a_hello,
    a_model,
    a_report,
    a_route,
    an_instance,
    eventually,
    running_pool,
)
from llmster_control import __version__
from llmster_control.api import pool as api
from llmster_control.app import ControlConfig
from llmster_control.protocol import NodeView, PoolState
from llmster_daemon.errors import Conflict
from llmster_daemon.protocol.node import PROTOCOL_VERSION


async def get(pool: Pool, path: str, status: int = 200) -> Any:
    response = await pool.http.get(f"/pool/v1/{path}")
    assert response.status_code == status, response.text
    return response.json()


async def post(pool: Pool, path: str, status: int = 200, /, **body: Any) -> Any:
    response = await pool.http.post(f"/pool/v1/{path}", json=body)
    assert response.status_code == status, response.text
    return response.json()


async def patch(pool: Pool, name: str, status: int = 200, **body: Any) -> Any:
    response = await pool.http.patch(f"/pool/v1/nodes/{name}", json=body)
    assert response.status_code == status, response.text
    return response.json()


def code(answer: Any) -> str:
    return str(answer["error"]["code"])


def orders(node: FakeNode) -> list[tuple[str, dict[str, Any]]]:
    return [(order.name, order.args) for order in node.orders]


# Looking


async def test_the_state_is_the_whole_pool(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        await pool.join("b", role="decode", instances=())
        a = await pool.join("a", models=(a_model(), a_model("n")))
        await a.report(a_route("r1"), a_route("r2"))
        state = PoolState.model_validate(await get(pool, "state"))
        assert (state.version, state.gateway_url) == (__version__, pool.url)
        assert [(n.name, n.role, n.liveness) for n in state.nodes] == [
            ("a", "mixed", "online"),
            ("b", "decode", "online"),
        ]
        first = state.nodes[0]
        assert (first.url, first.inventory, first.instances) == (a.url, INVENTORY, a.instances)
        assert [model.key for model in first.models] == ["m", "n"]
        assert first.telemetry is not None
        assert 0 <= first.last_report_s < 5
        assert [route.request_id for route in state.routes] == ["r2", "r1"]


async def test_routes_are_newest_first_and_limited(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        a = await pool.join("a")
        await a.report(*(a_route(f"r{i}") for i in range(30)))
        newest_first = [f"r{i}" for i in reversed(range(30))]
        for query, expected in [
            ("routes", newest_first[:20]),
            ("routes?limit=1", newest_first[:1]),
            (f"routes?limit={api.MAX_ROUTES}", newest_first),
        ]:
            found = await get(pool, query)
            assert [route["request_id"] for route in found] == expected


async def test_a_limit_out_of_bounds_is_refused(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        for limit in ("0", "-1", str(api.MAX_ROUTES + 1), "many", ""):
            answer = await get(pool, f"routes?limit={limit}", 400)
            assert code(answer) == "invalid_value"
            assert "limit" in answer["error"]["param"]


async def test_one_request_is_found_by_its_id_in_memory_and_after_a_restart(
    tmp_path: Path,
) -> None:
    async with running_pool(tmp_path) as pool:
        a = await pool.join("a")
        await a.report(a_route("old"), a_route("other"))
        assert [r["request_id"] for r in await get(pool, "routes?request_id=old")] == ["old"]
        assert code(await get(pool, "routes?request_id=nope", 404)) == "route_not_found"
    async with running_pool(tmp_path) as pool:
        assert [r["request_id"] for r in await get(pool, "routes?request_id=old")] == ["old"]
        pool.members.routes.clear()
        assert [r["request_id"] for r in await get(pool, "routes?request_id=old")] == ["old"]


async def test_usage_counts_what_was_reported_just_now(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        a = await pool.join("a")
        failed = a_route("r2", status="failed", error_code="engine_lost")
        await a.report(a_route("r1", prompt_tokens=5, completion_tokens=2, kv_bytes=9), failed)
        (used,) = await get(pool, "usage")
        assert used == {
            "model": "m",
            "node": "a",
            "requests": 2,
            "failed": 1,
            "prompt_tokens": 5,
            "completion_tokens": 2,
            "kv_bytes": 9,
        }


async def test_nodes_are_shown_as_lost_after_a_restart(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        await pool.join("a")
    async with running_pool(tmp_path) as pool:
        (node,) = (await get(pool, "state"))["nodes"]
        assert (node["name"], node["liveness"]) == ("a", "lost")


def test_an_ipv6_host_stands_in_brackets() -> None:
    assert ControlConfig(Path(), host="::1", port=7).url == "http://[::1]:7"
    assert ControlConfig(Path(), port=7).url == "http://127.0.0.1:7"


# Orders


async def test_a_model_is_loaded_where_it_is_on_disk_and_least_is_loaded(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        busy = await pool.join("a", instances=(an_instance(), an_instance("n")))
        free = await pool.join("b")
        await pool.join("c", instances=(), models=(a_model("other"),))
        loaded = await post(pool, "load", model="M", options={"context_length": 512})
        assert (loaded["node"], loaded["instance"]["id"]) == ("b", "M")
        ((name, args),) = orders(free)
        assert (name, args["model"], args["options"]["context_length"]) == ("load", "M", 512)
        assert busy.orders == []


async def test_a_draining_node_loads_only_what_no_other_can(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        await pool.join("a", instances=(), models=(a_model(), a_model("mine")))
        await pool.join("b")
        await patch(pool, "a", draining=True)
        assert (await post(pool, "load", model="m"))["node"] == "b"
        assert (await post(pool, "load", model="mine"))["node"] == "a"
        assert (await post(pool, "load", model="m", node="a"))["node"] == "a"


async def test_what_can_not_be_loaded_says_why(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        assert code(await post(pool, "load", 503, model="m")) == "pool_empty"
        node = await pool.join("a")
        assert code(await post(pool, "load", 404, model="nope")) == "model_not_found"
        assert code(await post(pool, "load", 404, model="m", node="x")) == "node_not_found"
        assert code(await post(pool, "load", 400, model="")) == "invalid_value"
        wrong = await post(pool, "load", 400, model="m", options={"slots": 0})
        assert wrong["error"]["param"] == "options.slots"
        node.failing["load"] = Conflict("no_memory", "it does not fit", "unload another")
        refused = await post(pool, "load", 409, model="m")
        assert refused == node.failing["load"].envelope()


async def test_an_order_whose_node_goes_away_is_unavailable(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        node = await pool.join("a", silent=True)
        asking = asyncio.create_task(post(pool, "load", 503, model="m"))
        await eventually(lambda: node.orders)
        await node.leave()
        assert code(await asking) == "node_lost"


async def test_unloading_a_model_unloads_it_everywhere(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        await pool.join("a")
        await pool.join("b")
        bystander = await pool.join("c", instances=(an_instance("n"),))
        answer = await post(pool, "unload", target="M")
        assert answer == {
            "unloaded": [{"node": "a", "instance": "M"}, {"node": "b", "instance": "M"}]
        }
        assert bystander.orders == []
        answer = await post(pool, "unload", target="m", node="b")
        assert answer == {"unloaded": [{"node": "b", "instance": "m"}]}


async def test_unloading_what_is_not_there_is_not_found(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        await pool.join("a")
        assert code(await post(pool, "unload", 404, target="nope")) == "instance_not_found"


async def test_a_file_is_imported_by_the_nodes_that_can_read_it(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        here = INVENTORY.model_copy(update={"hostname": "here"})
        node = await pool.join("a", inventory=here)
        other = await pool.join("b")
        answer = await post(pool, "import", path="/x.gguf", hostname="here")
        assert [entry["node"] for entry in answer["imported"]] == ["a"]
        assert orders(node) == [("import", {"path": "/x.gguf"})]
        assert other.orders == []
        answer = await post(pool, "import", path="/x.gguf", node="b")
        assert [entry["node"] for entry in answer["imported"]] == ["b"]


async def test_a_file_that_no_node_can_read_is_not_imported(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        await pool.join("a")
        refused = await post(pool, "import", 503, path="/x.gguf", hostname="elsewhere")
        assert code(refused) == "no_local_node"


async def test_draining_and_its_end_outlive_a_restart(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        node = await pool.join("a")
        view = NodeView.model_validate(await patch(pool, "a", draining=True))
        assert view.draining
        # The node is told too: it passes on what it is asked directly.
        await eventually(lambda: node.feeds and node.feeds[-1].draining)
    async with running_pool(tmp_path) as pool:
        await pool.join("a")
        assert pool.members.find("a").known.draining
        assert not (await patch(pool, "a", draining=False))["draining"]
    async with running_pool(tmp_path) as pool:
        assert not pool.members.find("a").known.draining


async def test_a_new_role_is_the_nodes_and_routings_and_the_stores(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        node = await pool.join("a")
        pool.members.snapshot()
        assert (await patch(pool, "a", role="prefill"))["role"] == "prefill"
        assert orders(node) == [("role", {"role": "prefill"})]
        assert [c.role for c in pool.members.snapshot().candidates["m"]] == ["prefill"]
        # The same role again is no order.
        await patch(pool, "a", role="prefill")
        assert len(node.orders) == 1
    async with running_pool(tmp_path) as pool:
        assert pool.members.find("a").known.role == "prefill"


async def test_a_bad_patch_changes_nothing(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        node = await pool.join("a")
        assert code(await patch(pool, "x", 404, draining=True)) == "node_not_found"
        assert code(await patch(pool, "a", 400, role="cook")) == "invalid_value"
        node.failing["role"] = Conflict("no", "not now")
        assert code(await patch(pool, "a", 409, role="decode", draining=True)) == "no"
        view = (await get(pool, "state"))["nodes"][0]
        assert (view["role"], view["draining"]) == ("mixed", False)


async def test_what_is_not_there_has_the_same_envelope(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        assert code(await get(pool, "nothing", 404)) == "not_found"
        assert code(await get(pool, "load", 405)) == "method_not_allowed"


# The nodes' connection


def address(pool: Pool) -> str:
    return pool.url.replace("http", "ws", 1) + "/pool/v1/connect"


async def closed_with(socket: ClientConnection) -> tuple[int, str]:
    """How the control plane closes a connection."""
    with pytest.raises(ConnectionClosed) as caught:
        async with asyncio.timeout(5):
            while True:
                await socket.recv()
    assert caught.value.rcvd is not None
    return caught.value.rcvd.code, caught.value.rcvd.reason


HELLO = a_hello().model_dump()
OTHER_VERSION = json.dumps(HELLO | {"protocol": PROTOCOL_VERSION + 1})


BAD_HELLOS: list[tuple[str | bytes, str]] = [
    ("garbage", "ValidationError"),
    (b"\x00\xff", "ValidationError"),
    ('{"type": "hello"}', "ValidationError"),
    (a_report().model_dump_json(), "the first message must be a hello"),
    (OTHER_VERSION, f"the node speaks protocol {PROTOCOL_VERSION + 1}, this is 1"),
    (json.dumps(HELLO | {"name": ""}), "a node's name has 1 to 64 printable characters"),
]


async def test_who_does_not_say_a_proper_hello_is_shown_out(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        for first, reason in BAD_HELLOS:
            async with connect(address(pool), proxy=None) as socket:
                await socket.send(first)
                assert await closed_with(socket) == (4400, reason)
        assert pool.members.all() == []


async def test_who_says_nothing_is_shown_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "HELLO_LIMIT_S", 0.05)
    async with running_pool(tmp_path) as pool, connect(address(pool), proxy=None) as socket:
        assert await closed_with(socket) == (4400, "TimeoutError")


async def test_garbage_after_the_hello_ends_the_connection(tmp_path: Path) -> None:
    garbage: tuple[str | bytes, ...] = ("garbage", b"\x00\xff", '{"type": "surprise"}')
    async with running_pool(tmp_path) as pool:
        for message in garbage:
            async with connect(address(pool), proxy=None) as socket:
                await socket.send(a_hello().model_dump_json())
                await socket.send(message)
                assert await closed_with(socket) == (4400, "a message that makes no sense")
            await eventually(lambda: pool.members.find("a").send is None)


async def test_a_second_connection_of_a_node_replaces_the_first(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        node = await pool.join("a")
        node_again = await pool.join("a")
        assert [member.known.url for member in pool.members.all()] == [node_again.url]
        await eventually(lambda: node_again.feeds)
        assert (await pool.chat()).status_code == 200
        await post(pool, "load", model="m", node="a")
        assert (len(node.asked), len(node_again.asked)) == (0, 1)
        assert (node.orders, len(node_again.orders)) == ([], 1)
        # The end of the first one changes nothing.
        await node.close()
        await node_again.report()
        assert (await get(pool, "state"))["nodes"][0]["liveness"] == "online"


async def test_reports_of_a_replaced_connection_are_not_taken(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool, connect(address(pool), proxy=None) as old:
        await old.send(a_hello("a" * 32, "a").model_dump_json())
        await eventually(pool.members.all)
        node = await pool.join("a")
        newest = pool.members.find("a").report
        await old.send(a_report().model_dump_json())
        # Messages are taken in order: once this one has ended it, the report was seen.
        await old.send("garbage")
        assert (await closed_with(old))[0] == 4400
        assert pool.members.find("a").report is newest
        assert (await pool.chat()).status_code == 200
        assert len(node.asked) == 1


async def test_a_web_page_can_not_join_or_ask(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        with pytest.raises(InvalidStatus):
            await connect(address(pool), proxy=None, origin="https://example.com")
        for headers in ({"origin": "https://example.com"}, {"host": "example.com"}):
            response = await pool.http.get("/pool/v1/state", headers=headers)
            assert response.status_code == 403
        response = await pool.http.get(
            "/pool/v1/state", headers={"origin": "http://localhost:3000"}
        )
        assert response.status_code == 200


async def test_a_name_that_begins_like_loopback_is_not_loopback(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        response = await pool.http.get("/pool/v1/state", headers={"host": "127.0.0.1.example.com"})
        assert response.status_code == 403


async def test_a_host_header_that_is_no_host_is_refused(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        response = await pool.http.get("/pool/v1/state", headers={"host": "[bad"})
        assert response.status_code in (400, 403)
