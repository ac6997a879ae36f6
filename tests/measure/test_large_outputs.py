"""What keeps models with large weights and outputs within memory and time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.calibration import Calibration
from qcompiler.formats import Int, PerChannel, PerGroup, QuantSpec, UInt, base
from qcompiler.formats.fit import quantize
from qcompiler.measure.memory import give_back
from qcompiler.measure.shorten import shortened


def text_model(*inputs: tuple[str, ir.DataType, list[int | str]]) -> ir.Model:
    values = [ir.val(name, dtype, ir.Shape(shape)) for name, dtype, shape in inputs]
    return ir.Model(ir.Graph(values, [], nodes=[], opset_imports={"": 21}, name="g"), ir_version=10)


def test_a_text_is_shortened_in_all_inputs() -> None:
    model = text_model(("ids", ir.DataType.INT64, ["b", "t"]), ("mask", ir.DataType.INT64, ["b", "t"]))
    feeds = {"ids": np.arange(12).reshape(2, 6), "mask": np.ones((2, 6), np.int64)}
    short = shortened(model, feeds, 4)
    np.testing.assert_array_equal(short["ids"], feeds["ids"][:, :4])
    assert short["mask"].shape == (2, 4)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(ir.DataType.INT64, ["b", 6]), (ir.DataType.FLOAT, ["b", "t"]), (ir.DataType.INT64, ["b", "t", 1])],
)
def test_what_is_no_text_of_free_length_stays_whole(dtype: ir.DataType, shape: list[int | str]) -> None:
    model = text_model(("x", dtype, shape))
    feeds = {"x": np.zeros([6 if d == "t" else d if isinstance(d, int) else 2 for d in shape], dtype.numpy())}
    assert shortened(model, feeds, 4)["x"].shape == feeds["x"].shape


def test_two_lengths_of_their_own_are_not_cut_alike() -> None:
    model = text_model(("source", ir.DataType.INT64, ["b", "s"]), ("target", ir.DataType.INT64, ["b", "t"]))
    feeds = {"source": np.zeros((1, 9), np.int64), "target": np.zeros((1, 7), np.int64)}
    assert [a.shape[1] for a in shortened(model, feeds, 4).values()] == [9, 7]


def test_samples_are_spread_over_all_blocks() -> None:
    model = text_model(("x", ir.DataType.FLOAT, ["b", "t"]))
    data = Calibration.from_iterable([np.full((5, 3), 1.0), np.full((5, 4), 2.0)], model.clone())
    some = data.spread(4)
    assert some.count == 4
    assert [feeds["x"].shape for feeds in some.batches(8)] == [(2, 3), (2, 4)]
    assert data.spread(100).count == 10


def test_spread_takes_first_and_last() -> None:
    model = text_model(("x", ir.DataType.FLOAT, ["b", 1]))
    data = Calibration.from_arrays({"x": np.arange(10, dtype=np.float32).reshape(10, 1)}, model)
    (feeds,) = data.spread(4).batches(8)
    np.testing.assert_array_equal(feeds["x"][:, 0], [0, 3, 6, 9])


def test_a_mapped_weight_is_the_same_after_its_pages_were_given_back(tmp_path: Path) -> None:
    array = np.arange(1 << 16, dtype=np.float32)
    (tmp_path / "w.bin").write_bytes(array.tobytes())
    shape = ir.Shape([array.size])
    tensor = ir.ExternalTensor("w.bin", 0, array.nbytes, ir.DataType.FLOAT, shape=shape, name="w", base_dir=tmp_path)
    seen = tensor.numpy()
    assert seen[-1] == array[-1]
    give_back([ir.val("w", const_value=tensor), ir.val("none")])
    np.testing.assert_array_equal(seen, array)


@pytest.mark.parametrize("spec", [QuantSpec(UInt(4), PerGroup(8), False), QuantSpec(Int(5), PerChannel())])
def test_codes_do_not_depend_on_the_parts_they_are_made_in(spec: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = np.random.default_rng(0).standard_normal((33, 20)).astype(np.float32)
    whole = quantize(matrix, spec)
    decoded = whole.decode()
    monkeypatch.setattr(base, "_PART", 64)
    parts = quantize(matrix, spec)
    np.testing.assert_array_equal(parts.codes, whole.codes)
    np.testing.assert_array_equal(parts.decode(), decoded)
    assert np.abs(decoded - matrix).max() < 0.5
