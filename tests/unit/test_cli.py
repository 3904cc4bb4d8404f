"""The `llmster` command: what it prints, and how it fails."""

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from fakes.cli import Ran, run, run_here, run_process
from fakes.local_pool import free_ports
from fakes.pool import Pool, a_model, a_route, an_instance, running_pool
from llmster_daemon.errors import Conflict
from llmster_daemon.home import locked
from llmster_daemon.protocol.node import GpuInfo, Inventory
from llmster_tui.cli import app

COMMANDS = list(getattr(typer.main.get_command(app), "commands"))  # noqa: B009 - untyped there
ASKING = [
    ("nodes",),
    ("ps",),
    ("ls",),
    ("routes",),
    ("usage",),
    ("load", "m"),
    ("unload", "m"),
    ("import", "m.gguf"),
    ("drain", "a"),
    ("role", "a", "mixed"),
]
"""Commands that ask the control plane one thing, with what they need."""


@pytest.fixture
def refusing() -> Iterator[str]:
    """The URL of a port that nobody else gets and that refuses connections."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port on which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


# Help


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_has_help(command: str, flag: str) -> None:
    ran = run_here(command, flag)
    assert (ran.code, ran.err) == (0, "")
    assert f"Usage: llmster {command}" in ran.out


def test_the_list_of_commands_is_the_help() -> None:
    ran = run_here("--help")
    assert ran.code == 0
    for command in COMMANDS:
        assert f"│ {command} " in ran.out
    # Without a command the same is shown, and it is a mistake.
    bare = run_here()
    assert (bare.code, bare.out.split(), bare.err) == (2, ran.out.split(), "")


def test_it_tells_its_version() -> None:
    ran = run_here("--version")
    assert ran.code == 0
    assert ran.out.startswith("llmster 0.")


@pytest.mark.parametrize(
    "args",
    [("nope",), ("load",), ("routes", "--limit", "0"), ("up", "--nodes", "none"), ("ps", "--x")],
)
def test_a_wrong_option_is_exit_code_2(args: tuple[str, ...]) -> None:
    ran = run_here(*args)
    assert (ran.code, ran.out) == (2, "")
    assert "Usage: llmster" in ran.err
    assert "Traceback" not in ran.err


# Errors


@pytest.mark.parametrize("args", ASKING, ids=lambda args: args[0])
def test_without_a_control_plane_it_says_how_to_start_one(
    args: tuple[str, ...], refusing: str
) -> None:
    error, hint = run_here(*args, "--control", refusing).check_error()
    assert error == f"no control plane answers at {refusing}"
    assert hint == "run `llmster up`"


@pytest.mark.parametrize("args", ASKING, ids=lambda args: args[0])
def test_with_json_an_error_is_the_envelope(args: tuple[str, ...], refusing: str) -> None:
    ran = run_here(*args, "--control", refusing, "--json")
    assert (ran.code, ran.err) == (1, "")
    error = json.loads(ran.out)["error"]
    assert error["code"] == "control_unreachable"
    assert set(error) == {"message", "type", "param", "code", "hint"}


def test_the_address_may_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, refusing: str
) -> None:
    monkeypatch.setenv("LLMSTER_CONTROL", refusing)
    error, _ = run_here("ps").check_error()
    assert refusing in error


@pytest.mark.parametrize("url", ["nonsense", "ftp://127.0.0.1"])
def test_an_address_that_is_none_is_an_error(url: str) -> None:
    error, hint = run_here("ps", "--control", url).check_error()
    assert url in error
    assert "http://HOST:PORT" in hint


async def test_something_else_at_the_address_is_an_error() -> None:
    async def page(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 404 No\r\ncontent-length: 4\r\nconnection: close\r\n\r\n<p/>")
        writer.close()

    async with await asyncio.start_server(page, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        error, hint = (await run("ps", "--control", url)).check_error()
    assert "404" in error
    assert "control plane" in hint


def test_a_role_that_is_none_is_refused_before_anything_is_asked(refusing: str) -> None:
    error, hint = run_here("role", "a", "cook", "--control", refusing).check_error()
    assert error == "there is no role 'cook'"
    assert hint == "prefill, decode or mixed"


async def test_the_pools_errors_are_shown_as_they_are(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        node = await pool.join("a")
        node.failing["load"] = Conflict("no_memory", "it does not fit", "unload another")
        ran = await run("load", "m", "--control", pool.url)
        assert ran.check_error() == ("it does not fit", "unload another")
        error, hint = (await run("drain", "x", "--control", pool.url)).check_error()
        assert error == "there is no node 'x' (nodes: a)"
        assert hint == "run `llmster nodes`"
        ran = await run("load", "m", "--control", pool.url, "--json")
        assert (ran.code, json.loads(ran.out)) == (1, node.failing["load"].envelope())


def test_a_reader_that_leaves_gets_no_complaint() -> None:
    readable, writable = os.pipe()
    os.close(readable)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "llmster_tui.cli", "--help"],
            stdout=writable,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writable)
    assert done.stderr == b""


# Tables


async def fill(pool: Pool) -> None:
    """Two nodes, one with a GPU and an engine in trouble, and three requests."""
    gpu = GpuInfo(index=0, uuid="GPU-1", name="NVIDIA RTX 6000")
    machine = Inventory(
        hostname="ws", cpu_name="CPU", cpu_cores=8, mem_total_bytes=1 << 34, gpus=(gpu,)
    )
    trouble = an_instance(
        "big", state="backoff", pid=None, restarts=2, reason="[/red] killed by signal 9 [bold]"
    )
    await pool.join("b", role="decode", inventory=machine, instances=(an_instance(), trouble))
    node = await pool.join("a", role="prefill", models=(a_model(), a_model("n", parameters=None)))
    await node.report(
        a_route("r1", prompt_tokens=12, completion_tokens=3, ttft_s=0.25, reason="[bold]why[/]"),
        a_route("r2", kind="split", prefill_node="a", decode_node="b", kv_bytes=1 << 20),
        a_route("r3", kind="none", decode_node=None, status="failed", error_code="pool_empty"),
    )


async def test_tables_show_the_pool(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        await fill(pool)
        pool.members.set_draining(pool.members.find("a"), True)
        ran = {name: await run(name, "--control", pool.url) for (name, *more) in ASKING if not more}
        assert [(r.code, r.err) for r in ran.values()] == [(0, "")] * 5

        header, a, b = ran["nodes"].rows
        assert header[:4] == ["NODE", "STATE", "ROLE", "CPU"]
        assert a[:4] == ["a", "online (draining)", "prefill", "25%"]
        assert b[:3] == ["b", "online", "decode"]
        assert "NVIDIA RTX 6000" in b
        assert "none" in a

        header, first, second, third = ran["ps"].rows
        assert header[:4] == ["INSTANCE", "NODE", "ROLE", "STATE"]
        assert [row[:4] for row in (first, second)] == [
            ["m", "a", "prefill", "ready"],
            ["m", "b", "decode", "ready"],
        ]
        assert third[:4] == ["big", "b", "decode", "backoff"]
        # What nodes say is shown to the letter, even where it looks like markup.
        assert third[-1] == "[/red] killed by signal 9 [bold]"

        _, m, n = ran["ls"].rows
        assert (m[0], m[-1]) == ("m", "a, b")
        assert (n[0], n[-1]) == ("n", "a")
        assert "135M" in m

        _, newest, split, oldest = ran["routes"].rows
        assert newest[:3] == ["r3", "m", "none"]
        assert "failed pool_empty" in newest
        assert split[:4] == ["r2", "m", "split", "a > b"]
        assert oldest[:6] == ["r1", "m", "colocated", "a", "12", "3"]
        assert oldest[-1] == "[bold]why[/]"

        _, used = ran["usage"].rows
        assert used[:4] == ["m", "a", "3", "1"]


async def test_json_is_what_the_tables_are_made_of(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        await fill(pool)
        found = {}
        for name, *more in ASKING:
            if not more:
                ran = await run(name, "--control", pool.url, "--json")
                assert (ran.code, ran.err) == (0, "")
                found[name] = json.loads(ran.out)
        assert [node["name"] for node in found["nodes"]] == ["a", "b"]
        assert [(i["node"], i["id"]) for i in found["ps"]] == [("a", "m"), ("b", "m"), ("b", "big")]
        assert [(m["key"], m["nodes"]) for m in found["ls"]] == [("m", ["a", "b"]), ("n", ["a"])]
        assert [route["request_id"] for route in found["routes"]] == ["r3", "r2", "r1"]
        assert [(used["requests"], used["failed"]) for used in found["usage"]] == [(3, 1)]
        limited = await run("routes", "-n", "1", "--control", pool.url, "--json")
        assert [route["request_id"] for route in json.loads(limited.out)] == ["r3"]


async def test_where_there_is_nothing_it_says_what_to_do(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        for name, *more in ASKING:
            if not more:
                ran = await run(name, "--control", pool.url)
                assert (ran.code, ran.err) == (0, "")
                (line,) = ran.out.splitlines()
                assert "llmster" in line or line == "no request has been served yet"
                ran = await run(name, "--control", pool.url, "--json")
                assert json.loads(ran.out) == []


async def test_orders_say_what_was_done(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        node = await pool.join("a")
        for args, said in [
            (
                ("load", "m", "--context", "512"),
                "m is ready on a: 4,096 tokens of context, 4 slots",
            ),
            (("unload", "m"), "m is unloaded on a"),
            (("drain", "a"), "a is draining"),
            (("drain", "a", "--undo"), "a takes requests"),
            (("role", "a", "decode"), "a has the role decode"),
            (("import", "x.gguf", "--node", "a"), "new is in the store of a"),
        ]:
            ran = await run(*args, "--control", pool.url)
            assert (ran.code, ran.err, ran.out.splitlines()[0]) == (0, "", said)
            ran = await run(*args, "--control", pool.url, "--json")
            assert (ran.code, ran.err) == (0, "")
            assert isinstance(json.loads(ran.out), dict)
        assert node.orders[0].args["options"]["context_length"] == 512
        # The node reads the file: it must be told where it is, not where we are.
        (path,) = {order.args["path"] for order in node.orders if order.name == "import"}
        assert Path(path) == Path.cwd() / "x.gguf"


# Starting and stopping


@pytest.mark.parametrize("roles", ["cook", "prefill,decode", "mixed,,cook"])
def test_up_refuses_bad_roles(roles: str, tmp_path: Path) -> None:
    ran = run_process("up", "--roles", roles, "--home", str(tmp_path / "h"))
    error, hint = ran.check_error()
    assert f"--roles {roles}" in error
    assert "llmster up --nodes 2" in hint
    assert not (tmp_path / "h").exists()


@pytest.mark.parametrize("option", ["--port", "--control-port"])
@pytest.mark.parametrize("detach", [(), ("--detach",)], ids=["foreground", "detached"])
def test_up_on_a_taken_port_names_the_option(
    option: str, detach: tuple[str, ...], tmp_path: Path, taken_port: int
) -> None:
    other = "--control-port" if option == "--port" else "--port"
    home = str(tmp_path / "h")
    args = ["up", "--no-sample", option, str(taken_port), "--home", home]
    args += [other, str(free_ports(1)[0])]
    ran = run_process(*args, *detach)
    assert ran.code == 1
    error, hint = ran.err.splitlines()
    assert f"127.0.0.1:{taken_port}" in error
    assert f"`{option} N`" in hint
    assert not (tmp_path / "h" / "up.json").exists()


@pytest.mark.parametrize("detach", [(), ("--detach",)], ids=["foreground", "detached"])
def test_up_in_a_home_that_can_not_be_made_says_so(detach: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    home = tmp_path / "file" / "home"
    error, hint = run_process("up", "--no-sample", "--home", str(home), *detach).check_error()
    assert str(home) in error
    assert "--home DIR" in hint


@pytest.mark.parametrize("command", ["control", "daemon"])
def test_servers_refuse_what_others_can_reach(command: str, tmp_path: Path) -> None:
    ran = run_process(command, "--host", "0.0.0.0", home=tmp_path / "h")
    error, hint = ran.check_error()
    assert "0.0.0.0" in error
    assert "--host 127.0.0.1" in hint
    assert not (tmp_path / "h").exists()


@pytest.mark.parametrize("command", ["control", "daemon"])
def test_servers_share_neither_ports_nor_homes(
    command: str, tmp_path: Path, taken_port: int
) -> None:
    args = (command, "--port", str(taken_port), "--home", str(tmp_path))
    error, hint = run_process(*args).check_error()
    assert f"127.0.0.1:{taken_port}" in error
    assert "--port N" in hint
    with locked(tmp_path, command):
        error, hint = run_process(*args).check_error()
    assert error == f"another {command} runs in {tmp_path}"
    assert "llmster down" in hint


def test_the_daemon_refuses_a_bad_role(tmp_path: Path) -> None:
    error, _ = run_process("daemon", "--role", "cook", home=tmp_path / "h").check_error()
    assert error == "there is no role 'cook'"


DAMAGED = ["", "no json", "[]", "{}", '{"processes": 7}', '{"processes": {"up": 7}}']
DAMAGED += ['{"processes": {"up": [1]}}', '{"processes": {"up": ["x", "y"]}}']


def test_down_where_nothing_runs_is_no_error(tmp_path: Path) -> None:
    assert run_here("down", "--home", str(tmp_path)) == Ran(0, "nothing was running\n", "")
    ran = run_here("down", "--home", str(tmp_path / "missing"), "--json")
    assert (ran.code, json.loads(ran.out)) == (0, {"stopped": []})
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("record", DAMAGED)
def test_down_survives_a_damaged_record(record: str, tmp_path: Path) -> None:
    (tmp_path / "up.json").write_text(record)
    assert run_here("down", "--home", str(tmp_path)) == Ran(0, "nothing was running\n", "")
    assert not (tmp_path / "up.json").exists()


def test_down_leaves_a_later_process_of_the_same_pid_alone(tmp_path: Path) -> None:
    record = {"processes": {"up": [os.getpid(), 1], "node-1": [os.getpid(), 1]}}
    (tmp_path / "up.json").write_text(json.dumps(record))
    assert run_here("down", "--home", str(tmp_path)) == Ran(0, "nothing was running\n", "")


def test_down_below_a_file_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ran = run_here("down", "--home", str(tmp_path / "file" / "home"))
    assert ran == Ran(0, "nothing was running\n", "")
