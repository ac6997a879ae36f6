"""Calibration data: sources, layouts, batches, and one clear error for everything that does not fit."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qcompiler.calibration import Calibration, feeds_check
from qcompiler.calibration.integers import integer_inputs
from qcompiler.errors import BadData, BadModel, BadOption
from qcompiler.preprocess import Preprocess

RNG = np.random.default_rng(0)
F, INT = ir.DataType.FLOAT, ir.DataType.INT64


def value(name: str, shape: list[Any], dtype: ir.DataType = F) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def constant(name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)


def build(
    inputs: list[ir.Value], nodes: list[ir.Node], outputs: list[ir.Value], constants: Sequence[ir.Value] = ()
) -> ir.Model:
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=constants, opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


def relus(**shapes: list[Any]) -> ir.Model:
    """One Relu an input."""
    inputs = [value(name, shape) for name, shape in shapes.items()]
    nodes = [ir.Node("", "Relu", [v], outputs=[value(f"{v.name}_out", list(v.shape or ()))]) for v in inputs]
    return build(inputs, nodes, [n.outputs[0] for n in nodes])


def typed(dtype: ir.DataType, shape: list[Any]) -> ir.Model:
    x = value("x", shape, dtype)
    node = ir.Node("", "Identity", [x], outputs=[value("y", shape, dtype)])
    return build([x], [node], [node.outputs[0]])


def language_model(length: int | str = "seq", causal: bool = True, vocabulary: int = 50) -> ir.Model:
    """ids -> embedding (+ the mean over all positions if not causal) -> logits; a mask that indexes nothing."""
    ids, mask = value("ids", ["batch", length], INT), value("mask", ["batch", length], INT)
    table = constant("table", RNG.standard_normal((vocabulary, 8)).astype(np.float32))
    head = constant("head", RNG.standard_normal((8, vocabulary)).astype(np.float32))
    axes = constant("axes", np.array([2]))
    nodes = [
        ir.node("Gather", [table, ids]),
        ir.node("Cast", [mask], attributes={"to": F}),
    ]
    nodes.append(ir.node("Unsqueeze", [nodes[1].outputs[0], axes]))
    nodes.append(ir.node("Mul", [nodes[0].outputs[0], nodes[2].outputs[0]]))
    hidden = nodes[-1].outputs[0]
    if not causal:
        nodes.append(ir.node("ReduceMean", [hidden, constant_axis := constant("one", np.array([1]))]))
        nodes.append(ir.node("Add", [hidden, nodes[-1].outputs[0]]))
        hidden = nodes[-1].outputs[0]
        extra = [constant_axis]
    else:
        extra = []
    logits = value("logits", ["batch", length, vocabulary])
    nodes.append(ir.Node("", "MatMul", [hidden, head], outputs=[logits]))
    return build([ids, mask], nodes, [logits], [table, head, axes, *extra])


IMAGES = relus(x=["n", 3, 8, 8])
STATEFUL = relus(input=["seq", 6], state=[1, 1, 4])


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


# ---- layouts and batches


@given(count=st.integers(1, 40), size=st.integers(1, 12), limit=st.none() | st.integers(0, 50))
def test_batches_serve_every_sample_once_and_in_order(count: int, size: int, limit: int | None) -> None:
    x = np.arange(count, dtype=np.float32)[:, None]
    data = Calibration.from_arrays({"x": x}, relus(x=["n", 1]))
    served = [b["x"] for b in data.batches(size, limit)]
    assert all(len(b) <= size for b in served)
    expected = x if limit is None else x[:limit]
    np.testing.assert_array_equal(np.concatenate([*served, x[:0]]), expected)


def test_a_fixed_batch_is_respected() -> None:
    x = floats(10, 5)
    data = Calibration.from_arrays({"x": x}, relus(x=[4, 5]))
    served = list(data.batches(32))
    assert [b["x"].shape for b in served] == [(4, 5)] * 3
    np.testing.assert_array_equal(served[2]["x"], x[[8, 9, 9, 9]])
    assert [b["x"].shape for b in data.take(5).batches(1, limit=4)] == [(4, 5)]
    assert [b["x"].shape for b in Calibration.from_arrays({"x": floats(3, 5)}, relus(x=[1, 5])).batches(32)] == [
        (1, 5)
    ] * 3


def test_inputs_without_a_common_batch_axis() -> None:
    single = Calibration.from_arrays({"input": floats(7, 6), "state": floats(1, 1, 4)}, STATEFUL)
    assert single.count == 1
    assert [{k: v.shape for k, v in b.items()} for b in single.batches(8)] == [{"input": (7, 6), "state": (1, 1, 4)}]
    stacked = Calibration.from_arrays({"input": floats(5, 7, 6), "state": floats(5, 1, 1, 4)}, STATEFUL)
    assert stacked.count == 5
    assert [b["state"].shape for b in stacked.batches(8, limit=3)] == [(1, 1, 4)] * 3


def test_parts_and_fingerprints() -> None:
    x = floats(10, 3, 8, 8)
    data = Calibration.from_arrays({"x": x}, IMAGES)
    assert data.take(4).count == 4
    assert data.take(40).count == 10
    np.testing.assert_array_equal(np.concatenate([b["x"] for b in data.part(3, 8).batches(2)]), x[3:8])
    assert data.part(2, 6).fingerprint == Calibration.from_arrays({"x": x[2:6]}, IMAGES).fingerprint
    changed = x.copy()
    changed[9, 2, 7, 7] += 1
    assert data.fingerprint != Calibration.from_arrays({"x": changed}, IMAGES).fingerprint


def test_integers_of_another_width_are_cast() -> None:
    model = typed(ir.DataType.INT32, ["n", 2])
    (feeds,) = Calibration.from_arrays({"x": np.array([[1, 2]], np.int64)}, model).batches(4)
    assert feeds["x"].dtype == np.int32
    with pytest.raises(BadData, match="integers that int32 cannot"):
        next(Calibration.from_arrays({"x": np.array([[1, 2**40]])}, model).batches(4))


# ---- what does not fit


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": floats(2, 3, 8, 8)}, "has no input 'y'; its inputs are x \\[n,3,8,8\\]"),
        ({}, "input 'x' is missing"),
        ({"x": floats(2, 3, 9, 8)}, r"'x' has shape \[2, 3, 9, 8\]; the input is \[n,3,8,8\]"),
        ({"x": floats(3, 8)}, r"'x' has shape \[3, 8\]"),
        ({"x": floats(1, 1, 1, 3, 8, 8)}, "has shape"),
        ({"x": floats(0, 3, 8, 8)}, "holds no samples"),
        ({"x": np.array(1.0)}, "has shape"),
        ({"x": np.full((4, 3, 8, 8), np.nan, np.float32)}, "NaN, first in sample 0"),
        ({"x": np.full((4, 3, 8, 8), np.inf, np.float32)}, "infinity, first in sample 0"),
        (
            {"x": np.concatenate([floats(2, 3, 8, 8), np.full((1, 3, 8, 8), -np.inf, "f")])},
            "infinity, first in sample 2",
        ),
        ({"x": np.full((2, 3, 8, 8), 1e300)}, "infinity, first in sample 0"),
        ({"x": np.zeros((2, 3, 8, 8), np.complex64)}, "has type complex64"),
        ({"x": np.full((2, 3, 8, 8), "a")}, "has type"),
    ],
)
def test_arrays_that_do_not_fit(arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(BadData, match=message) as caught:
        feeds_check(IMAGES, arrays, "here")
    assert str(caught.value).startswith("here")


@pytest.mark.filterwarnings("error")
def test_data_narrower_than_the_input_is_checked_without_a_warning() -> None:
    half = np.array([[1, 65504]], np.float16)
    (feeds,) = Calibration.from_arrays({"x": half}, typed(F, ["n", 2])).batches(4)
    assert feeds["x"].dtype == np.float32
    with pytest.raises(BadData, match="infinity"):
        Calibration.from_arrays({"x": np.array([[1, np.inf]], np.float16)}, typed(F, ["n", 2]))


def test_a_mask_of_minus_infinity_is_taken() -> None:
    mask = np.where(RNG.random((4, 3, 8, 8)) < 0.5, 0, -np.inf).astype(np.float32)
    assert feeds_check(IMAGES, {"x": mask}).count == 4


def test_counts_that_differ_are_refused() -> None:
    two = relus(a=["n", 3], b=["n", 3])
    with pytest.raises(BadData, match="different numbers of samples"):
        feeds_check(two, {"a": floats(4, 3), "b": floats(5, 3)})
    with pytest.raises(BadData, match="some do not"):
        feeds_check(two, {"a": floats(4, 2, 3), "b": floats(4, 3)})
    with pytest.raises(BadData, match="wants int64"):
        feeds_check(typed(INT, ["n", 2]), {"x": floats(2, 2)})


# ---- files


def bomb(folder: Path) -> Path:
    """A header that declares 2^40 floats in a small compressed member."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)})
    path = folder / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", header.getvalue() + bytes(1 << 20))
    return path


def honest_bomb(folder: Path) -> Path:
    """A member whose directory entry admits to 2^50 bytes."""
    path = bomb(folder)
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    struct.pack_into("<I", data, at + 24, 0xFFFFFFF0)
    path.write_bytes(bytes(data))
    return path


def pickled(folder: Path) -> Path:
    np.savez(folder / "x.npz", x=np.array([{"a": 1}], dtype=object))
    return folder / "x.npz"


def cut(folder: Path) -> Path:
    np.savez(folder / "x.npz", x=floats(9, 3, 8, 8))
    whole = (folder / "x.npz").read_bytes()
    (folder / "x.npz").write_bytes(whole[: len(whole) // 2])
    return folder / "x.npz"


def cut_npy(folder: Path) -> Path:
    np.save(folder / "x.npy", floats(9, 3, 8, 8))
    whole = (folder / "x.npy").read_bytes()
    (folder / "x.npy").write_bytes(whole[:-5])
    return folder / "x.npy"


def file(name: str, data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def images(folder: Path, data: bytes | None = None) -> Path:
    (folder / "images").mkdir()
    for index in range(3):
        Image.fromarray(RNG.integers(0, 256, (12 + index, 16, 3), np.uint8)).save(folder / "images" / f"{index}.png")
    if data is not None:
        (folder / "images" / "9.png").write_bytes(data)
    return folder / "images"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none.npz", "no such file"),
        (lambda folder: folder, "holds no images"),
        (file("x.npz", b"text"), "cannot be read as .npz"),
        (file("x.npz", b"PK\x05\x06" + bytes(18)), "holds 0 arrays"),
        (file("x.npy", b"text"), "cannot be read as .npy"),
        (file("x.npy", b""), "cannot be read as .npy"),
        (file("notes.txt", b"some words"), "give --tokenizer"),
        (bomb, "declares 4398046511104 bytes"),
        (honest_bomb, "bytes of data but has"),
        (pickled, "Python objects"),
        (cut, "cannot be read as .npz"),
        (cut_npy, "declares 6912 bytes of data but has 6907"),
        (lambda folder: images(folder, b"no image"), "cannot be read as an image"),
    ],
)
def test_files_that_cannot_be_used(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadData, match=message) as caught:
        list(Calibration.from_path(make(tmp_path), IMAGES).batches(8))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_and_npy_give_what_was_saved(save: Callable[..., None], tmp_path: Path) -> None:
    x = floats(5, 3, 8, 8)
    save(tmp_path / "x.npz", x=x)
    np.save(tmp_path / "x.npy", np.asfortranarray(x))
    prints = set[str]()
    for name in ("x.npz", "x.npy"):
        data = Calibration.from_path(tmp_path / name, IMAGES)
        np.testing.assert_array_equal(np.concatenate([b["x"] for b in data.batches(2)]), x)
        prints.add(data.fingerprint)
    assert len(prints) == 1


def test_uncompressed_members_are_not_read_into_memory(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=floats(5, 3, 8, 8))
    (block,) = Calibration.from_path(tmp_path / "x.npz", IMAGES).blocks
    assert isinstance(block.arrays["x"], np.memmap)


# ---- images


def test_images_become_the_models_input(tmp_path: Path) -> None:
    data = Calibration.from_path(images(tmp_path), IMAGES)
    (feeds,) = data.batches(8)
    assert feeds["x"].shape == (3, 3, 8, 8)
    assert feeds["x"].dtype == np.float32
    assert -1 <= feeds["x"].min() < 0 < feeds["x"].max() <= 1


def test_preprocessing_does_what_it_says(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    text = "mean=0.485/0.456/0.406,std=0.229/0.224/0.225,order=bgr"
    (feeds,) = Calibration.from_path(tmp_path, IMAGES, preprocess=text).batches(1)
    expected = (pixels[..., ::-1] / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(feeds["x"][0], expected.transpose(2, 0, 1), atol=1e-5)
    (bytes_in,) = Calibration.from_path(tmp_path, typed(ir.DataType.UINT8, ["n", 8, 8, 3])).batches(1)
    np.testing.assert_array_equal(bytes_in["x"][0], pixels)


def test_resize_and_crop(tmp_path: Path) -> None:
    Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (32, 1))).save(tmp_path / "a.png")
    out = Preprocess.parse("resize=16,crop=16x24").apply(tmp_path / "a.png", 1)
    assert out.shape == (16, 24, 1)
    assert abs(float(out.mean())) < 0.02  # the crop is the centre of a ramp from -1 to 1
    assert Preprocess.parse("resize=10x20").apply(tmp_path / "a.png", 3).shape == (10, 20, 3)


@pytest.mark.parametrize(
    "text",
    [
        "size=3",
        "resize",
        "resize=0",
        "resize=axb",
        "crop=-1",
        "std=0",
        "mean=1/2",
        "mean=nan",
        "order=grb",
        "crop=8,crop=8",
    ],
)
def test_preprocess_text_that_means_nothing(text: str) -> None:
    with pytest.raises(BadOption, match="--preprocess"):
        Preprocess.parse(text)


@pytest.mark.parametrize(
    ("text", "reason"), [("resize=x", "'x' is no size"), ("crop=8x", "'8x' is no size"), ("mean=a", "'a' is no number")]
)
def test_preprocess_text_that_is_no_number_is_named(text: str, reason: str) -> None:
    with pytest.raises(BadOption, match=f"--preprocess: {reason}"):
        Preprocess.parse(text)


@pytest.mark.parametrize(
    ("name", "options", "culprit"),
    [
        ("x.npz", {"preprocess": "resize=8"}, "--preprocess, with .*x.npz: it is for folders of images"),
        ("x.npz", {"tokenizer": Path("none.json")}, "--tokenizer, with .*x.npz: it is for text files"),
        ("images", {"tokenizer": Path("none.json")}, "--tokenizer, with .*images: it is for text files"),
    ],
)
def test_an_option_that_the_data_has_no_use_for_is_refused(
    name: str, options: dict[str, Any], culprit: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "x.npz", x=floats(3, 3, 8, 8))
    images(tmp_path)
    with pytest.raises(BadOption, match=culprit):
        Calibration.from_path(tmp_path / name, IMAGES, **options)


def test_images_need_an_image_model(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="one input of four dimensions"):
        Calibration.from_path(images(tmp_path), relus(x=["n", 8]))
    with pytest.raises(BadData, match="is no image"):
        Calibration.from_path(tmp_path / "images", relus(x=["n", 7, 8, 8]))


# ---- text


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    vocabulary = {"[UNK]": 0} | {f"w{i}": i for i in range(1, 50)}
    data = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    return tmp_path / "tokenizer.json"


def test_text_becomes_windows_of_tokens(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ".join(f"w{1 + i % 49}" for i in range(40)))
    data = Calibration.from_path(tmp_path / "a.txt", language_model(16), tokenizer=tokenizer)
    (feeds,) = data.batches(8)
    np.testing.assert_array_equal(feeds["ids"], [np.arange(1, 17), np.arange(17, 33)])
    np.testing.assert_array_equal(feeds["mask"], np.ones((2, 16)))
    (whole,) = Calibration.from_path(tmp_path / "a.txt", language_model(), tokenizer=tokenizer).batches(8)
    assert whole["ids"].shape == (1, 40)


def test_text_that_cannot_be_used(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("w49 " * 20)
    with pytest.raises(BadData, match="holds token 49, the model knows 20"):
        Calibration.from_path(path, language_model(8, vocabulary=20), tokenizer=tokenizer)
    with pytest.raises(BadData, match="gives 20 tokens"):
        Calibration.from_path(path, language_model(64), tokenizer=tokenizer)
    with pytest.raises(BadData, match="does not take a text alone"):
        Calibration.from_path(path, IMAGES, tokenizer=tokenizer)
    with pytest.raises(BadData, match=r"cannot be read as tokenizer\.json"):
        Calibration.from_path(path, language_model(8), tokenizer=path)
    path.write_bytes(b"\xff\xfe\xfd" * 10)
    with pytest.raises(BadData, match="not UTF-8"):
        Calibration.from_path(path, language_model(8), tokenizer=tokenizer)


# ---- iterables


def test_iterables_of_any_form() -> None:
    x = floats(6, 3, 8, 8)
    forms: list[list[Any]] = [[x[:4], x[4:]], [[x[:4]], [x[4:]]], [{"x": x[:4]}, {"x": x[4:]}]]
    prints = {Calibration.from_iterable(iter(form), IMAGES).fingerprint for form in forms}
    assert prints == {Calibration.from_arrays({"x": x}, IMAGES).fingerprint}


def test_samples_of_several_lengths_stay_apart() -> None:
    data = Calibration.from_iterable([floats(2, 5), floats(3, 7), floats(1, 5)], relus(x=["n", "seq"]))
    assert data.count == 6
    assert [b["x"].shape for b in data.batches(8)] == [(3, 5), (3, 7)]
    assert data.take(4).count == 4


@pytest.mark.parametrize(
    ("items", "message"),
    [([], "no samples"), ([[floats(1, 3), floats(1, 3)]], "item 0: has 2 arrays"), (["words"], "no array of numbers")],
)
def test_iterables_that_cannot_be_used(items: list[Any], message: str) -> None:
    with pytest.raises(BadData, match=message):
        Calibration.from_iterable(items, IMAGES)


# ---- made by the compiler


def test_roles_of_integer_inputs_are_read_off_the_graph() -> None:
    assert [(r.name, r.role, r.size) for r in integer_inputs(language_model())] == [
        ("ids", "tokens", 50),
        ("mask", "mask", 2),
    ]


def test_made_up_inputs_run_and_repeat() -> None:
    data = Calibration.synthetic_for(relus(x=["n", 3, "h", "w"]), samples=3, seed=7)
    (feeds,) = data.batches(8)
    assert feeds["x"].shape == (3, 3, 224, 224)
    assert data.synthetic
    assert "no calibration data" in data.warning
    assert data.fingerprint == Calibration.synthetic_for(relus(x=["n", 3, "h", "w"]), samples=3, seed=7).fingerprint
    assert data.fingerprint != Calibration.synthetic_for(relus(x=["n", 3, "h", "w"]), samples=3, seed=8).fingerprint


def test_made_up_inputs_without_a_batch_axis() -> None:
    data = Calibration.synthetic_for(STATEFUL, samples=3)
    assert data.count == 3
    assert all(b["state"].shape == (1, 1, 4) for b in data.batches(8))


def test_a_causal_model_writes_its_own_text() -> None:
    data = Calibration.synthetic_for(language_model(), samples=8)
    (feeds,) = data.batches(8)
    assert "text" in data.warning
    assert feeds["ids"].shape == feeds["mask"].shape == (4, 64)
    assert feeds["mask"].min() == 1
    assert 0 <= feeds["ids"].min() <= feeds["ids"].max() < 50


def test_own_text_can_be_declined() -> None:
    data = Calibration.synthetic_for(language_model(), samples=8, text=False)
    assert "random" in data.warning
    assert data.count == 8


def test_an_encoder_gets_random_tokens() -> None:
    data = Calibration.synthetic_for(language_model(causal=False), samples=8)
    (feeds,) = data.batches(8)
    assert "random" in data.warning
    assert feeds["ids"].shape == (8, 64)


def test_enormous_inputs_are_not_made_up() -> None:
    with pytest.raises(BadModel, match="too large to make up"):
        Calibration.synthetic_for(relus(x=["n", 1 << 20, 1 << 20]))


def with_setting() -> ir.Model:
    """x [n, 3] times a number without axes."""
    x, k = value("x", ["n", 3]), value("k", [])
    node = ir.Node("", "Mul", [x, k], outputs=[value("y", ["n", 3])])
    return build([x, k], [node], [node.outputs[0]])


def test_a_number_goes_into_every_call() -> None:
    x, k = floats(5, 3), np.array(2, np.float32)
    data = Calibration.from_arrays({"x": x, "k": k}, with_setting())
    feeds = list(data.batches(2))
    assert [f["x"].shape[0] for f in feeds] == [2, 2, 1]
    assert all(f["k"].shape == () and f["k"] == 2 for f in feeds)
    assert next(data.part(1, 3).batches(4))["k"] == 2
    other = Calibration.from_arrays({"x": x, "k": np.array(3, np.float32)}, with_setting())
    assert other.fingerprint != data.fingerprint
    with pytest.raises(BadData, match="NaN"):
        Calibration.from_arrays({"x": x, "k": np.array(np.nan, np.float32)}, with_setting())


def test_items_with_different_numbers_stay_apart() -> None:
    items = [{"x": floats(2, 3), "k": np.array(v, np.float32)} for v in (1, 1, 2)]
    data = Calibration.from_iterable(items, with_setting())
    assert [(len(f["x"]), float(f["k"])) for f in data.batches(8)] == [(4, 1.0), (2, 2.0)]


def test_made_up_inputs_vary_numbers_without_axes() -> None:
    data = Calibration.synthetic_for(with_setting(), 16)
    assert data.count == 16
    assert len({float(f["k"]) for f in data.batches(8)}) > 1
