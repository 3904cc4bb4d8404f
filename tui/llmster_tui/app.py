"""The console's screen: `llmster tui`."""

import asyncio
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

from textual import work
from textual.app import App
from textual.binding import Binding, BindingType
from textual.screen import Screen

from llmster_control.protocol import LoadRequest, NodePatch, NodeView, PoolState, UnloadRequest
from llmster_daemon.errors import LlmsterError

from .screens.confirm import ConfirmScreen
from .screens.help import HelpScreen
from .screens.load import LoadScreen
from .screens.pool import PoolScreen
from .state import InstanceRow, instance_rows, model_rows, next_role
from .widgets.panel import Panel

_NODE_ACTIONS = ("drain", "role", "load")


class PoolFeedSource(Protocol):
    """Where the state comes from and where orders go: `PoolClient`, or a test's own.

    Every method raises `LlmsterError` and nothing else.
    """

    async def state(self) -> PoolState: ...

    async def load(self, request: LoadRequest) -> dict[str, Any]: ...

    async def unload(self, request: UnloadRequest) -> dict[str, Any]: ...

    async def patch_node(self, name: str, patch: NodePatch) -> NodeView: ...


class PoolApp(App[None]):
    """Shows a pool and takes orders for it; asks for its state every `interval_s` seconds."""

    TITLE = "llmster"
    CSS_PATH = "pool.tcss"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("d", "drain", "Drain/undrain"),
        Binding("r", "role", "Next role"),
        Binding("l", "load", "Load"),
        Binding("u", "unload", "Unload"),
        Binding("question_mark", "help", "Help", key_display="?"),
        Binding("q", "quit", "Quit"),
    ]

    def __init__(self, feed: PoolFeedSource, interval_s: float = 1.0) -> None:
        super().__init__()
        self.pool_screen = PoolScreen()
        self.pool: PoolState | None = None
        self.trouble: LlmsterError | None = None
        self._source = feed
        self._interval_s = interval_s
        self._changes = 0
        """How many orders changed the pool: a state asked for before the last one is old."""
        self._usable = (False, False)
        self._refresh_now = asyncio.Event()
        self._one_patch = asyncio.Lock()

    def get_default_screen(self) -> Screen[None]:
        return self.pool_screen

    def on_ready(self) -> None:
        self._follow()

    @work(group="follow")
    async def _follow(self) -> None:
        while True:
            await self.refresh_pool()
            self._refresh_now.clear()
            try:
                async with asyncio.timeout(self._interval_s):
                    await self._refresh_now.wait()
            except TimeoutError:
                pass

    async def refresh_pool(self) -> None:
        """Asks for the state once and shows it; where that fails, shows why above the last one."""
        changes = self._changes
        try:
            state = await self._source.state()
        except LlmsterError as error:
            self.trouble = error
        else:
            self.trouble = None
            if changes == self._changes:
                self.pool = state
        self._show()

    def _show(self) -> None:
        self.pool_screen.show(self.pool, self.trouble)
        self._refresh_keys()

    def on_panel_selection_changed(self, event: Panel.SelectionChanged) -> None:
        self._refresh_keys()

    def _refresh_keys(self) -> None:
        # Only when it matters: the footer makes all its keys anew.
        usable = (self._selected_node() is not None, self._selected_instance() is not None)
        if usable != self._usable:
            self._usable = usable
            self.refresh_bindings()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Greys out the keys that have nothing to act on."""
        if action in _NODE_ACTIONS and self._selected_node() is None:
            return None
        if action == "unload" and self._selected_instance() is None:
            return None
        return True

    def action_drain(self) -> None:
        self._change_node(
            lambda node: NodePatch(draining=not node.draining),
            lambda node: (
                "is draining: no new requests" if node.draining else "takes requests again"
            ),
        )

    def action_role(self) -> None:
        self._change_node(
            lambda node: NodePatch(role=next_role(node.role)),
            lambda node: f"is now {node.role}",
        )

    def action_load(self) -> None:
        if (node := self._selected_node()) is not None:
            self._load(node)

    def action_unload(self) -> None:
        if (instance := self._selected_instance()) is not None:
            self._unload(instance)

    def action_help(self) -> None:
        self.push_screen(HelpScreen())

    def _selected_node(self) -> NodeView | None:
        key = self.pool_screen.nodes.table.selected_key
        return self._node(key) if key is not None else None

    def _selected_instance(self) -> InstanceRow | None:
        key = self.pool_screen.instances.table.selected_key
        rows = instance_rows(self.pool) if self.pool else ()
        return next((row for row in rows if row.key == key), None)

    def _node(self, node_id: str) -> NodeView | None:
        nodes = self.pool.nodes if self.pool else ()
        return next((node for node in nodes if node.id == node_id), None)

    def _change_node(
        self, patch: Callable[[NodeView], NodePatch], said: Callable[[NodeView], str]
    ) -> None:
        if (node := self._selected_node()) is not None:
            self._patch(node.id, patch, said)

    @work(group="orders")
    async def _patch(
        self,
        node_id: str,
        patch: Callable[[NodeView], NodePatch],
        said: Callable[[NodeView], str],
    ) -> None:
        # One at a time, each from what the last one left: pressing r twice means two roles on.
        async with self._one_patch:
            node = self._node(node_id)
            if node is None:
                return
            try:
                changed = await self._source.patch_node(node.name, patch(node))
            except LlmsterError as error:
                self._report(error)
                return
            self._put(changed)
        self._say(f"{changed.name} {said(changed)}")

    def _put(self, changed: NodeView) -> None:
        """Shows a changed node at once rather than at the next refresh."""
        if self.pool is not None:
            nodes = tuple(changed if n.id == changed.id else n for n in self.pool.nodes)
            self.pool = self.pool.model_copy(update={"nodes": nodes})
            self._changes += 1
            self._show()

    @work(group="orders")
    async def _load(self, node: NodeView) -> None:
        model = await self.push_screen_wait(LoadScreen(node.name, model_rows(node)))
        if model is None:
            return
        self._say(f"loading {model} on {node.name}")
        self._refresh_now.set()
        try:
            await self._source.load(LoadRequest(model=model, node=node.name))
        except LlmsterError as error:
            self._report(error)
        else:
            self._say(f"{model} is loaded on {node.name}")
        self._refresh_now.set()

    @work(group="orders")
    async def _unload(self, instance: InstanceRow) -> None:
        running = instance.active + instance.waiting
        confirmed = await self.push_screen_wait(
            ConfirmScreen(
                f"Unload {instance.model} from {instance.node}?",
                f"It has {running} request{'' if running == 1 else 's'} running or waiting.",
                "Unload",
            )
        )
        if not confirmed:
            return
        try:
            await self._source.unload(UnloadRequest(target=instance.id, node=instance.node))
        except LlmsterError as error:
            self._report(error)
        else:
            self._say(f"{instance.model} is unloaded from {instance.node}")
        self._refresh_now.set()

    def _say(self, message: str) -> None:
        self.notify(message, timeout=4, markup=False)

    def _report(self, error: LlmsterError) -> None:
        text = f"{error.message}\n→ {error.hint}" if error.hint else error.message
        self.notify(text, title="Error", severity="error", timeout=12, markup=False)
