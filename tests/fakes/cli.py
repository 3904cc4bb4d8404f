"""The `llmster` command as a person runs it."""

import asyncio
import contextlib
import io
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from llmster_tui.cli import main

LIMIT_S = 60.0


@dataclass(frozen=True)
class Ran:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[list[str]]:
        """The cells of a printed table, the header first."""
        return [re.split(r"\s{2,}", line.strip()) for line in self.out.splitlines()]

    def check_error(self) -> tuple[str, str]:
        """The error and its hint, after a look at their shape: a line each, and nothing else."""
        assert self.code == 1, self
        assert self.out == "", self
        error, hint = self.err.splitlines()
        assert error.startswith("error: "), self
        assert hint.startswith("hint: "), self
        return error.removeprefix("error: "), hint.removeprefix("hint: ")


def run_here(*args: str) -> Ran:
    """Run a command in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        patch.object(sys, "argv", ["llmster", *args]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return Ran(code, out.getvalue(), err.getvalue())


async def run(*args: str) -> Ran:
    """Run a command in this process, beside what the test's event loop runs."""
    return await asyncio.to_thread(run_here, *args)


def run_process(*args: str, home: Path | None = None) -> Ran:
    """Run a command in a process of its own, with nothing of ours in its environment."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("LLMSTER_")}
    if home is not None:
        env["LLMSTER_HOME"] = str(home)
    done = subprocess.run(
        [sys.executable, "-m", "llmster_tui.cli", *args],
        env=env,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    return Ran(done.returncode, done.stdout, done.stderr)
