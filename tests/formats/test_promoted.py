"""Formats of two widths: names, grids, exact bits, and which groups are promoted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompiler.errors import BadOption
from qcompiler.formats import (
    Int,
    PerChannel,
    PerGroup,
    PerTensor,
    Promoted,
    QuantSpec,
    parse_format,
    parse_spec,
    spread,
)
from qcompiler.formats.fit import Method, encode, quantize
from qcompiler.formats.packing import pack, pack_plane
from qcompiler.formats.promoted import split_zero
from qcompiler.formats.promotion import group_errors
from qcompiler.graph.merged import split_groups

PERCENT = st.integers(1, 9999).map(lambda hundredths: hundredths / 100)
WIDTHS = st.tuples(st.integers(2, 8), st.integers(2, 8)).filter(lambda pair: pair[0] < pair[1])
FORMATS = st.builds(lambda pair, percent: Promoted(pair[0], pair[1], percent), WIDTHS, PERCENT)
GRANULARITIES = st.one_of(st.just(PerTensor()), st.just(PerChannel()), st.integers(1, 40).map(PerGroup))
SPECS = st.builds(QuantSpec, FORMATS, GRANULARITIES, st.booleans(), st.sampled_from(["float32", "float16", "bfloat16"]))
SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, max_side=40)
MATRICES = hnp.arrays(np.float32, SHAPES, elements=st.floats(-100, 100, width=32, allow_subnormal=False))


@given(SPECS)
def test_spec_survives_its_name(spec: QuantSpec) -> None:
    assert parse_spec(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int8to4p10", "4 bits promote no code of 8"),
        ("int4to4p10", "promote no code"),
        ("int4to8p0", "none or all"),
        ("int4to8p0.001", "none or all"),
        ("int4to8p100", "none or all"),
        ("int1to4p10", "1 bits does not exist"),
        ("int4to8", "unknown format"),
        ("int4to8p", "unknown format"),
        ("int4.5", "does not exist"),
        ("int4to8p10x", "unknown format"),
        ("int", "unknown format"),
    ],
)
def test_what_is_no_such_format_says_so(text: str, message: str) -> None:
    with pytest.raises(BadOption, match=message):
        parse_format(text)


@given(SPECS, MATRICES, st.sampled_from(["minmax", "mse"]))
@settings(deadline=None, max_examples=40)
def test_codes_lie_on_the_grids_that_the_flags_tell(spec: QuantSpec, w: np.ndarray, method: Method) -> None:
    fmt = spec.format
    assert isinstance(fmt, Promoted)
    q = quantize(w, spec, method)
    assert q.zero is not None
    flags, points = split_zero(q.zero)
    assert flags.shape == q.scale.shape == spec.granularity.grid(*w.shape)
    assert flags.sum() == fmt.promoted(flags.size)
    most = np.where(flags, fmt.wide.hi, fmt.narrow.hi)
    assert ((points >= -most - 1) & (points <= most) & (points == np.rint(points))).all()
    assert points.any() <= (not spec.symmetric)
    most = np.broadcast_to(spread(most.astype(np.float32), spec, w.shape[1]), w.shape)
    assert ((q.codes >= -most - 1) & (q.codes <= most)).all()
    np.testing.assert_array_equal(encode(q.decode(), spec, q.scale, q.zero).codes, q.codes)


@given(SPECS, MATRICES)
@settings(deadline=None, max_examples=40)
def test_stored_bits_are_the_bits_that_are_stored(spec: QuantSpec, w: np.ndarray) -> None:
    fmt, q = spec.format, quantize(w, spec, "minmax")
    assert isinstance(fmt, Promoted)
    assert q.zero is not None
    scales = q.scale.size * {"float32": 32, "float16": 16, "bfloat16": 16}[spec.scale_dtype]
    flags, points = split_zero(q.zero)
    stored = [(q.codes, spec.granularity.group_size(w.shape[1]))] + ([] if spec.symmetric else [(points, 1)])
    planes = [] if flags.all() or not flags.any() else [pack_plane(flags.reshape(-1), 1)]
    for integers, size in stored:
        parts = split_groups(integers, flags, size) if planes else (integers,)
        for part, width in zip(
            parts, (fmt.bits, fmt.high) if len(parts) > 1 else (fmt.high if flags.all() else fmt.bits,), strict=True
        ):
            planes += pack(part.reshape(-1).astype(np.int16) + (1 << (width - 1)), width)
    assert q.stored_bits == scales + 8 * sum(plane.size for plane in planes)


@given(
    WIDTHS, MATRICES, st.integers(1, 16), st.integers(0, 2**31), st.sampled_from(["float32", "float16"]), st.booleans()
)
@settings(deadline=None, max_examples=40)
def test_more_promoted_groups_never_lose_more(
    widths: tuple[int, int], w: np.ndarray, size: int, seed: int, dtype: str, symmetric: bool
) -> None:
    importance = np.random.default_rng(seed).exponential(1, w.shape).astype(np.float32)
    last = np.inf
    for percent in (1, 5, 20, 60, 95):
        q = quantize(w, QuantSpec(Promoted(*widths, percent), PerGroup(size), symmetric, dtype), "mse", importance)
        error = float((importance * np.square(q.decode().astype(np.float64) - w)).sum())
        assert error <= last * (1 + 1e-6) + 1e-12
        last = error


@given(FORMATS, MATRICES, st.integers(1, 16), st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_the_groups_that_save_most_are_promoted(fmt: Promoted, w: np.ndarray, size: int, seed: int) -> None:
    spec = QuantSpec(fmt, PerGroup(size), True, "float32")
    importance = np.random.default_rng(seed).exponential(1, w.shape[1]).astype(np.float32)
    q = quantize(w, spec, "mse", importance)
    assert q.zero is not None
    flags, _ = split_zero(q.zero)
    assume(flags.any() and not flags.all())
    low, high = (
        quantize(w, QuantSpec(f, PerGroup(size), True, "float32"), "mse", importance) for f in (fmt.narrow, fmt.wide)
    )
    saved = np.maximum(group_errors(w, low, importance) - group_errors(w, high, importance), 0)
    assert saved[flags].min() >= saved[~flags].max()


def test_all_groups_promoted_is_the_wide_format_and_none_the_narrow_one() -> None:
    w = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    for percent, plain in ((1, Int(4)), (99, Int(7))):
        q = quantize(w, QuantSpec(Promoted(4, 7, percent), PerGroup(32)))
        want = quantize(w, QuantSpec(plain, PerGroup(32)))
        np.testing.assert_array_equal(q.decode(), want.decode())
        assert q.stored_bits == want.stored_bits


def test_one_bit_more_is_one_bit_more_in_both_widths() -> None:
    assert parse_spec("int4to6p10-g32").with_bits(5) == parse_spec("int5to7p10-g32")
