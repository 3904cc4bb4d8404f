"""Renders the console for a made-up busy pool: `docs/images/tui.svg`, as the README shows it.

python scripts/screenshot.py [PATH]
"""

import asyncio
import sys
from pathlib import Path
from typing import Any, NoReturn

from llmster_control.protocol import Liveness, NodeView, PoolState
from llmster_daemon.errors import Unavailable
from llmster_daemon.protocol.base import Role
from llmster_daemon.protocol.node import (
    GpuInfo,
    GpuReading,
    InstanceInfo,
    Inventory,
    ModelInfo,
    RouteRecord,
    Telemetry,
)
from llmster_tui.app import PoolApp

SIZE = (120, 36)
AT = 1_760_000_000.0
GIB = 1 << 30


class StillPool:
    """A pool in which nothing happens."""

    def __init__(self, state: PoolState) -> None:
        self._state = state

    async def state(self) -> PoolState:
        return self._state

    async def load(self, request: Any) -> NoReturn:
        raise Unavailable("made_up", "this pool is made up")

    async def unload(self, request: Any) -> NoReturn:
        raise Unavailable("made_up", "this pool is made up")

    async def patch_node(self, name: str, patch: Any) -> NoReturn:
        raise Unavailable("made_up", "this pool is made up")


def export_screenshot(state: PoolState, path: Path) -> None:
    """Writes the screen that shows this state as an SVG file."""

    async def render() -> str:
        app = PoolApp(StillPool(state), interval_s=3600)
        async with app.run_test(size=SIZE) as pilot:
            await app.refresh_pool()
            await pilot.pause()
            return app.export_screenshot(title="llmster tui", simplify=True)

    svg = asyncio.run(render())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(svg, encoding="utf-8")


def busy_pool() -> PoolState:
    """Five machines at work: one drains, one is lost, one engine failed, one is loading."""
    rtx, a100 = "NVIDIA GeForce RTX 4090", "NVIDIA A100-SXM4-40GB"
    return PoolState(
        at=AT,
        version="0.1.0",
        gateway_url="http://127.0.0.1:1234/v1",
        nodes=(
            _node("ws-1", "prefill", ("AMD Ryzen 9 7950X", 16, 64), (rtx, 24), 0.79, 0.94, 0.21)(
                _instance("qwen3-8b-q4_k_m", slots=16, active=6, waiting=1),
                _instance("smollm2-135m-instruct", slots=16, active=2),
            ),
            _node("ws-2", "decode", ("AMD Ryzen 9 7950X", 16, 64), (rtx, 24), 0.92, 0.58, 0.12)(
                _instance("qwen3-8b-q4_k_m", slots=32, active=23),
            ),
            _node(
                "a100", "mixed", ("AMD EPYC 7543", 32, 512), (a100, 40, 40), 0.41, 0.33, 0.08,
                draining=True,
            )(
                _instance("qwen3-32b-q5_k_m", "loading", progress=0.62),
                _instance("qwen3-8b-q4_k_m", slots=16, active=1),
            ),
            _node(
                "laptop", "mixed", ("Intel Core Ultra 7 165U", 12, 32), None, 0.71, None, 0.44,
                liveness="suspect", last_report_s=4.2,
            )(
                _instance("smollm2-135m-instruct", slots=4, active=1),
                _instance(
                    "qwen3-8b-q4_k_m", "failed", restarts=5, reason="the engine ran out of memory"
                ),
            ),
            _node(
                "h100-rented", "decode", ("Intel Xeon 8480C", 26, 220), ("NVIDIA H100 80GB", 80),
                0.5, 0.5, 0.1, liveness="lost", last_report_s=154,
            )(_instance("qwen3-32b-q5_k_m", slots=64, active=0)),
        ),
        routes=_routes(),
    )  # fmt: skip


def _node(
    name: str,
    role: Role,
    machine: tuple[str, int, int],
    gpus: tuple[Any, ...] | None,
    memory: float,
    gpu: float | None,
    cpu: float,
    liveness: Liveness = "online",
    draining: bool = False,
    last_report_s: float = 0.4,
) -> Any:
    """A node without its instances: call it with them."""
    cpu_name, cores, ram_gib = machine
    card, *sizes = gpus or ("",)
    keys = ("qwen3-32b-q5_k_m", "qwen3-8b-q4_k_m", "smollm2-135m-instruct")
    bare = NodeView(
        id=f"node-{name}",
        name=name,
        role=role,
        liveness=liveness,
        draining=draining,
        url=f"https://{name}:1234",
        home="/var/lib/llmster",
        version="0.1.0",
        last_report_s=last_report_s,
        inventory=Inventory(
            hostname=name,
            cpu_name=cpu_name,
            cpu_cores=cores,
            mem_total_bytes=ram_gib * GIB,
            gpus=tuple(
                GpuInfo(index=i, uuid=f"{name}-{i}", name=card, mem_total_bytes=size * GIB)
                for i, size in enumerate(sizes)
            ),
        ),
        telemetry=Telemetry(
            at=AT,
            cpu_utilisation=cpu,
            mem_used_bytes=int(memory * ram_gib * GIB),
            gpus=tuple(
                GpuReading(
                    index=i,
                    mem_used_bytes=int(memory * size * GIB),
                    utilisation=gpu,
                    power_w=60 + 360 * (gpu or 0),
                )
                for i, size in enumerate(sizes)
            ),
        ),
        models=tuple(_model(key) for key in keys),
    )
    return lambda *instances: bare.model_copy(update={"instances": instances})


def _model(key: str) -> ModelInfo:
    parameters = {"qwen3-32b-q5_k_m": 32_800_000_000, "qwen3-8b-q4_k_m": 8_200_000_000}
    count = parameters.get(key, 134_500_000)
    return ModelInfo(
        key=key,
        path=f"/var/lib/llmster/models/{key}.gguf",
        size_bytes=int(count * (0.7 if "q5" in key else 0.61)),
        digest="0" * 64,
        architecture="qwen3" if "qwen3" in key else "llama",
        quantisation="Q5_K_M" if "q5" in key else "Q4_K_M",
        context_length=40_960 if "qwen3" in key else 8_192,
        parameters=count,
    )


def _instance(model: str, state: Any = "ready", **fields: Any) -> InstanceInfo:
    if state == "ready":
        fields |= {"context_length": 8192, "pid": 4711, "kv_used_cells": 512 * fields["active"]}
    return InstanceInfo(id=f"i-{model[:8]}", model=model, digest="0" * 64, state=state, **fields)


def _routes() -> tuple[RouteRecord, ...]:
    """Requests of the last minutes: long prompts are split, short ones stay on one node."""
    served: tuple[tuple[str, str | None, str | None, int, int, dict[str, Any]], ...] = (
        ("split", "ws-1", "ws-2", 6211, 240, {}),
        ("colocated", None, "ws-2", 412, 388, {}),
        ("split", "ws-1", "ws-2", 3870, 512, {}),
        ("colocated", None, "laptop", 96, 61, {"model": "smollm2-135m-instruct"}),
        ("split", "a100", "ws-2", 7904, 1024, {"attempts": 2}),
        ("none", None, None, 0, 0, {"status": "failed", "error_code": "pool_full"}),
        ("split", "ws-1", "ws-2", 2950, 77, {"status": "cancelled"}),
        ("colocated", None, "a100", 820, 300, {}),
        ("colocated", None, "ws-2", 655, 411, {}),
        ("split", "ws-1", "ws-2", 5120, 128, {}),
        ("colocated", None, "ws-1", 210, 95, {"model": "smollm2-135m-instruct"}),
        ("split", "ws-1", "ws-2", 4410, 330, {}),
    )
    records = []
    for index, (kind, prefill, decode, prompt, completion, more) in enumerate(served):
        split = kind == "split"
        answered = kind != "none"
        fields: dict[str, Any] = {
            "request_id": f"req-{0x9E3779B97F4A7C15 * (index + 1) % (1 << 32):08x}",
            "at": AT - (index + 1) ** 1.9,
            "model": "qwen3-8b-q4_k_m",
            "kind": kind,
            "prefill_node": prefill,
            "decode_node": decode,
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "ttft_s": (0.06 + prompt / 9000) if answered else None,
            "tpot_s": (0.0148 + index % 3 * 0.0007) if answered else None,
            "duration_s": 0.06 + prompt / 9000 + completion * 0.015,
            "kv_bytes": prompt * 147_456 if split else 0,
            "handover_s": (0.004 + prompt * 1.6e-6) if split else None,
            "reason": "a long prompt: its prefill is cheaper on ws-1" if split else "",
        }
        records.append(RouteRecord(**(fields | more)))
    return tuple(records)


if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else root / "docs/images/tui.svg"
    export_screenshot(busy_pool(), target)
    print(target)
