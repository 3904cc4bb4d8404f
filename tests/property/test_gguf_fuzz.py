"""Whatever bytes a model file holds, the reader returns or raises BadModel: fast and in bounds."""

import struct
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.gguf import TENSORS, gguf_bytes, tensor_bytes
from llmster_daemon.errors import BadModel
from llmster_daemon.models.gguf import GgufInfo, read_gguf
from llmster_daemon.models.index import Entry, Index

SOUND = gguf_bytes()
HEAD = len(SOUND) - sum(map(tensor_bytes, TENSORS))
"""Where the weights begin; changes beyond matter to no one."""
TIME_LIMIT_S = 1.0
MEMORY_LIMIT_BYTES = 8 << 20

U64 = st.one_of(
    st.integers(0, 64), st.integers(0, (1 << 64) - 1), st.sampled_from([1 << 63, (1 << 64) - 1])
)


@pytest.fixture(scope="module")
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "model.gguf"


def read_within_bounds(path: Path, content: bytes) -> GgufInfo | None:
    path.write_bytes(content)
    tracemalloc.start()
    began = time.perf_counter()
    try:
        info = read_gguf(path)
    except BadModel as error:
        assert error.code == "bad_gguf"
        assert error.message.isprintable()
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert time.perf_counter() - began < TIME_LIMIT_S
        assert peak < MEMORY_LIMIT_BYTES
    # What is accepted must survive the index.
    entry = Entry(size=1, mtime_ns=1, digest="0" * 64, key="k", info=info)
    text = Index(models={"m": entry}).model_dump_json()
    assert Index.model_validate_json(text).models["m"] == entry
    assert info.kv_bytes_per_token >= 0
    assert info.data_bytes <= len(content)
    return info


fuzz = settings(max_examples=300, deadline=None)


@fuzz
@given(edits=st.lists(st.tuples(st.integers(0, HEAD - 1), st.integers(0, 255)), max_size=8))
def test_changed_bytes(path: Path, edits: list[tuple[int, int]]) -> None:
    content = bytearray(SOUND)
    for position, value in edits:
        content[position] = value
    read_within_bounds(path, bytes(content))


@fuzz
@given(position=st.integers(0, HEAD - 8), value=U64)
def test_changed_numbers(path: Path, position: int, value: int) -> None:
    content = bytearray(SOUND)
    struct.pack_into("<Q", content, position, value)
    read_within_bounds(path, bytes(content))


@fuzz
@given(length=st.integers(0, len(SOUND) - 1))
def test_truncation_is_always_found(path: Path, length: int) -> None:
    assert read_within_bounds(path, SOUND[:length]) is None


@fuzz
@given(position=st.integers(0, HEAD), inserted=st.binary(max_size=64), removed=st.integers(0, 64))
def test_inserted_and_removed_bytes(
    path: Path, position: int, inserted: bytes, removed: int
) -> None:
    read_within_bounds(path, SOUND[:position] + inserted + SOUND[position + removed :])


@fuzz
@given(tail=st.binary(max_size=512), tensors=U64, values=U64)
def test_noise_after_a_header(path: Path, tail: bytes, tensors: int, values: int) -> None:
    read_within_bounds(path, b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + tail)


@fuzz
@given(content=st.binary(max_size=512))
def test_noise(path: Path, content: bytes) -> None:
    assert read_within_bounds(path, content) is None
