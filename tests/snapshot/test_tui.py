"""The console's screen: how it looks in each of its states, and what its keys do.

After a change that is meant: `pytest tests/snapshot --snapshot-update`, and look at the files.
"""

import asyncio
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

from llmster_control.protocol import LoadRequest, NodePatch, NodeView, PoolState, UnloadRequest
from llmster_daemon.errors import Conflict, LlmsterError, Unavailable
from llmster_daemon.protocol.base import Role
from llmster_tui.app import PoolApp

SIZE = (120, 36)
UNREACHABLE = Unavailable("control_unreachable", "no control plane answers", "run `llmster up`")
BUSY: PoolState = runpy.run_path(
    str(Path(__file__).resolve().parents[2] / "scripts" / "screenshot.py")
)["busy_pool"]()
EMPTY = BUSY.model_copy(update={"nodes": (), "routes": ()})
"""Its nodes, by name: a100 (drains), h100-rented (lost), laptop, ws-1, ws-2."""

SnapCompare = Callable[..., bool]


@pytest.fixture(autouse=True)
def _colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The snapshots have colours, whatever the terminal of whoever compares them wants."""
    monkeypatch.delenv("NO_COLOR", raising=False)


class FakeFeed:
    """A pool in memory, with a switch for each thing that can go wrong."""

    def __init__(self, pool: PoolState) -> None:
        self.pool = pool
        self.down: LlmsterError | None = None
        self.refuses: LlmsterError | None = None
        self.loads: list[LoadRequest] = []
        self.unloads: list[UnloadRequest] = []
        self.patches: list[tuple[str, NodePatch]] = []
        self.before_answer = asyncio.Event()
        self.before_answer.set()

    async def state(self) -> PoolState:
        pool = self.pool
        await self.before_answer.wait()
        if self.down is not None:
            raise self.down
        return pool

    async def load(self, request: LoadRequest) -> dict[str, Any]:
        self.loads.append(request)
        self._refuse()
        return {}

    async def unload(self, request: UnloadRequest) -> dict[str, Any]:
        self.unloads.append(request)
        self._refuse()
        return {}

    async def patch_node(self, name: str, patch: NodePatch) -> NodeView:
        self.patches.append((name, patch))
        self._refuse()
        node = next(node for node in self.pool.nodes if node.name == name)
        changed = node.model_copy(update=patch.model_dump(exclude_none=True))
        self.put(changed)
        return changed

    def put(self, changed: NodeView) -> None:
        nodes = tuple(changed if node.id == changed.id else node for node in self.pool.nodes)
        self.pool = self.pool.model_copy(update={"nodes": nodes})

    def _refuse(self) -> None:
        if self.refuses is not None:
            raise self.refuses


def app_of(pool: PoolState, down: LlmsterError | None = None) -> tuple[PoolApp, FakeFeed]:
    """The app, which asks only at its start and where a test says so."""
    feed = FakeFeed(pool)
    feed.down = down
    return PoolApp(feed, interval_s=3600), feed


def only(*names: str) -> PoolState:
    """The busy pool with only these nodes."""
    nodes = tuple(node for node in BUSY.nodes if node.name in names)
    return BUSY.model_copy(update={"nodes": nodes, "routes": ()})


async def settle(pilot: Pilot[None]) -> None:
    """Waits for the first state, and until every order is carried out and on the screen."""
    app = pilot.app
    assert isinstance(app, PoolApp)
    while app.pool is None and app.trouble is None:
        await pilot.pause()
    orders = [worker for worker in app.workers if worker.group == "orders"]
    if orders:
        await app.workers.wait_for_complete(orders)
    await pilot.pause()
    await pilot.pause()


async def press(pilot: Pilot[None], *keys: str) -> None:
    """Presses keys and lets what they start begin; a question may now be on the screen."""
    await pilot.press(*keys)
    await pilot.pause()


def text_of(app: PoolApp) -> str:
    """What a person reads on the screen, line by line."""
    # Textual's own way to this text is an SVG file, which cuts it into pieces.
    return "\n".join(line.text.rstrip() for line in app.screen._compositor.render_strips())


def test_empty(snap_compare: SnapCompare) -> None:
    assert snap_compare(app_of(EMPTY)[0], terminal_size=SIZE, run_before=settle)


def test_one_node(snap_compare: SnapCompare) -> None:
    assert snap_compare(app_of(only("ws-1"))[0], terminal_size=SIZE, run_before=settle)


def test_lost_node(snap_compare: SnapCompare) -> None:
    assert snap_compare(
        app_of(only("ws-2", "h100-rented"))[0], terminal_size=SIZE, run_before=settle
    )


def test_busy(snap_compare: SnapCompare) -> None:
    assert snap_compare(app_of(BUSY)[0], terminal_size=SIZE, run_before=settle)


def test_busy_in_a_small_terminal(snap_compare: SnapCompare) -> None:
    assert snap_compare(app_of(BUSY)[0], terminal_size=(80, 24), run_before=settle)


def test_unreachable_banner(snap_compare: SnapCompare) -> None:
    app, feed = app_of(BUSY)

    async def lose_the_control_plane(pilot: Pilot[None]) -> None:
        await settle(pilot)
        feed.down = UNREACHABLE
        await app.refresh_pool()

    assert snap_compare(app, terminal_size=SIZE, run_before=lose_the_control_plane)


def test_unreachable_from_the_start(snap_compare: SnapCompare) -> None:
    assert snap_compare(app_of(EMPTY, down=UNREACHABLE)[0], terminal_size=SIZE, run_before=settle)


def test_load_modal(snap_compare: SnapCompare) -> None:
    assert snap_compare(app_of(BUSY)[0], terminal_size=SIZE, run_before=settle, press=["l", "down"])


def test_unload_modal(snap_compare: SnapCompare) -> None:
    assert snap_compare(
        app_of(BUSY)[0], terminal_size=SIZE, run_before=settle, press=["tab", "down", "u"]
    )


def test_help(snap_compare: SnapCompare) -> None:
    assert snap_compare(
        app_of(BUSY)[0], terminal_size=SIZE, run_before=settle, press=["question_mark"]
    )


def test_error_notification(snap_compare: SnapCompare) -> None:
    app, feed = app_of(BUSY)
    feed.refuses = Conflict("node_busy", "ws-1 is [busy]", "ask again in a minute")

    async def drain(pilot: Pilot[None]) -> None:
        await settle(pilot)
        await press(pilot, "d")
        await settle(pilot)

    assert snap_compare(app, terminal_size=SIZE, run_before=drain)


async def test_d_drains_the_selected_node_and_d_again_undrains_it() -> None:
    app, feed = app_of(only("ws-1", "ws-2"))
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await settle(pilot)
        await press(pilot, "down", "d")
        await settle(pilot)
        assert feed.patches == [("ws-2", NodePatch(draining=True))]
        assert "◒ draining" in text_of(app)
        await press(pilot, "d")
        await settle(pilot)
        assert feed.patches[1:] == [("ws-2", NodePatch(draining=False))]
        assert "◒ draining" not in text_of(app)


async def test_r_pressed_twice_quickly_goes_two_roles_on() -> None:
    app, feed = app_of(only("a100"))
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await settle(pilot)
        await press(pilot, "r", "r")
        await settle(pilot)
        roles: list[Role | None] = [patch.role for _, patch in feed.patches]
        assert roles == ["prefill", "decode"]
        assert "a100 is now decode" in text_of(app)


async def test_a_state_asked_for_before_a_change_does_not_undo_it_on_the_screen() -> None:
    app, feed = app_of(only("ws-1"))
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await settle(pilot)
        feed.before_answer.clear()
        refresh = asyncio.create_task(app.refresh_pool())
        await pilot.pause()
        await press(pilot, "d")
        await settle(pilot)
        feed.before_answer.set()
        await refresh
        await pilot.pause()
        assert "◒ draining" in text_of(app)


async def test_l_loads_the_chosen_model_on_the_selected_node() -> None:
    app, feed = app_of(only("ws-1", "ws-2"))
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await settle(pilot)
        await press(pilot, "down", "l")
        assert "Load on ws-2" in text_of(app)
        await press(pilot, "down", "down", "enter")
        await settle(pilot)
        assert feed.loads == [LoadRequest(model="smollm2-135m-instruct", node="ws-2")]
        assert "smollm2-135m-instruct is loaded on ws-2" in text_of(app)


async def test_escape_leaves_the_load_modal_without_loading() -> None:
    app, feed = app_of(BUSY)
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await settle(pilot)
        await press(pilot, "l", "escape")
        await settle(pilot)
        assert feed.loads == []
        assert app.screen is app.pool_screen


async def test_a_node_without_models_says_how_to_get_one() -> None:
    bare = only("ws-1").nodes[0].model_copy(update={"models": ()})
    app, feed = app_of(EMPTY.model_copy(update={"nodes": (bare,)}))
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await settle(pilot)
        await press(pilot, "l")
        assert "llmster import FILE" in text_of(app)
        await press(pilot, "enter", "escape")
        await settle(pilot)
        assert feed.loads == []


@pytest.mark.parametrize(
    ("keys", "unloaded"),
    [
        (("y",), True),
        (("enter",), True),
        (("n",), False),
        (("escape",), False),
        (("tab", "enter"), False),
    ],
)
async def test_u_unloads_the_selected_instance_after_a_yes(
    keys: tuple[str, ...], unloaded: bool
) -> None:
    app, feed = app_of(only("ws-1"))
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await settle(pilot)
        await press(pilot, "tab", "down", "u")
        assert "Unload smollm2-135m-instruct from ws-1?" in text_of(app)
        assert feed.unloads == []
        await press(pilot, *keys)
        await settle(pilot)
        wanted = [UnloadRequest(target="i-smollm2-", node="ws-1")] if unloaded else []
        assert feed.unloads == wanted


@pytest.mark.parametrize("keys", [("d",), ("r",), ("l", "enter"), ("u", "y")])
async def test_a_refused_order_is_told_with_its_hint(keys: tuple[str, ...]) -> None:
    app, feed = app_of(only("ws-1"))
    feed.refuses = Conflict("nope", "ws-1 will not [do] it", "run `llmster ps`")
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await settle(pilot)
        for key in keys:
            await press(pilot, key)
        await settle(pilot)
        shown = text_of(app)
        assert "ws-1 will not [do] it" in shown
        assert "→ run `llmster ps`" in shown


async def test_keys_with_nothing_to_act_on_do_nothing() -> None:
    app, feed = app_of(EMPTY)
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await settle(pilot)
        await press(pilot, "d", "r", "l", "u")
        await settle(pilot)
        assert app.screen is app.pool_screen
        assert (feed.patches, feed.loads, feed.unloads) == ([], [], [])
        assert "no node has joined: run `llmster up`" in text_of(app)


async def test_the_screen_survives_the_control_plane_and_recovers() -> None:
    app, feed = app_of(EMPTY, down=UNREACHABLE)
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await settle(pilot)
        assert "control plane unreachable, retrying" in text_of(app)
        feed.down, feed.pool = None, BUSY
        await app.refresh_pool()
        await pilot.pause()
        assert "unreachable" not in text_of(app)
        feed.down = LlmsterError("bad_answer", "the answer can't be read")
        await app.refresh_pool()
        await pilot.pause()
        assert "in trouble, retrying: the answer can't be read" in text_of(app)
        assert "3 of 5 nodes online" in text_of(app)


async def test_the_selection_stays_on_its_row_as_others_come_and_go() -> None:
    app, feed = app_of(only("ws-1", "ws-2"))
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await settle(pilot)
        await press(pilot, "down")
        nodes = app.pool_screen.nodes.table
        assert nodes.selected_key == "node-ws-2"
        feed.pool = BUSY
        await app.refresh_pool()
        await pilot.pause()
        assert [row.key.value for row in nodes.ordered_rows] == [
            f"node-{name}" for name in ("a100", "h100-rented", "laptop", "ws-1", "ws-2")
        ]
        assert nodes.selected_key == "node-ws-2"
        feed.pool = only("ws-1", "ws-2")
        await app.refresh_pool()
        await pilot.pause()
        assert nodes.selected_key == "node-ws-2"
        feed.pool = only("ws-1")
        await app.refresh_pool()
        await pilot.pause()
        assert nodes.selected_key == "node-ws-1"


async def test_new_requests_come_in_above_and_leave_the_scroll_alone() -> None:
    newest, *older = BUSY.routes
    app, feed = app_of(BUSY.model_copy(update={"routes": tuple(older)}))
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await settle(pilot)
        routes = app.pool_screen.routes.table
        await press(pilot, "tab", "tab", "down", "down")
        selected = routes.selected_key
        feed.pool = BUSY
        await app.refresh_pool()
        await pilot.pause()
        assert routes.ordered_rows[0].key.value == newest.request_id
        assert routes.selected_key == selected
        await press(pilot, "up", "up", "up")
        feed.pool = BUSY.model_copy(
            update={"routes": (newest.model_copy(update={"request_id": "later"}), *BUSY.routes)}
        )
        await app.refresh_pool()
        await pilot.pause()
        assert routes.selected_key == "later"


async def test_a_refresh_behind_a_modal_is_there_when_it_closes() -> None:
    app, feed = app_of(only("ws-1"))
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await settle(pilot)
        await press(pilot, "question_mark")
        feed.pool = BUSY
        await app.refresh_pool()
        await press(pilot, "escape")
        assert "h100-rented" in text_of(app)


async def test_it_asks_again_by_itself() -> None:
    feed = FakeFeed(EMPTY)
    app = PoolApp(feed, interval_s=0.2)
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await settle(pilot)
        feed.pool = only("ws-1")
        async with asyncio.timeout(10):
            while "ws-1" not in text_of(app):
                await pilot.pause()


async def test_q_leaves() -> None:
    app, _ = app_of(BUSY)
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await settle(pilot)
        await press(pilot, "q")
    assert app.return_code == 0
