"""The model store: layout, keys, index, import and each fault of disks and files."""

import errno
import hashlib
import json
import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fakes.gguf import F16, Q8_0, Tensor, gguf_bytes
from llmster_daemon.errors import BadModel, BadRequest, Conflict, HomeError, LlmsterError, NotFound
from llmster_daemon.models import files, store
from llmster_daemon.models.store import ModelStore

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk, as root only")

F16_MODEL = gguf_bytes()
Q8_MODEL = gguf_bytes({"general.file_type": 7}, [Tensor("w", (64, 64), Q8_0)])
OTHER_F16_MODEL = gguf_bytes({"general.name": "Other"})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def models(root: Path) -> ModelStore:
    return ModelStore(root)


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file outside the store."""

    def write(name: str = "Tiny-1M.F16.gguf", content: bytes = F16_MODEL) -> Path:
        path = tmp_path / "downloads" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return path

    return write


@pytest.fixture
def drop(root: Path) -> Callable[..., Path]:
    """Puts a file into the store's folder by hand."""

    def write(relative: str, content: bytes = F16_MODEL, age_s: float = 10) -> Path:
        path = root / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        past = time.time() - age_s
        os.utime(path, (past, past))
        return path

    return write


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", mount], check=True)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that a store hashes from now on."""
    seen: list[Path] = []

    def file_sha256(path: Path, *args: Any) -> str:
        seen.append(path)
        return files.file_sha256(path, *args)

    monkeypatch.setattr(store, "file_sha256", file_sha256)
    return seen


def keys(models: ModelStore) -> list[str]:
    return [model.key for model in models.list()]


def partials(root: Path) -> list[Path]:
    return list(root.rglob(".import-*"))


# Keys and names


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct"),
        ("Qwen3-8B-Q4_K_M.gguf", "qwen3-8b"),
        ("Qwen3-8B-UD-Q4_K_XL.gguf", "qwen3-8b"),
        ("m.i1-IQ2_XXS.GGUF", "m"),
        ("m_bf16.gguf", "m"),
        ("gpt-oss-20b-MXFP4.gguf", "gpt-oss-20b"),
        ("gpt-oss-20b.gguf", "gpt-oss-20b"),
        ("Q4_0.gguf", "q4_0"),
        ("-q4_0.gguf", "-q4_0"),
        ("Phi-3.5-mini.gguf", "phi-3.5-mini"),
        ("llama-2-q4.v2.gguf", "llama-2-q4.v2"),
    ],
)
def test_key_is_the_stem_without_quantisation(name: str, key: str) -> None:
    assert files.base_key(name) == key


@pytest.mark.parametrize(
    "name",
    ["..", "a..gguf", "../a", "a/b", "a\\b", ".hidden", "", "a\nb", "a\x1bb", "a\u202eb", "\udcff"],
)
def test_unsafe_names(name: str) -> None:
    assert not files.is_safe_name(name)


def test_names_in_any_script_are_safe() -> None:
    assert files.is_safe_name("Modèle 模型 (v2).gguf")
    assert not files.is_safe_name("模" * 67)


# Listing


def test_store_without_a_folder_is_empty(models: ModelStore, root: Path) -> None:
    assert models.list() == ()
    assert models.get("x") is None
    assert not root.exists()


def test_lists_what_was_dropped_into_the_folder(models: ModelStore, drop: Any) -> None:
    path = drop("lmstudio-community/Tiny-GGUF/Tiny-1M.F16.gguf")
    (model,) = models.list()
    assert model.key == "tiny-1m"
    assert model.path == str(path)
    assert model.size_bytes == len(F16_MODEL)
    assert model.digest == hashlib.sha256(F16_MODEL).hexdigest()
    assert (model.architecture, model.quantisation) == ("llama", "F16")
    assert (model.context_length, model.parameters) == (512, 64 * 5 + 64 * 64 + 64)


def test_finds_files_at_most_two_folders_deep(models: ModelStore, drop: Any) -> None:
    for path in ("a.gguf", "p/b.gguf", "p/r/c.gguf", "p/r/x/d.gguf", "p/.r/e.gguf", "p/r/f.txt"):
        drop(path)
    assert keys(models) == ["a", "b", "c"]


def test_get_and_details_ignore_case(models: ModelStore, drop: Any) -> None:
    drop("p/r/Tiny-1M.F16.gguf")
    assert models.get("TINY-1m") == models.list()[0]
    assert models.details("TINY-1m").name == "Tiny"


def test_details_of_an_unknown_model(models: ModelStore) -> None:
    with pytest.raises(NotFound) as caught:
        models.details("none")
    assert caught.value.code == "model_not_found"
    assert "llmster ls" in caught.value.hint


def test_get_finds_a_file_that_came_after_the_listing(models: ModelStore, drop: Any) -> None:
    assert models.list() == ()
    drop("p/r/new.gguf")
    assert models.get("new")


def test_same_key_in_another_quantisation_gets_it_appended(models: ModelStore, drop: Any) -> None:
    drop("p/r/m.Q8_0.gguf", Q8_MODEL, age_s=10)
    drop("p/r/m.F16.gguf", F16_MODEL, age_s=20)
    drop("z/r/m.F16.gguf", OTHER_F16_MODEL, age_s=5)
    drop("z/s/m.F16.gguf", gguf_bytes({"general.name": "Third"}), age_s=4)
    assert keys(models) == ["m", "m@f16", "m@f16-2", "m@q8_0"]
    assert models.details("m").quantisation == "F16"
    assert models.get("M@Q8_0")


def test_keys_stay_when_another_model_goes(models: ModelStore, root: Path, drop: Any) -> None:
    first = drop("p/r/m.F16.gguf", F16_MODEL, age_s=20)
    drop("p/r/m.Q8_0.gguf", Q8_MODEL, age_s=10)
    assert keys(models) == ["m", "m@q8_0"]
    first.unlink()
    assert keys(models) == ["m@q8_0"]
    assert keys(ModelStore(root)) == ["m@q8_0"]


def test_bad_file_is_left_out_and_logged_once(
    models: ModelStore, drop: Any, caplog: pytest.LogCaptureFixture
) -> None:
    drop("p/r/good.gguf")
    drop("p/r/bad.gguf", F16_MODEL[:-1])
    for _ in range(3):
        assert keys(models) == ["good"]
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "bad.gguf" in caplog.text
    assert "truncated" in caplog.text


def test_bad_file_that_becomes_whole_is_listed(models: ModelStore, drop: Any) -> None:
    drop("p/r/m.gguf", F16_MODEL[:-1])
    assert keys(models) == []
    drop("p/r/m.gguf", F16_MODEL)
    assert keys(models) == ["m"]


def test_file_that_is_written_while_it_is_read_waits(
    models: ModelStore, drop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = drop("p/r/m.gguf")

    def touch_and_hash(path: Path) -> str:
        os.utime(path, (1, 1))
        return "0" * 64

    with monkeypatch.context() as patch:
        patch.setattr(store, "file_sha256", touch_and_hash)
        assert models.list() == ()
    assert models.list()[0].digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_changed_file_is_read_again(models: ModelStore, drop: Any) -> None:
    drop("p/r/m.gguf", F16_MODEL)
    before = models.list()[0]
    drop("p/r/m.gguf", OTHER_F16_MODEL, age_s=5)
    after = models.list()[0]
    assert after.key == before.key
    assert after.digest == hashlib.sha256(OTHER_F16_MODEL).hexdigest()
    assert models.details("m").name == "Other"


def test_slow_hash_does_not_hold_up_others(
    models: ModelStore, drop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop("p/r/known.gguf")
    models.list()
    drop("p/r/slow.gguf", OTHER_F16_MODEL)
    begun, go_on = threading.Event(), threading.Event()

    def slow(path: Path) -> str:
        begun.set()
        assert go_on.wait(30)
        return files.file_sha256(path)

    monkeypatch.setattr(store, "file_sha256", slow)
    thread = threading.Thread(target=models.list)
    thread.start()
    try:
        assert begun.wait(30)
        assert keys(models) == ["known"]
        assert models.get("slow") is None
    finally:
        go_on.set()
        thread.join()
    assert keys(models) == ["known", "slow"]


# Links and names in the folder


def test_link_out_of_the_store_is_refused(
    models: ModelStore, root: Path, source: Any, caplog: pytest.LogCaptureFixture
) -> None:
    outside = source()
    (root / "p" / "r").mkdir(parents=True)
    (root / "p" / "r" / "m.gguf").symlink_to(outside)
    (root / "p" / "out").symlink_to(outside.parent)
    assert models.list() == ()
    assert caplog.text.count("leads out of the store") == 2


def test_link_within_the_store_is_the_same_model(models: ModelStore, root: Path, drop: Any) -> None:
    blob = drop("p/blob", F16_MODEL)
    drop("p/r/a.gguf", OTHER_F16_MODEL)
    (root / "p" / "r" / "b.gguf").symlink_to(root / "p" / "r" / "a.gguf")
    (root / "p" / "r" / "c.gguf").symlink_to(blob)
    assert keys(models) == ["a", "c"]


def test_links_that_lead_nowhere_are_left_out(models: ModelStore, root: Path) -> None:
    folder = root / "p" / "r"
    folder.mkdir(parents=True)
    (folder / "loop.gguf").symlink_to(folder / "loop.gguf")
    (folder / "gone.gguf").symlink_to(folder / "nothing")
    (folder / "up").symlink_to(root)
    assert models.list() == ()


def test_unsafe_name_in_the_folder_is_left_out(
    models: ModelStore, drop: Any, caplog: pytest.LogCaptureFixture
) -> None:
    drop("p/r/a\x1b[2J.gguf")
    drop("p/r/\udcff.gguf")
    assert models.list() == ()
    assert caplog.text.count("name is not safe") == 2
    assert "\x1b" not in caplog.text


def test_fifo_and_folder_named_like_models_are_left_out(models: ModelStore, root: Path) -> None:
    (root / "p" / "r" / "d.gguf").mkdir(parents=True)
    os.mkfifo(root / "p" / "r" / "f.gguf")
    assert models.list() == ()


# The index


def test_index_saves_hashing_again(
    models: ModelStore, root: Path, drop: Any, hashed: list[Path]
) -> None:
    drop("p/r/m.gguf")
    first = models.list()
    assert len(hashed) == 1
    assert models.list() == first
    again = ModelStore(root)
    assert again.list() == first
    assert again.details("m") == models.details("m")
    assert len(hashed) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"version":1', '"version":99'),
        lambda text: text.replace('"size":', '"size":"x","y":'),
        lambda text: text.replace('"context_length":512', '"context_length":"512"'),
        lambda text: text.replace('"key":"b"', '"key":"a"'),
        lambda text: "\x00\xff" * 50,
    ],
)
def test_damaged_index_is_rebuilt(root: Path, drop: Any, damage: Callable[[str], str]) -> None:
    drop("p/r/a.gguf")
    drop("p/r/b.gguf", OTHER_F16_MODEL)
    before = ModelStore(root).list()
    index = root / ".index.json"
    text = index.read_text()
    index.write_text(damage(text), encoding="latin-1")
    assert ModelStore(root).list() == before
    assert json.loads(index.read_text()) == json.loads(text)


def test_index_entry_for_a_path_outside_is_ignored(root: Path, drop: Any, source: Any) -> None:
    drop("p/r/a.gguf")
    ModelStore(root).list()
    index = root / ".index.json"
    outside = source()
    document = json.loads(index.read_text())
    entry = dict(document["models"]["p/r/a.gguf"], key="evil", mtime_ns=outside.stat().st_mtime_ns)
    document["models"]["../downloads/" + outside.name] = entry
    index.write_text(json.dumps(document))
    assert keys(ModelStore(root)) == ["a"]


def test_stores_of_two_processes_share_the_index(
    models: ModelStore, root: Path, source: Any, hashed: list[Path]
) -> None:
    assert models.list() == ()
    imported = ModelStore(root).import_file(source())
    assert models.list() == (imported,)
    assert hashed == []


def test_index_that_can_not_be_written_does_not_stop_the_listing(
    models: ModelStore, drop: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store, "save_index", fail)
    drop("p/r/a.gguf")
    assert keys(models) == ["a"]
    drop("p/r/b.gguf", OTHER_F16_MODEL)
    assert keys(models) == ["a", "b"]
    assert caplog.text.count("can't be written") == 1


# Import


def test_import_copies_into_the_layout(models: ModelStore, root: Path, source: Any) -> None:
    seen: list[tuple[int, int]] = []
    file = source()
    model = models.import_file(file, on_progress=lambda done, total: seen.append((done, total)))
    path = root / "local" / "tiny-1m" / "Tiny-1M.F16.gguf"
    assert model.path == str(path)
    assert path.read_bytes() == F16_MODEL
    assert not path.samefile(file)
    assert model.digest == hashlib.sha256(F16_MODEL).hexdigest()
    assert seen[-1] == (len(F16_MODEL), len(F16_MODEL))
    assert models.list() == (model,)
    assert models.get("tiny-1m") == model
    assert not partials(root)


def test_import_does_not_hash_a_second_time(
    models: ModelStore, root: Path, source: Any, hashed: list[Path]
) -> None:
    models.import_file(source())
    models.list()
    ModelStore(root).list()
    assert hashed == []


def test_import_for_a_publisher(models: ModelStore, root: Path, source: Any) -> None:
    model = models.import_file(source(), publisher="HuggingFaceTB")
    assert model.path.startswith(str(root / "HuggingFaceTB"))


def test_import_by_hard_link(models: ModelStore, root: Path, source: Any) -> None:
    file = source()
    model = models.import_file(file, link=True)
    assert Path(model.path).samefile(file)
    assert model.digest == hashlib.sha256(F16_MODEL).hexdigest()
    assert not partials(root)


def test_import_by_link_of_a_symbolic_link_is_the_file(
    models: ModelStore, source: Any, tmp_path: Path
) -> None:
    blob = source("blob-without-suffix")
    link = tmp_path / "Pretty.gguf"
    link.symlink_to(blob)
    model = models.import_file(link, link=True)
    assert model.key == "pretty"
    assert not Path(model.path).is_symlink()
    assert Path(model.path).samefile(blob)


@needs_root
def test_hard_link_to_another_disk_becomes_a_copy(source: Any, disk: Path) -> None:
    file = source()
    model = ModelStore(disk / "models").import_file(file, link=True)
    assert not Path(model.path).samefile(file)
    assert Path(model.path).read_bytes() == F16_MODEL


def test_file_without_suffix_gets_one(models: ModelStore, source: Any) -> None:
    assert models.import_file(source("blob")).path.endswith("/local/blob/blob.gguf")


def test_importing_the_same_content_again_gives_the_existing_model(
    models: ModelStore, source: Any
) -> None:
    first = models.import_file(source())
    assert models.import_file(source()) == first
    assert models.import_file(source("another-name.gguf")) == first
    assert models.import_file(Path(first.path)) == first
    assert models.list() == (first,)


def test_importing_another_quantisation_gives_a_key_of_its_own(
    models: ModelStore, source: Any
) -> None:
    models.import_file(source("m.F16.gguf", F16_MODEL))
    assert models.import_file(source("m.Q8_0.gguf", Q8_MODEL)).key == "m@q8_0"
    assert keys(models) == ["m", "m@q8_0"]


def test_importing_another_file_of_the_same_key_is_a_conflict(
    models: ModelStore, root: Path, source: Any
) -> None:
    first = models.import_file(source("m.gguf"))
    for name in ("m.gguf", "M.F16.gguf"):
        with pytest.raises(Conflict) as caught:
            models.import_file(source(name, OTHER_F16_MODEL))
        assert caught.value.code == "model_exists"
        assert caught.value.hint
    assert models.list() == (first,)
    assert not partials(root)


def test_import_repairs_a_damaged_file_in_its_place(models: ModelStore, source: Any) -> None:
    path = Path(models.import_file(source()).path)
    os.truncate(path, 500)
    assert models.list() == ()
    assert models.import_file(source()).path == str(path)
    assert path.read_bytes() == F16_MODEL


def test_threads_that_import_the_same_file_get_one_model(models: ModelStore, source: Any) -> None:
    file, results = source(), []
    threads = [
        threading.Thread(target=lambda: results.append(models.import_file(file))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert len(set(results)) == 1


def test_threads_may_list_get_and_import_together(models: ModelStore, source: Any) -> None:
    wanted = [source(f"m{n}.gguf", gguf_bytes({"general.name": f"Model {n}"})) for n in range(12)]
    errors: list[BaseException] = []

    def run(part: int) -> None:
        try:
            for file in wanted[part::4]:
                models.import_file(file)
                assert models.get(file.stem)
                models.list()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(models.list()) == 12


# Faults of an import


def refused(
    models: ModelStore, source: Path, kind: type[LlmsterError], code: str, **options: Any
) -> LlmsterError:
    with pytest.raises(kind) as caught:
        models.import_file(source, **options)
    assert caught.value.code == code
    assert not partials(models.root)
    assert not (models.root / "local").exists()
    return caught.value


def test_import_of_a_missing_file(models: ModelStore, tmp_path: Path) -> None:
    error = refused(models, tmp_path / "none.gguf", NotFound, "file_not_found")
    assert "none.gguf" in error.message


def test_import_of_a_folder(models: ModelStore, tmp_path: Path) -> None:
    assert "folder" in refused(models, tmp_path, BadRequest, "not_a_file").message


def test_import_of_a_fifo(models: ModelStore, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "f.gguf")
    refused(models, tmp_path / "f.gguf", BadRequest, "not_a_file")


def test_import_of_an_unreadable_file(
    models: ModelStore, source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may read everything, so the system's answer is given here.
    monkeypatch.setattr(os, "access", lambda *args: False)
    refused(models, source(), BadRequest, "file_unreadable")


def test_import_of_an_impossible_path(models: ModelStore) -> None:
    refused(models, Path("a\0b"), BadRequest, "file_unreadable")
    refused(models, Path("x" * 5000), BadRequest, "file_unreadable")


def test_import_of_another_format(models: ModelStore, source: Any) -> None:
    refused(models, source("x.gguf", b"PK\3\4" + bytes(500)), BadModel, "bad_gguf")


def test_import_of_a_truncated_file(models: ModelStore, source: Any) -> None:
    error = refused(models, source("x.gguf", F16_MODEL[:-100]), BadModel, "bad_gguf")
    assert f"{len(F16_MODEL):,}" in error.message
    assert f"{len(F16_MODEL) - 100:,}" in error.message


@pytest.mark.parametrize("name", ["a\nb.gguf", "a..b.gguf", ".hidden.gguf", "\udcff.gguf"])
def test_import_of_a_file_with_an_unsafe_name(models: ModelStore, source: Any, name: str) -> None:
    refused(models, source(name), BadRequest, "bad_file_name")


@pytest.mark.parametrize("publisher", ["", "..", "a/b", "../x", ".a", "a b", "a\n", "x" * 65])
def test_import_for_an_unsafe_publisher(models: ModelStore, source: Any, publisher: str) -> None:
    refused(models, source(), BadRequest, "bad_publisher", publisher=publisher)


def test_import_through_a_link_out_of_the_store(
    models: ModelStore, root: Path, source: Any, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    root.mkdir()
    (root / "pub").symlink_to(outside)
    refused(models, source(), HomeError, "path_outside_home", publisher="pub")
    assert list(outside.iterdir()) == []


def test_import_below_a_file(models: ModelStore, root: Path, source: Any) -> None:
    root.write_text("")
    with pytest.raises(HomeError) as caught:
        models.import_file(source())
    assert caught.value.code == "home_unusable"


def test_source_that_changes_while_it_is_copied_is_not_stored(
    models: ModelStore, source: Any
) -> None:
    file = source("x.gguf", gguf_bytes(tensors=[Tensor("w", (64, 1 << 16), F16)]))

    def cut(done: int, total: int) -> None:
        os.truncate(file, files.CHUNK_BYTES)

    refused(models, file, BadModel, "bad_gguf", on_progress=cut)


def test_import_that_is_broken_off_leaves_nothing(models: ModelStore, source: Any) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        models.import_file(source(), on_progress=stop)
    assert not (models.root / "local").exists()
    assert models.import_file(source()).key == "tiny-1m"


def test_import_removes_what_killed_imports_left(
    models: ModelStore, root: Path, source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.import_file(source("a.gguf"))
    dead = root / "local" / "a" / ".import-1.partial"
    dead.write_bytes(b"x")
    models.import_file(source("b.gguf", OTHER_F16_MODEL))
    assert dead.exists(), "it may belong to an import that has just begun"
    monkeypatch.setattr(files, "PARTIAL_GRACE_S", -1.0)
    models.import_file(source("c.gguf", Q8_MODEL))
    assert not dead.exists()


def test_partial_file_of_a_living_import_stays(
    root: Path, source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PARTIAL_GRACE_S", -1.0)
    root.mkdir()
    for link in (False, True):
        with files.staged(source(), root, link=link) as file:
            files.remove_dead_partials(root)
            assert file.path.exists()
        assert not file.path.exists()


@needs_root
def test_disk_without_room_is_found_before_the_copy(
    disk: Path, source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 1 << 16)
    models = ModelStore(disk / "models")
    content = gguf_bytes(tensors=[Tensor("w", (64, 1 << 14), F16)])
    progress: list[int] = []
    error = refused(
        models,
        source("x.gguf", content),
        HomeError,
        "disk_full",
        on_progress=lambda done, total: progress.append(done),
    )
    assert progress == []
    assert f"{len(content):,} bytes are needed" in error.message
    assert "are free" in error.message


@needs_root
def test_disk_that_fills_up_during_the_copy(
    disk: Path, source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = ModelStore(disk / "models")
    content = gguf_bytes(tensors=[Tensor("w", (64, 1 << 14), F16)])
    with monkeypatch.context() as patch:
        # The room is there when it is asked for, and gone when it is needed.
        patch.setattr(files, "_free_bytes", lambda folder: 1 << 40)
        refused(models, source("x.gguf", content), HomeError, "disk_full")
    assert models.import_file(source()).key == "tiny-1m"


@needs_root
def test_read_only_disk(disk: Path, source: Any) -> None:
    (disk / "models" / "p" / "r").mkdir(parents=True)
    (disk / "models" / "p" / "r" / "old.gguf").write_bytes(OTHER_F16_MODEL)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    models = ModelStore(disk / "models")
    assert keys(models) == ["old"]
    error = refused(models, source(), HomeError, "home_read_only")
    assert str(disk) in error.message
    assert keys(models) == ["old"]
