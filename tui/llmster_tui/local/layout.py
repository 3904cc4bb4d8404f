"""Where a local pool keeps things, and which processes it is made of."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmster_daemon.protocol.base import Role
from llmster_daemon.supervisor.process import started_ticks


@dataclass(frozen=True, slots=True)
class Layout:
    """A pool of this machine below one home."""

    home: Path
    nodes: int = 1
    port: int = 1234
    control_port: int = 1240
    roles: tuple[Role, ...] = ()

    @property
    def control_url(self) -> str:
        """Where the control plane answers."""
        return f"http://127.0.0.1:{self.control_port}"

    @property
    def endpoint(self) -> str:
        """The OpenAI endpoint to tell people: the first node's."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def control_home(self) -> Path:
        """The control plane's home."""
        return self.home / "control"

    @property
    def cache(self) -> Path:
        """Downloads that all nodes share."""
        return self.home / "cache"

    @property
    def record(self) -> Path:
        """What runs here: pids and addresses."""
        return self.home / "up.json"

    def node_home(self, index: int) -> Path:
        """A node's home; nodes count from 0."""
        return self.home / "nodes" / self.node_name(index)

    @staticmethod
    def node_name(index: int) -> str:
        """A node's name."""
        return f"node-{index + 1}"

    def node_port(self, index: int) -> int:
        """A node's port: counted up from the first, without the control plane's."""
        ports = [p for p in range(self.port, self.port + self.nodes + 1) if p != self.control_port]
        return ports[index]

    def role(self, index: int) -> Role:
        """A node's role; `mixed` where none is given."""
        return self.roles[index] if index < len(self.roles) else "mixed"


def read_record(home: Path) -> dict[str, Any] | None:
    """What was last started in a home, if it can still be read."""
    try:
        record = json.loads((home / "up.json").read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def living(record: dict[str, Any]) -> dict[str, int]:
    """The processes of a record that still run: name to pid."""
    processes = record.get("processes")
    found = {}
    for name, entry in processes.items() if isinstance(processes, dict) else ():
        match entry:
            case [int(pid), int(ticks)] if started_ticks(pid) == ticks:
                found[name] = pid
    return found
