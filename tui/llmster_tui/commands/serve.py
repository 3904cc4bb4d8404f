"""Commands that start and stop things: up, down, demo, control, daemon."""

import asyncio
import logging
import socket
import sys
from pathlib import Path
from typing import Annotated, cast

import typer

from llmster_tui.commands.options import DEFAULT_CONTROL, DEFAULT_HOME, AsJson, Home, print_json


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (up, down, demo, control, daemon):
        app.command()(command)


def up(
    nodes: Annotated[int, typer.Option("--nodes", min=1, max=64, help="Node daemons.")] = 1,
    roles: Annotated[
        str, typer.Option("--roles", help="Roles of the nodes, in order: prefill,decode")
    ] = "",
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return when the pool is ready.")
    ] = False,
    sample: Annotated[
        bool, typer.Option("--sample/--no-sample", help="Fetch and load the sample model.")
    ] = True,
    port: Annotated[
        int, typer.Option("--port", min=1, max=65000, help="Port of the first node.")
    ] = 1234,
    control_port: Annotated[
        int, typer.Option("--control-port", min=1, max=65535, help="Port of the control plane.")
    ] = 1240,
    home: Home = DEFAULT_HOME,
    ready_file: Annotated[Path | None, typer.Option("--ready-file", hidden=True)] = None,
) -> None:
    """Start a control plane and nodes on this machine, with a sample model, and supervise them."""
    from llmster_daemon.errors import BadRequest
    from llmster_daemon.protocol.base import Role
    from llmster_tui.local.layout import Layout, living, read_record
    from llmster_tui.local.up import detach as run_detached
    from llmster_tui.local.up import print_line, run_up

    names = [name.strip() for name in roles.split(",") if name.strip()]
    wrong = [name for name in names if name not in ("prefill", "decode", "mixed")]
    if wrong or len(names) > nodes:
        raise BadRequest(
            "bad_roles",
            f"--roles {roles}: at most one of prefill, decode, mixed for each of {nodes} node(s)",
            "for example `llmster up --nodes 2 --roles prefill,decode`",
        )
    layout = Layout(
        home.absolute(), nodes, port, control_port, tuple(cast("Role", name) for name in names)
    )
    record = read_record(layout.home)
    if detach and record is not None and {"up", "control"} <= set(living(record)):
        print_line(f"running already: {record['endpoint']} (stop it with `llmster down`)")
        return
    if detach:
        argv = ["up", "--nodes", str(nodes), "--port", str(port), "--home", str(layout.home)]
        argv += ["--control-port", str(control_port)]
        argv += ["--roles", roles] if roles else []
        argv += [] if sample else ["--no-sample"]
        run_detached(layout, argv, print_line)
        return
    _log_to_stderr(logging.WARNING)
    asyncio.run(run_up(layout, sample, print_line, ready_file))


def down(home: Home = DEFAULT_HOME, as_json: AsJson = False) -> None:
    """Stop what `llmster up` started: nodes, their engines and the control plane."""
    from llmster_tui.local.down import stop_pool

    stopped = stop_pool(home.absolute())
    if as_json:
        print_json({"stopped": stopped})
    else:
        typer.echo(f"stopped: {', '.join(stopped)}" if stopped else "nothing was running")


def demo(
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, max=512, help="Length of each answer.")
    ] = 32,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
    svg: Annotated[
        Path | None, typer.Option("--svg", help="Also write the table as a picture.")
    ] = None,
) -> None:
    """Start a throw-away pool of two nodes, and compare colocated with split serving."""
    from llmster_tui.local.demo import run_demo

    def say(text: str) -> None:
        typer.echo(text, err=True)

    _log_to_stderr(logging.WARNING)
    found = asyncio.run(run_demo(tokens, home.absolute() / "cache", say))
    if as_json:
        print_json(
            [
                {"prompt": c.name, "colocated": c.colocated, "split": c.split, "equal": c.equal}
                for c in found
            ]
        )
        return
    from llmster_tui.local.demo_table import show

    show(found, svg)


def control(
    home: Home = DEFAULT_HOME / "control",
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")
    ] = 1240,
    store: Annotated[
        str | None, typer.Option("--store", help="SQLAlchemy URL; SQLite in the home otherwise.")
    ] = None,
) -> None:
    """Run the control plane of a pool in the foreground."""
    from llmster_control.app import ControlConfig, run_control

    _log_to_stderr(logging.INFO)
    asyncio.run(run_control(ControlConfig(home.absolute(), host, port, store)))


def daemon(
    home: Home = DEFAULT_HOME / "node",
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")
    ] = 1234,
    name: Annotated[
        str | None, typer.Option("--name", help="Name in the pool; the host's name otherwise.")
    ] = None,
    role: Annotated[str, typer.Option("--role", help="prefill, decode or mixed.")] = "mixed",
    control_url: Annotated[
        str, typer.Option("--control", envvar="LLMSTER_CONTROL", help="URL of the control plane.")
    ] = DEFAULT_CONTROL,
    alone: Annotated[bool, typer.Option("--alone", help="Join no pool.")] = False,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads per engine.")
    ] = None,
) -> None:
    """Run the node daemon of this machine in the foreground.

    SIGTERM leaves the engines running for the next daemon; Ctrl-C (SIGINT) stops them.
    """
    from llmster_daemon.app import default_threads, run_daemon
    from llmster_daemon.config import NodeConfig
    from llmster_daemon.errors import BadRequest
    from llmster_daemon.protocol.base import Role

    if role not in ("prefill", "decode", "mixed"):
        raise BadRequest("bad_role", f"there is no role '{role}'", "prefill, decode or mixed")
    _log_to_stderr(logging.INFO)
    config = NodeConfig(
        home=home.absolute(),
        name=name or socket.gethostname(),
        role=cast("Role", role),
        host=host,
        port=port,
        control_url=None if alone else control_url,
        threads=threads or default_threads(),
    )
    asyncio.run(run_daemon(config))


def _log_to_stderr(level: int) -> None:
    logging.basicConfig(
        level=level,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("websockets").setLevel(logging.WARNING)
