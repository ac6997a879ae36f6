"""Problem files: exact round trips, and what is no problem file says so."""

from __future__ import annotations

import io
import json
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

from qcompiler.solvers.files import load_problem, save_problem
from qcompiler.solvers.problem import Problem


def full_problem(names: tuple[str, ...] = ("bytes", "Zeit ⏱"), dense: bool = False) -> Problem:
    """With everything that a problem can have."""
    rng = np.random.default_rng(0)
    loss = rng.normal(size=(4, 3))
    loss[1, 2] = np.inf
    half = sparse.random_array((12, 12), density=0.2, rng=rng).toarray()
    cross = half + half.T
    pair = sparse.csr_array((np.array([0.5, 0.5]), (np.array([0, 4]), np.array([4, 0]))), shape=(12, 12))
    costs = {name: rng.uniform(0, 5, (4, 3)) for name in names}
    return Problem(
        loss,
        costs,
        {name: rng.uniform() for name in reversed(names)},
        ties=((0, 3), (2,)),
        cross=cross if dense else sparse.csr_array(cross),
        pair_costs={names[0]: pair} if names else {},
    )


def assert_same(a: Problem, b: Problem) -> None:
    def plain(m: object) -> object:
        return None if m is None else (isinstance(m, np.ndarray), sparse.csr_array(m).toarray().tolist())

    assert a.loss.tobytes() == b.loss.tobytes()
    assert a.loss.shape == b.loss.shape
    assert [(n, c.tobytes()) for n, c in a.costs.items()] == [(n, c.tobytes()) for n, c in b.costs.items()]
    assert list(a.budgets.items()) == list(b.budgets.items())
    assert a.ties == b.ties
    assert plain(a.cross) == plain(b.cross)
    assert {n: plain(m) for n, m in a.pair_costs.items()} == {n: plain(m) for n, m in b.pair_costs.items()}


@pytest.mark.parametrize("dense", [True, False])
def test_round_trip(tmp_path: Path, dense: bool) -> None:
    save_problem(full_problem(dense=dense), tmp_path / "p.npz")
    assert_same(load_problem(tmp_path / "p.npz"), full_problem(dense=dense))
    assert [p.name for p in tmp_path.iterdir()] == ["p.npz"]  # no temporary file stays


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(st.text(st.characters(), max_size=8), unique=True, max_size=4))
def test_any_names(tmp_path: Path, names: list[str]) -> None:
    names = [*names, "\ud800", "a/../b", "cost_0"]
    problem = full_problem(tuple(dict.fromkeys(names)))
    save_problem(problem, tmp_path / "p.npz")
    assert_same(load_problem(tmp_path / "p.npz"), problem)


def test_a_problem_of_nothing(tmp_path: Path) -> None:
    problem = Problem(np.zeros((0, 3)), {}, {})
    save_problem(problem, tmp_path / "p.npz")
    assert_same(load_problem(tmp_path / "p.npz"), problem)


def test_numpy_reads_it_without_pickles(tmp_path: Path) -> None:
    save_problem(full_problem(), tmp_path / "p.npz")
    with np.load(tmp_path / "p.npz", allow_pickle=False) as arrays:
        assert arrays["loss"].shape == (4, 3)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_problem(full_problem(), tmp_path / "p.npz")
    before = (tmp_path / "p.npz").read_bytes()

    def full_disk(file: io.BufferedWriter, **arrays: object) -> None:
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_problem(full_problem(("other",)), tmp_path / "p.npz")
    assert (tmp_path / "p.npz").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["p.npz"]


def raw(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, allow_pickle=array.dtype == object)
    return stream.getvalue()


def header(**change: object) -> bytes:
    fields = {"version": 1, "resources": ["b"], "budgets": [0], "pairs": [], "cross": "none", **change}
    return raw(np.frombuffer(json.dumps(fields).encode(), np.uint8))


def claims(shape: tuple[int, ...]) -> bytes:
    """An array's header without its contents."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return stream.getvalue()


def members(**change: bytes | None) -> dict[str, bytes]:
    found = {
        "header": header(),
        "loss": raw(np.zeros((2, 2))),
        "cost_0": raw(np.ones((2, 2))),
        "budgets": raw(np.ones(1)),
        "tie_sizes": raw(np.zeros(0, np.int64)),
        "tie_units": raw(np.zeros(0, np.int64)),
        **change,
    }
    return {name: data for name, data in found.items() if data is not None}


def write(path: Path, arrays: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in arrays.items():
            archive.writestr(f"{name}.npy", data)
    return path


def test_the_hand_made_file_is_right_to_begin_with(tmp_path: Path) -> None:
    assert load_problem(write(tmp_path / "p.npz", members())).units == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"header": None}, "no header"),
        ({"header": raw(np.zeros(3, np.uint8))}, "not a problem file"),
        ({"header": raw(np.frombuffer(b"[" * 100_000, np.uint8))}, "deep|not a problem file"),
        ({"header": raw(np.frombuffer(b"[1]", np.uint8))}, "fields"),
        ({"header": header(version=2)}, "version is 2"),
        ({"header": header(resources=[1])}, "names"),
        ({"header": header(resources=["b", "b"])}, "twice"),
        ({"header": header(budgets=[1])}, "indices"),
        ({"header": header(budgets=[True])}, "indices"),
        ({"header": header(budgets=[0, 0])}, "two budgets"),
        ({"header": header(budgets=[])}, "1 amounts for 0"),
        ({"header": header(cross="full")}, "cross is 'full'"),
        ({"header": header(cross="dense")}, "'cross' is missing"),
        ({"header": header(pairs=[0])}, "'pair_0_values' is missing"),
        ({"loss": None}, "'loss' is missing"),
        ({"loss": raw(np.zeros((2, 2), np.float32))}, "float32"),
        ({"loss": raw(np.array([[object()]], object))}, "not a problem file"),
        ({"loss": claims((10**12, 2))}, "does not have the size"),
        ({"loss": claims((2**40, 2**40))}, "does not have the size"),
        ({"loss": claims((10**12, 0))}, "unit 0 has no option"),
        ({"loss": claims((-1, 2))}, "not a problem file"),
        ({"loss": raw(np.full((2, 2), np.nan))}, "finite"),
        ({"loss": b"\x93NUMPY\x09\x00"}, "version"),
        ({"loss": b""}, "not a problem file"),
        ({"cost_0": raw(np.ones((2, 3)))}, "shape of loss"),
        ({"cost_1": raw(np.ones((2, 2)))}, "'cost_1' belongs to nothing"),
        ({"tie_sizes": raw(np.array([3])), "tie_units": raw(np.array([0]))}, "sizes of the ties"),
        ({"tie_sizes": raw(np.array([2])), "tie_units": raw(np.array([0, 2]))}, "does not exist"),
        ({"tie_sizes": raw(np.array([2, -2])), "tie_units": raw(np.zeros(0, np.int64))}, "sizes of the ties"),
    ],
)
def test_inconsistent_files_say_what_is_wrong(tmp_path: Path, change: dict[str, bytes | None], message: str) -> None:
    path = write(tmp_path / "p.npz", members(**change))
    tracemalloc.start()
    with pytest.raises(ValueError, match=message):
        load_problem(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


@pytest.mark.parametrize(("rows", "columns"), [([0, 1, 1, 1, 9], [0]), ([0, 1, 1, 1, 1], [7]), ([0, 1], [0])])
def test_matrices_that_point_outside(tmp_path: Path, rows: list[int], columns: list[int]) -> None:
    matrix = {
        "cross_values": raw(np.ones(1)),
        "cross_columns": raw(np.array(columns)),
        "cross_rows": raw(np.array(rows)),
    }
    with pytest.raises(ValueError, match="not a problem file"):
        load_problem(write(tmp_path / "p.npz", members(header=header(cross="sparse"), **matrix)))


def test_compressed_files_are_refused_unread(tmp_path: Path) -> None:
    bomb = members(loss=raw(np.zeros((1_000_000, 2))))
    path = write(tmp_path / "p.npz", bomb, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 50_000
    with pytest.raises(ValueError, match="compressed"):
        load_problem(path)


@pytest.mark.parametrize("content", [b"", b"units: 3\n", b"PK\x03\x04", b"\x93NUMPY" + bytes(200)])
def test_other_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"p\.npz is not a problem file"):
        load_problem(tmp_path / "p.npz")


def test_missing_files_are_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_problem(tmp_path / "p.npz")


def test_damaged_files_raise_one_kind_of_error(tmp_path: Path) -> None:
    save_problem(full_problem(), tmp_path / "p.npz")
    whole = (tmp_path / "p.npz").read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for attempt in range(600):
        data = bytearray(whole)
        if attempt % 3 == 0:
            data = data[: int(rng.integers(len(data)))]
        else:
            for _ in range(int(rng.integers(1, 4))):
                data[int(rng.integers(len(data)))] = int(rng.integers(256))
        (tmp_path / "p.npz").write_bytes(data)
        try:
            assert_same(load_problem(tmp_path / "p.npz"), full_problem())  # damage that changed nothing
        except ValueError as error:
            refused += "not a problem file" in str(error)
    assert refused > 400
