"""Reads what a GGUF file says about itself. The files are untrusted.

Nothing is believed before it has been compared with the size of the file, and memory is bounded by
`MAX_METADATA_BYTES` whatever the file claims. The first pass only notes where each value lies, so
the token lists (hundreds of thousands of strings) never become Python objects.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; where llama.cpp's own loader
(`gguf.cpp`) is stricter, so is this, for a file it refuses can't be served.
"""

import os
import re
import stat
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..errors import BadModel
from .gguf_types import (
    ARRAY,
    BOOL,
    FILE_TYPE_GUESSED,
    FILE_TYPES,
    INTEGERS,
    NUMBERS,
    STRING,
    TENSOR_TYPES,
)

MAX_METADATA_BYTES: Final = 64 << 20
"""The largest vocabularies in use (262,144 tokens, 514,906 merges) need less than 20 MiB."""
MAX_VALUES: Final = 4096
MAX_TENSORS: Final = 65_536
MAX_KEY_BYTES: Final = 65_535
MAX_TEXT_BYTES: Final = 1 << 20
MAX_TOKEN_BYTES: Final = 4096
MAX_TENSOR_NAME_BYTES: Final = 63
MAX_DIMENSIONS: Final = 4
MAX_LAYERS: Final = 4096
MAX_ALIGNMENT: Final = 1 << 20
DEFAULT_ALIGNMENT: Final = 32
CHUNK_BYTES: Final = 1 << 20

_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_ARCHITECTURE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_AGAIN: Final = "get the file again, then run `llmster import FILE`"


@dataclass(frozen=True)
class GgufInfo:
    """What a GGUF file says about the model in it. Lengths in tokens, sizes in bytes."""

    architecture: str
    name: str
    quantisation: str
    context_length: int
    block_count: int
    embedding_length: int
    head_count: int
    head_count_kv: int
    """Where it differs between layers, the most that one has."""
    key_length: int
    value_length: int
    vocab_size: int
    parameters: int
    chat_template: str | None
    bos_token: str | None
    eos_token: str | None
    add_bos_token: bool | None
    """None: the file does not say; the tokenizer's own default holds."""
    tensor_count: int
    data_bytes: int
    head_counts_kv: tuple[int, ...] = ()
    """One per layer, where the file gives them so; else empty."""

    @property
    def kv_bytes_per_token(self) -> int:
        """The bytes that one token takes in an f16 KV cache: K and V of all layers.

        An upper bound for models with sliding windows, recurrent layers or latent attention.
        """
        heads = sum(self.head_counts_kv) or self.block_count * self.head_count_kv
        return 2 * heads * (self.key_length + self.value_length)


class _GgufError(Exception):
    """What is wrong with the file, in words that follow "it can't be used: "."""

    def __init__(self, reason: str, hint: str = _AGAIN) -> None:
        super().__init__(reason)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class _Value:
    """Where a metadata value lies. `element` and `count` are of an array."""

    kind: int
    position: int
    element: int = -1
    count: int = 1


class _Reader:
    """A cursor over the start of a file, which is read into memory as far as it is needed."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self.size = size
        self.buffer = bytearray()
        self.position = 0

    def need(self, count: int) -> int:
        """Makes the next `count` bytes present; the cursor's position. Raises _GgufError."""
        end = self.position + count
        if end <= len(self.buffer):
            return self.position
        if end > self.size:
            raise _GgufError(
                f"it ends within its metadata (at least {end:,} bytes are expected,"
                f" it has {self.size:,})"
            )
        if end > MAX_METADATA_BYTES:
            raise _GgufError(f"its metadata is longer than {MAX_METADATA_BYTES:,} bytes")
        while len(self.buffer) < end:
            wanted = max(CHUNK_BYTES, end - len(self.buffer))
            chunk = os.pread(self._fd, wanted, len(self.buffer))
            if not chunk:
                raise _GgufError("it became shorter while it was read")
            self.buffer += chunk
        return self.position

    def skip(self, count: int) -> None:
        """Steps over `count` bytes."""
        self.position = self.need(count) + count

    def number(self, form: struct.Struct) -> int:
        """The integer at the cursor, which moves past it."""
        value: int = form.unpack_from(self.buffer, self.need(form.size))[0]
        self.position += form.size
        return value

    def text(self, limit: int, what: str) -> str:
        """The string at the cursor, which moves past it. Bytes that are not UTF-8 become U+FFFD."""
        length = self.number(_U64)
        if length > limit:
            raise _GgufError(f"{what} has {length:,} bytes, at most {limit:,} are allowed")
        start = self.need(length)
        self.position += length
        return self.buffer[start : self.position].decode("utf-8", "replace")

    def skip_strings(self, count: int) -> None:
        """Steps over `count` strings. The hot loop: 100 ns a string."""
        self._check_room(count, _U64.size)
        position, buffer, unpack = self.position, self.buffer, _U64.unpack_from
        for _ in range(count):
            if position + 8 > len(buffer):
                self.position = position
                self.need(8)
            position += 8 + unpack(buffer, position)[0]
        self.position = position
        self.need(0)

    def skip_value(self, kind: int) -> _Value:
        """Steps over a value of this type; where it lies."""
        start = self.position
        if kind == STRING:
            self.skip_strings(1)
            return _Value(kind, start)
        if kind != ARRAY:
            self.skip(_number_form(kind).size)
            return _Value(kind, start)
        element, count = self.number(_U32), self.number(_U64)
        start = self.position
        if element == ARRAY:
            raise _GgufError("its metadata holds an array of arrays")
        if element == STRING:
            self.skip_strings(count)
        else:
            size = _number_form(element).size
            self._check_room(count, size)
            self.skip(count * size)
        return _Value(kind, start, element, count)

    def _check_room(self, count: int, size: int) -> None:
        if count * size > self.size - self.position:
            raise _GgufError(f"its metadata holds an array of {count:,}, more than fit the file")


def _number_form(kind: int) -> struct.Struct:
    form = NUMBERS.get(kind)
    if form is None:
        raise _GgufError(f"its metadata holds a value of the unknown type {kind}")
    return form


class _Metadata:
    """The file's key-value pairs, looked up by key. Values are decoded only when asked for."""

    def __init__(self, reader: _Reader, count: int) -> None:
        self._reader = reader
        self._values: dict[str, _Value] = {}
        for _ in range(count):
            key = reader.text(MAX_KEY_BYTES, "a key")
            if not key or key in self._values:
                raise _GgufError(
                    f"the key {_shown(key)} is there twice" if key else "a key is empty"
                )
            self._values[key] = reader.skip_value(reader.number(_U32))

    def text(self, key: str) -> str | None:
        """A string value. None: not there."""
        value = self._get(key, {STRING}, "text")
        if value is None:
            return None
        self._reader.position = value.position
        return self._reader.text(MAX_TEXT_BYTES, key)

    def boolean(self, key: str) -> bool | None:
        """A boolean value. None: not there."""
        value = self._get(key, {BOOL}, "a boolean")
        return None if value is None else self._reader.buffer[value.position] != 0

    def integer(self, key: str) -> int | None:
        """A whole number, 0 to 2^32 - 1. None: not there."""
        value = self._get(key, INTEGERS, "a whole number")
        return None if value is None else self._numbers(key, value.kind, value.position, 1)[0]

    def integers(self, key: str) -> tuple[int, ...]:
        """A whole number, or one per layer, as a tuple. Empty: not there."""
        value = self._values.get(key)
        if value is None or value.kind != ARRAY:
            single = self.integer(key)
            return () if single is None else (single,)
        if value.element not in INTEGERS or not 0 < value.count <= MAX_LAYERS:
            raise _GgufError(f"the key {_shown(key)} is not a list of one whole number per layer")
        return self._numbers(key, value.element, value.position, value.count)

    def token_count(self) -> int:
        """How many tokens the vocabulary has; 0 without one."""
        tokens = self._tokens()
        return tokens.count if tokens else 0

    def token(self, key: str) -> str | None:
        """The text of the token whose id this key holds. None where there is no such token."""
        token_id, tokens = self.integer(key), self._tokens()
        if token_id is None or tokens is None or token_id >= tokens.count:
            return None
        self._reader.position = tokens.position
        self._reader.skip_strings(token_id)
        return self._reader.text(MAX_TOKEN_BYTES, "a token")

    def _tokens(self) -> _Value | None:
        tokens = self._get("tokenizer.ggml.tokens", {ARRAY}, "a list")
        if tokens is not None and tokens.element != STRING:
            raise _GgufError("its vocabulary is not a list of texts")
        return tokens

    def _get(self, key: str, kinds: "set[int] | frozenset[int]", what: str) -> _Value | None:
        value = self._values.get(key)
        if value is not None and value.kind not in kinds:
            raise _GgufError(f"the key {_shown(key)} is not {what}")
        return value

    def _numbers(self, key: str, kind: int, position: int, count: int) -> tuple[int, ...]:
        form = NUMBERS[kind]
        end = position + count * form.size
        numbers = tuple(n for (n,) in form.iter_unpack(self._reader.buffer[position:end]))
        if not all(0 <= number < 1 << 32 for number in numbers):
            raise _GgufError(f"the key {_shown(key)} is out of range")
        return numbers


@dataclass(frozen=True, slots=True)
class _Tensors:
    """All tensors of a file: `end` is the data section's size without its last padding."""

    count: int
    elements: int
    data_bytes: int
    end: int
    main_type: str


def _read_tensors(reader: _Reader, count: int, alignment: int) -> _Tensors:
    names: set[str] = set()
    by_type: Counter[str] = Counter()
    data_bytes = end = 0
    for _ in range(count):
        name = reader.text(MAX_TENSOR_NAME_BYTES, "a tensor's name")
        shown = _shown(name)
        if name in names:
            raise _GgufError(f"the tensor {shown} is there twice")
        names.add(name)
        dimensions = reader.number(_U32)
        if dimensions > MAX_DIMENSIONS:
            raise _GgufError(
                f"the tensor {shown} has {dimensions:,} dimensions, at most 4 are allowed"
            )
        elements, row = 1, 1
        for dimension in range(dimensions):
            length = reader.number(_U64)
            row = length if dimension == 0 else row
            elements *= length
            # Zero divides llama.cpp's own overflow check by zero.
            if not 0 < elements < 1 << 63:
                raise _GgufError(f"the tensor {shown} has an impossible shape")
        type_id = reader.number(_U32)
        kind = TENSOR_TYPES.get(type_id)
        if kind is None:
            raise _GgufError(
                f"the tensor {shown} has the type {type_id}, which this release does not know",
                "use a file in another quantisation",
            )
        if row % kind.block:
            raise _GgufError(f"the tensor {shown} has rows of {row:,}, which are no whole blocks")
        offset = reader.number(_U64)
        expected = -(-end // alignment) * alignment
        if offset != expected:
            raise _GgufError(
                f"the tensor {shown} lies at {offset:,}, where {expected:,} is expected"
            )
        size = elements // kind.block * kind.block_bytes
        data_bytes += size
        end = offset + size
        by_type[kind.name] += elements
    return _Tensors(count, by_type.total(), data_bytes, end, by_type.most_common(1)[0][0])


def _read_header(reader: _Reader) -> tuple[int, int]:
    """The numbers of tensors and of key-value pairs."""
    if reader.size == 0:
        raise _GgufError("it is empty")
    magic = bytes(reader.buffer[: reader.need(4) + 4])
    reader.position = 4
    if magic != b"GGUF" and magic != b"FUGG":
        hint = "run `git lfs pull` to get the model itself" if magic == b"vers" else _AGAIN
        raise _GgufError("it is not a GGUF file", hint)
    version = reader.number(_U32)
    # Big-endian files keep the magic and turn the version around.
    if magic == b"FUGG" or version & 0xFFFF == 0:
        raise _GgufError(
            "it is in big-endian byte order", "use the little-endian file of the same model"
        )
    if version not in (2, 3):
        raise _GgufError(
            f"it has GGUF version {version}, this release reads 2 and 3",
            "convert the model again with a current llama.cpp",
        )
    tensors, values = reader.number(_U64), reader.number(_U64)
    if tensors > MAX_TENSORS or values > MAX_VALUES:
        raise _GgufError(
            f"it claims {tensors:,} tensors and {values:,} keys,"
            f" at most {MAX_TENSORS:,} and {MAX_VALUES:,} are allowed"
        )
    return tensors, values


def _parse(reader: _Reader) -> GgufInfo:
    tensor_count, value_count = _read_header(reader)
    metadata = _Metadata(reader, value_count)
    tensors_at = reader.position

    if (metadata.integer("split.count") or 0) > 1:
        raise _GgufError(
            "it is one part of a split model",
            "join the parts with `llama-gguf-split --merge FIRST-PART WHOLE`, then import WHOLE",
        )
    alignment = metadata.integer("general.alignment")
    alignment = DEFAULT_ALIGNMENT if alignment is None else alignment
    if not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise _GgufError(f"its alignment is {alignment:,}, not a power of two")
    if tensor_count == 0:
        raise _GgufError("it holds no weights, only metadata")

    reader.position = tensors_at
    tensors = _read_tensors(reader, tensor_count, alignment)
    data_at = -(-reader.position // alignment) * alignment
    if data_at + tensors.end > reader.size:
        raise _GgufError(
            f"it is truncated: {data_at + tensors.end:,} bytes are expected, it has {reader.size:,}"
        )
    return _describe(metadata, tensors)


def _describe(metadata: _Metadata, tensors: _Tensors) -> GgufInfo:
    architecture = metadata.text("general.architecture")
    if architecture is None or not _ARCHITECTURE.fullmatch(architecture):
        raise _GgufError("it does not say which architecture it has")

    def required(name: str) -> int:
        value = metadata.integer(f"{architecture}.{name}")
        if not value:
            raise _GgufError(
                f"its metadata lacks {architecture}.{name}",
                "only whole language models can be imported, no adapters or projectors",
            )
        return value

    def per_layer(name: str) -> tuple[int, ...]:
        values = metadata.integers(f"{architecture}.attention.{name}")
        if len(values) > 1 and len(values) != block_count:
            raise _GgufError(f"{name} has {len(values):,} values for {block_count:,} layers")
        return values

    block_count, embedding_length = required("block_count"), required("embedding_length")
    if block_count > MAX_LAYERS:
        raise _GgufError(f"it claims {block_count:,} layers, at most {MAX_LAYERS:,} are allowed")
    # llama.cpp's defaults (`llama_model::load_hparams`): no head_count means no attention.
    head_count = max(per_layer("head_count"), default=0)
    heads_kv = per_layer("head_count_kv")
    per_head = embedding_length // head_count if head_count else 0
    file_type = metadata.integer("general.file_type")
    quantisation = None if file_type is None else FILE_TYPES.get(file_type & ~FILE_TYPE_GUESSED)
    return GgufInfo(
        architecture=architecture,
        name=_printable(metadata.text("general.name") or ""),
        # By elements: norms and biases are many tensors, but small ones.
        quantisation=quantisation or tensors.main_type,
        context_length=required("context_length"),
        block_count=block_count,
        embedding_length=embedding_length,
        head_count=head_count,
        head_count_kv=max(heads_kv, default=head_count),
        key_length=max(per_layer("key_length"), default=per_head),
        value_length=max(per_layer("value_length"), default=per_head),
        vocab_size=metadata.token_count() or metadata.integer(f"{architecture}.vocab_size") or 0,
        parameters=tensors.elements,
        chat_template=metadata.text("tokenizer.chat_template"),
        bos_token=metadata.token("tokenizer.ggml.bos_token_id"),
        eos_token=metadata.token("tokenizer.ggml.eos_token_id"),
        add_bos_token=metadata.boolean("tokenizer.ggml.add_bos_token"),
        tensor_count=tensors.count,
        data_bytes=tensors.data_bytes,
        head_counts_kv=heads_kv if len(heads_kv) > 1 else (),
    )


def _printable(text: str) -> str:
    """The text without anything that could steer a terminal."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def _shown(name: str) -> str:
    """A name out of the file, quoted and cut for a message."""
    return ascii(name if len(name) <= 80 else name[:77] + "...")


def read_gguf(path: Path) -> GgufInfo:
    """What the GGUF file says about itself; the weights are not read.

    Checks that the file is whole: a truncated one is refused with the expected and the real size.
    Blocks for some milliseconds per 100,000 tokens of vocabulary. Raises BadModel (`bad_gguf`) for
    any file that can't be used, and nothing else.
    """
    try:
        # Non-blocking, so that opening a FIFO returns.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise _GgufError("it is not a regular file")
            return _parse(_Reader(fd, status.st_size))
        finally:
            os.close(fd)
    except _GgufError as flaw:
        reason, hint = str(flaw), flaw.hint
    except OSError as error:
        reason, hint = f"it can't be read ({error.strerror})", _AGAIN
    except ValueError:
        reason, hint = "its name can't be opened", _AGAIN
    raise BadModel("bad_gguf", f"the file {_shown(path.name)} can't be used: {reason}", hint)
