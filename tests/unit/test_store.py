"""The pool's database: what it keeps, and what it says when the disk or the file is bad."""

import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from llmster_control.protocol import UsageView
from llmster_control.store import database
from llmster_control.store.migrations import REVISIONS
from llmster_control.store.store import KnownNode, Store
from llmster_control.store.tables import Base, InstanceRow, NodeRow, RouteRow
from llmster_daemon.errors import BadRequest, HomeError, LlmsterError, Unavailable
from llmster_daemon.protocol.node import GpuInfo, InstanceInfo, Inventory, RouteRecord

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system")

Mount = Callable[[str], Path]
"""Mounts a tmpfs with these options and returns where."""


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        where = tmp_path / f"disk-{len(mounted)}"
        where.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", where], check=True)
        mounted.append(where)
        return where

    yield mount
    for where in mounted:
        subprocess.run(["umount", where], check=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "pool.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with closing(Store.open(path)) as store:
        yield store


def node(node_id: str = "n1", name: str = "ws-1", last_seen_at: float = 2.5) -> KnownNode:
    gpu = GpuInfo(index=0, uuid="GPU-1", name="RTX 4090", mem_total_bytes=24 << 30)
    return KnownNode(
        id=node_id,
        name=name,
        role="mixed",
        url="https://ws-1:1234",
        home="/home/ann/.llmster",
        version="0.1.0",
        inventory=Inventory(
            hostname="ws-1", cpu_name="EPYC", cpu_cores=64, mem_total_bytes=1 << 40, gpus=(gpu,)
        ),
        joined_at=1.25,
        last_seen_at=last_seen_at,
    )


def instance(instance_id: str = "i1", **changed: object) -> InstanceInfo:
    whole = {"id": instance_id, "model": "m", "digest": "0" * 64, "state": "ready", **changed}
    return InstanceInfo.model_validate(whole)


def route(request_id: str, at: float = 1.0, **changed: object) -> RouteRecord:
    whole = {"request_id": request_id, "at": at, "model": "m", "kind": "colocated", **changed}
    return RouteRecord.model_validate(whole)


def pragma(store: Store, name: str) -> object:
    with store._engine.connect() as connection:
        return connection.exec_driver_sql(f"PRAGMA {name}").scalar()


# Opening and migrating


def test_a_new_store_is_made_for_our_user_only(path: Path) -> None:
    umask = os.umask(0)
    try:
        with closing(Store.open(path)) as store:
            store.save_node(node())
            modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    finally:
        os.umask(umask)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert modes == {"pool.db": 0o600, "pool.db-wal": 0o600, "pool.db-shm": 0o600}


def test_the_modes_of_what_exists_are_left_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    path = tmp_path / "pool.db"
    path.touch(0o640)
    Store.open(path).close()
    assert path.stat().st_mode & 0o777 == 0o640
    assert tmp_path.stat().st_mode & 0o777 == 0o755


def test_sqlite_runs_as_we_ask(store: Store) -> None:
    assert pragma(store, "journal_mode") == "wal"
    assert pragma(store, "synchronous") == 1
    assert pragma(store, "busy_timeout") == 5000
    assert pragma(store, "foreign_keys") == 1


def test_a_reader_sees_the_old_state_while_another_process_writes(store: Store, path: Path) -> None:
    store.save_node(node())
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("DELETE FROM node")
        assert len(store.known_nodes()) == 1
        other.execute("COMMIT")
    assert store.known_nodes() == []


def test_migrations_lead_to_the_tables(store: Store) -> None:
    with store._engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []
        assert context.get_current_heads() == (REVISIONS[-1],)


def test_the_revisions_are_the_files() -> None:
    scripts = ScriptDirectory(str(Path(database.__file__).with_name("migrations")))
    walked = [script.revision for script in scripts.walk_revisions()]
    assert walked == list(reversed(REVISIONS))


def test_the_rows_mirror_the_wire_types() -> None:
    assert set(NodeRow.model_fields) == set(KnownNode.model_fields)
    assert set(InstanceRow.model_fields) == set(InstanceInfo.model_fields) | {"node_id"}
    assert set(RouteRow.model_fields) == set(RouteRecord.model_fields) | {"id", "node_id"}


def test_it_remembers_after_it_was_closed(path: Path) -> None:
    with closing(Store.open(path)) as store:
        store.save_node(node())
        store.add_routes([("n1", route("a"))])
    with closing(Store.open(f"sqlite:///{path}")) as store:
        assert store.known_nodes() == [node()]
        assert store.routes() == [route("a")]


def test_an_up_to_date_store_opens_at_once_and_without_alembic(path: Path) -> None:
    Store.open(path).close()
    code = (
        "import sys, time; from llmster_control.store.store import Store\n"
        "began = time.monotonic()\n"
        f"Store.open({str(path)!r}).close()\n"
        "took = time.monotonic() - began\n"
        "assert 'alembic' not in sys.modules; assert took < 0.15, took"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_any_character_can_be_in_the_path(tmp_path: Path) -> None:
    with closing(Store.open(tmp_path / "50%(x)s" / "pool ?#.db")) as store:
        store.save_node(node())
    assert (tmp_path / "50%(x)s" / "pool ?#.db").stat().st_size


def test_two_that_open_a_new_store_at_once_both_can(path: Path) -> None:
    opened: list[Store] = []
    threads = [threading.Thread(target=lambda: opened.append(Store.open(path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for store in opened:
        store.close()
    assert len(opened) == 4


def test_a_store_in_memory_is_one_for_all_threads() -> None:
    with closing(Store.open("sqlite://")) as store:
        thread = threading.Thread(target=lambda: store.save_node(node()))
        thread.start()
        thread.join()
        assert store.known_nodes() == [node()]


def test_a_closed_store_does_not_open_itself_again(path: Path) -> None:
    store = Store.open(path)
    store.close()
    for call in (store.known_nodes, lambda: store.save_node(node())):
        with pytest.raises(RuntimeError, match="closed"):
            call()


# What can be wrong with the database


def test_a_newer_database_is_refused_untouched(path: Path) -> None:
    Store.open(path).close()
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("UPDATE alembic_version SET version_num = '9999'")
    before = path.read_bytes()
    with pytest.raises(LlmsterError) as raised:
        Store.open(path)
    assert raised.value.code == "store_newer"
    assert "9999" in raised.value.message
    assert "upgrade llmster" in raised.value.hint
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"text" * 2000, b"\0" * 8192], ids=["text", "zeros"])
def test_a_file_that_is_no_database(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(HomeError) as raised:
        Store.open(path)
    assert raised.value.code == "store_corrupt"
    assert f"mv {path}" in raised.value.hint
    assert path.read_bytes() == content


def test_a_database_that_was_damaged_within(path: Path) -> None:
    with closing(Store.open(path)) as store:
        store.add_routes([("n1", route(f"r{n}", at=n)) for n in range(1000)])
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (size - 4096))
    with pytest.raises(HomeError) as raised, closing(Store.open(path)) as store:
        store.routes()
    assert raised.value.code == "store_corrupt"


def test_a_database_of_another_program_with_such_a_table(path: Path) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("CREATE TABLE node (x)")
    with pytest.raises(HomeError) as raised:
        Store.open(path)
    assert raised.value.code == "store_corrupt"


def test_values_that_we_never_write(store: Store) -> None:
    store.save_node(node())
    with store._writer.begin() as connection:
        connection.exec_driver_sql("UPDATE node SET role = 'chef'")
    with pytest.raises(HomeError) as raised:
        store.known_nodes()
    assert raised.value.code == "store_corrupt"


def test_a_folder_under_a_regular_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HomeError) as raised:
        Store.open(tmp_path / "file" / "home" / "pool.db")
    assert raised.value.code == "home_read_only"
    assert "Not a directory" in raised.value.message


def test_a_folder_in_the_place_of_the_file(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(HomeError) as raised:
        Store.open(path)
    assert raised.value.code == "home_read_only"


@needs_root
@pytest.mark.parametrize("exists", [False, True])
def test_a_read_only_disk(mount: Mount, exists: bool) -> None:
    disk = mount("size=1m")
    if exists:
        Store.open(disk / "pool.db").close()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(HomeError) as raised:
        Store.open(disk / "pool.db")
    assert raised.value.code == "home_read_only"
    assert "writable" in raised.value.hint


@needs_root
@pytest.mark.parametrize("options", ["size=4k", "size=32k", "size=64k", "size=1m,nr_inodes=1"])
def test_a_disk_too_small_for_a_new_store(mount: Mount, options: str) -> None:
    with pytest.raises(HomeError) as raised:
        Store.open(mount(options) / "pool.db")
    assert raised.value.code == "disk_full"
    assert "free space" in raised.value.hint


@needs_root
def test_a_disk_that_fills_up_loses_nothing_that_was_written(mount: Mount) -> None:
    disk = mount("size=600k")
    written = 0
    with closing(Store.open(disk / "pool.db")) as store:
        with pytest.raises(HomeError) as raised:
            while True:
                many = [("n1", route(f"r{written + n}", reason="x" * 100)) for n in range(100)]
                store.add_routes(many)
                written += 100
        assert raised.value.code == "disk_full"
        assert written > 0
        assert [used.requests for used in store.usage()] == [written]
        assert len(store.routes(limit=1 << 20)) == written


def test_a_lock_held_too_long(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.01)
    with closing(Store.open(path)) as store:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(Unavailable) as raised:
                store.save_node(node())
            assert raised.value.code == "store_busy"
        store.save_node(node())
        assert store.known_nodes() == [node()]


@pytest.mark.parametrize("url", ["://", "nonsense://host/db", "postgresql+nodriver://host/db"])
def test_a_url_that_means_nothing(url: str) -> None:
    with pytest.raises(BadRequest) as raised:
        Store.open(url)
    assert raised.value.code == "bad_store_url"


# What it keeps


def test_nodes_are_saved_replaced_and_forgotten(store: Store) -> None:
    store.save_node(node("n2", "b"))
    store.save_node(node("n1", "a"))
    changed = node("n2", "b").model_copy(update={"draining": True, "role": "decode"})
    store.save_node(changed)
    assert store.known_nodes() == [node("n1", "a"), changed]
    store.forget_node("n1")
    store.forget_node("never known")
    assert store.known_nodes() == [changed]


def test_instances_are_replaced_and_go_with_their_node(store: Store) -> None:
    store.save_node(node("n1"))
    store.save_node(node("n2"))
    full = instance("i2", progress=0.5, pid=7, kv_used_cells=1 << 33, reason="it\ndied")
    store.save_instances("n1", [instance("i1"), full])
    store.save_instances("n2", [instance("i1", state="failed")])
    assert store.instances("n1") == [instance("i1"), full]
    store.save_instances("n1", [full])
    assert store.instances("n1") == [full]
    store.save_instances("n1", [])
    assert store.instances("n1") == []
    store.forget_node("n2")
    assert store.instances("n2") == []


def test_instances_of_an_unknown_node_are_not_kept(store: Store) -> None:
    store.save_instances("gone", [instance()])
    assert store.instances("gone") == []


def test_routes_come_back_whole_and_newest_first(store: Store) -> None:
    whole = route(
        "a",
        at=5.5,
        kind="split",
        prefill_node="n1",
        decode_node="n2",
        reason="long prompt",
        attempts=2,
        prompt_tokens=4096,
        completion_tokens=7,
        ttft_s=0.25,
        tpot_s=0.01,
        duration_s=1.5,
        kv_bytes=1 << 40,
        handover_s=0.125,
        status="failed",
        error_code="engine_lost",
    )
    store.add_routes([("n1", route("old", at=1)), ("n2", whole), ("n1", route("mid", at=2))])
    store.add_routes([(None, route("late", at=3, kind="none"))])
    assert [found.request_id for found in store.routes()] == ["a", "late", "mid", "old"]
    assert [found.request_id for found in store.routes(limit=2)] == ["a", "late"]
    assert store.routes(limit=0) == []
    assert store.routes(request_id="a") == [whole]
    assert store.routes(request_id="b") == []


def test_usage_is_by_model_and_node_with_the_nodes_present_name(store: Store) -> None:
    store.save_node(node("n1", "ws-1"))
    counted = {"prompt_tokens": 10, "completion_tokens": 2, "kv_bytes": 100}
    store.add_routes([("n1", route("a", **counted)), ("n1", route("b", **counted))])
    store.add_routes([("n1", route("c", status="failed")), ("n1", route("d", status="cancelled"))])
    store.add_routes([("n2", route("e", model="l")), (None, route("f", kind="none"))])
    none = {"failed": 0, "prompt_tokens": 0, "completion_tokens": 0, "kv_bytes": 0}
    expected = UsageView(
        model="m",
        node="ws-1",
        requests=4,
        failed=1,
        prompt_tokens=20,
        completion_tokens=4,
        kv_bytes=200,
    )
    assert store.usage() == [
        UsageView(model="l", node="n2", requests=1, **none),
        UsageView(model="m", node="", requests=1, **none),
        expected,
    ]
    store.forget_node("n1")
    assert expected.model_copy(update={"node": "n1"}) in store.usage()


def test_a_route_told_twice_counts_once_and_the_last_word_holds(store: Store) -> None:
    store.add_routes([("n1", route("a", status="failed", prompt_tokens=5)), ("n1", route("b"))])
    store.add_routes([("n1", route("b")), ("n2", route("a", prompt_tokens=7))])
    store.add_routes([("n2", route("a", prompt_tokens=9)), ("n2", route("a", prompt_tokens=7))])
    assert store.routes(request_id="a") == [route("a", prompt_tokens=7)]
    assert [(u.node, u.requests, u.failed, u.prompt_tokens) for u in store.usage()] == [
        ("n1", 1, 0, 0),
        ("n2", 1, 0, 7),
    ]


def test_a_value_that_does_not_fit_stores_nothing_of_its_batch(store: Store) -> None:
    with pytest.raises(OverflowError):
        store.add_routes([("n1", route("a")), ("n1", route("b", kv_bytes=1 << 64))])
    assert store.routes() == []
    assert store.usage() == []


def test_pruning_keeps_the_newest_and_the_usage(store: Store) -> None:
    store.add_routes([("n1", route(f"r{n}", at=n // 2)) for n in range(10)])
    assert store.prune_routes() == 0
    assert store.prune_routes(keep=3) == 7
    assert [found.request_id for found in store.routes()] == ["r9", "r8", "r7"]
    assert store.prune_routes(keep=0) == 3
    assert [used.requests for used in store.usage()] == [10]


def test_two_stores_and_four_threads_write_at_once(store: Store, path: Path) -> None:
    errors: list[BaseException] = []

    def write(target: Store, who: str) -> None:
        try:
            for n in range(25):
                target.save_node(node(who, last_seen_at=n))
                target.save_instances(who, [instance(f"i{n}")])
                target.add_routes([("shared", route(f"{who}-{n}")), ("shared", route(f"all-{n}"))])
                target.usage()
        except BaseException as error:
            errors.append(error)

    with closing(Store.open(path)) as other:
        threads = [
            threading.Thread(target=write, args=(target, f"{who}{place}"))
            for place, target in enumerate((store, other))
            for who in "ab"
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []
    assert [used.requests for used in store.usage()] == [4 * 25 + 25]
    assert {known.last_seen_at for known in store.known_nodes()} == {24}
    assert store.instances("a0") == [instance("i24")]


def test_ten_thousand_routes_take_well_under_the_time_they_took_to_serve(store: Store) -> None:
    many = [("n1", route(f"r{n}", at=n, prompt_tokens=1)) for n in range(10_000)]
    began = time.monotonic()
    for first in range(0, len(many), 1000):
        store.add_routes(many[first : first + 1000])
    # About 0.3 s on two slow cores; the bound is only there to catch a row at a time.
    assert time.monotonic() - began < 5
    assert [used.prompt_tokens for used in store.usage()] == [10_000]


def test_a_database_server_that_does_not_answer_is_named() -> None:
    place = database.place_of("postgresql://ann:secret@db/pool")
    refused = OperationalError("SELECT 1", None, ConnectionRefusedError("refused"))
    with pytest.raises(Unavailable) as raised, database.database_errors(place):
        raise refused
    assert raised.value.code == "store_unreachable"
    assert "secret" not in str(raised.value)


def test_our_own_mistakes_are_not_put_down_to_the_database(store: Store) -> None:
    with pytest.raises(OperationalError), store._reading() as session:
        session.execute(text("SELECT nonsense"))
