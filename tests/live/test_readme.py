"""The README's commands, from a clean clone, as someone new would type them."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.live, pytest.mark.slow, pytest.mark.timeout(2400)]

ROOT = Path(__file__).parents[2]
TEST_COMMAND = "scripts/test"
"""The one command that is not run here: it is what runs this."""


def commands() -> list[str]:
    """The shell blocks of the README, in order."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    return [block for block in blocks if block.strip() != TEST_COMMAND]


def run(script: str, folder: Path, home: Path, limit_s: float) -> str:
    env = {**os.environ, "LLMSTER_HOME": str(home)}
    for name in ("VIRTUAL_ENV", "LLMSTER_CONTROL"):
        env.pop(name, None)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A clean clone, and a home for it."""
    folder = tmp_path_factory.mktemp("readme")
    clone, home = folder / "llmster", folder / "home"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    yield clone, home
    if (clone / ".venv").exists():
        subprocess.run([clone / "scripts" / "down", "--home", str(home)], check=False)
    shutil.rmtree(clone / ".venv", ignore_errors=True)


def test_every_command_of_the_readme_works_from_a_clean_clone(clone: tuple[Path, Path]) -> None:
    folder, home = clone
    found = commands()
    assert len(found) >= 4
    printed = [run(block, folder, home, 2000) for block in found]
    up, curl, look, demo = printed[:4]
    assert "ready: the OpenAI endpoint is http://127.0.0.1:1234/v1" in up
    assert '"finish_reason"' in curl
    assert "node-1" in look
    assert "colocated" in look
    assert "stopped:" in look
    assert demo.count("yes") == 4
    assert " NO " not in demo


def test_the_curl_that_up_prints_works_when_pasted(clone: tuple[Path, Path]) -> None:
    folder, home = clone
    up = run("scripts/up --detach", folder, home, 600)
    try:
        pasted = up[up.index("  curl ") :].split("\n\n")[0]
        assert '"finish_reason"' in run(pasted, folder, home, 120)
    finally:
        run("scripts/down", folder, home, 60)
