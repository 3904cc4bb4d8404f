"""The `llmster` command. Every command imports what it needs when it runs: starting stays quick."""

import json
import sys
from typing import Annotated

import typer

from llmster_daemon.errors import LlmsterError
from llmster_tui.commands import manage, serve, show

app = typer.Typer(
    name="llmster",
    help="One pool of mixed machines that serves language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for group in (serve, show, manage):
    group.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        from llmster_daemon import __version__

        typer.echo(f"llmster {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """One pool of mixed machines that serves language models."""


def main() -> None:
    """Run a command; every error that llmster raises on purpose is one line and a hint."""
    try:
        app(prog_name="llmster")
    except LlmsterError as error:
        if "--json" in sys.argv:
            typer.echo(json.dumps(error.envelope()))
        else:
            typer.secho(f"error: {error.message}", fg="red", err=True)
            if error.hint:
                typer.echo(f"hint: {error.hint}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
