"""A pool as a person starts it: `llmster up --detach`, in a home and on ports of its own."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

MODEL = "smollm2-135m-instruct"
SENTENCE = "The capital of France is"
CLI = [sys.executable, "-m", "llmster_tui.cli"]


def free_ports(count: int) -> list[int]:
    """Ports that are free now, in a row, below those that outgoing connections get."""
    for _ in range(100):
        start = random.randrange(20_000, 32_000)
        with contextlib.ExitStack() as held:
            try:
                for port in range(start, start + count):
                    held.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
        return list(range(start, start + count))
    raise AssertionError("no free ports")


def until(true: Callable[[], Any], limit_s: float, what: str) -> Any:
    """What `true` returns, once that is something."""
    deadline = time.monotonic() + limit_s
    while True:
        value = true()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {limit_s} s: {what}")
        time.sleep(0.05)


class PoolOnDisk:
    """A running pool, seen from outside."""

    def __init__(self, home: Path, nodes: int, roles: str) -> None:
        self.home = home
        ports = free_ports(nodes + 1)
        self.ports = ports[:nodes]
        self.control_port = ports[nodes]
        self.nodes = nodes
        self.roles = roles
        self.http = httpx.Client(trust_env=False, timeout=120)

    @property
    def control(self) -> str:
        """URL of the control plane."""
        return f"http://127.0.0.1:{self.control_port}"

    def url(self, node: int) -> str:
        """URL of a node, counted from 1."""
        return f"http://127.0.0.1:{self.ports[node - 1]}"

    def start(self) -> str:
        """Start it; returns what was printed."""
        args = ["up", "-d", "--nodes", str(self.nodes), "--port", str(self.ports[0])]
        args += ["--control-port", str(self.control_port)]
        args += ["--roles", self.roles] if self.roles else []
        return self.cli(*args).stdout

    def stop(self) -> None:
        """Stop it."""
        self.cli("down")
        self.http.close()

    def cli(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the `llmster` command against this pool."""
        env = {**os.environ, "LLMSTER_HOME": str(self.home), "LLMSTER_CONTROL": self.control}
        done = subprocess.run(
            [*CLI, *args], env=env, capture_output=True, text=True, timeout=170, check=False
        )
        if check and done.returncode:
            raise AssertionError(f"llmster {args} failed: {done.stdout}\n{done.stderr}")
        return done

    def json(self, *args: str) -> Any:
        """The JSON that a command prints."""
        return json.loads(self.cli(*args, "--json").stdout)

    def state(self) -> Any:
        """The pool's state."""
        return self.http.get(f"{self.control}/pool/v1/state").json()

    def node(self, name: str) -> Any:
        """One node's view."""
        return next(n for n in self.state()["nodes"] if n["name"] == name)

    def instance(self, node: str) -> Any:
        """The first instance of a node."""
        found = self.node(node)["instances"]
        return found[0] if found else None

    def pid(self, process: str) -> int:
        """The pid of `up`, `control` or a node."""
        record = json.loads((self.home / "up.json").read_text())
        return int(record["processes"][process][0])

    def until_serving(self, limit_s: float = 30) -> None:
        """Until all nodes are online with a ready instance."""

        def serving() -> bool:
            try:
                nodes = self.state()["nodes"]
            except httpx.HTTPError:
                return False
            return len(nodes) == self.nodes and all(
                n["liveness"] == "online" and any(i["state"] == "ready" for i in n["instances"])
                for n in nodes
            )

        until(serving, limit_s, "every node online with a ready instance")

    def ask(
        self, text: str, url: str | None = None, prefer: str | None = None, **fields: Any
    ) -> httpx.Response:
        """A greedy chat completion."""
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": 24,
            **fields,
        }
        headers = {"x-llmster-prefer": prefer} if prefer else {}
        base = url or self.url(1)
        return self.http.post(f"{base}/v1/chat/completions", json=body, headers=headers)

    def capital(self, url: str | None = None, **fields: Any) -> httpx.Response:
        """Has the model complete a sentence whose end is known."""
        body = {"model": MODEL, "prompt": SENTENCE, "temperature": 0, "max_tokens": 6, **fields}
        return self.http.post(f"{url or self.url(1)}/v1/completions", json=body)

    def route(self, request_id: str) -> Any:
        """The record of a request, once it has been reported."""

        def find() -> Any:
            answer = self.http.get(
                f"{self.control}/pool/v1/routes", params={"request_id": request_id}
            )
            return answer.json()[0] if answer.status_code == 200 else None

        return until(find, 10, f"route of {request_id}")


def text_of(response: httpx.Response) -> str:
    """The answer's text; fails with the envelope otherwise."""
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


@contextlib.contextmanager
def running_pool(home: Path, cache: Path, nodes: int = 1, roles: str = "") -> Iterator[PoolOnDisk]:
    """A pool that has started, with the sample model loaded on every node."""
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "cache").exists():
        (home / "cache").symlink_to(cache)
    pool = PoolOnDisk(home, nodes, roles)
    pool.start()
    try:
        yield pool
    finally:
        pool.stop()


def signal_process(pid: int, number: signal.Signals) -> None:
    """Send a signal."""
    os.kill(pid, number)
