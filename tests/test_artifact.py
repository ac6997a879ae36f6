"""The artifact folder: all or nothing, never over somebody else's files, and verified."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompiler.artifact import (
    REFERENCE,
    REPORT,
    check_output,
    compare,
    load_artifact,
    new_folder,
    read_manifest,
    write_manifest,
)
from qcompiler.artifact.verify import FreshProcess
from qcompiler.errors import BadData, BadModel, OutputError, VerificationFailed

ENTRIES: dict[str, Any] = {
    "target": "onnx",
    "seed": 0,
    "pipeline": "",
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["n", 4]}],
    "outputs": [{"name": "y", "dtype": "float32", "shape": ["n", 4]}],
    "original": None,
    "calibration": {"kind": "made", "fingerprint": "0", "path": None, "preprocess": None, "tokenizer": None},
}


def make(out: Path, text: str) -> None:
    with new_folder(out) as folder:
        (folder / "weights.bin").write_text(text)
        (folder / "model.onnx").write_text("a model")
        write_manifest(folder, ENTRIES)


def interrupted(out: Path, error: BaseException) -> None:
    with new_folder(out) as folder:
        (folder / "weights.bin").write_text("half")
        raise error


def overtaken(out: Path) -> None:
    with new_folder(out) as folder:
        (folder / "weights.bin").write_text("ours")
        out.write_text("theirs")


def test_a_complete_folder_replaces_an_earlier_artifact(tmp_path: Path) -> None:
    out = tmp_path / "a.qc"
    make(out, "first")
    make(out, "second")
    assert (out / "weights.bin").read_text() == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["a.qc"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), VerificationFailed("x")])
def test_a_failed_folder_leaves_the_earlier_artifact(tmp_path: Path, error: BaseException) -> None:
    out = tmp_path / "a.qc"
    make(out, "first")
    with pytest.raises(type(error)):
        interrupted(out, error)
    assert (out / "weights.bin").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["a.qc"]


@pytest.mark.skipif(sys.platform == "win32", reason="no locks on folders")
def test_what_a_killed_process_has_left_is_removed_and_what_a_living_one_makes_is_kept(tmp_path: Path) -> None:
    code = """if True:
        import sys, time
        from pathlib import Path
        from qcompiler.artifact import new_folder
        with new_folder(Path(sys.argv[1])) as folder:
            (folder / "weights.bin").write_text("half")
            print(folder.name, flush=True)
            time.sleep(60)
    """
    out, left = tmp_path / "a.qc", list[str]()
    command = [sys.executable, "-c", code, str(out)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for process in processes:
            assert process.stdout is not None
            left.append(process.stdout.readline().strip())
        processes[0].kill()
        processes[0].wait()
        make(out, "ours")
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["a.qc", left[1]])
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.skipif(sys.platform == "win32", reason="no locks on folders")
def test_a_folder_that_is_taken_for_an_abandoned_one_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process looks between the making of a folder and its lock."""
    make_folder, swept = tempfile.mkdtemp, list[str]()

    def unlucky(**options: str) -> str:
        made = make_folder(**options)  # type: ignore[call-overload]
        if not swept:
            swept.append(made)
            shutil.rmtree(made)
        return made

    monkeypatch.setattr(tempfile, "mkdtemp", unlucky)
    make(tmp_path / "a.qc", "ours")
    assert len(swept) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.qc"]


def test_a_folder_of_somebody_else_is_refused_and_kept(tmp_path: Path) -> None:
    out = tmp_path / "a.qc"
    out.mkdir()
    (out / "manifest.json").write_text('{"kind": "shopping list"}')
    with pytest.raises(OutputError, match="not an artifact"):
        check_output(out)
    with pytest.raises(OutputError, match="not an artifact"):
        make(out, "ours")
    assert [p.name for p in out.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("name", ["notes.txt", "my/results.csv", "my", "__pycache__/other.cpython-311.pyc"])
def test_files_of_the_user_in_an_artifact_are_never_deleted(tmp_path: Path, name: str) -> None:
    out = tmp_path / "a.qc"
    make(out, "first")
    mine = out / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine") if "." in name else mine.mkdir()
    with pytest.raises(OutputError, match=f"a.qc: holds '{name.split('/')[0]}.*; move it or choose another -o"):
        check_output(out)
    with pytest.raises(OutputError, match="would delete"):
        make(out, "second")
    assert mine.exists()
    assert (out / "weights.bin").read_text() == "first"


def appearing(out: Path) -> None:
    with new_folder(out) as folder:
        write_manifest(folder, ENTRIES)
        (out / "notes.txt").write_text("mine")


def test_a_file_that_appears_in_an_artifact_meanwhile_is_not_deleted(tmp_path: Path) -> None:
    out = tmp_path / "a.qc"
    make(out, "first")
    with pytest.raises(OutputError, match=r"holds 'notes\.txt'"):
        appearing(out)
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "weights.bin").read_text() == "first"


def test_what_python_caches_of_an_artifact_is_no_file_of_the_user(tmp_path: Path) -> None:
    out = tmp_path / "a.qc"
    with new_folder(out) as folder:
        (folder / "runtime.py").write_text("x = 1")
        write_manifest(folder, ENTRIES)
    (out / "__pycache__").mkdir()
    (out / "__pycache__" / "runtime.cpython-311.pyc").write_bytes(b"x")
    make(out, "second")
    assert (out / "weights.bin").read_text() == "second"


def test_what_appears_at_the_place_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "a.qc"
    with pytest.raises(OutputError, match="not an artifact"):
        overtaken(out)
    assert out.read_text() == "theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["a.qc"]


def test_a_link_to_an_artifact_stays_a_link(tmp_path: Path) -> None:
    make(tmp_path / "a.qc", "first")
    link = tmp_path / "link.qc"
    link.symlink_to("a.qc")
    check_output(link)
    make(link, "second")
    assert link.is_symlink()
    assert (tmp_path / "a.qc" / "weights.bin").read_text() == "second"
    assert {p.name for p in tmp_path.iterdir()} == {"a.qc", "link.qc"}


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    out = tmp_path / "a.qc"
    out.mkdir()
    make(out, "ours")
    assert (out / "weights.bin").exists()


def test_full_disk_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no room left"), new_folder(tmp_path / "a.qc"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not any(tmp_path.iterdir())


def test_missing_parent_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write there"):
        check_output(tmp_path / "no" / "a.qc")


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    make(tmp_path / "a.qc", "x")
    plain = tmp_path / "plain"
    plain.mkdir()
    assert (tmp_path / "a.qc").stat().st_mode == plain.stat().st_mode


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    out = tmp_path / "a.qc"
    make(out, "first")
    assert load_artifact(out).manifest["target"] == "onnx"
    (out / "weights.bin").write_text("fIrst")
    with pytest.raises(BadModel, match="changed after compilation"):
        load_artifact(out)
    (out / "weights.bin").unlink()
    with pytest.raises(BadModel, match="is missing"):
        load_artifact(out)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "x"}', "\x00"])
def test_a_broken_manifest_is_a_bad_model(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BadModel):
        read_manifest(tmp_path)


def test_a_manifest_of_a_later_version_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "a.qc", "x")
    path = tmp_path / "a.qc" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99}))
    with pytest.raises(BadModel, match="schema 99"):
        read_manifest(tmp_path / "a.qc")


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "missing"),
        ({"x": np.zeros((2, 4), "f"), "z": np.zeros(1)}, "no such input"),
        ({"x": np.zeros((2, 5), "f")}, "does not fit"),
        ({"x": np.zeros((2, 4, 1), "f")}, "does not fit"),
        ({"x": np.zeros((2, 4))}, "does not fit"),
    ],
)
def test_wrong_feeds_are_bad_data(tmp_path: Path, feeds: dict[str, np.ndarray], message: str) -> None:
    make(tmp_path / "a.qc", "x")
    with pytest.raises(BadData, match=message):
        load_artifact(tmp_path / "a.qc").run(feeds)


def test_comparison_is_relative_to_the_reference() -> None:
    reference = {"y": np.array([3.0, 4.0], "f"), "k": np.array([1, 2])}
    found = compare({"y": np.array([3.0, 4.5], "f"), "k": np.array([1, 2])}, reference)
    assert found.output == "y"
    assert found.relative == pytest.approx(0.1)


def test_nan_that_the_reference_has_not_is_infinitely_far() -> None:
    reference = {"y": np.array([1.0, np.nan], "f")}
    assert compare({"y": np.array([1.0, np.nan], "f")}, reference).relative == 0
    assert compare({"y": np.array([np.nan, np.nan], "f")}, reference).relative == float("inf")


def test_integer_outputs_count_what_differs() -> None:
    assert compare({"y": np.array([1, 2, 3, 5])}, {"y": np.array([1, 2, 3, 4])}).relative == 0.25


@pytest.mark.parametrize("outputs", [{}, {"y": np.zeros(3, "f")}, {"y": np.zeros(2, "d")}])
def test_missing_or_misshapen_outputs_fail(outputs: dict[str, np.ndarray]) -> None:
    with pytest.raises(VerificationFailed, match="output 'y'"):
        compare(outputs, {"y": np.zeros(2, "f")})


def test_files_that_do_not_run_fail_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(VerificationFailed, match="does not run"):
        next(FreshProcess("onnx", tmp_path).run([{"x": np.zeros((1, 4), "f")}]))


def test_files_that_hang_fail(tmp_path: Path) -> None:
    with pytest.raises(VerificationFailed, match="did not finish"):
        next(FreshProcess("onnx", tmp_path, timeout=0.01).run([{"x": np.zeros((1, 4), "f")}]))


def test_a_child_does_not_count_what_its_parent_held() -> None:
    held = np.ones(60_000_000)  # 480 MB, touched
    line = "import qcompiler.artifact.worker as w; print(w.own_peak())"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True)
    assert 1 << 20 < int(done.stdout) < held.nbytes


@pytest.mark.parametrize("entry", [*ENTRIES, "files", "schema"])
@pytest.mark.parametrize("value", [None, 3, [3], {"x": 3}, [{"name": "x"}]], ids=str)
def test_manifests_that_were_tampered_with_are_refused(tmp_path: Path, entry: str, value: object) -> None:
    make(tmp_path / "a.qc", "text")
    path = tmp_path / "a.qc" / "manifest.json"
    manifest = json.loads(path.read_text())
    if (entry, value) in (("original", None), ("seed", 3)):
        value = "wrong"
    path.write_text(json.dumps({**manifest, entry: value}))
    with pytest.raises(BadModel, match=entry):
        load_artifact(tmp_path / "a.qc")
    del manifest[entry]
    path.write_text(json.dumps(manifest))
    if entry != "original":
        with pytest.raises(BadModel, match=entry):
            load_artifact(tmp_path / "a.qc")


def test_a_manifest_that_was_edited_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "a.qc", "text")
    path = tmp_path / "a.qc" / "manifest.json"
    path.write_text(path.read_text().replace('"onnx"', '"cpu"', 1))
    with pytest.raises(BadModel, match="the manifest was changed"):
        load_artifact(tmp_path / "a.qc")


def test_an_artifact_runs_without_its_report(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a.qc") as folder:
        (folder / REFERENCE).write_text("x")
        (folder / REPORT).write_text("x")
        write_manifest(folder, ENTRIES)
    (tmp_path / "a.qc" / REPORT).unlink()
    assert load_artifact(tmp_path / "a.qc").manifest["target"] == ENTRIES["target"]


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../b", "bad\0name"])
def test_a_manifest_names_only_files_of_its_folder(tmp_path: Path, name: str) -> None:
    make(tmp_path / "a.qc", "text")
    path = tmp_path / "a.qc" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = manifest["files"]["weights.bin"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(BadModel, match="files"):
        load_artifact(tmp_path / "a.qc")
