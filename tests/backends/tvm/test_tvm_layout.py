"""Packing of weights into tiles, decoded again by numpy alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.backends.tvm.layout import LANES, QUAD, Tiling, flat, tile, tiling_of
from qcompiler.formats import QTensor, parse_spec
from qcompiler.formats.packing import plane_widths, unpack, unpack_plane


def random_weight(rows: int, columns: int, spec_text: str, seed: int = 0) -> QTensor:
    rng = np.random.default_rng(seed)
    spec = parse_spec(spec_text)
    lo, hi, dtype = spec.format.lo, spec.format.hi, spec.format.dtype  # type: ignore[attr-defined]
    grid = spec.granularity.grid(rows, columns)
    codes = rng.integers(lo, hi + 1, (rows, columns)).astype(dtype)
    scale = (rng.integers(1, 64, grid).astype(np.float32) / np.float32(256)).astype(
        np.float32
    )  # exact in every scale dtype
    zero = None if spec.symmetric else rng.integers(lo, hi + 1, grid).astype(np.float32)
    return QTensor(spec, codes, scale, zero)


def untile(arrays: dict[str, np.ndarray], t: Tiling) -> np.ndarray:
    """Codes [rows, columns] counted from zero."""
    codes, shift = np.zeros((t.tiles, t.words, LANES * QUAD), np.uint8), 0
    for i, width in enumerate(plane_widths(t.bits)):
        fields = unpack_plane(arrays[f"plane{i}"][..., None], width, 8 // width)  # [tiles, words, 64, quads]
        codes |= np.moveaxis(fields, 3, 2).reshape(codes.shape) << np.uint8(shift)
        shift += width
    rows = codes.reshape(t.tiles, t.words, LANES, QUAD).transpose(0, 2, 1, 3).reshape(t.tiles * LANES, t.groups, -1)
    parts = [rows[: t.rows, g, : min(t.group, t.columns - g * t.group)] for g in range(t.groups)]
    return np.concatenate(parts, axis=1)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 150),
    bits=st.integers(2, 8),
    group=st.sampled_from(["channel", "tensor", "g5", "g16", "g32", "g64"]),
    kind=st.sampled_from(["int", "uint"]),
    symmetry=st.sampled_from(["sym", "asym"]),
)
def test_tiles_hold_every_code_once(rows: int, columns: int, bits: int, group: str, kind: str, symmetry: str) -> None:
    weight = random_weight(rows, columns, f"{kind}{bits}-{symmetry}-{group}-fp16")
    t = tiling_of(weight)
    arrays = tile(weight, t, row_sums=True)
    offset = 1 << (bits - 1) if kind == "int" else 0
    assert np.array_equal(untile(arrays, t), weight.codes.astype(np.int16) + offset)
    per_row = arrays["sums"].sum(axis=1).reshape(-1)[:rows]
    assert np.array_equal(per_row, (weight.codes.astype(np.int64) + offset).sum(axis=1))


@pytest.mark.parametrize("bits", range(2, 9))
def test_flat_weights_take_no_more_room_than_accounted(bits: int) -> None:
    weight = random_weight(9, 25, f"int{bits}-sym-channel-fp16")
    arrays = flat(weight)
    assert sum(array.nbytes for array in arrays.values()) * 8 == weight.stored_bits
    planes = [arrays[f"plane{i}"].astype(np.uint8) for i in range(len(plane_widths(bits)))]
    codes = unpack(planes, bits, 9 * 25).reshape(9, 25)
    assert np.array_equal(codes.astype(np.int16) - (1 << (bits - 1)), weight.codes)


@pytest.mark.parametrize(
    "spec", ["uint4-asym-g32-fp16", "uint2-asym-g64-fp16", "uint8-asym-g32-fp16", "uint3-sym-g32-fp16"]
)
def test_tiled_weights_of_whole_tiles_take_what_is_accounted(spec: str) -> None:
    weight = random_weight(64, 512, spec)
    assert sum(array.nbytes for array in tile(weight, tiling_of(weight)).values()) * 8 == weight.stored_bits


def test_a_group_too_long_for_an_int32_sum_is_split() -> None:
    weight = random_weight(2, 40000, "int2-sym-channel-fp16")
    t = tiling_of(weight)
    assert t.groups == 3
    assert np.array_equal(untile(tile(weight, t), t), weight.codes.astype(np.int16) + 2)
