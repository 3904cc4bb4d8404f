"""The loaded models of the pool: one row per engine process."""

from collections.abc import Sequence
from typing import ClassVar

from rich.text import Text

from llmster_tui.state import UNKNOWN, InstanceRow, bar

from .panel import Panel, cell


class InstancesPanel(Panel):
    """The instances; the selected one is what unload acts on."""

    TITLE = "Instances"
    COLUMNS: ClassVar[tuple[str, ...]] = (
        "Node",
        "Model",
        "State",
        "Slots",
        ">Waiting",
        ">Context",
        "Note",
    )

    def show(self, rows: Sequence[InstanceRow], empty: str) -> None:
        """Shows these instances, or `empty` without any."""
        self.show_rows(
            {row.key: _cells(row) for row in rows}, {row.key: row.detail for row in rows}, empty
        )


def _cells(row: InstanceRow) -> tuple[Text, ...]:
    known = row.slots is not None
    return (
        cell(row.node, limit=16),
        cell(row.model, limit=32),
        cell(f"{row.glyph} {row.state}", row.tone),
        cell(bar(row.active / row.slots, 5), "busy").append(f" {row.active}/{row.slots}")
        if row.slots is not None
        else cell(UNKNOWN),
        cell(str(row.waiting) if known else UNKNOWN, right=True),
        cell(UNKNOWN if row.context_length is None else f"{row.context_length:,}", right=True),
        cell(row.note, row.tone),
    )
