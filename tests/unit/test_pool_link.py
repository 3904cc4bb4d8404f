"""The node's connection to its control plane, against a real WebSocket server."""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from fakes.gguf import gguf_bytes
from fakes.node import Control, add_model, new_home, until
from llmster_daemon import pool_link
from llmster_daemon.app import running_node
from llmster_daemon.config import NodeConfig
from llmster_daemon.errors import BadRequest, Conflict, LlmsterError
from llmster_daemon.pool_link import MAX_ROUTES_KEPT, PATH, PoolLink, result_error
from llmster_daemon.protocol.node import (
    Command,
    Inventory,
    NodeHello,
    NodeReport,
    PoolFeed,
    RouteRecord,
    Telemetry,
)

INVENTORY = Inventory(hostname="box", cpu_name="cpu", cpu_cores=2, mem_total_bytes=1)
FEED = PoolFeed(gateway_url="http://127.0.0.1:1", your_name="box-2", models=("tiny",))
Obey = Callable[[Command], Any]


def route(number: int) -> RouteRecord:
    return RouteRecord(request_id=f"req-{number}", at=1.0, model="tiny", kind="colocated")


class Reporter:
    """A node, as the link sees it."""

    def __init__(self) -> None:
        self.asked = 0
        self.silent = 0
        """How many more times there is nothing to report yet."""
        self.on_report: Callable[[], None] = lambda: None
        self.answer: Obey = lambda command: {"did": command.name}

    def hello(self) -> NodeHello:
        return NodeHello(
            version="1",
            node_id="a" * 32,
            name="box",
            role="mixed",
            url="http://127.0.0.1:2",
            home="/home",
            inventory=INVENTORY,
        )

    def report(self, routes: tuple[RouteRecord, ...]) -> NodeReport | None:
        self.asked += 1
        self.on_report()
        if self.silent:
            self.silent -= 1
            return None
        telemetry = Telemetry(at=float(self.asked), cpu_utilisation=0.5, mem_used_bytes=1)
        return NodeReport(telemetry=telemetry, role="mixed", routes=routes)

    async def obey(self, command: Command) -> dict[str, Any]:
        result = self.answer(command)
        value: dict[str, Any] = await result if asyncio.iscoroutine(result) else result
        return value


@pytest.fixture
async def control() -> AsyncIterator[Control]:
    control = Control()
    await control.start()
    yield control
    await control.stop()


@pytest.fixture
def reporter() -> Reporter:
    return Reporter()


async def end(task: asyncio.Task[None]) -> None:
    assert not task.done(), "the link gave up"
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@pytest.fixture
async def link(control: Control, reporter: Reporter) -> AsyncIterator[PoolLink]:
    """A link that tries to connect for as long as the test takes."""
    link = PoolLink(reporter)
    task = asyncio.create_task(link.run(control.url))
    yield link
    await end(task)


async def reports(control: Control, count: int) -> list[dict[str, Any]]:
    """The reports so far, once there are that many."""
    await until(lambda: len(control.told("report")) >= count, f"{count} reports")
    return control.told("report")


async def test_hello_comes_first(control: Control, link: PoolLink, reporter: Reporter) -> None:
    await reports(control, 1)
    (connection,) = control.connections
    assert connection.request is not None
    assert connection.request.path == PATH == "/pool/v1/connect"
    assert NodeHello.model_validate(control.messages[0]) == reporter.hello()
    assert control.messages[1]["type"] == "report"
    assert control.messages[0]["protocol"] == 1


async def test_a_report_comes_every_second(control: Control, link: PoolLink) -> None:
    await reports(control, 3)
    first, second, third = control.told_at[1:4]
    assert 0.9 < second - first < 1.6
    assert 0.9 < third - second < 1.6


async def test_a_change_is_reported_sooner(
    control: Control, link: PoolLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_link, "REPORT_INTERVAL_S", 60)
    await reports(control, 1)
    for count in (2, 3):
        link.report_soon()
        await reports(control, count)


async def test_a_change_while_a_report_is_made_is_not_missed(
    control: Control, link: PoolLink, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_link, "REPORT_INTERVAL_S", 60)
    await reports(control, 1)

    def once() -> None:
        reporter.on_report = lambda: None
        link.add_route(route(1))

    reporter.on_report = once
    link.report_soon()
    await until(lambda: control.routes() == ["req-1"], "the route is reported")


async def test_changes_that_never_end_do_not_flood(control: Control, link: PoolLink) -> None:
    await reports(control, 1)
    started = time.monotonic()
    while len(control.told("report")) < 6:
        link.report_soon()
        await asyncio.sleep(0)
    assert time.monotonic() - started > 0.4


async def test_nothing_is_reported_before_the_first_measurement(
    control: Control, reporter: Reporter
) -> None:
    reporter.silent = 3
    link = PoolLink(reporter)
    link.add_route(route(1))
    task = asyncio.create_task(link.run(control.url))
    first, *_ = await reports(control, 1)
    assert first["telemetry"]["at"] == 4.0
    assert control.routes() == ["req-1"]
    assert [message["type"] for message in control.messages[:2]] == ["hello", "report"]
    await end(task)


async def test_routes_are_reported_once_and_in_order(control: Control, link: PoolLink) -> None:
    await reports(control, 1)
    for number in range(5):
        link.add_route(route(number))
        if number % 2:
            await reports(control, len(control.told("report")) + 1)
    await until(lambda: len(control.routes()) == 5, "all routes")
    link.report_soon()
    await reports(control, len(control.told("report")) + 1)
    assert control.routes() == [f"req-{number}" for number in range(5)]


async def test_routes_wait_for_the_control_plane(control: Control, link: PoolLink) -> None:
    await reports(control, 1)
    await control.stop()
    for number in range(MAX_ROUTES_KEPT + 3):
        link.add_route(route(number))
    await control.start()
    await until(lambda: len(control.routes()) >= MAX_ROUTES_KEPT, "the routes")
    # The oldest had to go.
    assert control.routes() == [f"req-{number}" for number in range(3, MAX_ROUTES_KEPT + 3)]
    assert len(control.told("hello")) == len(control.connections) == 2


async def test_routes_that_come_while_many_are_sent_are_not_lost(
    control: Control, link: PoolLink, reporter: Reporter
) -> None:
    await reports(control, 1)

    def once() -> None:
        reporter.on_report = lambda: None
        link.add_route(route(-1))

    for number in range(MAX_ROUTES_KEPT):
        link.add_route(route(number))
    reporter.on_report = once
    await until(lambda: "req--1" in control.routes(), "the late route")
    assert len(control.routes()) == len(set(control.routes())) == MAX_ROUTES_KEPT + 1


async def test_what_the_control_plane_tells(control: Control, link: PoolLink) -> None:
    await reports(control, 1)
    assert (link.connected, link.feed) == (False, None)
    await control.say(FEED)
    await until(lambda: link.connected, "the feed is taken")
    assert link.feed == FEED
    await control.stop()
    await until(lambda: not link.connected, "the end is noticed")
    # The other nodes live on.
    assert link.feed == FEED


@pytest.mark.parametrize(
    "garbage",
    [
        "",
        "{",
        "[]",
        "null",
        b"\xff\x00",
        "{}",
        '{"type": "dance"}',
        '{"type": "feed"}',
        '{"type": "feed", "gateway_url": 5}',
        '{"type": "command", "id": "1", "name": "explode"}',
        '{"type": "command", "id": 1, "name": "load"}',
        '{"type": "hello"}',
    ],
)
async def test_garbage_is_ignored(control: Control, link: PoolLink, garbage: str | bytes) -> None:
    await reports(control, 1)
    await control.say(garbage)
    await control.say(FEED)
    await until(lambda: link.connected, "the feed is taken")
    assert (await control.order("role")).value == {"did": "role"}
    assert len(control.connections) == 1


async def test_a_control_plane_that_is_not_there_yet(
    reporter: Reporter, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_link, "FIRST_RETRY_S", 0.01)
    control = Control()
    link = PoolLink(reporter)
    with caplog.at_level(logging.INFO, pool_link.__name__):
        task = asyncio.create_task(link.run(control.url))
        await until(lambda: caplog.records, "it says that nobody is there")
        await control.start()
        await reports(control, 1)
    missing, joined = caplog.messages
    assert missing.startswith(f"no control plane at {control.url} (")
    assert joined == f"joined the pool at {control.url}"
    await end(task)
    await control.stop()


async def test_a_control_plane_that_comes_back(control: Control, link: PoolLink) -> None:
    for count in (1, 2, 3):
        await until(lambda count=count: len(control.told("hello")) == count, f"hello {count}")
        await control.say(FEED)
        await until(lambda: link.connected, "the feed is taken")
        await control.stop()
        await until(lambda: not link.connected, "the end is noticed")
        await control.start()
    await until(lambda: len(control.told("hello")) == 4, "the last hello")


async def test_it_asks_less_and_less_often(
    control: Control, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a control plane that is there and does not want it."""
    monkeypatch.setattr(pool_link, "FIRST_RETRY_S", 0.05)
    monkeypatch.setattr(pool_link, "MAX_RETRY_S", 0.3)
    monkeypatch.setattr(pool_link.random, "uniform", lambda _, high: high)
    control.welcome = False
    link = PoolLink(reporter)
    task = asyncio.create_task(link.run(control.url))
    await until(lambda: len(control.connections) == 6, "it asked six times")
    at = control.connected_at
    gaps = [later - earlier for earlier, later in itertools.pairwise(at)]
    for gap, least in zip(gaps, [0.05, 0.1, 0.2, 0.3, 0.3], strict=True):
        assert least * 0.9 < gap < least + 0.5
    # Once it is welcome, it starts from the beginning.
    control.welcome = True
    await until(lambda: control.told("report"), "it is in")
    await control.say(FEED)
    await until(lambda: link.connected, "the feed is taken")
    lost_at = time.monotonic()
    await control.connections[-1].close()
    await until(lambda: len(control.told("hello")) == 2, "it is back")
    assert control.connected_at[-1] - lost_at < 0.25
    await end(task)


async def test_a_command_that_takes_long_holds_up_nothing(
    control: Control, link: PoolLink, reporter: Reporter
) -> None:
    await reports(control, 1)
    finish = asyncio.Event()

    async def slowly() -> dict[str, Any]:
        await finish.wait()
        return {"did": "slowly"}

    reporter.answer = lambda command: slowly() if command.id == "slow" else {"did": "quickly"}
    await control.say(Command(id="slow", name="load"))
    assert (await control.order("unload")).value == {"did": "quickly"}
    await reports(control, len(control.told("report")) + 1)
    finish.set()
    await until(lambda: len(control.told("result")) == 2, "both are answered")
    assert control.told("result")[1] == {
        "type": "result",
        "id": "slow",
        "value": {"did": "slowly"},
        "error": None,
    }


@pytest.mark.parametrize("how", ["close", "abort"])
async def test_it_reconnects_while_a_command_is_under_way(
    control: Control, link: PoolLink, reporter: Reporter, how: str
) -> None:
    await reports(control, 1)
    started = asyncio.Event()

    async def forever() -> dict[str, Any]:
        started.set()
        await asyncio.Event().wait()
        return {}

    reporter.answer = lambda _: forever()
    await control.say(FEED)
    await control.say(Command(id="load", name="load"))
    await started.wait()
    if how == "close":
        await control.connections[0].close()
    else:
        control.connections[0].transport.abort()
    await until(lambda: len(control.told("hello")) == 2, "it is back", limit_s=5)


async def test_what_was_done_is_reported_at_once(
    control: Control, link: PoolLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_link, "REPORT_INTERVAL_S", 60)
    await reports(control, 1)
    await control.order("load", model="tiny")
    await reports(control, 2)


def failing(error: Exception) -> Obey:
    def fail(_: Command) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        (Conflict("busy", "it is busy", "wait"), "busy", 409),
        (BadRequest("bad", "it is bad", "mend it", param="model"), "bad", 400),
        (LlmsterError("odd", "it is odd", "run"), "odd", 500),
        (KeyError("model"), "bad_command", 400),
        (ValueError("no number"), "bad_command", 400),
        (TypeError("no text"), "bad_command", 400),
        (AttributeError("lower"), "internal_error", 500),
        (RuntimeError("surprise"), "internal_error", 500),
        (OSError(5, "I/O error"), "internal_error", 500),
    ],
)
async def test_commands_that_fail(
    control: Control, link: PoolLink, reporter: Reporter, error: Exception, code: str, status: int
) -> None:
    await reports(control, 1)
    reporter.answer = failing(error)
    result = await control.order("load")
    assert result.value is None
    found = result_error(result)
    assert found is not None
    assert (found.code, found.status) == (code, status)
    assert found.message
    if isinstance(error, LlmsterError):
        assert found.body() == error.body()
    reporter.answer = lambda _: {"still": "here"}
    assert (await control.order("load")).value == {"still": "here"}
    assert result_error(await control.order("load")) is None
    assert len(control.connections) == 1


async def test_a_whole_node_reports_and_obeys(control: Control, tmp_path: Path) -> None:
    home = new_home(tmp_path / "home")
    add_model(home)
    more = tmp_path / "more.gguf"
    await asyncio.to_thread(more.write_bytes, gguf_bytes({"general.name": "more"}))
    config = NodeConfig(home, "box", control_url=control.url)
    async with running_node(config) as node:
        first, *_ = await reports(control, 1)
        (hello,) = control.told("hello")
        assert (hello["node_id"], hello["name"], hello["url"]) == (node.id, "box", config.url)
        assert hello["inventory"]["cpu_cores"] > 0
        assert [model["key"] for model in first["models"]] == ["tiny"]
        assert first["telemetry"]["mem_used_bytes"] > 0

        assert (node.name, node.gateway_url) == ("box", None)
        await control.say(FEED)
        await until(lambda: node.gateway_url == FEED.gateway_url, "the feed is taken")
        assert (node.name, node.model_names()) == ("box-2", ["tiny"])

        assert (await control.order("role", role="prefill")).value == {"role": "prefill"}
        await until(lambda: control.told("report")[-1]["role"] == "prefill", "it is reported")
        imported = await control.order("import", path=str(more))
        assert imported.value is not None
        assert imported.value["model"]["key"] == "more"
        await until(lambda: len(control.told("report")[-1]["models"]) == 2, "it is reported")

        failures: list[tuple[str, dict[str, Any], str]] = [
            ("role", {"role": "king"}, "bad_role"),
            ("role", {}, "bad_command"),
            ("load", {"model": "huge"}, "model_not_found"),
            ("load", {"model": "tiny", "options": {"slots": 0}}, "bad_command"),
            ("load", {"model": "tiny", "options": {"context_length": 4096}}, "context_too_long"),
            ("load", {"model": 5}, "bad_command"),
            ("unload", {"target": "tiny"}, "instance_not_found"),
            ("unload", {"target": None}, "bad_command"),
            ("import", {"path": "/nowhere/at/all.gguf"}, "file_not_found"),
            ("import", {"path": 5}, "bad_command"),
            ("import", {"path": "\0"}, "file_unreadable"),
        ]
        for name, args, code in failures:
            error = result_error(await control.order(name, **args))
            assert error is not None
            assert (name, args, error.code) == (name, args, code)
        assert len(control.connections) == 1
        assert (node.role, node.instances.infos()) == ("prefill", ())
