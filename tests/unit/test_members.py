"""The members of a pool: who is in it, how each is, what each is told, and what is kept."""

import asyncio
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from fakes.pool import INVENTORY, a_hello, a_model, a_report, a_route, an_instance, eventually
from llmster_control.registry import members as registry
from llmster_control.registry.liveness import LOST_AFTER_S, SUSPECT_AFTER_S
from llmster_control.registry.members import Member, Members
from llmster_control.store.store import KnownNode, Store
from llmster_control.store.writer import StoreWriter
from llmster_daemon.errors import BadRequest, Conflict, LlmsterError, NotFound, Unavailable
from llmster_daemon.protocol.node import Command, CommandResult, PoolFeed

GATEWAY = "http://gateway"


class Clock:
    """Monotonic time that a test moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def pass_s(self, seconds: float) -> None:
        self.now_s += seconds


class Link:
    """A node's end of its connection: keeps what it is sent."""

    def __init__(self) -> None:
        self.feeds: list[PoolFeed] = []
        self.orders: list[Command] = []
        # One object: a bound method is a new one each time, and members tell links apart by it.
        self.send = self._send

    async def _send(self, message: PoolFeed | Command) -> None:
        if isinstance(message, PoolFeed):
            self.feeds.append(message)
        else:
            self.orders.append(message)


class House:
    """Members with a store behind them, and a clock."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.writer = StoreWriter(store)
        self.clock = Clock()
        self.members = Members(self.writer, GATEWAY, store.known_nodes(), clock=self.clock)
        self.links: dict[str, Link] = {}

    async def join(self, node_id: str, name: str | None = None, **hello: Any) -> Member:
        link = self.links[node_id] = Link()
        return await self.members.join(a_hello(node_id, name, **hello), link.send)

    async def come(self, node_id: str, *instances: Any, **report: Any) -> Member:
        """Join and report."""
        member = await self.join(node_id, role=report.get("role", "mixed"))
        await self.members.take_report(member, a_report(*(instances or (an_instance(),)), **report))
        return member

    def leave(self, member: Member) -> None:
        self.members.leave(member, self.links[member.known.id].send)

    def liveness(self, name: str) -> str:
        return next(view.liveness for view in self.members.views() if view.name == name)

    def serving(self, model: str = "m") -> list[str]:
        """The nodes of which routing knows for a model."""
        return [c.node for c in self.members.snapshot().candidates.get(model, ())]


@pytest.fixture
def store() -> Iterator[Store]:
    with closing(Store.open("sqlite://")) as opened:
        yield opened


@pytest.fixture
def house(store: Store) -> House:
    return House(store)


# Liveness


async def test_a_node_is_online_from_its_first_report(house: House) -> None:
    member = await house.join("a")
    assert house.liveness("a") == "lost"
    assert house.members.online() == []
    await house.members.take_report(member, a_report(an_instance()))
    assert house.liveness("a") == "online"
    assert house.members.online() == [member]
    assert house.serving() == ["a"]


async def test_silence_makes_it_suspect_then_lost_and_one_report_brings_it_back(
    house: House,
) -> None:
    member = await house.come("a")
    house.clock.pass_s(SUSPECT_AFTER_S)
    assert house.liveness("a") == "suspect"
    assert [c.liveness for c in house.members.snapshot().candidates["m"]] == ["suspect"]
    assert house.members.online() == []
    house.clock.pass_s(LOST_AFTER_S - SUSPECT_AFTER_S)
    assert house.liveness("a") == "lost"
    assert house.serving() == []
    await house.members.take_report(member, a_report(an_instance()))
    assert house.liveness("a") == "online"
    assert house.serving() == ["a"]


async def test_a_closed_connection_makes_it_suspect_at_once(house: House) -> None:
    member = await house.come("a")
    assert house.serving() == ["a"]
    house.leave(member)
    assert house.liveness("a") == "suspect"
    assert [c.liveness for c in house.members.snapshot().candidates["m"]] == ["suspect"]


async def test_silence_reaches_routing_within_a_second(house: House) -> None:
    await house.come("a")
    await house.come("b")
    house.members.snapshot()
    house.clock.pass_s(LOST_AFTER_S - 0.5)
    assert house.serving() == ["a", "b"]
    house.clock.pass_s(1.0)
    assert house.serving() == []


async def test_the_end_of_an_old_connection_does_not_end_the_new_one(house: House) -> None:
    await house.come("a")
    old = house.links["a"]
    member = await house.come("a")
    house.members.leave(member, old.send)
    assert house.liveness("a") == "online"
    house.leave(member)
    assert house.liveness("a") == "suspect"


async def test_a_node_that_comes_back_is_the_same_member(house: House) -> None:
    first = await house.come("a")
    house.leave(first)
    again = await house.join("a", url="http://elsewhere")
    assert again is first
    assert [view.url for view in house.members.views()] == ["http://elsewhere"]
    await house.members.take_report(again, a_report(an_instance()))
    assert [c.url for c in house.members.snapshot().candidates["m"]] == ["http://elsewhere"]


# Names


async def test_a_taken_name_gets_a_suffix_and_the_node_is_told(house: House) -> None:
    await house.join("first", "box")
    await house.join("second", "box")
    assert [view.name for view in house.members.views()] == ["box", "box-second"]
    assert house.links["first"].feeds[-1].your_name == "box"
    assert house.links["second"].feeds[-1].your_name == "box-second"
    # It is not renamed when it comes back, nor is the first one.
    await house.join("second", "box")
    await house.join("first", "box")
    assert [view.name for view in house.members.views()] == ["box", "box-second"]


async def test_names_stay_unique_even_where_the_suffix_is_taken(house: House) -> None:
    await house.join("one", "box-twinsi")
    for node_id in ("zero", "twinsister", "twinsiblings"):
        await house.join(node_id, "box")
    names = [view.name for view in house.members.views()]
    assert len(set(names)) == 4, names


@pytest.mark.parametrize("name", ["", "x" * 65, "two\nlines", "bell\a", "\x1b[31mred"])
async def test_a_name_that_can_not_be_shown_is_refused(house: House, name: str) -> None:
    hello = a_hello("a").model_copy(update={"name": name})
    with pytest.raises(BadRequest, match="printable"):
        await house.members.join(hello, Link().send)
    assert house.members.all() == []


async def test_a_node_is_found_by_name_and_by_id(house: House) -> None:
    member = await house.join("id-of-a", "box")
    assert house.members.find("box") is house.members.find("id-of-a") is member
    with pytest.raises(NotFound, match=r"no node 'bux' \(nodes: box\)"):
        house.members.find("bux")


# The feed


async def test_the_feed_names_peers_and_models(house: House) -> None:
    await house.come("a", an_instance("m"))
    await house.come("b", an_instance("n"))
    await house.members.feed_all()
    feed = house.links["a"].feeds[-1]
    assert feed.gateway_url == GATEWAY
    assert feed.models == ("m", "n")
    assert [(p.node_id, p.name, p.url) for p in feed.peers] == [("b", "b", "http://b")]


async def test_the_feed_is_sent_only_when_it_has_changed(house: House) -> None:
    a = await house.come("a")
    b = await house.come("b")
    await house.members.feed_all()
    counts = [len(link.feeds) for link in house.links.values()]
    for _ in range(3):
        await house.members.take_report(a, a_report(an_instance(active=2)))
        await house.members.take_report(b, a_report(an_instance()))
    assert [len(link.feeds) for link in house.links.values()] == counts
    await house.members.take_report(b, a_report(an_instance(), an_instance("n")))
    assert [len(link.feeds) for link in house.links.values()] == [n + 1 for n in counts]


async def test_a_node_that_connects_again_is_fed_though_nothing_has_changed(house: House) -> None:
    member = await house.come("a")
    told = house.links["a"].feeds[-1]
    house.leave(member)
    await house.join("a")
    assert house.links["a"].feeds == [told]


async def test_a_connection_that_replaces_another_is_fed(house: House) -> None:
    await house.come("a")
    told = house.links["a"].feeds[-1]
    await house.join("a")
    assert house.links["a"].feeds == [told]


async def test_who_has_left_is_nobodys_peer(house: House) -> None:
    a, b = await house.come("a"), await house.come("b")
    house.leave(b)
    await house.members.take_report(a, a_report(an_instance()))
    assert house.links["a"].feeds[-1].peers == ()


# Orders


async def order(house: House, member: Member, **answer: Any) -> dict[str, Any]:
    """Give an order, and have the node answer it."""
    link = house.links[member.known.id]
    asking = asyncio.ensure_future(house.members.command(member, "load", model="m"))
    await eventually(lambda: link.orders)
    house.members.take_result(member, CommandResult(id=link.orders[-1].id, **answer))
    return await asking


async def test_an_order_returns_what_the_node_answers(house: House) -> None:
    member = await house.come("a")
    assert await order(house, member, value={"done": 1}) == {"done": 1}
    (sent,) = house.links["a"].orders
    assert (sent.name, sent.args) == ("load", {"model": "m"})
    assert member.pending == {}


async def test_an_order_raises_the_nodes_error(house: House) -> None:
    member = await house.come("a")
    error = Conflict("no_memory", "the model does not fit", "unload another")
    with pytest.raises(LlmsterError) as caught:
        await order(house, member, error={**error.body(), "status": 409})
    assert caught.value.envelope() == error.envelope()
    assert caught.value.status == 409


@pytest.mark.parametrize("how", ["leaves", "connects again"])
async def test_an_order_fails_when_its_node_goes_away(house: House, how: str) -> None:
    member = await house.come("a")
    asking = asyncio.ensure_future(house.members.command(member, "load", model="m"))
    await eventually(lambda: member.pending)
    if how == "leaves":
        house.leave(member)
    else:
        await house.join("a")
    with pytest.raises(LlmsterError, match="went away") as caught:
        await asking
    assert (caught.value.code, caught.value.status) == ("node_lost", 503)
    assert member.pending == {}


async def test_an_order_to_a_node_that_is_not_connected_fails_at_once(house: House) -> None:
    member = await house.come("a")
    house.leave(member)
    with pytest.raises(Unavailable, match="a is not connected"):
        await house.members.command(member, "load", model="m")


async def test_an_order_that_is_never_answered_ends(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "COMMAND_LIMIT_S", 0.01)
    member = await house.come("a")
    with pytest.raises(Unavailable, match="'load' in time"):
        await house.members.command(member, "load", model="m")
    assert member.pending == {}


async def test_results_of_unknown_or_cancelled_orders_are_ignored(house: House) -> None:
    member = await house.come("a")
    house.members.take_result(member, CommandResult(id="unheard of"))
    asking = asyncio.ensure_future(house.members.command(member, "load"))
    await eventually(lambda: house.links["a"].orders)
    asking.cancel()
    await asyncio.wait([asking])
    house.members.take_result(member, CommandResult(id=house.links["a"].orders[0].id))
    assert asking.cancelled()
    assert member.pending == {}


# What routing sees


async def test_the_snapshot_tells_what_routing_needs(house: House) -> None:
    busy = an_instance("m", "m:2", digest="x", slots=3, active=2, waiting=4)
    member = await house.come("a", an_instance(), busy, role="prefill")
    house.members.set_draining(member, True)
    first, second = house.members.snapshot().candidates["m"]
    assert (first.instance, first.busy, first.slots) == ("m", 0, 4)
    assert (second.node_id, second.node, second.url) == ("a", "a", "http://a")
    assert (second.instance, second.digest, second.slots, second.busy) == ("m:2", "x", 3, 6)
    assert (second.role, second.liveness, second.draining) == ("prefill", "online", True)
    # An instance can be asked for by its own name too.
    assert house.members.snapshot().candidates["m:2"] == (second,)


@pytest.mark.parametrize(
    ("state", "reviving"),
    [
        ("starting", True),
        ("loading", True),
        ("backoff", True),
        ("failed", False),
        ("stopping", False),
    ],
)
async def test_only_ready_instances_serve_and_some_others_may_soon(
    house: House, state: str, reviving: bool
) -> None:
    await house.come("a", an_instance(state=state))
    snapshot = house.members.snapshot()
    assert snapshot.candidates == {}
    assert snapshot.reviving == ({"m"} if reviving else set())


async def test_changes_show_in_the_next_snapshot(house: House) -> None:
    member = await house.come("a")
    assert house.serving() == ["a"]
    house.members.set_draining(member, True)
    assert [c.draining for c in house.members.snapshot().candidates["m"]] == [True]
    await house.members.take_report(member, a_report(an_instance("n")))
    assert house.members.models() == ("n",)


async def test_a_report_wakes_who_waits_for_a_change(house: House) -> None:
    member = await house.come("a")
    waiting = asyncio.ensure_future(house.members.change())
    await asyncio.sleep(0)
    assert not waiting.done()
    await house.members.take_report(member, a_report())
    await asyncio.wait_for(waiting, 1)


async def test_models_on_disk_are_those_of_nodes_that_are_here(house: House) -> None:
    member = await house.come("a", an_instance(), models=(a_model("small"),))
    assert house.members.on_disk("SMALL")
    assert not house.members.on_disk("m")
    house.leave(member)
    assert not house.members.on_disk("small")


# What is kept


async def test_nodes_are_known_and_lost_after_a_restart(house: House, store: Store) -> None:
    member = await house.come("a", role="decode")
    house.members.set_draining(member, True)
    await house.writer.flush()
    again = House(store)
    (view,) = again.members.views()
    assert (view.id, view.name, view.role, view.draining) == ("a", "a", "decode", True)
    assert (view.liveness, view.telemetry, view.instances) == ("lost", None, ())
    assert 0 <= view.last_report_s < 60
    assert view.inventory == INVENTORY
    with pytest.raises(Unavailable):
        await again.members.command(again.members.find("a"), "load")
    # It is still draining, and as old as it was, when it comes back.
    joined_at = member.known.joined_at
    back = await again.come("a", role="decode")
    assert (back.known.draining, back.known.joined_at) == (True, joined_at)
    assert again.liveness("a") == "online"


async def test_draining_and_its_end_reach_the_store(house: House, store: Store) -> None:
    member = await house.come("a")
    for draining in (True, False):
        house.members.set_draining(member, draining)
        await house.writer.flush()
        assert [node.draining for node in store.known_nodes()] == [draining]


async def test_a_new_role_reaches_the_store_with_the_report(house: House, store: Store) -> None:
    member = await house.come("a")
    await house.members.take_report(member, a_report(role="prefill"))
    await house.writer.flush()
    assert [node.role for node in store.known_nodes()] == ["prefill"]


async def test_counters_alone_are_not_worth_a_write(house: House, store: Store) -> None:
    member = await house.come("a")
    await house.writer.flush()
    house.clock.pass_s(1)
    await house.members.take_report(member, a_report(an_instance(active=3, kv_used_cells=9)))
    assert house.writer.pending == 0
    await house.members.take_report(member, a_report(an_instance(state="failed", reason="oom")))
    await house.writer.flush()
    assert [i.reason for i in store.instances("a")] == ["oom"]


async def test_last_seen_is_written_now_and_then(house: House) -> None:
    member = await house.come("a")
    await house.writer.flush()
    house.clock.pass_s(registry.SAVE_SEEN_S + 1)
    await house.members.take_report(member, a_report(an_instance()))
    assert house.writer.pending == 1


async def test_routes_are_remembered_and_stored(house: House, store: Store) -> None:
    member = await house.come("a")
    await house.members.take_report(member, a_report(routes=(a_route("r1"), a_route("r2"))))
    assert [route.request_id for route in house.members.routes] == ["r1", "r2"]
    await house.writer.flush()
    assert store.routes(limit=10, request_id="r1") == [a_route("r1")]
    assert [(used.node, used.requests) for used in store.usage()] == [("a", 2)]


async def test_a_request_that_was_tried_again_is_one_route(house: House, store: Store) -> None:
    a, b = await house.come("a"), await house.come("b")
    failed = a_route("r", status="failed", error_code="engine_lost", attempts=1)
    served = a_route("r", decode_node="b", attempts=2)
    # The node that failed may be the later one to tell.
    for first, second in [((a, failed), (b, served)), ((b, served), (a, failed))]:
        for member, route in (first, second):
            await house.members.take_report(member, a_report(routes=(route,)))
        await house.writer.flush()
        assert list(house.members.routes) == [served]
        assert store.routes() == [served]


async def test_only_the_newest_routes_stay_in_memory(house: House) -> None:
    house.members.add_routes(None, [a_route(f"r{i}") for i in range(registry.ROUTES_IN_MEMORY + 7)])
    assert len(house.members.routes) == registry.ROUTES_IN_MEMORY
    assert house.members.routes[0].request_id == "r7"


def test_known_nodes_without_a_report_are_never_candidates(store: Store) -> None:
    known = KnownNode(
        id="k",
        name="k",
        role="mixed",
        url="http://k",
        home="/h",
        version="0",
        inventory=INVENTORY,
        joined_at=1.0,
        last_seen_at=1.0,
    )
    members = Members(StoreWriter(store), GATEWAY, [known], clock=lambda: 0.0)
    assert members.snapshot().candidates == {}
    assert members.online() == []
