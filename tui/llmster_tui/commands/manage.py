"""Commands that change the pool: load, unload, import, drain, role."""

import socket
from pathlib import Path
from typing import Annotated, Any

import typer

from llmster_tui.commands.options import DEFAULT_CONTROL, AsJson, Control, ask, print_json

Node = Annotated[
    str | None, typer.Option("--node", help="Name of the node; otherwise the pool chooses.")
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(load)
    app.command()(unload)
    app.command("import")(import_file)
    app.command()(drain)
    app.command()(role)


def load(
    model: Annotated[str, typer.Argument(help="Key of the model; `llmster ls` lists them.")],
    node: Node = None,
    context: Annotated[
        int | None, typer.Option("--context", min=16, help="Context length in tokens.")
    ] = None,
    slots: Annotated[
        int, typer.Option("--slots", min=1, max=256, help="Requests served at once.")
    ] = 16,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads; all by default.")
    ] = None,
    gpu_layers: Annotated[
        int, typer.Option("--gpu-layers", min=-1, help="Layers on the GPU; -1 is all.")
    ] = -1,
    prefix_cache: Annotated[
        bool,
        typer.Option(
            "--prefix-cache", help="Keep the KV of ended requests for prompts that begin alike."
        ),
    ] = False,
    control: Control = DEFAULT_CONTROL,
    as_json: AsJson = False,
) -> None:
    """Load a model so that it can be asked; returns when it is ready."""
    from llmster_control.protocol import LoadRequest
    from llmster_daemon.protocol.node import LoadOptions

    options = LoadOptions(
        context_length=context,
        slots=slots,
        threads=threads,
        gpu_layers=gpu_layers,
        prefix_cache=prefix_cache,
    )
    request = LoadRequest(model=model, node=node, options=options)
    result = _with_status(
        f"loading {model}", as_json, lambda: ask(control, lambda client: client.load(request))
    )
    if as_json:
        print_json(result)
    else:
        instance = result["instance"]
        typer.echo(
            f"{instance['id']} is ready on {result['node']}:"
            f" {instance['context_length']:,} tokens of context, {instance['slots']} slots"
        )


def unload(
    target: Annotated[str, typer.Argument(help="An instance, or a model for all of it.")],
    node: Node = None,
    control: Control = DEFAULT_CONTROL,
    as_json: AsJson = False,
) -> None:
    """Unload an instance, or all instances of a model."""
    from llmster_control.protocol import UnloadRequest

    request = UnloadRequest(target=target, node=node)
    result = ask(control, lambda client: client.unload(request))
    if as_json:
        print_json(result)
    else:
        for gone in result["unloaded"]:
            typer.echo(f"{gone['instance']} is unloaded on {gone['node']}")


def import_file(
    file: Annotated[Path, typer.Argument(help="A GGUF file on this machine.")],
    node: Node = None,
    control: Control = DEFAULT_CONTROL,
    as_json: AsJson = False,
) -> None:
    """Copy a GGUF file into the model store of the nodes on this machine."""
    from llmster_control.protocol import ImportRequest

    hostname = None if node else socket.gethostname()
    request = ImportRequest(path=str(file.absolute()), node=node, hostname=hostname)
    result = _with_status(
        f"importing {file.name}",
        as_json,
        lambda: ask(control, lambda client: client.import_file(request)),
    )
    if as_json:
        print_json(result)
    else:
        for entry in result["imported"]:
            typer.echo(f"{entry['model']['key']} is in the store of {entry['node']}")
        key = result["imported"][0]["model"]["key"]
        typer.echo(f"load it with `llmster load {key}`")


def drain(
    node: Annotated[str, typer.Argument(help="Name of the node.")],
    undo: Annotated[bool, typer.Option("--undo", help="Give it requests again.")] = False,
    control: Control = DEFAULT_CONTROL,
    as_json: AsJson = False,
) -> None:
    """Give a node no new requests; those under way end there."""
    from llmster_control.protocol import NodePatch

    patch = NodePatch(draining=not undo)
    view = ask(control, lambda client: client.patch_node(node, patch))
    if as_json:
        print_json(view)
    else:
        typer.echo(f"{view.name} {'is draining' if view.draining else 'takes requests'}")


def role(
    node: Annotated[str, typer.Argument(help="Name of the node.")],
    new_role: Annotated[str, typer.Argument(metavar="ROLE", help="prefill, decode or mixed.")],
    control: Control = DEFAULT_CONTROL,
    as_json: AsJson = False,
) -> None:
    """Give a node another role. Nothing is loaded again."""
    from llmster_control.protocol import NodePatch
    from llmster_daemon.errors import BadRequest

    if new_role not in ("prefill", "decode", "mixed"):
        raise BadRequest("bad_role", f"there is no role '{new_role}'", "prefill, decode or mixed")
    patch = NodePatch.model_validate({"role": new_role})
    view = ask(control, lambda client: client.patch_node(node, patch))
    if as_json:
        print_json(view)
    else:
        typer.echo(f"{view.name} has the role {view.role}")


def _with_status(text: str, quiet: bool, work: Any) -> Any:
    """Show that something takes time, where a person looks."""
    from rich.console import Console

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        return work()
    with console.status(text + " ..."):
        return work()
