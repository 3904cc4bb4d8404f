"""`llmster demo`: the same prompts colocated and split, side by side, on a throw-away pool."""

import asyncio
import contextlib
import random
import shutil
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

import httpx

from llmster_daemon.api.http import PREFER, REQUEST_ID
from llmster_daemon.errors import LlmsterError
from llmster_daemon.protocol.node import ModelInfo, RouteRecord
from llmster_tui.client import PoolClient
from llmster_tui.local.layout import Layout
from llmster_tui.local.up import LocalPool, Say, put_sample

PROMPTS = (
    ("a question", "What is the capital of France?"),
    ("a paragraph", "Summarise in one sentence. " + "The river rose in the night. " * 20),
    ("a page", "Continue the story. " + "The fox crossed the frozen field at dawn. " * 55),
    ("four pages", "List what happens. " + "A ship left port, and a storm came up at noon. " * 170),
)
"""A name for people, and a text; about 20, 150, 500 and 1,900 tokens with the sample model."""
ROUTE_WAIT_S = 10.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """One prompt, both ways. `equal`: the same answer to the letter, greedily sampled."""

    name: str
    colocated: RouteRecord
    split: RouteRecord
    equal: bool


async def run_demo(answer_tokens: int, cache: Path, say: Say) -> list[Comparison]:
    """Start a pool, compare, stop it. Raises LlmsterError."""
    home = Path(tempfile.mkdtemp(prefix="llmster-demo-"))
    try:
        ports = _free_ports(3)
        layout = Layout(home, 2, ports[0], ports[2], ("prefill", "decode"))
        model = await asyncio.to_thread(_share_cache_and_put_sample, layout, cache, say)
        say("starting a control plane, a prefill node and a decode node")
        async with LocalPool(layout, say) as pool:
            await pool.load_everywhere(model.key)
            return await _compare(layout, model.key, answer_tokens, say)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _share_cache_and_put_sample(layout: Layout, cache: Path, say: Say) -> ModelInfo:
    """Use the download of earlier runs, and keep one that is made now."""
    cache.mkdir(parents=True, exist_ok=True)
    layout.cache.symlink_to(cache.absolute())
    return put_sample(layout, say)


async def _compare(layout: Layout, model: str, answer_tokens: int, say: Say) -> list[Comparison]:
    found = []
    async with (
        httpx.AsyncClient(trust_env=False, timeout=600) as http,
        PoolClient(layout.control_url) as pool,
    ):
        for name, prompt in PROMPTS:
            say(f"{name} ...")
            texts, records = [], []
            for way in ("colocated", "split"):
                response = await http.post(
                    f"{layout.endpoint}/chat/completions",
                    headers={PREFER: way},
                    json={
                        "model": model,
                        "messages": [{"role": "user", "content": prompt}],
                        "max_tokens": answer_tokens,
                        "temperature": 0,
                    },
                )
                body = response.json()
                if response.status_code != 200:
                    raise LlmsterError.from_body(body["error"], response.status_code)
                texts.append(body["choices"][0]["message"]["content"])
                records.append(await _route(pool, response.headers[REQUEST_ID]))
            found.append(Comparison(name, records[0], records[1], texts[0] == texts[1]))
    return found


async def _route(pool: PoolClient, request_id: str) -> RouteRecord:
    """The record of a request: nodes report it just after the answer."""
    async with asyncio.timeout(ROUTE_WAIT_S):
        while True:
            for record in await pool.routes(20):
                if record.request_id == request_id:
                    return record
            await asyncio.sleep(0.05)


def _free_ports(count: int) -> list[int]:
    """Ports that are free now, in a row, below those that outgoing connections get."""
    for _ in range(50):
        start = random.randrange(20_000, 32_000)  # noqa: S311 - no secret
        with contextlib.ExitStack() as held:
            try:
                for port in range(start, start + count):
                    held.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
        return list(range(start, start + count))
    raise LlmsterError("no_free_ports", "no free ports in a row were found", "try again")
