"""The GGUF reader: what it reads from a sound file, and how it refuses each kind of bad one."""

import ctypes
import os
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from fakes.gguf import F16, F32, Q4_1, Q8_0, TENSORS, Tensor, Typed, gguf_bytes, text
from llmster_daemon.errors import BadModel
from llmster_daemon.models.gguf import MAX_METADATA_BYTES, GgufInfo, read_gguf
from llmster_daemon.models.gguf_types import FILE_TYPES, TENSOR_TYPES


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def read_bytes(content: bytes) -> GgufInfo:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return read_gguf(path)

    return read_bytes


@pytest.fixture
def flaw(read: Any) -> Any:
    """The message and hint with which a file is refused."""

    def refuse(content: bytes) -> str:
        with pytest.raises(BadModel) as caught:
            read(content)
        assert caught.value.code == "bad_gguf"
        assert caught.value.status == 422
        assert "model.gguf" in caught.value.message
        assert caught.value.hint
        return str(caught.value)

    return refuse


@pytest.mark.parametrize("version", [2, 3])
def test_reads_a_sound_file(read: Any, version: int) -> None:
    assert read(gguf_bytes(version=version)) == GgufInfo(
        architecture="llama",
        name="Tiny",
        quantisation="F16",
        context_length=512,
        block_count=2,
        embedding_length=64,
        head_count=4,
        head_count_kv=2,
        key_length=16,
        value_length=16,
        vocab_size=5,
        parameters=64 * 5 + 64 * 64 + 64,
        chat_template="{{ messages }}",
        bos_token="<s>",
        eos_token="</s>",
        add_bos_token=True,
        tensor_count=3,
        data_bytes=2 * (64 * 5 + 64 * 64) + 4 * 64,
    )


def test_kv_bytes_per_token_are_k_and_v_in_f16_of_all_layers(read: Any) -> None:
    assert read(gguf_bytes()).kv_bytes_per_token == 2 * 2 * (16 + 16) * 2


def test_kv_bytes_with_heads_per_layer(read: Any) -> None:
    info = read(gguf_bytes({"llama.attention.head_count_kv": [0, 3]}))
    assert (info.head_count_kv, info.head_counts_kv) == (3, (0, 3))
    assert info.kv_bytes_per_token == 3 * (16 + 16) * 2


def test_key_and_value_length_override_the_default(read: Any) -> None:
    info = read(gguf_bytes({"llama.attention.key_length": 48, "llama.attention.value_length": 32}))
    assert (info.key_length, info.value_length) == (48, 32)
    assert info.kv_bytes_per_token == 2 * 2 * (48 + 32) * 2


def test_kv_heads_default_to_all_heads(read: Any) -> None:
    assert read(gguf_bytes({"llama.attention.head_count_kv": None})).head_count_kv == 4


def test_model_without_attention_has_no_kv(read: Any) -> None:
    changes = {"llama.attention.head_count": None, "llama.attention.head_count_kv": None}
    assert read(gguf_bytes(changes)).kv_bytes_per_token == 0


@pytest.mark.parametrize(
    ("file_type", "name"), [(0, "F32"), (3, "Q4_1"), (15, "Q4_K_M"), (1024 + 7, "Q8_0")]
)
def test_quantisation_from_the_file_type(read: Any, file_type: int, name: str) -> None:
    assert read(gguf_bytes({"general.file_type": file_type})).quantisation == name


@pytest.mark.parametrize("file_type", [None, 999])
def test_quantisation_from_the_tensors_that_hold_most_elements(
    read: Any, file_type: int | None
) -> None:
    tensors = [Tensor(f"norm.{n}", (64,), F32) for n in range(5)] + [Tensor("w", (64, 64), Q8_0)]
    assert read(gguf_bytes({"general.file_type": file_type}, tensors)).quantisation == "Q8_0"


def test_size_of_block_quantised_tensors(read: Any) -> None:
    info = read(gguf_bytes(tensors=[Tensor("w", (64, 3), Q4_1)]))
    assert (info.parameters, info.data_bytes) == (192, 120)


def test_what_the_file_does_not_say_is_none(read: Any) -> None:
    optional = ("bos_token_id", "eos_token_id", "add_bos_token", "tokens", "scores")
    changes = {f"tokenizer.ggml.{name}": None for name in optional}
    info = read(gguf_bytes({**changes, "tokenizer.chat_template": None, "general.name": None}))
    assert (info.bos_token, info.eos_token, info.add_bos_token) == (None, None, None)
    assert (info.chat_template, info.name, info.vocab_size) == (None, "", 0)


def test_vocabulary_size_without_a_vocabulary(read: Any) -> None:
    changes = {"tokenizer.ggml.tokens": None, "llama.vocab_size": 1000}
    assert read(gguf_bytes(changes)).vocab_size == 1000


def test_token_id_outside_the_vocabulary_is_no_token(read: Any) -> None:
    assert read(gguf_bytes({"tokenizer.ggml.bos_token_id": 5})).bos_token is None


def test_integers_of_any_width(read: Any) -> None:
    changes = {"llama.context_length": Typed("u64", 4096), "llama.block_count": Typed("i8", 2)}
    assert read(gguf_bytes(changes)).context_length == 4096


def test_other_alignment(read: Any) -> None:
    assert read(gguf_bytes({"general.alignment": 4096}, alignment=4096)).tensor_count == 3


def test_text_that_is_not_utf8_is_read(read: Any) -> None:
    assert read(gguf_bytes({"general.name": b"a\xffb"})).name == "a\ufffdb"


def test_name_cannot_steer_the_terminal(read: Any) -> None:
    assert "\x1b" not in read(gguf_bytes({"general.name": "\x1b[2Jx"})).name


def test_large_vocabulary_is_read_fast_and_small(read: Any) -> None:
    tokens = [f"token{n}" for n in range(200_000)]
    content = gguf_bytes({"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.eos_token_id": 199_999})
    del tokens
    began = time.perf_counter()
    assert read(content).eos_token == "token199999"
    assert time.perf_counter() - began < 2
    tracemalloc.start()
    try:
        read(content)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(content)
    finally:
        tracemalloc.stop()


def test_refuses_an_empty_file(flaw: Any) -> None:
    assert "empty" in flaw(b"")


def test_refuses_another_format(flaw: Any) -> None:
    assert "not a GGUF file" in flaw(b"PK\3\4" + bytes(100))


def test_git_lfs_pointer_gets_its_own_hint(flaw: Any) -> None:
    assert "git lfs pull" in flaw(b"version https://git-lfs.github.com/spec/v1\n")


@pytest.mark.parametrize("version", [0x10000, 1, 4, 99])
def test_refuses_other_versions(flaw: Any, version: int) -> None:
    flaw(gguf_bytes(version=version))


def test_refuses_big_endian(flaw: Any) -> None:
    assert "big-endian" in flaw(gguf_bytes(order=">"))
    assert "big-endian" in flaw(gguf_bytes(magic=b"FUGG", order=">"))


def test_refuses_a_part_of_a_split_model(flaw: Any) -> None:
    message = flaw(gguf_bytes({"split.count": Typed("u16", 3)}))
    assert "split" in message
    assert "llama-gguf-split --merge" in message


def test_a_split_of_one_is_whole(read: Any) -> None:
    assert read(gguf_bytes({"split.count": Typed("u16", 1)})).tensor_count == 3


def test_truncated_weights_give_both_sizes(flaw: Any) -> None:
    content = gguf_bytes()
    message = flaw(content[:-1])
    assert f"{len(content):,} bytes are expected" in message
    assert f"it has {len(content) - 1:,}" in message


def test_truncated_metadata_gives_the_real_size(flaw: Any) -> None:
    assert "it has 300" in flaw(gguf_bytes()[:300])


def test_every_truncation_is_found(flaw: Any) -> None:
    content = gguf_bytes()
    for length in [*range(1200), *range(1200, len(content), 97)]:
        flaw(content[:length])


def test_refuses_counts_beyond_bounds(flaw: Any) -> None:
    for tensors, values in [(1 << 63, 1), (1, 1 << 63), (100_000, 1), (1, 5000)]:
        assert "claims" in flaw(b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + bytes(999))


def header(value: bytes) -> bytes:
    """A file with one metadata value, cut after it and followed by zeros."""
    return b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + text("k") + value + bytes(256)


@pytest.mark.parametrize("length", [257, 1 << 31, (1 << 64) - 1, (1 << 63) + 8])
def test_refuses_string_longer_than_the_file(flaw: Any, length: int) -> None:
    flaw(header(struct.pack("<IQ", 8, length)))


@pytest.mark.parametrize("element", [0, 4, 8, 12])
@pytest.mark.parametrize("count", [1000, 1 << 40, (1 << 64) - 1])
def test_refuses_array_longer_than_the_file(flaw: Any, element: int, count: int) -> None:
    assert "more than fit" in flaw(header(struct.pack("<IIQ", 9, element, count)))


def test_refuses_arrays_of_arrays(flaw: Any) -> None:
    assert "array of arrays" in flaw(header(struct.pack("<IIQ", 9, 9, 1) * 3))


@pytest.mark.parametrize("kind", [13, 1 << 31])
def test_refuses_unknown_value_types(flaw: Any, kind: int) -> None:
    assert "unknown type" in flaw(header(struct.pack("<I", kind)))
    assert "unknown type" in flaw(header(struct.pack("<IIQ", 9, kind, 1)))


def test_refuses_endless_metadata_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    claim = 4 * MAX_METADATA_BYTES
    path.write_bytes(header(struct.pack("<IIQ", 9, 0, claim)))
    os.truncate(path, 2 * claim)
    tracemalloc.start()
    try:
        with pytest.raises(BadModel, match="metadata is longer"):
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_refuses_a_key_that_is_there_twice(flaw: Any) -> None:
    pair = text("k") + struct.pack("<IB", 0, 1)
    assert "twice" in flaw(b"GGUF" + struct.pack("<IQQ", 3, 1, 2) + pair + pair + bytes(99))


def test_refuses_an_overlong_template(flaw: Any) -> None:
    assert "at most" in flaw(gguf_bytes({"tokenizer.chat_template": "x" * (1 << 20) + "x"}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("general.architecture", 7),
        ("general.architecture", "a/b"),
        ("general.architecture", ""),
        ("general.architecture", None),
        ("general.name", 1.5),
        ("general.alignment", 0),
        ("general.alignment", 24),
        ("general.alignment", "32"),
        ("general.file_type", "Q4_1"),
        ("llama.context_length", None),
        ("llama.context_length", Typed("i32", -1)),
        ("llama.context_length", 1.0),
        ("llama.context_length", [512]),
        ("llama.block_count", 0),
        ("llama.block_count", 100_000),
        ("llama.embedding_length", Typed("u64", 1 << 40)),
        ("llama.attention.head_count", Typed("f32", [1.0, 2.0])),
        ("llama.attention.head_count_kv", [1, 2, 3]),
        ("llama.attention.head_count_kv", Typed("u32", [])),
        ("llama.attention.head_count_kv", Typed("i32", [1, -2])),
        ("tokenizer.ggml.tokens", "abc"),
        ("tokenizer.ggml.tokens", [1, 2]),
        ("tokenizer.ggml.tokens", ["a", "x" * 5000]),
        ("tokenizer.ggml.add_bos_token", 1),
        ("tokenizer.ggml.bos_token_id", "1"),
    ],
)
def test_refuses_metadata_of_the_wrong_kind(flaw: Any, key: str, value: object) -> None:
    flaw(gguf_bytes({key: value}))


def test_projector_or_adapter_is_no_language_model(flaw: Any) -> None:
    assert "clip.block_count" in flaw(gguf_bytes({"general.architecture": "clip"}))


def test_refuses_a_file_without_weights(flaw: Any) -> None:
    assert "no weights" in flaw(gguf_bytes(tensors=[]))


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1), (0,), (64, 0), (1 << 62, 4), (1 << 32, 1 << 32), (1 << 63,)]
)
def test_refuses_impossible_shapes(flaw: Any, shape: tuple[int, ...]) -> None:
    flaw(gguf_bytes(tensors=[Tensor("w", shape, F16, size=64)]))


def test_huge_tensor_is_a_truncated_file(flaw: Any) -> None:
    assert "truncated" in flaw(gguf_bytes(tensors=[Tensor("w", (1 << 40,), F16, size=64)]))


def test_refuses_rows_of_broken_blocks(flaw: Any) -> None:
    assert "blocks" in flaw(gguf_bytes(tensors=[Tensor("w", (40, 4), Q4_1)]))


@pytest.mark.parametrize("kind", [4, 31, 43, 1 << 31])
def test_refuses_unknown_tensor_types(flaw: Any, kind: int) -> None:
    content = gguf_bytes(tensors=[Tensor("w", (32,), F32)])
    known, unknown = (struct.pack("<QIQ", 32, number, 0) for number in (F32, kind))
    assert content.count(known) == 1
    assert f"type {kind}" in flaw(content.replace(known, unknown))


@pytest.mark.parametrize("offset", [1, 32, 1 << 40, (1 << 64) - 32])
def test_refuses_misplaced_tensors(flaw: Any, offset: int) -> None:
    assert "lies at" in flaw(gguf_bytes(tensors=[Tensor("w", (64,), F32, offset=offset)]))


def test_refuses_overlapping_tensors(flaw: Any) -> None:
    tensors = [Tensor("a", (64,)), Tensor("b", (64,), offset=0)]
    assert "lies at" in flaw(gguf_bytes(tensors=tensors))


def test_refuses_tensors_of_one_name(flaw: Any) -> None:
    assert "twice" in flaw(gguf_bytes(tensors=[Tensor("a", (8,)), Tensor("a", (8,))]))


def test_refuses_long_tensor_names(flaw: Any) -> None:
    assert "name" in flaw(gguf_bytes(tensors=[Tensor("a" * 64, (8,))]))


def test_control_characters_of_the_file_stay_out_of_messages(flaw: Any) -> None:
    assert "\x1b" not in flaw(gguf_bytes(tensors=[Tensor("\x1b[2J", (0,))]))


def test_missing_file_folder_and_fifo_are_bad_models(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.gguf"
    os.mkfifo(fifo)
    for path in (tmp_path / "none.gguf", tmp_path, fifo, tmp_path / "a\0b"):
        with pytest.raises(BadModel):
            read_gguf(path)


def test_types_are_those_of_the_installed_llama_cpp() -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    ggml = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    ggml.ggml_type_name.restype = ctypes.c_char_p
    ggml.ggml_type_size.restype = ctypes.c_size_t
    ggml.ggml_blck_size.restype = ctypes.c_int64
    theirs = {
        number: (ggml.ggml_type_name(number).decode().upper(), *sizes)
        for number in range(llama_cpp.GGML_TYPE_COUNT)
        if (sizes := (ggml.ggml_blck_size(number), ggml.ggml_type_size(number))) != (0, 0)
    }
    assert {number: tuple(kind) for number, kind in TENSOR_TYPES.items()} == theirs
    prefixes = ("LLAMA_FTYPE_MOSTLY_", "LLAMA_FTYPE_ALL_")
    file_types = {
        getattr(llama_cpp, name): name.split("_", 3)[3]
        for name in dir(llama_cpp)
        if name.startswith(prefixes)
    }
    assert file_types == FILE_TYPES


def test_llama_cpp_takes_the_files_that_the_tests_write(tmp_path: Path) -> None:
    """So that what our reader is tested with is GGUF, and not only our idea of it."""
    llama_cpp = pytest.importorskip("llama_cpp")
    ggml = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))

    class Params(ctypes.Structure):
        _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))

    ggml.gguf_init_from_file.argtypes = [ctypes.c_char_p, Params]
    ggml.gguf_init_from_file.restype = ctypes.c_void_p
    ggml.gguf_get_n_tensors.argtypes = [ctypes.c_void_p]
    ggml.gguf_get_n_tensors.restype = ctypes.c_int64
    ggml.gguf_free.argtypes = [ctypes.c_void_p]
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes())
    context = ggml.gguf_init_from_file(str(path).encode(), Params(True, None))
    assert context
    assert ggml.gguf_get_n_tensors(context) == len(TENSORS)
    ggml.gguf_free(context)
