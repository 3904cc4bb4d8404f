"""The llama.cpp engine beside llama-server, both over HTTP, in one run.

    python scripts/bench/engine.py [--model FILE.gguf] [--repeat 3] [--json FILE]

Needs `pip install xllamacpp`. Without --model: a Q4_0 copy of the sample model, since its own Q4_1
hardly gains from batching on a CPU. Same model file, threads, slots and context on both sides; the
sides take turns within each measurement, and medians are shown. Noise hits both alike.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx
import llama_cpp

from llmster_daemon.config import NodeConfig
from llmster_daemon.models.sample import ensure_sample
from llmster_daemon.models.store import ModelStore
from llmster_tui.commands.options import DEFAULT_HOME

HERE = Path(__file__).parent
THREADS = len(os.sched_getaffinity(0))
SLOTS = 32
CONTEXT = 8192
PORT = 21234
COUNTING = "Count on: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,"
WORDS = ("river", "stone", "cloud", "letter", "garden", "window", "market", "winter", "silver")


@dataclass(frozen=True)
class Side:
    """One of the two servers."""

    name: str
    url: str
    model: str
    extra: dict[str, object]


@dataclass(frozen=True)
class Stream:
    """One answer: seconds from the request to each of its tokens."""

    ttft_s: float
    total_s: float
    tokens: int


def words(count: int, seed: int) -> str:
    """A prompt of about `count` tokens that shares no prefix with another seed's."""
    rng = random.Random(seed)
    return f"{seed} " + " ".join(rng.choice(WORDS) for _ in range(count - 3))


async def stream(http: httpx.AsyncClient, side: Side, prompt: str, max_tokens: int) -> Stream:
    """Ask for a greedy completion and time it."""
    body = {
        "model": side.model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **side.extra,
    }
    begun = time.perf_counter()
    first, tokens = 0.0, 0
    async with http.stream("POST", f"{side.url}/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError((await response.aread()).decode())
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            first = first or time.perf_counter() - begun
            usage = json.loads(line[6:]).get("usage")
            if usage:
                tokens = usage["completion_tokens"]
    return Stream(first, time.perf_counter() - begun, tokens)


async def decode_rate(http: httpx.AsyncClient, side: Side, streams: int, seed: int) -> float:
    """Aggregate tokens per second of that many streams, 48 tokens each."""
    begun = time.perf_counter()
    done = await asyncio.gather(
        *(stream(http, side, f"{seed}.{i} {COUNTING}", 48) for i in range(streams))
    )
    return sum(s.tokens for s in done) / (time.perf_counter() - begun)


async def prefill_rate(http: httpx.AsyncClient, side: Side, tokens: int, seed: int) -> float:
    """Prompt tokens per second."""
    done = await stream(http, side, words(tokens, seed), 1)
    return tokens / done.ttft_s


async def ttft_under_load(http: httpx.AsyncClient, side: Side, seed: int) -> list[float]:
    """TTFT of short prompts, one every half second, while a 4,000-token prompt is computed."""
    long = asyncio.create_task(stream(http, side, words(4000, seed), 1))
    await asyncio.sleep(0.3)
    short = []
    number = 0
    while not long.done():
        short.append(asyncio.create_task(stream(http, side, f"{seed}.{number} {COUNTING}", 4)))
        number += 1
        await asyncio.sleep(0.5)
    await long
    return [s.ttft_s for s in await asyncio.gather(*short)]


async def prefix_gain(http: httpx.AsyncClient, side: Side, seed: int) -> float:
    """How many times sooner the first token comes when a 1,000-token prompt was seen before."""
    system = words(1000, seed)
    extra = {**side.extra}
    extra.pop("cache_prompt", None)
    caching = Side(side.name, side.url, side.model, extra)
    first = await stream(http, caching, f"{system} First question: who?", 1)
    gains = []
    for i in range(3):
        again = await stream(http, caching, f"{system} Question {i}: where?", 1)
        gains.append(first.ttft_s / again.ttft_s)
    return statistics.median(gains)


@contextlib.asynccontextmanager
async def sides(model: Path) -> AsyncIterator[list[Side]]:
    """Both servers, running."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        key = ModelStore(home / "models").import_file(model).key
        config = NodeConfig(home, "bench", port=PORT)
        with (
            subprocess.Popen(
                [sys.executable, "-m", "llmster_tui.cli", "daemon", "--alone"]
                + ["--home", str(home), "--port", str(PORT), "--threads", str(THREADS)],
                stderr=subprocess.DEVNULL,
            ) as ours,
            subprocess.Popen(
                [sys.executable, str(HERE / "llama_server.py"), str(model)]
                + [str(THREADS), str(SLOTS), str(CONTEXT)],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            ) as theirs,
        ):
            try:
                assert theirs.stdout is not None
                address = theirs.stdout.readline().strip()
                if not address:
                    raise RuntimeError("llama-server did not start")
                async with httpx.AsyncClient(trust_env=False, timeout=120) as http:
                    await until_up(http, config.url)
                    loaded = await http.post(
                        f"{config.url}/node/v1/load",
                        json={
                            "model": key,
                            "options": {"slots": SLOTS, "context_length": CONTEXT},
                        },
                    )
                    loaded.raise_for_status()
                yield [
                    Side("llmster", config.url, key, {}),
                    Side("llama-server", address, "any", {"cache_prompt": False}),
                ]
            finally:
                # SIGINT has the daemon stop its engine too.
                ours.send_signal(2)
                theirs.kill()


async def until_up(http: httpx.AsyncClient, url: str) -> None:
    """Until a node answers."""
    for _ in range(200):
        with contextlib.suppress(httpx.HTTPError):
            await http.get(f"{url}/node/v1/status")
            return
        await asyncio.sleep(0.1)
    raise RuntimeError(f"{url} did not come up")


Measure = Callable[[httpx.AsyncClient, Side, int], Awaitable[float]]


async def alternate(
    http: httpx.AsyncClient, both: list[Side], repeat: int, measure: Measure
) -> dict[str, float]:
    """Medians per side; who begins changes from round to round."""
    found: dict[str, list[float]] = {side.name: [] for side in both}
    for number in range(repeat):
        for side in both if number % 2 == 0 else reversed(both):
            found[side.name].append(await measure(http, side, random.randrange(1 << 30)))
    return {name: statistics.median(values) for name, values in found.items()}


async def run(model: Path, repeat: int) -> list[dict[str, object]]:
    """All measurements, as rows."""
    rows: list[dict[str, object]] = []

    def add(what: str, unit: str, found: dict[str, float], better: str = "higher") -> None:
        ours, theirs = found["llmster"], found["llama-server"]
        ratio = ours / theirs if better == "higher" else theirs / ours
        rows.append({"what": what, "unit": unit, **found, "times_as_good": ratio})
        print(f"{what:44} {ours:10.3f} {theirs:10.3f} {unit:6} {ratio:6.2f}x", flush=True)

    print(f"{'':44} {'llmster':>10} {'llama-srv':>10}", flush=True)
    async with (
        sides(model) as both,
        httpx.AsyncClient(trust_env=False, timeout=600, limits=httpx.Limits()) as http,
    ):
        for side in both:
            await decode_rate(http, side, 2, 1)
        for n in (1, 4, 16, 32):
            found = await alternate(
                http, both, repeat, lambda h, s, seed, n=n: decode_rate(h, s, n, seed)
            )
            add(f"decode, {n} streams", "tok/s", found)
        for n in (512, 2048):
            found = await alternate(
                http, both, repeat, lambda h, s, seed, n=n: prefill_rate(h, s, n, seed)
            )
            add(f"prefill, {n} tokens", "tok/s", found)
        found = await alternate(http, both, repeat, prefix_gain)
        add("TTFT gain, 1,000 shared tokens", "times", found)
        waits: dict[str, list[float]] = {side.name: [] for side in both}
        for _ in range(max(1, repeat - 1)):
            for side in both:
                waits[side.name] += await ttft_under_load(http, side, random.randrange(1 << 30))
        for name, q in (("p50", 50), ("p99", 99)):
            found = {
                k: statistics.quantiles(v, n=100, method="inclusive")[q - 1]
                for k, v in waits.items()
            }
            add(f"TTFT {name} beside a 4,000-token prompt", "s", found, better="lower")
    return rows


def q4_0_sample() -> Path:
    """The sample model, quantised again by llama.cpp; made once, kept in the home's cache."""
    cache = DEFAULT_HOME / "cache"
    copy = cache / "smollm2-135m-instruct-q4_0.gguf"
    if not copy.exists():
        cache.mkdir(parents=True, exist_ok=True)
        source = ensure_sample(ModelStore(cache / "bench"), cache=cache).path
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
        params.allow_requantize = True
        part = copy.with_suffix(".part")
        failed = llama_cpp.llama_model_quantize(source.encode(), str(part).encode(), params)
        if failed:
            raise RuntimeError("llama.cpp could not quantise the sample")
        part.rename(copy)
    return copy


def main() -> None:
    """Parse options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a GGUF file")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    machine = f"{platform.processor() or platform.machine()}, {THREADS} threads"
    print(f"# {' '.join(sys.argv)}\n# {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {machine}")
    rows = asyncio.run(run(options.model or q4_0_sample(), options.repeat))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
