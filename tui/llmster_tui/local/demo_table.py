"""The demo's table, on the screen and as a picture."""

import io
from pathlib import Path

from rich.console import Console
from rich.table import Table

from llmster_tui.local.demo import Comparison
from llmster_tui.state import human_bytes, human_s

WIDTH = 118


def table(found: list[Comparison]) -> Table:
    """Colocated and split, side by side."""
    out = Table(title="the same prompts, colocated and split over two nodes", header_style="bold")
    out.add_column("prompt")
    for column in (
        "prompt\ntokens",
        "answer\ntokens",
        "TTFT\ncolocated",
        "TTFT\nsplit",
        "TPOT\ncolocated",
        "TPOT\nsplit",
        "KV handed\nover",
        "hand-over\nexposed",
    ):
        out.add_column(column, justify="right")
    out.add_column("equal\nanswer", justify="center")
    for c in found:
        out.add_row(
            c.name,
            f"{c.split.prompt_tokens:,}",
            f"{c.split.completion_tokens:,}",
            human_s(c.colocated.ttft_s),
            human_s(c.split.ttft_s),
            human_s(c.colocated.tpot_s),
            human_s(c.split.tpot_s),
            human_bytes(c.split.kv_bytes),
            human_s(c.split.handover_s),
            "yes" if c.equal else "NO",
        )
    return out


def show(found: list[Comparison], svg: Path | None) -> None:
    """Print the table; `svg` also gets it as a picture."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(table(found))
    console.print(
        "TTFT: time to first token. TPOT: time per token after it. Exposed: what the client waits\n"
        "for the KV cache after the prompt is computed. Both nodes share this machine's cores."
    )
    if svg is not None:
        picture = Console(record=True, width=WIDTH, file=io.StringIO())
        picture.print(table(found))
        svg.write_text(picture.export_svg(title="llmster demo"))
