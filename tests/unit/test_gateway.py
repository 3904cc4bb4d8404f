"""The gateway: where requests go, what comes back of them, and what happens when nodes fail."""

import asyncio
import contextlib
import json
from pathlib import Path

import httpx
import pytest

from fakes.pool import (
    CHAT,
    Asked,
    FakeNode,
    Pool,
    Wire,
    a_model,
    an_instance,
    eventually,
    refuse,
    running_pool,
    say_hello,
)
from llmster_control.gateway import gateway as module
from llmster_control.routing.policy import choose
from llmster_control.routing.snapshot import Ask, Decision, Snapshot
from llmster_daemon.protocol.node import RouteRecord

EVENTS = (b'data: {"a":1}\n\n', b"data: \xc3\xa9\xf0\x9f\x90\xba\n\n", b"data: [DONE]\n\n")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway's waits, short."""
    monkeypatch.setattr(module, "REVIVAL_WAIT_S", 0.4)
    monkeypatch.setattr(module, "LOOK_AGAIN_S", 0.02)


async def stream_events(_: Asked, wire: Wire) -> None:
    await wire.start(x_llmster_route='colocated;node="a"')
    for event in EVENTS:
        await wire.send(event)
    await wire.end()


async def cut_at_once(_: Asked, wire: Wire) -> None:
    wire.cut()


async def cut_in_a_whole_answer(_: Asked, wire: Wire) -> None:
    await wire.head_of_whole(1000)
    wire.cut()


async def cut_in_a_stream(_: Asked, wire: Wire) -> None:
    await wire.start()
    await wire.send(EVENTS[0])
    wire.cut()


def error_of(response: httpx.Response) -> dict[str, str]:
    """The envelope's inner object, after a look at its shape."""
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code", "hint"}
    return body["error"]


def last_route(pool: Pool) -> RouteRecord:
    return pool.members.routes[-1]


# What is relayed


async def test_an_answer_comes_back_unchanged_with_its_headers(tmp_path: Path) -> None:
    body = b'{ "odd":\t"spacing \xc3\xa9",\r\n "n": 1.50 }'

    async def behave(asked: Asked, wire: Wire) -> None:
        request_id = asked.headers["x-llmster-request-id"]
        await wire.answer(
            body, x_llmster_route='colocated;node="a"', x_llmster_request_id=request_id, x_own="no"
        )

    async with running_pool(tmp_path) as pool:
        node = await pool.join("a", behave=behave)
        question = b'{"model": "M",   "messages": [], "odd": "\xf0\x9f\x90\xba"}'
        response = await pool.http.post(CHAT, content=question)
        assert (response.status_code, response.content) == (200, body)
        assert response.headers["content-type"] == "application/json"
        assert response.headers["x-llmster-route"] == 'colocated;node="a"'
        (asked,) = node.asked
        assert response.headers["x-llmster-request-id"] == asked.headers["x-llmster-request-id"]
        assert "x-own" not in response.headers
        assert (asked.path, asked.body) == (CHAT, question)
        assert asked.plan["kind"] == "colocated"
        await pool.idle()


async def test_a_stream_comes_back_unchanged_and_as_it_is_made(tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def behave(_: Asked, wire: Wire) -> None:
        await wire.start(x_llmster_route="colocated")
        await wire.send(EVENTS[0])
        await go_on.wait()
        for event in EVENTS[1:]:
            await wire.send(event)
        await wire.end()

    async with running_pool(tmp_path) as pool:
        await pool.join("a", behave=behave)
        async with pool.http.stream("POST", CHAT, json={"model": "m"}) as response:
            assert response.headers["content-type"] == "text/event-stream"
            assert response.headers["x-llmster-route"] == "colocated"
            data = response.aiter_raw()
            assert await anext(data) == EVENTS[0]
            assert pool.gateway._in_flight == {"a" * 32: 1}
            go_on.set()
            assert b"".join([piece async for piece in data]) == b"".join(EVENTS[1:])
        await pool.idle()


async def test_completions_go_to_completions(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        node = await pool.join("a")
        await pool.http.post("/v1/completions", json={"model": "m", "prompt": "x"})
        assert [asked.path for asked in node.asked] == ["/v1/completions"]


async def test_a_split_plan_names_the_prefill_node(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        prefill = await pool.join("p", role="prefill")
        decode = await pool.join("d", role="decode")
        await pool.chat(x_llmster_prefer="split")
        assert prefill.asked == []
        (asked,) = decode.asked
        assert asked.plan["kind"] == "split"
        assert asked.plan["prefill_node_id"] == prefill.id
        assert asked.headers["x-llmster-prefer"] == "split"
        await pool.idle()


async def test_a_split_without_its_decode_node_is_served_by_the_other(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        prefill = await pool.join("p", role="prefill")
        decode = await pool.join("d", role="decode", behave=refuse(503))
        assert (await pool.chat()).status_code == 200
        assert len(decode.asked) == 1
        (asked,) = prefill.asked
        assert (asked.plan["kind"], asked.plan["attempt"]) == ("colocated", 2)
        await pool.idle()


async def test_requests_under_way_send_the_next_one_elsewhere(tmp_path: Path) -> None:
    done = asyncio.Event()

    async def behave(asked: Asked, wire: Wire) -> None:
        await done.wait()
        await say_hello(asked, wire)

    async with running_pool(tmp_path) as pool:
        nodes = [await pool.join(name, behave=behave) for name in "ab"]
        first = asyncio.create_task(pool.chat())
        await eventually(lambda: nodes[0].asked)
        second = asyncio.create_task(pool.chat())
        await eventually(lambda: nodes[1].asked)
        assert pool.gateway._in_flight == {node.id: 1 for node in nodes}
        done.set()
        await asyncio.gather(first, second)
        await pool.idle()


# Nodes that fail


async def test_a_failed_request_is_served_elsewhere(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        bad = await pool.join("a")
        good = await pool.join("b")
        for behave in (refuse(503), refuse(502, "bad"), cut_at_once, cut_in_a_whole_answer):
            bad.behave = behave
            assert (await pool.chat()).status_code == 200
            failed, served = bad.asked[-1].headers, good.asked[-1].headers
            assert served["x-llmster-request-id"] == failed["x-llmster-request-id"]
            assert good.asked[-1].plan["attempt"] == 2
        assert (len(bad.asked), len(good.asked)) == (4, 4)
        await pool.idle()
        assert list(pool.members.routes) == []


async def test_a_node_that_refuses_connections_is_passed_over(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        await pool.join("a", listening=False)
        good = await pool.join("b")
        assert (await pool.chat()).status_code == 200
        assert len(good.asked) == 1
        await pool.idle()


async def test_after_the_first_byte_a_failure_is_the_last_event(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        bad = await pool.join("a", behave=cut_in_a_stream)
        good = await pool.join("b")
        response = await pool.chat()
        first, last, rest = response.content.split(b"\n\n")
        assert (response.status_code, first, rest) == (200, EVENTS[0].strip(), b"")
        error = json.loads(last.removeprefix(b"data: "))["error"]
        assert error["code"] == "engine_lost"
        assert (len(bad.asked), good.asked) == (1, [])
        await pool.idle()


async def test_after_half_an_event_the_failure_is_an_event_of_its_own(tmp_path: Path) -> None:
    async def behave(_: Asked, wire: Wire) -> None:
        await wire.start()
        await wire.send(EVENTS[0] + b'data: {"half')
        wire.cut()

    async with running_pool(tmp_path) as pool:
        await pool.join("a", behave=behave)
        *_, last, rest = (await pool.chat()).content.split(b"\n\n")
        assert rest == b""
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "engine_lost"


async def test_a_nodes_answer_to_the_request_itself_is_not_tried_again(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        one = await pool.join("a")
        other = await pool.join("b")
        for status in (400, 404, 413, 422, 500):
            one.behave = refuse(status, "no_such_thing", "no")
            response = await pool.chat()
            assert response.status_code == status
            assert error_of(response)["code"] == "no_such_thing"
            assert response.headers["x-llmster-route"] == "none"
        assert (len(one.asked), other.asked) == (5, [])
        await pool.idle()


async def test_a_request_that_fails_everywhere_is_given_up(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        nodes = [await pool.join(name, behave=cut_at_once) for name in "ab"]
        response = await pool.chat()
        assert (response.status_code, error_of(response)["code"]) == (503, "engine_lost")
        assert response.headers["retry-after"] == "1"
        # A request that kills engines must not kill them forever.
        assert sum(len(node.asked) for node in nodes) == module.MAX_ATTEMPTS
        await pool.idle()
        route = last_route(pool)
        assert (route.kind, route.status, route.error_code) == ("none", "failed", "engine_lost")
        assert route.request_id == response.headers["x-llmster-request-id"]
        assert route.model == "m"


async def test_an_answer_of_something_else_than_a_node_is_a_failure(tmp_path: Path) -> None:
    async def behave(_: Asked, wire: Wire) -> None:
        await wire.answer(b"<html>Bad Gateway</html>", 502, content_type="text/html")

    async with running_pool(tmp_path) as pool:
        await pool.join("a", behave=behave)
        response = await pool.chat()
        assert (response.status_code, error_of(response)["code"]) == (502, "bad_answer")


# Waiting for what comes back


async def test_a_request_waits_for_a_model_that_comes_up(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        node = await pool.join("a", instances=(an_instance(state="backoff"),))
        asking = asyncio.create_task(pool.chat())
        await eventually(lambda: asking.done() or len(node.feeds) >= 1)
        await node.report()
        assert not asking.done()
        node.instances = (an_instance(),)
        await node.report()
        assert (await asking).status_code == 200
        assert len(node.asked) == 1


async def test_a_request_waits_for_the_only_node_to_listen_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REVIVAL_WAIT_S", 5.0)
    tried: list[str] = []

    def counting(snapshot: Snapshot, ask: Ask) -> Decision:
        tried.append(ask.model)
        return choose(snapshot, ask)

    async with running_pool(tmp_path) as pool:
        monkeypatch.setattr(module, "choose", counting)
        node = await pool.join("a", listening=False)
        asking = asyncio.create_task(pool.chat())
        # It refuses more often than a request may be attempted.
        await eventually(lambda: asking.done() or len(tried) > 3 * module.MAX_ATTEMPTS)
        await node.listen()
        assert (await asking).status_code == 200
        await pool.idle()


async def test_waiting_ends_at_the_deadline(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        await pool.join("a", instances=(an_instance(state="loading"),))
        response = await pool.chat()
        assert (response.status_code, error_of(response)["code"]) == (503, "model_not_ready")
        assert last_route(pool).error_code == "model_not_ready"
        assert last_route(pool).duration_s >= module.REVIVAL_WAIT_S


async def test_an_unreachable_node_is_given_up_at_the_deadline(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        await pool.join("a", listening=False)
        response = await pool.chat()
        assert (response.status_code, error_of(response)["code"]) == (503, "node_unreachable")
        assert last_route(pool).duration_s >= module.REVIVAL_WAIT_S
        await pool.idle()


async def test_draining_nodes_are_not_waited_for(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        node = await pool.join("a")
        pool.members.set_draining(pool.members.find("a"), True)
        response = await pool.chat()
        assert (response.status_code, error_of(response)["code"]) == (503, "no_node_available")
        assert node.asked == []
        assert last_route(pool).duration_s < module.REVIVAL_WAIT_S


# What can't be served at all


async def test_an_empty_pool_says_so(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        response = await pool.chat()
        assert (response.status_code, error_of(response)["code"]) == (503, "pool_empty")
        assert "llmster nodes" in error_of(response)["hint"]
        assert response.headers["x-llmster-route"] == "none"


async def test_an_unknown_model_is_not_found(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        await pool.join("a")
        response = await pool.chat("nope")
        assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")
        assert "loaded: m" in error_of(response)["message"]
        # The client's mistakes are not failures of the pool.
        assert list(pool.members.routes) == []


async def test_a_model_that_is_only_on_disk_can_be_loaded(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        await pool.join("a", instances=(), models=(a_model("disk"),))
        response = await pool.chat("disk")
        assert (response.status_code, error_of(response)["code"]) == (404, "model_not_loaded")
        assert error_of(response)["hint"] == "run `llmster load disk`"


BAD_BODIES = [
    (b"{not json", "invalid_json", None),
    (b"", "invalid_json", None),
    (b"\xff\xfe", "invalid_json", None),
    (b"[1]", "invalid_value", None),
    (b"{}", "missing_field", "model"),
    (b'{"model": 7}', "invalid_value", "model"),
    (b'{"model": ""}', "invalid_value", "model"),
    (b'{"model": "\\ud800"}', "invalid_json", None),
]


async def test_a_bad_body_is_refused(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        node = await pool.join("a")
        for body, code, param in BAD_BODIES:
            response = await pool.http.post(CHAT, content=body)
            error = error_of(response)
            found = (response.status_code, error["code"], error["param"])
            assert found == (400, code, param), body
        assert node.asked == []


async def test_a_bad_preference_is_refused(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        node = await pool.join("a")
        response = await pool.chat(x_llmster_prefer="both")
        error = error_of(response)
        assert response.status_code == 400
        assert (error["code"], error["param"]) == ("bad_header", "x-llmster-prefer")
        assert node.asked == []
        assert (await pool.chat(x_llmster_prefer="")).status_code == 200


async def test_models_are_listed_as_openai_does(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        await pool.join("a", instances=(an_instance("m"), an_instance("n")))
        listed = (await pool.http.get("/v1/models")).json()
        assert listed["object"] == "list"
        assert [model["id"] for model in listed["data"]] == ["m", "n"]
        assert (await pool.http.get("/v1/models/N")).json()["id"] == "n"
        assert (await pool.http.get("/v1/models/x")).status_code == 404


# Clients that hang up


async def hang_up(pool: Pool, node: FakeNode, left: asyncio.Event) -> None:
    """Ask, hang up once the node is at work, and see that the node is left within a second."""
    asking = asyncio.create_task(pool.chat())
    await eventually(lambda: node.asked)
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking
    await asyncio.wait_for(left.wait(), 1)
    await pool.idle()


async def test_hanging_up_before_the_answer_closes_the_nodes_connection(tmp_path: Path) -> None:
    left = asyncio.Event()

    async def behave(_: Asked, wire: Wire) -> None:
        await wire.gone()
        left.set()

    async with running_pool(tmp_path) as pool:
        await hang_up(pool, await pool.join("a", behave=behave), left)
        # Nobody failed, and nobody else was asked.
        assert list(pool.members.routes) == []


async def test_hanging_up_in_a_stream_closes_the_nodes_connection(tmp_path: Path) -> None:
    left = asyncio.Event()

    async def behave(_: Asked, wire: Wire) -> None:
        await wire.start()
        await wire.send(EVENTS[0])
        await wire.gone()
        left.set()

    async with running_pool(tmp_path) as pool:
        await pool.join("a", behave=behave)
        async with pool.http.stream("POST", CHAT, json={"model": "m"}) as response:
            assert await anext(response.aiter_raw()) == EVENTS[0]
        await asyncio.wait_for(left.wait(), 1)
        await pool.idle()


async def test_hanging_up_while_waiting_for_a_model_ends_the_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REVIVAL_WAIT_S", 60.0)
    async with running_pool(tmp_path) as pool:
        node = await pool.join("a", instances=(an_instance(state="loading"),))
        with pytest.raises(httpx.ReadTimeout):
            await pool.http.post(CHAT, json={"model": "m"}, timeout=0.1)
        node.instances = (an_instance(),)
        await node.report()
        assert (await pool.chat()).status_code == 200
        # The first request is not among what the node was asked.
        assert len(node.asked) == 1


async def test_many_streams_at_once_leave_nothing_behind(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        await pool.join("a", behave=stream_events)
        await pool.join("b", behave=cut_in_a_stream)
        answers = await asyncio.gather(*(pool.chat() for _ in range(20)))
        ends = {answer.content.endswith(EVENTS[-1]) for answer in answers}
        assert ends == {True, False}
        await pool.idle()
