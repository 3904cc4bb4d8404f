"""Options that several commands share, and how they print."""

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from llmster_tui.client import PoolClient

T = TypeVar("T")

Control = Annotated[
    str,
    typer.Option(
        "--control", envvar="LLMSTER_CONTROL", help="URL of the control plane.", metavar="URL"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Home = Annotated[
    Path,
    typer.Option("--home", envvar="LLMSTER_HOME", help="Directory for all state.", metavar="DIR"),
]
DEFAULT_CONTROL = "http://127.0.0.1:1240"
DEFAULT_HOME = Path(os.environ.get("LLMSTER_HOME") or Path.home() / ".llmster")


def ask(control: str, work: "Callable[[PoolClient], Awaitable[T]]") -> T:
    """What the control plane answers. Raises LlmsterError."""
    from llmster_tui.client import PoolClient

    async def run() -> T:
        async with PoolClient(control) as client:
            return await work(client)

    return asyncio.run(run())


def print_json(value: Any) -> None:
    """A value, or models of ours, as JSON."""
    from pydantic import BaseModel

    def plain(item: Any) -> Any:
        if isinstance(item, BaseModel):
            return item.model_dump(mode="json")
        raise TypeError(type(item).__name__)

    typer.echo(json.dumps(value, default=plain, indent=2))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], empty: str) -> None:
    """A table; columns that begin with `>` are right-aligned. `empty` is said instead of one."""
    from rich.console import Console
    from rich.table import Table

    rows = list(rows)
    if not rows:
        typer.echo(empty)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(
            column.removeprefix(">"),
            justify="right" if column.startswith(">") else "left",
            no_wrap=True,
        )
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        # In a pipe nothing is cut to a width that nobody sees.
        console = Console(highlight=False, markup=False, width=max(200, console.width))
    console.print(table)
