"""The nodes of the pool: what they have and how busy they are."""

from collections.abc import Sequence
from typing import ClassVar

from rich.text import Text

from llmster_tui.state import UNKNOWN, NodeRow, Tone, bar, human_percent, human_usage

from .panel import Panel, cell

_FULL = 0.9
"""From here on a bar warns: the next model or context may not fit."""


class NodesPanel(Panel):
    """The nodes; the selected one is what drain, role and load act on."""

    TITLE = "Nodes"
    COLUMNS: ClassVar[tuple[str, ...]] = (
        "Node",
        "Role",
        "State",
        "Memory",
        "GPU",
        "CPU",
        "Loaded",
        "Hardware",
    )

    def show(self, rows: Sequence[NodeRow], empty: str) -> None:
        """Shows these nodes, or `empty` without any."""
        self.show_rows(
            {row.key: _cells(row) for row in rows}, {row.key: row.detail for row in rows}, empty
        )


def _cells(row: NodeRow) -> tuple[Text, ...]:
    memory = cell(f"{row.memory:<4} ").append(_bar(row.mem_fraction, 8, warn_from=_FULL))
    return (
        cell(row.name, limit=16),
        cell(row.role),
        cell(f"{row.glyph} {row.state}", row.tone),
        memory.append(f" {human_usage(row.mem_used_bytes, row.mem_total_bytes)}"),
        _bar(row.gpu_utilisation, 5).append(f" {human_percent(row.gpu_utilisation):>4}"),
        _bar(row.cpu_utilisation, 5).append(f" {human_percent(row.cpu_utilisation):>4}"),
        cell(f"{UNKNOWN if row.loaded is None else row.loaded} of {row.on_disk}"),
        cell(row.hardware),
    )


def _bar(fraction: float | None, width: int, warn_from: float | None = None) -> Text:
    tone: Tone = "plain" if fraction is None else "busy"
    if fraction is not None and warn_from is not None:
        tone = "warn" if fraction >= warn_from else "good"
    return cell(bar(fraction, width), tone)
