from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import OutputError
from qcompiler.measure import cache as cache_module
from qcompiler.measure.cache import Cache, fingerprint


def test_what_is_put_comes_back(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "new" / "folder")
    arrays = {"a": np.arange(6.0).reshape(2, 3), "with/slash and space": np.array([True, False])}
    key = Cache.key("job", 1)
    assert cache.get(key) is None
    cache.put(key, arrays)
    found = cache.get(key)
    assert found is not None
    assert list(found) == list(arrays)
    for name in arrays:
        np.testing.assert_array_equal(found[name], arrays[name])
    assert not list(cache.folder.rglob("*.part"))


def test_what_a_killed_process_was_writing_is_removed(tmp_path: Path) -> None:
    old, fresh = tmp_path / "ab" / "old.part", tmp_path / "ab" / "fresh.part"
    old.parent.mkdir()
    old.touch()
    fresh.touch()  # of a process that may be alive
    os.utime(old, (0, 0))
    Cache(tmp_path).put(Cache.key("job"), {"a": np.zeros(1)})
    assert not old.exists()
    assert fresh.exists()


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 not really", None])
def test_a_damaged_entry_is_absent(tmp_path: Path, damage: bytes | None) -> None:
    cache, key = Cache(tmp_path), Cache.key("x")
    cache.put(key, {"a": np.arange(1000)})
    (path,) = tmp_path.rglob("*.npz")
    path.write_bytes(path.read_bytes()[:-900] if damage is None else damage)
    assert cache.get(key) is None


def test_pickles_are_refused(tmp_path: Path) -> None:
    cache, key = Cache(tmp_path), Cache.key("x")
    cache.put(key, {"a": np.arange(3)})
    (path,) = tmp_path.rglob("*.npz")
    with path.open("wb") as file:
        np.savez(file, a=np.array([{"code": 1}], dtype=object))
    assert cache.get(key) is None


def test_keys_tell_apart_what_differs() -> None:
    parts: list[tuple[object, ...]] = [
        ("ab", "c"), ("a", "bc"), ("abc",), (["ab", "c"],), (1,), ("1",), (None,), (),
        (np.zeros(4, np.float32),), (np.zeros((2, 2), np.float32),), (np.zeros(4, np.int32),),
        (ir.tensor(np.zeros(4, np.float32)),), (ir.tensor(np.ones(4, np.float32)),),
    ]  # fmt: skip
    assert len({Cache.key(*p) for p in parts}) == len(parts)
    assert Cache.key(np.arange(6).reshape(2, 3).T) == Cache.key(np.arange(6).reshape(2, 3).T.copy())


def test_a_full_disk_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module.np, "savez", full)
    with pytest.raises(OutputError, match="the disk is full") as caught:
        Cache(tmp_path).put(Cache.key("x"), {"a": np.zeros(3)})
    assert "\n" not in str(caught.value)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def model(weight: float = 1.0, op: str = "Add", name: str = "n") -> ir.Model:
    x = ir.val("x", ir.DataType.FLOAT, [2])
    w = ir.val("w", const_value=ir.tensor(np.full(2, weight, np.float32), name="w"))
    node = ir.node(op, [x, w], name=name)
    node.outputs[0].name = "y"
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[w], opset_imports={"": 21})
    return ir.Model(graph, ir_version=10)


def test_the_fingerprint_follows_what_is_computed() -> None:
    assert fingerprint(model()) == fingerprint(model(name="another")) == fingerprint(model().clone())
    assert len({fingerprint(m) for m in (model(), model(weight=2.0), model(op="Mul"))}) == 3
