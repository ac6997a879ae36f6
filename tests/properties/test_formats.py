"""Laws that every number format keeps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompiler.formats import Int, PerChannel, PerGroup, PerTensor, QuantSpec, UInt, parse_spec, spread
from qcompiler.formats.fit import METHODS, Method, encode, quantize
from qcompiler.formats.packing import pack, packed_bits, unpack

BITS = st.integers(2, 8)
GRANULARITIES = st.one_of(
    st.just(PerTensor()), st.just(PerChannel()), st.integers(1, 40).map(lambda size: PerGroup(size))
)
SPECS = st.builds(
    QuantSpec,
    st.one_of(BITS.map(Int), BITS.map(UInt)),
    GRANULARITIES,
    st.booleans(),
    st.sampled_from(["float32", "float16", "bfloat16"]),
)
MATRICES = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=40),
    elements=st.floats(-100, 100, width=32, allow_subnormal=False),
)


@given(SPECS)
def test_spec_survives_its_name(spec: QuantSpec) -> None:
    assert parse_spec(str(spec)) == spec


@given(SPECS, MATRICES, st.sampled_from(METHODS))
@settings(deadline=None)
def test_codes_of_decoded_weights_are_the_same_codes(spec: QuantSpec, w: np.ndarray, method: Method) -> None:
    q = quantize(w, spec, method)
    again = encode(q.decode(), spec, q.scale, q.zero)
    np.testing.assert_array_equal(again.codes, q.codes)


@given(SPECS, MATRICES)
@settings(deadline=None)
def test_error_is_at_most_half_a_step_inside_the_range(spec: QuantSpec, w: np.ndarray) -> None:
    q = quantize(w, spec, "minmax")
    scale = np.broadcast_to(spread(q.scale, spec, w.shape[1]), w.shape)
    lowest, highest = spec.format.code_range
    ends = [np.full(w.shape, code).astype(q.codes.dtype) for code in (lowest, highest)]
    zero = None if q.zero is None else spread(q.zero, spec, w.shape[1])
    low, high = (spec.format.decode(codes, scale, zero) for codes in ends)
    inside = (w >= low) & (w <= high)
    error = np.abs(q.decode() - w)
    assert (error[inside] <= scale[inside] * 0.5001 + 1e-6 * np.abs(w[inside])).all()


@given(SPECS, MATRICES)
@settings(deadline=None)
def test_search_is_never_worse_than_minmax(spec: QuantSpec, w: np.ndarray) -> None:
    def error(method: Method) -> float:
        return float(((quantize(w, spec, method).decode() - w).astype(np.float64) ** 2).sum())

    assert error("mse") <= error("minmax") * (1 + 1e-5) + 1e-12


@given(MATRICES, GRANULARITIES, st.booleans())
@settings(deadline=None)
def test_error_falls_with_bits(w: np.ndarray, granularity: PerTensor, symmetric: bool) -> None:
    last = np.inf
    for bits in range(2, 9):
        spec = QuantSpec(Int(bits), granularity, symmetric, "float32")
        q = quantize(w, spec, "minmax")
        reach = np.abs(w).max() if symmetric else float(w.max(initial=0) - w.min(initial=0))
        bound = reach / ((1 << (bits - 1)) - 1 if symmetric else (1 << bits) - 1)
        error = np.abs(q.decode() - w).max()
        assert error <= bound * 1.001 + 1e-4  # a zero point may cost the other half of a step
        assert bound <= last
        last = bound


@given(st.integers(2, 8), st.lists(st.integers(0, 255), min_size=1, max_size=70))
def test_pack_unpack_is_identity(bits: int, values: list[int]) -> None:
    codes = np.array(values, np.uint8) & np.uint8((1 << bits) - 1)
    planes = pack(codes, bits)
    np.testing.assert_array_equal(unpack(planes, bits, len(codes)), codes)
    assert 8 * sum(plane.size for plane in planes) == packed_bits(len(codes), bits)


@given(SPECS, st.integers(1, 30), st.integers(1, 70))
@settings(deadline=None)
def test_stored_bits_are_the_bits_that_are_stored(spec: QuantSpec, rows: int, columns: int) -> None:
    rng = np.random.default_rng(rows * 100 + columns)
    q = quantize(rng.standard_normal((rows, columns)).astype(np.float32), spec)
    lowest = spec.format.code_range[0]
    planes = pack(q.codes.reshape(-1).astype(np.int16) - lowest, spec.bits)
    stored = 8 * sum(plane.size for plane in planes)
    stored += q.scale.size * {"float32": 32, "float16": 16, "bfloat16": 16}[spec.scale_dtype]
    if q.zero is not None:
        zeros = pack(q.zero.reshape(-1).astype(np.int16) - lowest, spec.bits)
        stored += 8 * sum(plane.size for plane in zeros)
    assert q.stored_bits == stored


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_pair_of_codes_packs_and_unpacks(bits: int) -> None:
    levels = np.arange(1 << bits, dtype=np.uint8)
    pairs = np.stack(np.meshgrid(levels, levels), -1).reshape(-1, 2)
    np.testing.assert_array_equal(unpack(pack(pairs, bits), bits, 2), pairs)
