"""The screen with everything on it: nodes, instances, requests."""

from textual.app import ComposeResult
from textual.screen import Screen
from textual.widgets import Footer

from llmster_control.protocol import PoolState
from llmster_daemon.errors import LlmsterError
from llmster_tui.state import instance_rows, node_rows, route_rows, summary
from llmster_tui.widgets.instances import InstancesPanel
from llmster_tui.widgets.nodes import NodesPanel
from llmster_tui.widgets.routes import RoutesPanel
from llmster_tui.widgets.summary import Banner, SummaryBar


class PoolScreen(Screen[None]):
    """Shows a state; knows nothing of where it comes from."""

    def __init__(self) -> None:
        super().__init__()
        self.summary = SummaryBar()
        self.banner = Banner(id="banner")
        self.nodes = NodesPanel(id="nodes")
        self.instances = InstancesPanel(id="instances")
        self.routes = RoutesPanel(id="routes")

    def compose(self) -> ComposeResult:
        yield self.summary
        yield self.banner
        yield self.nodes
        yield self.instances
        yield self.routes
        yield Footer()

    def show(self, state: PoolState | None, trouble: LlmsterError | None) -> None:
        """Shows the state, and why it may be old. None: there has been none yet."""
        with self.app.batch_update():
            self.banner.show(trouble, state.at if state else None)
            if state is None:
                self.nodes.show(
                    (), f"no state yet: {trouble.hint or 'retrying'}" if trouble else ""
                )
                return
            self.summary.show(summary(state))
            self.nodes.show(node_rows(state), "no node has joined: run `llmster up`")
            self.instances.show(
                instance_rows(state),
                "nothing is loaded: select a node and press l"
                if state.nodes
                else "nothing is loaded: models load on nodes",
            )
            self.routes.show(route_rows(state), f"no request yet: send one to {state.gateway_url}")
        if self.is_current and self.focused is None and state.nodes:
            self.nodes.table.focus()
