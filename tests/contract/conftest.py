"""Engine processes that the tests of this folder share: one pair per backend."""

from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from fakes.engines import EngineProcess, idle
from llmster_daemon.engines.local import LocalEngine

NewProcess = Callable[..., EngineProcess]

SHARED = {"context_length": 4096, "slots": 8}
# A step takes some time, as a model's does, and no answer ends before it is told to.
FAKE_OPTIONS = {"step_s": 0.002, "answer": 1 << 30}


@pytest.fixture(scope="session", params=["fake", pytest.param("llamacpp", marks=pytest.mark.live)])
def backend(request: pytest.FixtureRequest) -> str:
    """Every test that uses this, or an engine, runs with each backend."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def new_process(backend: str, request: pytest.FixtureRequest) -> NewProcess:
    """Makes an engine process of the backend under test; it isn't started yet."""
    model = request.getfixturevalue("sample_model") if backend == "llamacpp" else ""
    defaults = FAKE_OPTIONS if backend == "fake" else {}
    return lambda **options: EngineProcess(backend, model, **{**defaults, **options})


def started(process: EngineProcess) -> Iterator[EngineProcess]:
    process.start()
    try:
        yield process
    finally:
        process.stop()


@pytest.fixture(scope="session")
def decode_process(new_process: NewProcess) -> Iterator[EngineProcess]:
    """A process that no test may harm."""
    yield from started(new_process(**SHARED))


@pytest.fixture(scope="session")
def prefill_process(new_process: NewProcess) -> Iterator[EngineProcess]:
    """Another one."""
    yield from started(new_process(**SHARED))


@pytest.fixture(scope="session")
def small_process(new_process: NewProcess) -> Iterator[EngineProcess]:
    """One whose cache is soon full. llama.cpp has none with fewer cells."""
    yield from started(new_process(context_length=256, slots=4))


async def connected(process: EngineProcess) -> AsyncIterator[LocalEngine]:
    async with process.connection() as engine:
        yield engine
        await idle(engine)
        assert process.running


@pytest.fixture
async def decode(decode_process: EngineProcess) -> AsyncIterator[LocalEngine]:
    """An engine. After the test it must hold nothing."""
    async for engine in connected(decode_process):
        yield engine


@pytest.fixture
async def prefill(prefill_process: EngineProcess) -> AsyncIterator[LocalEngine]:
    """Another engine of the same model."""
    async for engine in connected(prefill_process):
        yield engine


@pytest.fixture
async def small(small_process: EngineProcess) -> AsyncIterator[LocalEngine]:
    """An engine of 256 cells and four slots."""
    async for engine in connected(small_process):
        yield engine
