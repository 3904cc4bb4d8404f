"""Lets a person choose a model to load from a node's disk."""

from collections.abc import Sequence
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import DataTable, Static

from llmster_tui.state import ModelRow, Tone
from llmster_tui.widgets.panel import Panel, cell

_STATES: dict[str, tuple[str, Tone]] = {
    "loaded": ("● loaded", "good"),
    "loading": ("◔ loading", "busy"),
    "": ("", "plain"),
}


class ModelsPanel(Panel):
    """The models on one node's disk."""

    TITLE = "Models"
    COLUMNS: ClassVar[tuple[str, ...]] = (
        "Model",
        "Quantisation",
        ">Size",
        ">Parameters",
        ">Context",
        "",
    )

    def show(self, rows: Sequence[ModelRow]) -> None:
        """Shows these models."""
        self.show_rows(
            {
                row.key: (
                    cell(row.key, limit=48),
                    cell(row.quantisation),
                    cell(row.size, right=True),
                    cell(row.parameters, right=True),
                    cell(f"{row.context_length:,}", right=True),
                    cell(*_STATES[row.state]),
                )
                for row in rows
            },
            {},
            "this node has no model on its disk: run `llmster import FILE` there",
        )


class LoadScreen(ModalScreen[str | None]):
    """Returns the key of the chosen model, or None."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "cancel", "Cancel")]

    def __init__(self, node: str, models: Sequence[ModelRow]) -> None:
        super().__init__()
        self._node = node
        self._models = models
        self._panel = ModelsPanel()

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog wide") as dialog:
            dialog.border_title = f"Load on {self._node}"
            yield self._panel
            keys = "↑ ↓ choose · Enter load · Esc cancel" if self._models else "Esc close"
            yield Static(keys, classes="note")

    def on_mount(self) -> None:
        self._panel.show(self._models)
        self._panel.table.focus()

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        self.dismiss(event.row_key.value)

    def action_cancel(self) -> None:
        self.dismiss(None)
