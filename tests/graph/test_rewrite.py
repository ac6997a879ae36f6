"""Constants rewritten in parts come out as if whole, in the scratch file or not; all of them or none."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import PassRefused
from qcompiler.graph.folds import rewrite
from qcompiler.scratch import is_spilled

RNG = np.random.default_rng(0)


def constant(array: np.ndarray, name: str = "w") -> ir.Value:
    return ir.val(name, const_value=ir.tensor(array, name=name))


def numbers(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()


@pytest.fixture(autouse=True, params=[1 << 22, 10], ids=["whole", "parts"])
def small_parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite, "_PART", request.param)


@pytest.mark.parametrize("shape", [(), (7,), (5, 6), (3, 4, 5)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_scales_and_offsets(shape: tuple[int, ...], dtype: type) -> None:
    array = RNG.normal(size=shape).astype(dtype)
    value, factor = constant(array), RNG.uniform(1, 2, shape[-1:])
    rewrite.commit({value: rewrite.scaled(value, [(1.0, factor), (0.0, np.array(3.0))])})
    wanted = (((array.astype(np.float64) + 1) * factor - 1) * 3).astype(dtype)
    np.testing.assert_array_equal(numbers(value), wanted)
    assert numbers(value).dtype == dtype


@pytest.mark.parametrize(("shape", "axes"), [((6, 9), [0]), ((9, 6), [1]), ((2, 6, 5), [1]), ((6, 6), [0, 1])])
def test_turns(shape: tuple[int, ...], axes: list[int]) -> None:
    array, matrix = RNG.normal(size=shape).astype(np.float32), RNG.normal(size=(6, 6))
    value, wanted = constant(array), array.astype(np.float64)
    rewrite.commit({value: rewrite.turned(value, axes, matrix)})
    for axis in axes:
        wanted = np.moveaxis(np.tensordot(wanted, matrix, ([axis], [0])), -1, axis)
    np.testing.assert_allclose(numbers(value), wanted, rtol=1e-6, atol=1e-6)


def test_arrays_of_another_shape_are_stored_as_they_are() -> None:
    value = constant(np.zeros((2, 3), np.float32))
    rewrite.commit({value: RNG.normal(size=(4, 5))})
    assert numbers(value).shape == (4, 5)
    assert numbers(value).dtype == np.float32


def test_all_or_none() -> None:
    good, bad = constant(np.ones((4, 4), np.float16)), constant(np.full((4, 4), 1e4, np.float16), "bad")
    with pytest.raises(PassRefused, match="bad: the transformed weight overflows FLOAT16"):
        rewrite.commit({v: rewrite.scaled(v, [(0.0, np.array([1.0, 1, 1, 10]))]) for v in (good, bad)})
    assert (numbers(good) == 1).all()
    assert (numbers(bad) == np.float16(1e4)).all()


def test_infinities_that_were_there_stay() -> None:
    value = constant(np.array([1.0, -np.inf], np.float32))
    rewrite.commit({value: rewrite.scaled(value, [(0.0, np.array(2.0))])})
    np.testing.assert_array_equal(numbers(value), [2, -np.inf])


def test_large_ones_go_to_the_scratch_file() -> None:
    value = constant(np.ones((600, 200), np.float32))
    rewrite.commit({value: rewrite.scaled(value, [(0.0, np.array(2.0))])})
    assert is_spilled(numbers(value))
    assert (numbers(value) == 2).all()


@pytest.mark.parametrize("offset", [0.0, 1.0, -3.0])
@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)])
def test_the_largest_magnitude(offset: float, axes: tuple[int, ...]) -> None:
    array = RNG.normal(size=(5, 7)).astype(np.float32)
    found = rewrite.largest(constant(array), offset, axes)
    np.testing.assert_allclose(found, np.abs(array + offset).max(axis=axes, keepdims=True), rtol=1e-6)


def test_constants_without_numbers() -> None:
    value = constant(np.zeros((0, 3), np.float32))
    rewrite.commit({value: rewrite.scaled(value, [(0.0, np.array(2.0))])})
    assert numbers(value).shape == (0, 3)
    assert rewrite.largest(value, 0.0, (0,)).size == 0


def test_the_peak_is_the_reach_over_the_root_mean_square() -> None:
    array = RNG.normal(size=(3, 40)).astype(np.float32)
    array[1, 7] = -30
    assert rewrite.peak(constant(array)) == pytest.approx(30 / np.sqrt(np.square(array.astype(np.float64)).mean()))
    assert rewrite.peak(constant(np.zeros((2, 3), np.float32))) == 0
    assert rewrite.peak(constant(np.zeros((0, 3), np.float32))) == 0
