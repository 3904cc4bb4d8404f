"""How a node is set up."""

from dataclasses import dataclass
from pathlib import Path

from .protocol.base import Role

DEFAULT_PORT = 1234
DEFAULT_CONTROL_PORT = 1240
DEFAULT_CONTROL_URL = f"http://127.0.0.1:{DEFAULT_CONTROL_PORT}"


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """`control_url` None: a node on its own, in no pool. `threads`: per engine."""

    home: Path
    name: str
    role: Role = "mixed"
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    control_url: str | None = DEFAULT_CONTROL_URL
    threads: int = 1
    hang_limit_s: float = 120.0
    orphan_timeout_s: float = 300.0

    @property
    def url(self) -> str:
        """Where the node's API answers."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"
