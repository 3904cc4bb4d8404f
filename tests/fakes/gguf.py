"""Writes small GGUF files, sound unless told otherwise."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NUMBERS = {
    "u8": (0, "B"),
    "i8": (1, "b"),
    "u16": (2, "H"),
    "i16": (3, "h"),
    "u32": (4, "I"),
    "i32": (5, "i"),
    "f32": (6, "f"),
    "bool": (7, "?"),
    "u64": (10, "Q"),
    "i64": (11, "q"),
    "f64": (12, "d"),
}
STRING, ARRAY = 8, 9
F32, F16, Q4_1, Q8_0 = 0, 1, 3, 8
BLOCKS = {F32: (1, 4), F16: (1, 2), Q4_1: (32, 20), Q8_0: (32, 34)}


@dataclass(frozen=True)
class Typed:
    """A value of an explicit metadata type. A list is an array of that type."""

    kind: str
    value: Any


@dataclass(frozen=True)
class Tensor:
    """A tensor. `size` and `offset` are what the format asks for unless given."""

    name: str
    shape: tuple[int, ...]
    kind: int = F32
    offset: int | None = None
    size: int | None = None


METADATA: Mapping[str, Any] = {
    "general.architecture": "llama",
    "general.name": "Tiny",
    "general.file_type": F16,
    "llama.context_length": 512,
    "llama.embedding_length": 64,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a", "b"],
    "tokenizer.ggml.scores": Typed("f32", [0.0] * 5),
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": "{{ messages }}",
}
TENSORS = (
    Tensor("token_embd.weight", (64, 5), F16),
    Tensor("blk.0.attn_q.weight", (64, 64), F16),
    Tensor("output_norm.weight", (64,), F32),
)


def text(value: "str | bytes", order: str = "<") -> bytes:
    """A string as the format writes it."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack(order + "Q", len(raw)) + raw


def value_bytes(value: Any, order: str = "<") -> bytes:
    """A metadata value with its type before it."""
    match value:
        case Typed(kind, list(items)):
            number, form = NUMBERS[kind]
            body = b"".join(struct.pack(order + form, item) for item in items)
            return struct.pack(order + "IIQ", ARRAY, number, len(items)) + body
        case Typed(kind, single):
            number, form = NUMBERS[kind]
            return struct.pack(order + "I", number) + struct.pack(order + form, single)
        case str() | bytes():
            return struct.pack(order + "I", STRING) + text(value, order)
        case bool():
            return value_bytes(Typed("bool", value), order)
        case int():
            return value_bytes(Typed("u32", value), order)
        case float():
            return value_bytes(Typed("f32", value), order)
        case [str(), *_]:
            body = b"".join(text(item, order) for item in value)
            return struct.pack(order + "IIQ", ARRAY, STRING, len(value)) + body
        case [int(), *_]:
            return value_bytes(Typed("u32", value), order)
    raise TypeError(f"no GGUF type for {value!r}")


def gguf_bytes(
    changes: Mapping[str, Any] | None = None,
    tensors: Sequence[Tensor] = TENSORS,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    alignment: int = 32,
    order: str = "<",
    fill: bytes = b"\0",
) -> bytes:
    """A whole file: `METADATA` with `changes` (None takes a key out), and `tensors`."""
    metadata = {k: v for k, v in {**METADATA, **(changes or {})}.items() if v is not None}
    head = magic + struct.pack(order + "IQQ", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        head += text(key, order) + value_bytes(value, order)
    data = b""
    for tensor in tensors:
        data += b"\0" * (-len(data) % alignment)
        head += text(tensor.name, order) + struct.pack(order + "I", len(tensor.shape))
        head += b"".join(struct.pack(order + "Q", length) for length in tensor.shape)
        offset = len(data) if tensor.offset is None else tensor.offset
        head += struct.pack(order + "IQ", tensor.kind, offset)
        data += fill * (tensor_bytes(tensor) if tensor.size is None else tensor.size)
    return head + b"\0" * (-len(head) % alignment) + data


def tensor_bytes(tensor: Tensor) -> int:
    """The size of a tensor's data."""
    block, block_bytes = BLOCKS[tensor.kind]
    elements = 1
    for length in tensor.shape:
        elements *= length
    return elements // block * block_bytes
