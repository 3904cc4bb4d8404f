"""The rules of the house that a machine can check."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from llmster_tui.cli import app

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("daemon", "control", "tui")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
SCRIPTS = sorted(path for path in (ROOT / "scripts").rglob("*") if path.is_file())
MAX_LINES = 600
MAX_TEST_LINES = 700
"""Tables of cases are long without being hard to read."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> Iterator[str]:
    """The full names of the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""


def commands() -> dict[str, Any]:
    """The commands of `llmster`, as Typer builds them."""
    root: Any = typer.main.get_command(app)
    return dict(root.commands)


def test_there_is_something_to_check() -> None:
    for folder in FOLDERS:
        assert any(path.is_relative_to(ROOT / folder) for path in SOURCES)
    assert len(commands()) > 10


def test_imports_go_in_one_direction() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # Not vacuous: the contracts are there and were looked at.
    assert re.search(r"Contracts: [3-9] kept, 0 broken", done.stdout)


def test_the_top_folders_are_no_packages() -> None:
    """An `__init__.py` there would shadow other people's `daemon` and `control`."""
    for folder in FOLDERS:
        assert [p.name for p in (ROOT / folder).glob("*.py")] == []
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_files_are_short() -> None:
    limits = dict.fromkeys(SOURCES + SCRIPTS, MAX_LINES) | dict.fromkeys(TESTS, MAX_TEST_LINES)
    lines = {path: len(path.read_text().splitlines()) for path in limits if path.suffix == ".py"}
    assert {name_of(p): n for p, n in lines.items() if n >= limits[p]} == {}


def test_only_one_module_speaks_to_nvml() -> None:
    found = [name_of(path) for path in SOURCES if "pynvml" in imports(path)]
    assert found == ["daemon/llmster_daemon/telemetry/nvml.py"]


def test_a_silenced_type_error_has_a_reason() -> None:
    silenced = re.compile(r"#\s*type:\s*ignore\S*(.*)")
    for path in SOURCES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if found := silenced.search(line):
                assert re.match(r"\s*#\s*\w", found[1]), f"{name_of(path)}:{number} says no reason"


def test_no_secrets_and_no_registries_in_the_source() -> None:
    """Where packages and models come from is pip's configuration, not ours."""
    forbidden = re.compile(
        r"pypi\.org|pythonhosted|huggingface\.co|\bhf\.co\b"
        r"|-----BEGIN [A-Z ]*PRIVATE KEY|\b(?:sk|hf|ghp|pypi)[-_][A-Za-z0-9]{20,}"
    )
    found = [
        f"{name_of(path)}: {hit[0]}"
        for path in SOURCES + SCRIPTS
        if (hit := forbidden.search(path.read_text(errors="replace")))
    ]
    assert found == []


@pytest.mark.parametrize("command", commands())
def test_every_command_and_option_has_help(command: str) -> None:
    described = commands()[command]
    assert described.help
    silent = [p.name for p in described.params if not getattr(p, "hidden", False) and not p.help]
    assert silent == []


def test_the_page_of_commands_has_every_command_and_no_other() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    assert sorted(re.findall(r"^## llmster (\S+)$", page, re.MULTILINE)) == sorted(commands())


def test_the_page_of_commands_names_only_options_that_exist() -> None:
    known = {"--help", "--version"}
    for command in commands().values():
        for param in command.params:
            known |= {*param.opts, *param.secondary_opts}
    page = (ROOT / "docs" / "cli.md").read_text()
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", page)) <= known
