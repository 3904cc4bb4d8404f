"""The pool in one line, and the line that says that it can't be reached."""

from datetime import UTC, datetime

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.widgets import Static

from llmster_daemon.errors import LlmsterError
from llmster_tui.state import Summary


class SummaryBar(Horizontal):
    """Nodes, instances and requests on the left, the pool's endpoint on the right."""

    def __init__(self) -> None:
        super().__init__()
        self._left = Static("llmster", id="pool")
        self._right = Static(id="endpoint")

    def compose(self) -> ComposeResult:
        yield self._left
        yield self._right

    def show(self, summary: Summary) -> None:
        """Shows these numbers."""
        parts = [
            f"{summary.online} of {summary.nodes} nodes online",
            f"{summary.ready} instance{'' if summary.ready == 1 else 's'} ready",
            f"{summary.active} request{'' if summary.active == 1 else 's'} running",
            f"{summary.waiting} waiting",
        ]
        title = (f"llmster {summary.version}   ", "bold")
        self._left.update(Text.assemble(title, " · ".join(parts)))
        self._right.update(Text(summary.gateway_url))


class Banner(Static):
    """Says that what is on the screen is old, and why."""

    def show(self, trouble: LlmsterError | None, at: float | None) -> None:
        """Shows the trouble, or nothing. `at`: the Unix time of the state on the screen."""
        self.display = trouble is not None
        if trouble is None:
            return
        if trouble.code == "control_unreachable":
            text = "control plane unreachable, retrying"
        else:
            text = f"the control plane is in trouble, retrying: {trouble.message}"
        if at is not None:
            text += f" · the pool as of {datetime.fromtimestamp(at, UTC):%H:%M:%S} UTC"
        if trouble.hint:
            text += f" · {trouble.hint}"
        self.update(Text(f"⚠ {text}"))
