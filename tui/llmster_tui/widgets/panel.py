"""A titled table that is updated in place, and the words shown while it is empty."""

from collections.abc import KeysView, Mapping, Sequence
from typing import Any, ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.message import Message
from textual.widgets import DataTable, Static

from llmster_tui.state import Tone

_STYLES: dict[Tone, str | None] = {
    "good": "green",
    "busy": "cyan",
    "warn": "yellow",
    "bad": "bold red",
    "plain": None,
}


def cell(text: str, tone: Tone = "plain", right: bool = False, limit: int | None = None) -> Text:
    """A table cell. Longer than `limit` characters ends in an ellipsis."""
    if limit is not None and len(text) > limit:
        text = text[: limit - 1] + "…"
    made = Text(justify="right" if right else "left", no_wrap=True)
    # A span, not the style of the whole: only spans count when two texts are compared.
    return made.append(text, _STYLES[tone])


class KeyedTable(DataTable[Text]):
    """A table whose rows have keys; the cursor stays on its row whatever happens around it."""

    def __init__(self) -> None:
        super().__init__(cursor_type="row", cursor_foreground_priority="renderable")

    @property
    def selected_key(self) -> str | None:
        """The key of the row under the cursor."""
        if not self.is_valid_row_index(self.cursor_row):
            return None
        return self.ordered_rows[self.cursor_row].key.value

    def show(self, rows: Mapping[str, Sequence[Text]], follow_top: bool = False) -> None:
        """Makes the table hold these rows in this order, changing only what differs.

        `follow_top`: a cursor on the first row stays there, as new rows come in above it.
        """
        selected, row_index = self.selected_key, self.cursor_row
        for gone in self._keys() - rows.keys():
            self.remove_row(gone)
        columns = [column.key for column in self.ordered_columns]
        for key, cells in rows.items():
            if key not in self.rows:
                self.add_row(*cells, key=key)
                continue
            for column, new in zip(columns, cells, strict=True):
                if self.get_cell(key, column) != new:
                    self.update_cell(key, column, new, update_width=True)
        if list(self._keys()) != list(rows):
            # `sort` hands over the cells of a row but not its key; its first cell, which is
            # one object for as long as this takes, stands for it.
            rank = {id(self.get_row(key)[0]): index for index, key in enumerate(rows)}
            self.sort(key=lambda cells: rank[id(cells[0])])
        if selected is not None and selected in rows and not (follow_top and row_index == 0):
            row_index = list(rows).index(selected)
        if rows and row_index != self.cursor_row:
            self.move_cursor(row=row_index, animate=False, scroll=False)

    def _keys(self) -> KeysView[str]:
        """The keys of the rows, from the top."""
        return {row.key.value or "": None for row in self.ordered_rows}.keys()


class Panel(Vertical):
    """A border with a title, a table, and beneath it what is known of the selected row."""

    TITLE: ClassVar[str]
    COLUMNS: ClassVar[tuple[str, ...]]
    FOLLOW_TOP: ClassVar[bool] = False

    class SelectionChanged(Message):
        """Another row is selected, or none."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.table = KeyedTable()
        self._empty = Static(classes="empty", markup=False)
        self._details: Mapping[str, str] = {}

    def compose(self) -> ComposeResult:
        yield self.table
        yield self._empty

    def on_mount(self) -> None:
        self.border_title = self.TITLE
        for column in self.COLUMNS:
            right = column.startswith(">")
            label = column.removeprefix(">")
            self.table.add_column(Text(label, justify="right" if right else "left"), key=label)
        self.table.display = False

    def show_rows(
        self, rows: Mapping[str, Sequence[Text]], details: Mapping[str, str], empty: str
    ) -> None:
        """Shows the rows; without any, the text that says what to do."""
        self._details = details
        self.table.show(rows, self.FOLLOW_TOP)
        self.table.display = bool(rows)
        self._empty.display = not rows
        self._empty.update(empty)
        self._show_detail()

    @on(DataTable.RowHighlighted)
    def _on_row_highlighted(self, event: DataTable.RowHighlighted) -> None:
        event.stop()
        self._show_detail()
        self.post_message(self.SelectionChanged())

    def _show_detail(self) -> None:
        # Not a str: that would be read as markup, and a model's key may hold brackets.
        detail = self._details.get(self.table.selected_key or "")
        self.border_subtitle = Text(f"▸ {detail}" if detail else "")
