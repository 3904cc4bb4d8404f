"""The last requests, each with its phases: where its prompt was computed, and where it decoded."""

from collections.abc import Sequence
from typing import ClassVar

from rich.text import Text

from llmster_tui.state import RouteRow

from .panel import Panel, cell


class RoutesPanel(Panel):
    """The routes, newest first."""

    TITLE = "Last requests"
    FOLLOW_TOP = True
    COLUMNS: ClassVar[tuple[str, ...]] = (
        "Age",
        "Request",
        "Kind",
        "Prefill ▶ decode",
        ">Prompt",
        ">Tokens",
        ">TTFT",
        ">TPOT",
        ">KV",
        ">Hand-over",
        "Status",
    )

    def show(self, rows: Sequence[RouteRow], empty: str) -> None:
        """Shows these routes, or `empty` without any."""
        self.show_rows(
            {row.key: _cells(row) for row in rows}, {row.key: row.detail for row in rows}, empty
        )


def _cells(row: RouteRow) -> tuple[Text, ...]:
    return (
        cell(row.age),
        cell(row.id),
        cell(row.kind, "busy" if row.kind == "split" else "plain"),
        cell(row.path, limit=30),
        cell(row.prompt, right=True),
        cell(row.completion, right=True),
        cell(row.ttft, right=True),
        cell(row.tpot, right=True),
        cell(row.kv, right=True),
        cell(row.handover, right=True),
        cell(f"{row.glyph} {row.status}", row.tone, limit=40),
    )
