"""llama.cpp's sequence state (version 3), field by field.

    u32 magic, i32 sequence, u32 streams = 1
    u32 cells, cells x {i32 position, u32 1, i32 sequence}
    u32 v_trans, u32 layers
    K: layers x {i32 type, u64 row bytes, cells x row}
    V: layers x {i32 type, u64 row bytes, cells x row}      (v_trans = 0: flash attention)

llama.cpp accepts blobs with absurd positions and corrupt headers, so nothing structural that a
peer sends is used: `KvLayout.stamp` writes every structural byte anew and leaves only K and V rows.
"""

import struct
from dataclasses import dataclass

import numpy as np

HEAD = struct.Struct("<IiI")
SHAPE = struct.Struct("<II")
LAYER = struct.Struct("<iQ")
U32 = struct.Struct("<I")
CELL_BYTES = 12


class BlobError(ValueError):
    """The blob does not have the layout that is expected."""


@dataclass(frozen=True, slots=True)
class KvLayout:
    """The shape of a model's KV cache: (ggml type, bytes per token) of every K and V layer."""

    magic: int
    keys: tuple[tuple[int, int], ...]
    values: tuple[tuple[int, int], ...]

    @classmethod
    def parse(cls, blob: bytes | bytearray) -> "KvLayout":
        """The layout of a blob that this machine's own llama.cpp wrote. Raises BlobError."""
        try:
            magic, _, streams = HEAD.unpack_from(blob, 0)
            (cells,) = U32.unpack_from(blob, HEAD.size)
            at = HEAD.size + U32.size + cells * CELL_BYTES
            transposed, layers = SHAPE.unpack_from(blob, at)
            if streams != 1 or transposed or not 0 < layers < 4096 or not cells > 0:
                raise BlobError(
                    f"streams {streams}, transposed {transposed}, layers {layers}, cells {cells}"
                )
            at += SHAPE.size
            found: list[tuple[int, int]] = []
            for _ in range(2 * layers):
                kind, row_bytes = LAYER.unpack_from(blob, at)
                found.append((kind, row_bytes))
                at += LAYER.size + cells * row_bytes
        except (struct.error, OverflowError) as error:  # an offset beyond any memory
            raise BlobError(str(error)) from error
        if at != len(blob):
            raise BlobError(f"{len(blob)} bytes, {at} expected")
        return cls(magic, tuple(found[:layers]), tuple(found[layers:]))

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V of one token, all layers."""
        return sum(row for _, row in self.keys) + sum(row for _, row in self.values)

    def size(self, cells: int) -> int:
        """Bytes of a blob of that many tokens."""
        layers = len(self.keys) + len(self.values)
        head = HEAD.size + U32.size + SHAPE.size
        return head + layers * LAYER.size + cells * (CELL_BYTES + self.bytes_per_token)

    def stamp(self, blob: bytearray, slot: int, start: int, end: int) -> None:
        """Write all but the K and V rows anew, for positions [start, end) of `slot`.

        Raises BlobError if the blob's size is not that of such a range.
        """
        cells = end - start
        if cells <= 0 or len(blob) != self.size(cells):
            raise BlobError(
                f"{len(blob)} bytes for {cells} tokens, {self.size(max(cells, 0))} expected"
            )
        HEAD.pack_into(blob, 0, self.magic, slot, 1)
        U32.pack_into(blob, HEAD.size, cells)
        at = HEAD.size + U32.size
        table = np.empty((cells, 3), dtype="<i4")
        table[:, 0] = np.arange(start, end)
        table[:, 1] = 1
        table[:, 2] = slot
        blob[at : at + cells * CELL_BYTES] = table.tobytes()
        at += cells * CELL_BYTES
        SHAPE.pack_into(blob, at, 0, len(self.keys))
        at += SHAPE.size
        for kind, row_bytes in self.keys + self.values:
            LAYER.pack_into(blob, at, kind, row_bytes)
            at += LAYER.size + cells * row_bytes

    def describe(self) -> str:
        """A text that is equal for two layouts if and only if they can exchange KV."""
        return f"{self.magic:#x};k={self.keys!r};v={self.values!r}"
