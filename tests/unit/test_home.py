"""A node's home: made, checked, locked, remembered in; and a daemon that starts and stops in it."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fakes.node import (
    add_model,
    engine_pids,
    fill,
    load,
    managed,
    needs_root,
    new_home,
    no_engine_left,
    small_disk,
    until,
)
from llmster_daemon.app import run_daemon
from llmster_daemon.config import NodeConfig
from llmster_daemon.errors import Conflict, HomeError
from llmster_daemon.home import bind, identity, locked, prepare


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "home"


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody else listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_home_is_made_private_and_empty(home: Path) -> None:
    old_mask = os.umask(0)
    try:
        prepare(home, "models", "run")
    finally:
        os.umask(old_mask)
    assert names(home) == {"models", "run"}
    for folder in (home, home / "models", home / "run"):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_a_home_is_taken_as_it_is(home: Path) -> None:
    prepare(home, "models")
    (home / "models" / "mine").write_text("kept")
    prepare(home, "models", "logs")
    assert names(home) == {"models", "logs"}
    assert (home / "models" / "mine").read_text() == "kept"


def unusable(home: Path, code: str = "home_unwritable") -> HomeError:
    """The error of a home that can't be used, which says where it is and what to do."""
    with pytest.raises(HomeError) as caught:
        prepare(home, "models")
    assert caught.value.code == code
    assert str(home) in caught.value.message
    assert "--home" in caught.value.hint
    assert "free some space" in caught.value.hint
    return caught.value


def test_a_file_where_the_home_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "File exists" in unusable(tmp_path / "file").message
    assert "Not a directory" in unusable(tmp_path / "file" / "home").message


@needs_root
def test_a_home_that_is_read_only(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        new_home(disk / "home")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert "Read-only file system" in unusable(disk / "home").message
        assert "Read-only file system" in unusable(disk / "another").message


@needs_root
def test_a_disk_without_any_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        home = new_home(disk / "home")
        ballast = fill(disk)
        assert "No space left on device" in unusable(home).message
        with pytest.raises(HomeError, match="No space left on device"):
            identity(home)
        ballast.unlink()
        assert names(home) == {"models", "run", "logs"}
        assert re.fullmatch("[0-9a-f]{32}", identity(home))


@needs_root
def test_a_disk_with_almost_no_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "512k") as disk:
        assert "less than 1 MiB" in unusable(disk / "home", "disk_full").message


def test_a_home_serves_one_process(home: Path) -> None:
    prepare(home)
    with locked(home, "daemon"):
        with pytest.raises(Conflict) as caught, locked(home, "daemon"):
            pytest.fail("it was locked twice")
        assert (caught.value.code, caught.value.status) == ("home_in_use", 409)
        assert caught.value.message == f"another daemon runs in {home}"
        assert "llmster down" in caught.value.hint
        # A control plane may live beside a node.
        with locked(home, "control"):
            pass
    with locked(home, "daemon"):
        pass


def test_a_lock_ends_with_whatever_happens(home: Path) -> None:
    prepare(home)
    with pytest.raises(KeyError), locked(home, "daemon"):
        raise KeyError
    with locked(home, "daemon"):
        pass


def test_a_node_keeps_its_identity(home: Path) -> None:
    prepare(home)
    first = identity(home)
    assert re.fullmatch("[0-9a-f]{32}", first)
    assert identity(home) == first
    assert json.loads((home / "node.json").read_text()) == {"id": first}
    assert (home / "node.json").stat().st_mode & 0o777 == 0o600


def test_two_homes_are_two_nodes(tmp_path: Path) -> None:
    assert identity(new_home(tmp_path / "a")) != identity(new_home(tmp_path / "b"))


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'"text"',
        b'{"id": 5}',
        b'{"id": null}',
        b'{"id": "short"}',
        b'{"id": "' + b"A" * 32 + b'"}',
        b'{"id": "' + b"a" * 32 + b'\\n"}',
    ],
)
def test_a_damaged_identity_is_renewed(home: Path, damage: bytes) -> None:
    prepare(home)
    (home / "node.json").write_bytes(damage)
    made = identity(home)
    assert re.fullmatch("[0-9a-f]{32}", made)
    assert made.encode() not in damage
    assert identity(home) == made
    assert names(home) == {"node.json"}


def test_any_free_port() -> None:
    with bind("127.0.0.1", 0) as one, bind("127.0.0.1", 0) as other:
        assert one.getsockname()[1] != other.getsockname()[1]
        with socket.create_connection(one.getsockname()):
            pass


def test_a_port_in_use(taken: int) -> None:
    with pytest.raises(Conflict) as caught:
        bind("127.0.0.1", taken)
    assert caught.value.code == "port_in_use"
    assert caught.value.message == f"can't listen on 127.0.0.1:{taken}: Address already in use"
    assert "--port N" in caught.value.hint
    with pytest.raises(Conflict) as caught:
        bind("127.0.0.1", taken, "--control-port")
    assert "--control-port N" in caught.value.hint


def test_a_port_can_be_used_again_at_once() -> None:
    """Even while connections of the last daemon linger."""
    with bind("127.0.0.1", 0) as sock:
        address = sock.getsockname()
        with socket.create_connection(address), sock.accept()[0] as accepted:
            accepted.shutdown(socket.SHUT_RDWR)
    with bind(*address):
        pass


@pytest.mark.parametrize("port", [-1, 65536, 1 << 40])
def test_a_port_that_does_not_exist(port: int) -> None:
    with pytest.raises(Conflict, match=f"can't listen on 127.0.0.1:{port}"):
        bind("127.0.0.1", port)


def test_an_address_that_is_not_this_machine_s() -> None:
    with pytest.raises(Conflict, match="Cannot assign requested address"):
        bind("192.0.2.1", 0)


def test_a_daemon_that_cannot_start_says_why(home: Path, taken: int) -> None:
    def start(**config: Any) -> str:
        with pytest.raises(Conflict) as caught:
            asyncio.run(run_daemon(NodeConfig(home, "test", control_url=None, **config)))
        return caught.value.code

    assert start(host="0.0.0.0") == "needs_tls"
    assert not home.exists()
    assert start(port=taken) == "port_in_use"
    with locked(home, "daemon"):
        assert start(port=taken) == "home_in_use"


@pytest.mark.parametrize(
    ("number", "engine_lives"), [(signal.SIGTERM, True), (signal.SIGINT, False)]
)
async def test_a_daemon_ends_by_a_signal(
    home: Path, number: signal.Signals, engine_lives: bool
) -> None:
    """SIGTERM (an update, a restart) leaves its engines running, Ctrl-C does not."""
    new_home(home)
    add_model(home)
    with bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
    config = NodeConfig(home, "test", port=port, control_url=None)
    with no_engine_left(home):
        async with managed(home, stop=False) as manager:
            loaded = await load(manager)
        daemon = asyncio.create_task(run_daemon(config))
        async with httpx.AsyncClient(base_url=config.url, trust_env=False) as client:
            await until(lambda: (home / "node.json").exists(), "it starts")
            instances: list[dict[str, object]] = []
            while not any(instance["state"] == "ready" for instance in instances):
                instances = (await client.get("/node/v1/instances")).json()
            assert [instance["pid"] for instance in instances] == [loaded.pid]
            body = {"model": "tiny", "prompt": "hello", "max_tokens": 3}
            assert (await client.post("/v1/completions", json=body)).status_code == 200
        os.kill(os.getpid(), number)
        async with asyncio.timeout(10):
            await daemon
        assert engine_pids(home) == ({loaded.pid} if engine_lives else set())
        # Nothing of it is left: the next one can start.
        async with managed(home) as manager:
            with locked(home, "daemon"), bind("127.0.0.1", port):
                manager.restore()
                await until(lambda: manager.find("tiny"), "it is found again")
                assert (manager.infos()[0].pid == loaded.pid) == engine_lives
