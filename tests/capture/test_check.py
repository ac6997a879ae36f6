"""Hostile and broken model files: each gives one clear BadModel, and nothing is left behind."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcompiler.capture.onnx import check_file, load_onnx
from qcompiler.capture.wire import MAX_NODES
from qcompiler.errors import BadModel
from qcompiler.measure.runner import Runner

_spec = importlib.util.spec_from_file_location("capture_models", Path(__file__).with_name("models.py"))
assert _spec is not None
assert _spec.loader is not None
m = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(m)


def edited(edit: Callable[[onnx.ModelProto], object]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        proto = m.linear()
        edit(proto)
        return m.saved(proto, folder)

    return make


def entry(proto: onnx.ModelProto, key: str, value: str) -> None:
    weight = proto.graph.initializer[0]
    found = next((e for e in weight.external_data if e.key == key), None)
    if found is None:
        weight.external_data.add(key=key, value=value)
    else:
        found.value = value


def external(key: str, value: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = m.saved(m.linear(), folder, external=True)
        proto = onnx.load(path, load_external_data=False)
        entry(proto, key, value)
        path.write_bytes(proto.SerializeToString())
        return path

    return make


def linked(link: Callable[[Path, Path], None]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = m.saved(m.linear(), folder, external=True)
        data, real = folder / "m.data", folder / "elsewhere"
        data.rename(real)
        link(real, data)
        return path

    return make


def overlapping(folder: Path) -> Path:
    path = m.saved(
        m.model([oh.make_node("MatMul", ["x", "w"], ["a"]), oh.make_node("MatMul", ["a", "v"], ["y"])],
                [m.tensor("w", 200, 200), m.tensor("v", 200, 200)]), folder, external=True)  # fmt: skip
    proto = onnx.load(path, load_external_data=False)
    for item in proto.graph.initializer[1].external_data:
        item.value = "4096" if item.key == "offset" else item.value
    path.write_bytes(proto.SerializeToString())
    return path


def written(data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / "m.onnx"
        path.write_bytes(data)
        return path

    return make


def truncated(folder: Path) -> Path:
    path = m.saved(m.linear(), folder)
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def sparse(folder: Path) -> Path:
    path = folder / "m.onnx"
    with path.open("wb") as file:
        file.truncate(2**31 + 10)
    return path


def nested(folder: Path) -> Path:
    graph = oh.make_graph([oh.make_node("Relu", ["x"], ["y0"])], "g0", [], [oh.make_tensor_value_info("y0", 1, None)])
    for depth in range(20):
        name = f"y{depth + 1}"
        node = oh.make_node("If", ["c"], [name], then_branch=graph, else_branch=graph)
        if depth > 8:  # branches double the size; one is enough from here on
            node = oh.make_node("Scan", ["c"], [name], body=graph)
        graph = oh.make_graph([node], f"g{depth + 1}", [], [oh.make_tensor_value_info(name, 1, None)])
    return m.saved(m.model([oh.make_node("Scan", ["x"], ["y"], body=graph)], []), folder)


def many_nodes(folder: Path) -> Path:
    one = oh.make_node("Relu", ["x"], ["y"]).SerializeToString()
    message = b"\x0a" + bytes([len(one)]) + one
    graph = message * (MAX_NODES + 1)
    size, length = len(graph), b""
    while size >= 0x80:
        length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
    path = folder / "m.onnx"
    path.write_bytes(b"\x3a" + length + bytes([size]) + graph)
    return path


def rename_twice(proto: onnx.ModelProto) -> None:
    proto.graph.initializer.add().CopyFrom(proto.graph.initializer[0])


def cycle(proto: onnx.ModelProto) -> None:
    proto.graph.node.extend([oh.make_node("Add", ["a", "x"], ["b"]), oh.make_node("Relu", ["b"], ["a"])])


def recursion(proto: onnx.ModelProto) -> None:
    call = oh.make_node("F", ["t"], ["u"], domain="d")
    proto.functions.append(oh.make_function("d", "F", ["t"], ["u"], [call], [oh.make_opsetid("", 21)]))


def nan(proto: onnx.ModelProto) -> None:
    weights = np.ones((200, 300), np.float32)
    weights[5, 7] = np.nan
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights, "w"))


def infinite(proto: onnx.ModelProto) -> None:
    weights = np.ones((200, 3), np.float32)
    weights[5, 1] = np.inf
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights, "w"))


def set_dims(*dims: int) -> Callable[[onnx.ModelProto], None]:
    def edit(proto: onnx.ModelProto) -> None:
        proto.graph.initializer[0].dims[:] = dims

    return edit


ATTACKS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "none.onnx", "no such file"),
    "folder": (lambda folder: folder, "is a folder"),
    "empty": (written(b""), "empty"),
    "text": (written(b"hello, this is no model\n" * 50), "text file"),
    "git lfs pointer": (written(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"), "git lfs pull"),
    "zip": (written(b"PK\x03\x04" + bytes(100)), "zip archive"),
    "noise": (written(bytes(range(256)) * 20), "broken|protobuf"),
    "no graph": (written(b"\x08\x0a"), "no graph"),
    "truncated": (truncated, "cut off"),
    "over 2 GiB": (sparse, "larger than 2 GiB"),
    "nested subgraphs": (nested, "nested more than"),
    "too many nodes": (many_nodes, "more than 200000 nodes"),
    "parent path": (external("location", "../m.data"), "outside of the model's folder"),
    "absolute path": (external("location", "/etc/passwd"), "outside of the model's folder"),
    "windows path": (external("location", "C:\\m.data"), "outside of the model's folder"),
    "no location": (external("location", ""), "outside of the model's folder"),
    "missing data": (external("location", "none.data"), "is missing"),
    "negative offset": (external("offset", "-8"), "needs bytes -8"),
    "offset beyond": (external("offset", "999999999"), "which has 240000"),
    "length beyond": (external("length", "99999999"), "does not fit"),
    "length no number": (external("length", "many"), "no number"),
    "symbolic link": (linked(lambda real, data: data.symlink_to(real)), "is a link"),
    "device": (linked(lambda _, data: data.symlink_to("/dev/zero")), "is a link"),
    "fifo": (linked(lambda _, data: os.mkfifo(data)), "not a plain file"),
    "hard link": (linked(lambda real, data: data.hardlink_to(real)), "hard link"),
    "overlap": (overlapping, "overlap"),
    "negative dimension": (edited(set_dims(-200, 300)), "negative dimension"),
    "dimensions beyond the data": (edited(set_dims(400, 300)), "does not fit"),
    "enormous dimensions": (edited(set_dims(2**40, 2**40)), "impossible shape"),
    "dimensions that multiply to the size modulo 2^64": (edited(set_dims(2**32, 2**32, 0, 60000)), "does not fit"),
    "unknown type": (edited(lambda p: setattr(p.graph.initializer[0], "data_type", 99)), "unknown data type 99"),
    "initializer twice": (edited(rename_twice), "'w' is defined twice"),
    "value twice": (edited(lambda p: p.graph.node.append(p.graph.node[0])), "'y' is computed twice"),
    "cycle": (edited(cycle), "circle"),
    "functions in a circle": (edited(recursion), "call each other"),
    "dangling input": (edited(lambda p: p.graph.node[0].input.append("gone")), "'gone', which nothing computes"),
    "output of no node": (edited(lambda p: setattr(p.graph.output[0], "name", "z")), "'z' is computed by no node"),
    "compiled binary": (edited(lambda p: setattr(p.graph.node[0], "op_type", "EPContext")), "compiled binary"),
    "no opset": (edited(lambda p: p.ClearField("opset_import")), "no operator set"),
    "old opset": (
        edited(lambda p: setattr(p.opset_import[0], "version", 9)),
        "opset 9; export the model with an opset between 11 and 26",
    ),
    "new opset": (edited(lambda p: setattr(p.opset_import[0], "version", 28)), "opset 28"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_is_refused_with_one_line(name: str, tmp_path: Path) -> None:
    make, message = ATTACKS[name]
    with pytest.raises(BadModel, match=message) as caught:
        check_file(make(tmp_path))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(("edit", "kind"), [(nan, "NaN"), (infinite, "infinity")])
def test_weights_that_are_not_finite_are_named(
    edit: Callable[[onnx.ModelProto], None], kind: str, tmp_path: Path
) -> None:
    with pytest.raises(BadModel, match=f"weight 'w' holds {kind}"):
        load_onnx(edited(edit)(tmp_path))


def test_a_mask_of_infinities_is_no_fault(tmp_path: Path) -> None:
    mask = onnx.numpy_helper.from_array(np.full((1, 300), -np.inf, np.float32), "mask")
    proto = m.model(
        [oh.make_node("MatMul", ["x", "w"], ["a"]), oh.make_node("Add", ["a", "mask"], ["y"])],
        [m.tensor("w", 200, 300), mask],
    )
    assert "mask" in load_onnx(m.saved(proto, tmp_path)).graph.initializers


def test_nothing_is_left_of_a_refused_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private = tmp_path / "private"
    private.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(private))
    with pytest.raises(BadModel):
        load_onnx(edited(nan)(tmp_path))
    assert list(private.iterdir()) == []


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_files_are_refused_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    """Any cut and any changed byte gives BadModel or a model that can be checked; never another error."""
    graph = m.model(
        [oh.make_node("MatMul", ["x", "w"], ["a"], "n"), oh.make_node("Relu", ["a"], ["y"])], [m.tensor("w", 200, 3)]
    )
    whole = bytearray(graph.SerializeToString())
    small = [i for i in range(len(whole)) if i < 100 or i > len(whole) - 100]
    if data.draw(st.booleans()):
        whole = whole[: data.draw(st.sampled_from(small))]
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            whole[data.draw(st.sampled_from(small))] = data.draw(st.integers(0, 255))
    path = tmp_path / "m.onnx"
    path.write_bytes(bytes(whole))
    with contextlib.suppress(BadModel):
        load_onnx(path)


def test_good_files_pass(tmp_path: Path) -> None:
    check_file(m.saved(m.linear(), tmp_path))
    check_file(m.saved(m.linear(), tmp_path, external=True))


def test_a_dimension_of_size_zero_is_refused(tmp_path: Path) -> None:
    proto = m.model([oh.make_node("Relu", ["x"], ["y"])], [], x=("n", 0))
    with pytest.raises(BadModel, match=r"m\.onnx: input 'x' has a dimension of size 0"):
        load_onnx(m.saved(proto, tmp_path))


@pytest.mark.parametrize("opset", [11, 17])
def test_an_operator_of_no_onnx_version_is_named(opset: int, tmp_path: Path) -> None:
    proto = m.model([oh.make_node("Nope", ["x"], ["y"], "odd")], [], opset)
    with pytest.raises(BadModel, match=r"m\.onnx: node 'odd' has the operator 'Nope', which no version of ONNX has; "):
        load_onnx(m.saved(proto, tmp_path))


@pytest.mark.parametrize(
    ("node", "fix"),
    [
        (oh.make_node("Foo", ["x"], ["y"], domain="mine"), "if ONNX Runtime has all of its operations"),
        (oh.make_node("MatMul", ["x", "w"], ["y"]), "see that ONNX Runtime runs the original"),
    ],
)
def test_what_onnx_runtime_refuses_names_the_file_and_what_to_do(
    node: onnx.NodeProto, fix: str, tmp_path: Path
) -> None:
    proto = m.model([node], [m.tensor("w", 7, 3)])
    proto.opset_import.append(oh.make_opsetid("mine", 1))
    with pytest.raises(BadModel, match=f"m.onnx: ONNX Runtime cannot run it .*{fix}"):
        Runner(load_onnx(m.saved(proto, tmp_path)).ir)


def test_a_type_without_kernels_in_onnx_runtime_is_told_to_be_converted(tmp_path: Path) -> None:
    proto = m.model([oh.make_node("MatMul", ["x", "x"], ["y"])], [], x=(2, 2))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.BFLOAT16
    with pytest.raises(BadModel, match=r"m\.onnx: ONNX Runtime cannot run it .*convert it to float32"):
        Runner(load_onnx(m.saved(proto, tmp_path)).ir)
