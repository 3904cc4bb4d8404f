"""The structure of a KV blob, on blobs that are written here field by field."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmster_daemon.kv.blob import BlobError, KvLayout

MAGIC = 0x6767736E
F16, Q8_0 = 1, 8
LAYOUT = KvLayout(MAGIC, keys=((F16, 6), (Q8_0, 34)), values=((F16, 10), (F16, 2)))


def rows_of(layout: KvLayout, cells: int) -> list[bytes]:
    """Other bytes for every layer."""
    return [
        bytes((layer * 16 + i) % 251 for i in range(cells * row))
        for layer, (_, row) in enumerate(layout.keys + layout.values)
    ]


def blob_of(
    layout: KvLayout,
    start: int,
    end: int,
    slot: int = 3,
    streams: int = 1,
    transposed: int = 0,
    layers: int | None = None,
) -> bytearray:
    """A blob as llama.cpp writes it, sound unless told otherwise."""
    cells = end - start
    out = struct.pack("<IiII", layout.magic, slot, streams, cells)
    for position in range(start, end):
        out += struct.pack("<iii", position, 1, slot)
    out += struct.pack("<II", transposed, len(layout.keys) if layers is None else layers)
    for (kind, row), rows in zip(layout.keys + layout.values, rows_of(layout, cells), strict=True):
        out += struct.pack("<iQ", kind, row) + rows
    return bytearray(out)


@pytest.mark.parametrize("cells", [1, 2, 17])
def test_a_layout_is_read_from_a_blob_of_any_length(cells: int) -> None:
    blob = blob_of(LAYOUT, 5, 5 + cells)
    assert KvLayout.parse(blob) == LAYOUT
    assert LAYOUT.size(cells) == len(blob)


def test_sizes_grow_by_the_same_bytes_for_every_token() -> None:
    assert LAYOUT.bytes_per_token == 6 + 34 + 10 + 2
    assert LAYOUT.size(9) - LAYOUT.size(8) == LAYOUT.bytes_per_token + 12


def test_stamping_moves_a_blob_to_another_slot_and_range() -> None:
    blob = blob_of(LAYOUT, 0, 4, slot=3)
    LAYOUT.stamp(blob, 7, 100, 104)
    assert blob == blob_of(LAYOUT, 100, 104, slot=7)


def test_stamping_replaces_every_structural_byte_and_no_other() -> None:
    sound = blob_of(LAYOUT, 20, 24, slot=2)
    hostile = bytearray(b"\xff" * len(sound))
    kept = bytearray(b"\x00" * len(sound))
    for blob in (hostile, kept):
        LAYOUT.stamp(blob, 2, 20, 24)
    # Where the two agree, stamp wrote; where they differ, it left the rows alone.
    written = np.frombuffer(hostile, np.uint8) == np.frombuffer(kept, np.uint8)
    assert int((~written).sum()) == 4 * LAYOUT.bytes_per_token
    assert np.array_equal(
        np.frombuffer(hostile, np.uint8)[written], np.frombuffer(sound, np.uint8)[written]
    )


def test_a_blob_of_absurd_structure_is_sound_after_stamping() -> None:
    blob = blob_of(LAYOUT, 0, 4)
    struct.pack_into("<IiII", blob, 0, 0xDEADBEEF, -1, 77, 0xFFFFFFFF)
    struct.pack_into("<iii", blob, 16, -(1 << 31), 9999, -5)
    LAYOUT.stamp(blob, 0, 0, 4)
    assert blob == blob_of(LAYOUT, 0, 4, slot=0)


@pytest.mark.parametrize("change", [-12, -1, 1, 12 + 52])
def test_a_blob_of_the_wrong_size_is_refused(change: int) -> None:
    size = LAYOUT.size(4) + change
    blob = bytearray(size)
    with pytest.raises(BlobError, match=f"{size} bytes for 4 tokens, {LAYOUT.size(4)} expected"):
        LAYOUT.stamp(blob, 0, 0, 4)
    assert blob == bytearray(size)


@pytest.mark.parametrize(("start", "end"), [(4, 4), (5, 4)])
def test_an_empty_or_reversed_range_is_refused(start: int, end: int) -> None:
    with pytest.raises(BlobError):
        LAYOUT.stamp(bytearray(LAYOUT.size(0)), 0, start, end)


@pytest.mark.parametrize(
    "blob",
    [
        pytest.param(blob_of(LAYOUT, 0, 2, streams=2), id="two streams"),
        pytest.param(blob_of(LAYOUT, 0, 2, transposed=1), id="transposed values"),
        pytest.param(blob_of(LAYOUT, 0, 2, layers=0), id="no layers"),
        pytest.param(blob_of(LAYOUT, 0, 2, layers=5000), id="too many layers"),
        pytest.param(blob_of(LAYOUT, 0, 2, layers=3), id="a layer more than there is"),
        pytest.param(blob_of(LAYOUT, 0, 2, layers=1), id="a layer less than there is"),
        pytest.param(blob_of(LAYOUT, 0, 0), id="no tokens"),
        pytest.param(blob_of(LAYOUT, 0, 2) + b"\0", id="a byte too many"),
        pytest.param(blob_of(LAYOUT, 0, 2)[:-1], id="a byte too few"),
        pytest.param(bytearray(), id="nothing"),
    ],
)
def test_a_blob_that_is_laid_out_otherwise_is_refused(blob: bytearray) -> None:
    with pytest.raises(BlobError):
        KvLayout.parse(blob)


def test_a_row_length_beyond_any_memory_is_refused() -> None:
    blob = blob_of(LAYOUT, 0, 2)
    at = 16 + 2 * 12 + 8 + 4
    struct.pack_into("<Q", blob, at, (1 << 64) - 1)
    with pytest.raises(BlobError):
        KvLayout.parse(blob)


@pytest.mark.parametrize(
    "other",
    [
        KvLayout(MAGIC + 1, LAYOUT.keys, LAYOUT.values),
        KvLayout(MAGIC, LAYOUT.values, LAYOUT.keys),
        KvLayout(MAGIC, ((Q8_0, 6), LAYOUT.keys[1]), LAYOUT.values),
        KvLayout(MAGIC, LAYOUT.keys[:1], LAYOUT.keys[1:] + LAYOUT.values),
    ],
)
def test_layouts_that_differ_describe_themselves_differently(other: KvLayout) -> None:
    assert other.describe() != LAYOUT.describe()
    assert KvLayout.parse(blob_of(LAYOUT, 0, 1)).describe() == LAYOUT.describe()


LAYERS = st.lists(st.tuples(st.integers(-5, 40), st.integers(0, 70)), min_size=1, max_size=4)
LAYOUTS = LAYERS.flatmap(
    lambda keys: st.builds(
        KvLayout,
        st.integers(0, (1 << 32) - 1),
        st.just(tuple(keys)),
        st.lists(
            st.tuples(st.integers(-5, 40), st.integers(0, 70)),
            min_size=len(keys),
            max_size=len(keys),
        ).map(tuple),
    )
)


@settings(max_examples=200, deadline=None)
@given(LAYOUTS, st.integers(0, 1 << 20), st.integers(1, 20), st.integers(0, 200))
def test_any_stamped_blob_has_the_layout_that_stamped_it(
    layout: KvLayout, start: int, cells: int, slot: int
) -> None:
    blob = bytearray(layout.size(cells))
    layout.stamp(blob, slot, start, start + cells)
    assert KvLayout.parse(blob) == layout


@settings(max_examples=500, deadline=None)
@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(0, 1 << 12), st.binary(min_size=1, max_size=8)), max_size=4),
    st.integers(0, 40),
)
def test_a_damaged_blob_is_parsed_or_refused_and_nothing_else(
    cells: int, damages: list[tuple[int, bytes]], cut: int
) -> None:
    blob = blob_of(LAYOUT, 0, cells)
    for at, damage in damages:
        at %= len(blob)
        blob[at : at + len(damage)] = damage
    blob = blob[: len(blob) - cut]
    try:
        layout = KvLayout.parse(blob)
    except BlobError:
        return
    assert layout.size(struct.unpack_from("<I", blob, 12)[0]) == len(blob)
