"""Write-behind: nothing waits for the database, and nothing is lost while it can't be written."""

import asyncio
import logging
import os
import sqlite3
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest

from llmster_control.store import database, writer
from llmster_control.store.store import KnownNode, Store
from llmster_control.store.writer import StoreWriter
from llmster_daemon.errors import HomeError, Unavailable
from llmster_daemon.protocol.node import InstanceInfo, Inventory, RouteRecord

INVENTORY = Inventory(hostname="h", cpu_name="c", cpu_cores=1, mem_total_bytes=1)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system")


class Ticks:
    """A sleep that ends when the test says so, and remembers the seconds asked for."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self._go = asyncio.Semaphore(0)
        self._asleep = asyncio.Semaphore(0)

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self._asleep.release()
        await self._go.acquire()

    async def until_asleep(self) -> None:
        async with asyncio.timeout(30):
            await self._asleep.acquire()

    async def tick(self) -> None:
        """One round of the writer: from the end of its sleep to the start of the next."""
        self._go.release()
        await self.until_asleep()


class Gate:
    """Holds a store's method in its thread until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, store: Store, method: str) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()
        real = getattr(store, method)

        def held(*args: object) -> object:
            self.entered.set()
            assert self.opened.wait(30)
            return real(*args)

        monkeypatch.setattr(store, method, held)

    async def until_entered(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, 30)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.01)
    with closing(Store.open(tmp_path / "pool.db")) as store:
        yield store


@pytest.fixture
def other(tmp_path: Path, store: Store) -> Iterator[sqlite3.Connection]:
    """Another process's connection to the same file."""
    with closing(sqlite3.connect(tmp_path / "pool.db", isolation_level=None)) as other:
        yield other


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 1 MiB."""
    where = tmp_path / "disk"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", where], check=True)
    yield where
    subprocess.run(["umount", where], check=True)


@asynccontextmanager
async def running(writer: StoreWriter, ticks: Ticks) -> AsyncIterator["asyncio.Task[None]"]:
    task = asyncio.create_task(writer.run())
    await ticks.until_asleep()
    try:
        yield task
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


def node(node_id: str = "n1", last_seen_at: float = 1.0) -> KnownNode:
    return KnownNode(
        id=node_id,
        name=node_id,
        role="mixed",
        url="u",
        home="h",
        version="0",
        inventory=INVENTORY,
        joined_at=1.0,
        last_seen_at=last_seen_at,
    )


def instance(instance_id: str) -> InstanceInfo:
    return InstanceInfo(id=instance_id, model="m", digest="d", state="ready")


def route(request_id: str, at: float = 1.0, kv_bytes: int = 0) -> RouteRecord:
    return RouteRecord(request_id=request_id, at=at, model="m", kind="colocated", kv_bytes=kv_bytes)


def routes(first: int, end: int) -> list[tuple[str | None, RouteRecord]]:
    return [("n1", route(f"r{n}", at=n)) for n in range(first, end)]


def stored(store: Store) -> list[str]:
    return [found.request_id for found in reversed(store.routes(limit=1 << 20))]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == writer.__name__ and record.levelno >= logging.WARNING
    ]


async def test_putting_does_not_touch_the_database(store: Store) -> None:
    behind = StoreWriter(store)
    store.close()
    behind.put_node(node())
    behind.put_instances("n1", [instance("i")])
    behind.put_routes(routes(0, 3))
    assert behind.pending == 5


async def test_a_flush_writes_the_latest_of_everything(store: Store) -> None:
    behind = StoreWriter(store)
    behind.put_instances("n1", [instance("old")])
    behind.put_instances("n1", [instance("new")])
    behind.put_node(node(last_seen_at=1))
    behind.put_node(node(last_seen_at=2))
    behind.put_routes(routes(0, 2500))
    await behind.flush()
    assert behind.pending == 0
    # The node came first, although it was put last: its instances need it.
    assert store.known_nodes() == [node(last_seen_at=2)]
    assert store.instances("n1") == [instance("new")]
    assert stored(store) == [f"r{n}" for n in range(2500)]
    await behind.flush()


async def test_it_writes_every_half_second_and_once_more_at_the_end(store: Store) -> None:
    ticks = Ticks()
    behind = StoreWriter(store, sleep=ticks.sleep)
    async with running(behind, ticks):
        behind.put_routes(routes(0, 1))
        assert stored(store) == []
        await ticks.tick()
        assert stored(store) == ["r0"]
        await ticks.tick()
        behind.put_routes(routes(1, 2))
        assert stored(store) == ["r0"]
    assert stored(store) == ["r0", "r1"]
    assert ticks.waits == [0.5, 0.5, 0.5]


async def test_it_keeps_all_while_the_database_is_locked(
    store: Store, other: sqlite3.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ticks = Ticks()
    behind = StoreWriter(store, sleep=ticks.sleep)
    async with running(behind, ticks):
        other.execute("BEGIN IMMEDIATE")
        behind.put_node(node(last_seen_at=1))
        behind.put_routes(routes(0, 2))
        await ticks.tick()
        behind.put_node(node(last_seen_at=2))
        behind.put_instances("n1", [instance("i")])
        behind.put_routes(routes(2, 4))
        for _ in range(7):
            await ticks.tick()
        assert behind.pending == 6
        assert len(warnings(caplog)) == 1
        assert "locked" in warnings(caplog)[0]
        other.execute("ROLLBACK")
        await ticks.tick()
        assert behind.pending == 0
        assert "written again" in caplog.records[-1].getMessage()
    assert ticks.waits == [0.5, 1, 2, 4, 8, 16, 30, 30, 30, 0.5]
    assert store.known_nodes() == [node(last_seen_at=2)]
    assert store.instances("n1") == [instance("i")]
    assert stored(store) == ["r0", "r1", "r2", "r3"]


@needs_root
async def test_it_keeps_all_while_the_disk_is_full(disk: Path) -> None:
    with closing(Store.open(disk / "pool.db")) as store:
        behind = StoreWriter(store)
        with (disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError):
            while True:
                filler.write(bytes(4096))
        behind.put_node(node())
        behind.put_routes(routes(0, 1500))
        with pytest.raises(HomeError) as raised:
            await behind.flush()
        assert raised.value.code == "disk_full"
        behind.put_routes(routes(1500, 1600))
        (disk / "filler").unlink()
        await behind.flush()
        assert store.known_nodes() == [node()]
        assert stored(store) == [f"r{n}" for n in range(1600)]
        assert [used.requests for used in store.usage()] == [1600]


async def test_what_it_could_not_write_at_the_end_is_counted(
    store: Store, other: sqlite3.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    ticks = Ticks()
    behind = StoreWriter(store, sleep=ticks.sleep)
    other.execute("BEGIN IMMEDIATE")
    async with running(behind, ticks):
        behind.put_routes(routes(0, 3))
    assert "3 records of the pool are lost" in warnings(caplog)[-1]


async def test_beyond_its_bound_it_drops_the_oldest_routes_and_says_how_many(
    store: Store, other: sqlite3.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    ticks = Ticks()
    behind = StoreWriter(store, sleep=ticks.sleep, max_routes=10)
    async with running(behind, ticks):
        other.execute("BEGIN IMMEDIATE")
        behind.put_routes(routes(0, 8))
        await ticks.tick()
        behind.put_routes(routes(8, 12))
        await ticks.tick()
        behind.put_routes(routes(12, 15))
        assert behind.pending == 10
        assert behind.dropped_routes == 5
        other.execute("ROLLBACK")
        await ticks.tick()
        assert stored(store) == [f"r{n}" for n in range(5, 15)]
        await ticks.tick()
    told = [text for text in warnings(caplog) if "dropped" in text]
    assert told == [
        "10 routes wait to be written; the oldest are dropped from now on",
        "5 routes were dropped unwritten",
    ]


async def test_its_bound_is_twenty_thousand_routes(store: Store) -> None:
    behind = StoreWriter(store)
    behind.put_routes(routes(0, 20_001))
    assert (behind.pending, behind.dropped_routes) == (20_000, 1)


async def test_a_value_that_no_database_holds_is_dropped_alone(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    behind = StoreWriter(store)
    behind.put_node(node("bad").model_copy(update={"last_seen_at": float("nan")}))
    behind.put_node(node("good"))
    behind.put_routes([*routes(0, 2), ("n1", route("huge", kv_bytes=1 << 64)), *routes(2, 4)])
    await behind.flush()
    assert behind.pending == 0
    assert store.known_nodes() == [node("good")]
    assert stored(store) == ["r0", "r1", "r2", "r3"]
    assert [text.split(":")[0] for text in warnings(caplog)] == [
        "node 'bad' can't be stored and is dropped",
        "route 'huge' can't be stored and is dropped",
    ]


async def test_an_unforeseen_error_ends_nothing_and_loses_nothing(
    store: Store, other: sqlite3.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    ticks = Ticks()
    behind = StoreWriter(store, sleep=ticks.sleep)
    async with running(behind, ticks):
        other.execute("ALTER TABLE route RENAME TO mislaid")
        behind.put_routes(routes(0, 1))
        await ticks.tick()
        await ticks.tick()
        assert len(warnings(caplog)) == 1
        assert "no such table" in warnings(caplog)[0]
        other.execute("ALTER TABLE mislaid RENAME TO route")
    assert stored(store) == ["r0"]


async def test_the_loop_goes_on_while_a_write_is_slow(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, store, "save_node")
    behind = StoreWriter(store)
    behind.put_node(node(last_seen_at=1))
    flushing = asyncio.create_task(behind.flush())
    await gate.until_entered()
    behind.put_node(node(last_seen_at=2))
    gate.opened.set()
    await flushing
    assert behind.pending == 1
    await behind.flush()
    assert store.known_nodes() == [node(last_seen_at=2)]


async def test_cancelled_in_a_write_it_waits_for_it_and_writes_the_rest(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, store, "add_routes")
    behind = StoreWriter(store, interval_s=0)
    task = asyncio.create_task(behind.run())
    behind.put_routes(routes(0, 1))
    await gate.until_entered()
    behind.put_routes(routes(1, 2))
    for _ in range(3):
        # However often, it does not leave a thread that writes behind.
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert stored(store) == ["r0", "r1"]
    assert behind.pending == 0


async def test_a_cancelled_flush_that_failed_keeps_its_batch(
    store: Store, other: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, store, "add_routes")
    behind = StoreWriter(store)
    behind.put_routes(routes(0, 2))
    flushing = asyncio.create_task(behind.flush())
    await gate.until_entered()
    other.execute("BEGIN IMMEDIATE")
    flushing.cancel()
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await flushing
    assert behind.pending == 2
    other.execute("ROLLBACK")
    await behind.flush()
    assert stored(store) == ["r0", "r1"]


async def test_a_forgotten_node_does_not_come_back_with_what_was_waiting(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    behind = StoreWriter(store)
    behind.put_node(node("n1"))
    behind.put_node(node("n2"))
    await behind.flush()
    gate = Gate(monkeypatch, store, "forget_node")
    forgetting = asyncio.create_task(behind.forget_node("n1"))
    await gate.until_entered()
    behind.put_node(node("n1", last_seen_at=2))
    behind.put_instances("n1", [instance("i")])
    flushing = asyncio.create_task(behind.flush())
    forgetting.cancel()
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await forgetting
    await flushing
    assert store.known_nodes() == [node("n2")]
    assert behind.pending == 0


async def test_a_node_that_could_not_be_forgotten_is_still_known(
    store: Store, other: sqlite3.Connection
) -> None:
    store.save_node(node("n1"))
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable):
        await StoreWriter(store).forget_node("n1")
    assert store.known_nodes() == [node("n1")]
