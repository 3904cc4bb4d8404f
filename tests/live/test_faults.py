"""What a bad day looks like: processes die, hang and come back; homes fill up; ports are taken."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from fakes.local_pool import CLI, PoolOnDisk, free_ports, running_pool, text_of, until

pytestmark = pytest.mark.live


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, sample_cache: Path) -> Iterator[PoolOnDisk]:
    with running_pool(tmp_path_factory.mktemp("faults"), sample_cache, nodes=2) as running:
        yield running


def test_a_killed_engine_is_noticed_shown_and_started_again(pool: PoolOnDisk) -> None:
    before = pool.instance("node-1")
    os.kill(before["pid"], signal.SIGKILL)
    seen = until(
        lambda: (i := pool.instance("node-1")) and i["state"] != "ready" and i, 5, "noticed"
    )
    assert seen["state"] in ("backoff", "starting", "loading")
    after = until(
        lambda: (i := pool.instance("node-1")) and i["state"] == "ready" and i, 20, "back"
    )
    assert after["pid"] != before["pid"]
    assert after["restarts"] == before["restarts"] + 1
    assert "Paris" in text_of(pool.capital())


def test_a_request_survives_the_death_of_every_engine_before_its_first_token(
    pool: PoolOnDisk,
) -> None:
    for node in ("node-1", "node-2"):
        os.kill(pool.instance(node)["pid"], signal.SIGKILL)
    assert "Paris" in text_of(pool.capital())
    pool.until_serving()


def test_a_stream_whose_engine_dies_ends_with_an_error_event(pool: PoolOnDisk) -> None:
    body = {
        "model": "smollm2-135m-instruct",
        "messages": [{"role": "user", "content": "Count from one to a thousand."}],
        "max_tokens": 3000,
        "stream": True,
        "temperature": 0,
    }
    with pool.http.stream("POST", f"{pool.url(1)}/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        for _ in range(6):
            next(lines)
        os.kill(pool.instance("node-1")["pid"], signal.SIGKILL)
        rest = [line for line in lines if line]
    assert '"code":"engine_lost"' in rest[-1].replace(": ", ":")
    pool.until_serving()


def test_a_killed_daemon_comes_back_and_finds_its_engine(pool: PoolOnDisk) -> None:
    engine, daemon = pool.instance("node-2")["pid"], pool.pid("node-2")
    os.kill(daemon, signal.SIGKILL)
    until(lambda: pool.pid("node-2") != daemon, 10, "started again")
    pool.until_serving()
    assert pool.instance("node-2")["pid"] == engine
    assert "Paris" in text_of(pool.capital(pool.url(2)))


def test_a_silent_node_becomes_suspect_then_lost_and_comes_back_by_itself(
    pool: PoolOnDisk,
) -> None:
    daemon = pool.pid("node-2")
    os.kill(daemon, signal.SIGSTOP)
    try:
        until(lambda: pool.node("node-2")["liveness"] == "suspect", 6, "suspect")
        assert pool.capital(pool.control).headers["x-llmster-route"].endswith('"node-1"')
        until(lambda: pool.node("node-2")["liveness"] == "lost", 12, "lost")
        for _ in range(3):
            route = pool.capital(pool.control).headers["x-llmster-route"]
            assert route == 'colocated;node="node-1"'
    finally:
        os.kill(daemon, signal.SIGCONT)
    until(lambda: pool.node("node-2")["liveness"] == "online", 15, "online again")


def test_nodes_serve_without_a_control_plane_and_join_it_again(pool: PoolOnDisk) -> None:
    before = pool.pid("control")
    os.kill(before, signal.SIGKILL)
    assert "Paris" in text_of(pool.capital(pool.url(1)))
    until(lambda: pool.pid("control") != before, 10, "started again")
    pool.until_serving()
    assert "Paris" in text_of(pool.capital(pool.control))
    # What was known before is known again: the store outlives the process.
    assert pool.json("routes", "-n", "50")


def test_a_second_daemon_in_the_same_home_is_refused(pool: PoolOnDisk) -> None:
    home = pool.home / "nodes" / "node-1"
    done = subprocess.run(
        [*CLI, "daemon", "--home", str(home), "--port", str(free_ports(1)[0])],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "another daemon runs in" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_named_with_a_hint(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [*CLI, "up", "--home", str(tmp_path / "home"), "--port", str(port), "--no-sample"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    assert f":{port}" in done.stderr
    assert "hint:" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_home_is_named_with_a_hint(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    home = tmp_path / "full"
    home.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(home)], check=True)
    try:
        (home / "filler").write_bytes(b"x" * 60_000)
        done = subprocess.run(
            [*CLI, "up", "--home", str(home), "--port", str(free_ports(1)[0])],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        subprocess.run(["umount", str(home)], check=True)
    assert done.returncode == 1
    assert str(home) in done.stderr
    assert "hint:" in done.stderr
    assert "Traceback" not in done.stderr


def test_down_cleans_up_after_a_killed_supervisor_and_up_is_quick(
    tmp_path: Path, sample_cache: Path
) -> None:
    home = tmp_path / "home"
    with running_pool(home, sample_cache) as pool:
        engine = pool.instance("node-1")["pid"]
        os.kill(pool.pid("up"), signal.SIGKILL)
        pool.cli("down")
        for pid in (engine,):
            until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), 5, "engine gone")
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{pool.control}/pool/v1/state", trust_env=False)
        begun = time.monotonic()
        pool.start()
        # The target is 5 s on an idle machine; a busy CI machine is given some room.
        assert time.monotonic() - begun < 10
        assert "Paris" in text_of(pool.capital())
