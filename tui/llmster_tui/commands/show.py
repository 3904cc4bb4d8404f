"""Commands that look at the pool: nodes, ps, ls, routes, usage, tui."""

import asyncio
import contextlib
from typing import Annotated

import typer

from llmster_tui.commands.options import (
    DEFAULT_CONTROL,
    AsJson,
    Control,
    ask,
    print_json,
    print_table,
)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (nodes, ps, ls, routes, usage, tui):
        app.command()(command)


def nodes(control: Control = DEFAULT_CONTROL, as_json: AsJson = False) -> None:
    """List the nodes of the pool: state, role, memory, GPUs."""
    from llmster_tui.state import UNKNOWN, human_bytes, human_percent, human_s

    state = ask(control, lambda client: client.state())
    if as_json:
        print_json(list(state.nodes))
        return
    rows = []
    for node in state.nodes:
        telemetry = node.telemetry if node.liveness != "lost" else None
        gpus = ", ".join(gpu.name for gpu in node.inventory.gpus) or "none"
        total = node.inventory.mem_total_bytes
        rows.append(
            [
                node.name,
                node.liveness + (" (draining)" if node.draining else ""),
                node.role,
                human_percent(telemetry.cpu_utilisation if telemetry else None),
                f"{human_bytes(telemetry.mem_used_bytes if telemetry else None)}"
                f" / {human_bytes(total)}",
                gpus,
                str(sum(i.state == "ready" for i in node.instances)) if telemetry else UNKNOWN,
                human_s(node.last_report_s),
                node.url,
            ]
        )
    print_table(
        ["NODE", "STATE", "ROLE", ">CPU", ">MEMORY", "GPU", ">READY", ">REPORTED", "URL"],
        rows,
        "no node has joined: run `llmster up`, or `llmster daemon` on a machine",
    )


def ps(control: Control = DEFAULT_CONTROL, as_json: AsJson = False) -> None:
    """List the loaded models (instances) and how they are."""
    from llmster_tui.state import UNKNOWN

    state = ask(control, lambda client: client.state())
    found = [(node, i) for node in state.nodes for i in node.instances]
    if as_json:
        print_json([{"node": node.name, **i.model_dump(mode="json")} for node, i in found])
        return
    rows = []
    for node, i in found:
        shown = i.state if node.liveness != "lost" else f"unknown (node {node.liveness})"
        if i.progress is not None:
            shown += f" {i.progress:.0%}"
        rows.append(
            [
                i.id,
                node.name,
                node.role,
                shown,
                f"{i.active}/{i.slots}",
                str(i.waiting),
                f"{i.kv_used_cells:,}/{i.context_length:,}",
                str(i.pid or UNKNOWN),
                str(i.restarts),
                i.reason or "",
            ]
        )
    print_table(
        [
            "INSTANCE",
            "NODE",
            "ROLE",
            "STATE",
            ">ACTIVE",
            ">WAITING",
            ">KV TOKENS",
            ">PID",
            ">RESTARTS",
            "REASON",
        ],
        rows,
        "nothing is loaded: run `llmster ls`, then `llmster load KEY`",
    )


def ls(control: Control = DEFAULT_CONTROL, as_json: AsJson = False) -> None:
    """List the models on the nodes' disks."""
    from llmster_tui.state import UNKNOWN, human_bytes

    state = ask(control, lambda client: client.state())
    models: dict[tuple[str, str], list[str]] = {}
    info = {}
    for node in state.nodes:
        for model in node.models:
            models.setdefault((model.key, model.digest), []).append(node.name)
            info[model.key, model.digest] = model
    if as_json:
        print_json([{**info[k].model_dump(), "nodes": names} for k, names in models.items()])
        return
    rows = [
        [
            m.key,
            m.architecture,
            m.quantisation,
            f"{m.parameters / 1e6:,.0f}M" if m.parameters else UNKNOWN,
            human_bytes(m.size_bytes),
            f"{m.context_length:,}",
            ", ".join(models[k]),
        ]
        for k, m in sorted(info.items())
    ]
    print_table(
        ["MODEL", "ARCH", "QUANT", ">PARAMETERS", ">SIZE", ">CONTEXT", "NODES"],
        rows,
        "no node has a model: run `llmster import FILE`",
    )


def routes(
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=1, max=500, help="Requests to list.")
    ] = 20,
    control: Control = DEFAULT_CONTROL,
    as_json: AsJson = False,
) -> None:
    """List how the last requests were served, newest first."""
    from llmster_tui.state import UNKNOWN, human_bytes, human_s

    records = ask(control, lambda client: client.routes(limit))
    if as_json:
        print_json(records)
        return
    rows = []
    for r in records:
        path = r.decode_node or UNKNOWN
        if r.kind == "split":
            path = f"{r.prefill_node} > {r.decode_node}"
        rows.append(
            [
                r.request_id,
                r.model,
                r.kind,
                path,
                str(r.prompt_tokens),
                str(r.completion_tokens),
                human_s(r.ttft_s),
                human_s(r.tpot_s),
                human_bytes(r.kv_bytes) if r.kv_bytes else UNKNOWN,
                human_s(r.handover_s),
                r.status if r.status == "ok" else f"{r.status} {r.error_code or ''}".strip(),
                r.reason,
            ]
        )
    print_table(
        [
            "REQUEST",
            "MODEL",
            "KIND",
            "NODES",
            ">PROMPT",
            ">ANSWER",
            ">TTFT",
            ">TPOT",
            ">KV",
            ">HAND-OVER",
            "STATUS",
            "REASON",
        ],
        rows,
        "no request has been served yet",
    )


def usage(control: Control = DEFAULT_CONTROL, as_json: AsJson = False) -> None:
    """Show what each model on each node has done."""
    from llmster_tui.state import UNKNOWN, human_bytes

    views = ask(control, lambda client: client.usage())
    if as_json:
        print_json(views)
        return
    rows = [
        [
            v.model,
            v.node,
            f"{v.requests:,}",
            f"{v.failed:,}",
            f"{v.prompt_tokens:,}",
            f"{v.completion_tokens:,}",
            human_bytes(v.kv_bytes) if v.kv_bytes else UNKNOWN,
        ]
        for v in views
    ]
    print_table(
        ["MODEL", "NODE", ">REQUESTS", ">FAILED", ">PROMPT", ">ANSWER", ">KV HANDED OVER"],
        rows,
        "no request has been served yet",
    )


def tui(control: Control = DEFAULT_CONTROL) -> None:
    """Watch and steer the pool on one screen."""
    from llmster_tui.app import PoolApp
    from llmster_tui.client import PoolClient

    async def run() -> None:
        async with PoolClient(control) as client:
            await PoolApp(client).run_async()

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run())
