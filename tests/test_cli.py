"""The command line: what it prints, what it leaves behind, and what it says about bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler import cli
from qcompiler.build.samples import batch_for
from qcompiler.cli import run_command
from qcompiler.commands.output import of_outputs

PIPELINE = """
[[pass]]
name = "uniform"
spec = "int4-sym-g32-fp16"
target = "onnx"

[[pass]]
name = "gptq"

[[pass]]
name = "insert-qdq"
"""
KEYS = [
    "artifact", "target", "budget", "bits_per_weight", "stored_bytes", "predicted_loss", "lower_bound", "gap",
    "fidelity", "verified", "seconds", "peak_rss_bytes",
]  # fmt: skip


def write_model(path: Path, *, poison: float = 0.0) -> None:
    """Two matrix products with a Relu between them, x [n, 16] -> y [n, 12]."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(16, 32)).astype("f"), rng.normal(size=(32, 12)).astype("f")
    first[0, 0] += poison
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "second"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "two", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 12])],
        [numpy_helper.from_array(first, "first"), numpy_helper.from_array(second, "second")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path / "cache"))
    write_model(tmp_path / "two.onnx")
    (tmp_path / "plain.toml").write_text(PIPELINE)
    np.savez(tmp_path / "calib.npz", x=np.random.default_rng(1).normal(size=(24, 16)).astype("f"))
    return tmp_path


def compile_line(*extra: str) -> list[str]:
    return ["two.onnx", "--target", "onnx", "--pipeline", "plain.toml", "--calib", "calib.npz", *extra]


def left_behind(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()} - {"two.onnx", "plain.toml", "calib.npz", "cache"}


def test_json_is_the_last_line_and_has_exactly_the_promised_keys(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(compile_line("--json")) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert list(result) == KEYS
    assert set(result["fidelity"]) == {"sqnr_db", "kl", "top1_agreement"}
    assert result["artifact"] == "two.qc"
    assert result["verified"] is True
    assert result["bits_per_weight"] == pytest.approx(4 + 16 / 32, abs=0.3)
    assert result["fidelity"]["sqnr_db"] > 10
    assert left_behind(work) == {"two.qc"}


def test_summary_for_people(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(compile_line("-o", "out.qc")) == 0
    out = capsys.readouterr().out
    assert "bits per weight" in out
    assert "out.qc/report.html" in out


def test_summary_of_a_compilation_that_could_hold_nothing_back(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("calib.npz", x=np.ones((2, 16), "f"))
    assert run_command(compile_line()) == 0
    out, err = capsys.readouterr()
    assert "held-back" not in out
    assert "on the calibration data" in out
    assert "only 2 calibration samples: none is held back" in err


def test_run_writes_what_the_artifact_computes(work: Path) -> None:
    import qcompiler

    assert run_command(compile_line()) == 0
    assert run_command(["run", "two.qc", "--inputs", "calib.npz", "--outputs", "y.npz", "--batch", "5"]) == 0
    x = np.load("calib.npz")["x"]
    expected = qcompiler.load("two.qc").run({"x": x})["y"]
    np.testing.assert_allclose(np.load("y.npz")["y"], expected, rtol=1e-4, atol=1e-4)


def test_run_overwrites_neither_its_inputs_nor_an_artifact(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(compile_line()) == 0
    before = (work / "calib.npz").read_bytes()
    for outputs, reason in [("calib.npz", "the file with the inputs"), ("two.qc/y.npz", "lies in an artifact")]:
        assert run_command(["run", "two.qc", "--inputs", "calib.npz", "--outputs", outputs]) == 2
        assert reason in capsys.readouterr().err.splitlines()[-1]
    assert (work / "calib.npz").read_bytes() == before
    assert not (work / "two.qc/y.npz").exists()


def test_a_name_that_is_too_long_is_no_bug(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["two.onnx", "--target", "onnx", "-o", "x" * 300]) == 2
    assert "File name too long" in capsys.readouterr().err


def test_eval_compares_with_the_original(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(compile_line()) == 0
    capsys.readouterr()
    assert run_command(["eval", "two.qc", "--data", "calib.npz", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["samples"] == 24
    assert 10 < found["fidelity"]["sqnr_db"] < 60
    assert found["class_output"] == ("y" if found["fidelity"]["kl"] is not None else None)


def test_eval_says_when_the_original_is_gone_or_changed(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(compile_line()) == 0
    write_model(work / "two.onnx", poison=1.0)
    assert run_command(["eval", "two.qc", "--data", "calib.npz"]) == 2
    assert "was changed since" in capsys.readouterr().err
    (work / "two.onnx").rename(work / "moved.onnx")
    assert run_command(["bench", "two.qc"]) == 2
    assert "--reference" in capsys.readouterr().err
    assert run_command(["eval", "two.qc", "--data", "calib.npz", "--reference", "moved.onnx"]) == 0


def test_bench_reports_medians_of_all(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(compile_line()) == 0
    capsys.readouterr()
    assert run_command(["bench", "two.qc", "--seconds", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    medians = found["medians"]
    assert found["runs"] >= 5
    assert found["speedup_vs_ort_fp32"] == pytest.approx(medians["ort_fp32"] / medians["artifact"])
    assert set(medians) == {"artifact", "ort_fp32", "ort_qdq"}, "the artifact is what target onnx makes"
    best = min(medians["ort_qdq"], medians["artifact"])
    assert found["speedup_vs_ort_best"] == pytest.approx(best / medians["artifact"])
    assert found["ort_best_is_artifact"] == (best == medians["artifact"])
    assert run_command(["bench", "two.qc", "--seconds", "0.2"]) == 0
    assert "ONNX Runtime, fp32 original" in capsys.readouterr().out


def test_batches_shrink_as_outputs_grow() -> None:
    assert [batch_for(size) for size in (0, 1000, 8_000_000, 100_000_000)] == [8, 8, 4, 1]
    assert batch_for(1000, 2) == 2


def test_diagnose_shows_every_layer(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(compile_line()) == 0
    capsys.readouterr()
    assert run_command(["diagnose", "two.qc", "--data", "calib.npz", "--samples", "24", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    layers = found["layers"]
    assert len(layers) == 2
    assert layers[0]["accumulated"] == pytest.approx(layers[0]["alone"], rel=1e-4)
    assert layers[-1]["accumulated"] == pytest.approx(found["weights"], rel=1e-4)
    assert found["whole"] == pytest.approx(found["weights"], rel=0.1)
    assert [layer["bytes_for_it"] for layer in layers] == [16 * 32 // 8, 32 * 12 // 8]
    assert all(0 < abs(layer["one_more_bit"]) < found["weights"] for layer in layers)


def test_diagnose_and_eval_agree_and_say_of_how_many_samples(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(compile_line()) == 0
    np.savez("odd.npz", x=np.random.default_rng(5).normal(size=(19, 16)).astype("f"))
    capsys.readouterr()
    assert run_command(["eval", "two.qc", "--data", "odd.npz", "--json"]) == 0
    loss = json.loads(capsys.readouterr().out.splitlines()[-1])["loss"]
    assert run_command(["diagnose", "two.qc", "--data", "odd.npz", "--samples", "100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["samples"] == 19
    assert found["whole"] == pytest.approx(loss, rel=1e-5)
    assert found["layers"][-1]["accumulated"] == pytest.approx(found["weights"], rel=1e-4)
    gains = [layer["one_more_bit"] for layer in found["layers"]]
    assert run_command(["diagnose", "two.qc", "--data", "odd.npz", "--samples", "100"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{gain:+.2g}" in shown for gain in gains)
    assert run_command(["diagnose", "two.qc", "--data", "odd.npz"]) == 0
    assert "8 of 19, spread over them" in capsys.readouterr().out


def test_diagnose_repeats_transforms_but_no_rounding(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (work / "plain.toml").write_text('[[pass]]\nname = "equalize"\n' + PIPELINE)
    assert run_command(compile_line()) == 0
    passes = json.loads((work / "two.qc" / "manifest.json").read_text())["passes"]
    assert [entry["transformed"] for entry in passes] == [True, False, False, False]
    capsys.readouterr()
    monkeypatch.setattr("qcompiler.passes.round.gptq.GPTQ.run", lambda *_: pytest.fail("rounded again"))
    assert run_command(["diagnose", "two.qc", "--data", "calib.npz", "--samples", "24", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["whole"] == pytest.approx(found["weights"], rel=1e-3)


def test_explain_writes_nothing(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(compile_line("--explain", "--json")) == 0
    out = capsys.readouterr().out
    assert "peak memory expected" in out
    assert "int4-sym-g32-fp16" in out
    assert json.loads(out.splitlines()[-1])["artifact"] is None
    assert left_behind(work) == set()


def test_pareto_prints_sizes_and_writes_a_page(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["two.onnx", "--target", "onnx", "--calib", "calib.npz", "--pareto", "--json"]
    assert run_command([*line, "-o", "sizes.html"]) == 0
    assert "predicted loss" in capsys.readouterr().out
    assert left_behind(work) == {"sizes.html"}
    page = (work / "sizes.html").read_text()
    assert page.count("<tr>") > 3
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_pareto_sees_first_whether_its_page_can_be_written(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["two.onnx", "--target", "onnx", "--pareto", "-o", str(work)]) == 2
    assert run_command(["two.onnx", "--target", "onnx", "--pareto", "-o", "nowhere/sizes.html"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert all("choose another file with -o" in line for line in lines)
    assert left_behind(work) == set()


def test_pareto_replaces_nothing_but_its_own_pages(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (work / "two.onnx").read_bytes()
    assert run_command(["two.onnx", "--target", "onnx", "--pareto", "-o", "two.onnx"]) == 2
    assert "is nothing that qcompile wrote" in capsys.readouterr().err
    assert (work / "two.onnx").read_bytes() == before
    line = ["two.onnx", "--target", "onnx", "--calib", "calib.npz", "--pareto", "-o", "sizes.html"]
    assert [run_command(line), run_command(line)] == [0, 0]
    assert left_behind(work) == {"sizes.html"}


def test_explain_lists_what_is_kept(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "plain.toml").write_text(PIPELINE.replace("[[pass]]", '[[pass]]\nkeep = ["node"]', 1))
    assert run_command(compile_line("--explain")) == 0
    assert "float (kept)" in capsys.readouterr().out


def test_no_resume_leaves_no_cache(work: Path) -> None:
    assert run_command(compile_line("--no-resume")) == 0
    assert not (work / "cache").exists()


BAD_LINES = {
    "missing model": (["gone.onnx"], "gone.onnx"),
    "text for a model": (["plain.toml"], "plain.toml"),
    "truncated model": (["cut.onnx"], "cut.onnx"),
    "nan in a weight": (["nan.onnx", "--target", "onnx"], "nan"),
    "unknown target": (["two.onnx", "--target", "toaster"], "toaster"),
    "budget without unit": (["two.onnx", "--budget", "fast"], "fast"),
    "negative budget": (["two.onnx", "--budget", "-3bits"], "-3bits"),
    "unknown option": (["two.onnx", "--colour"], "--colour"),
    "option without a model": (["--target", "onnx"], "MODEL"),
    "unknown recipe": (["two.onnx", "--pipeline", "nothing"], "nothing"),
    "budget that nothing takes": (compile_line("--budget", "4bits"), "--budget"),
    "unknown activations": (compile_line("--activations", "int1"), "int1"),
    "preprocess without data": (["two.onnx", "--target", "onnx", "--preprocess", "resize=8"], "--preprocess"),
    "missing data": (compile_line("--calib", "gone.npz"), "gone.npz"),
    "wrong input name": (compile_line("--calib", "name.npz"), "name.npz"),
    "wrong input shape": (compile_line("--calib", "shape.npz"), "shape.npz"),
    "nan in the data": (compile_line("--calib", "nan.npz"), "nan.npz"),
    "foreign output folder": (compile_line("-o", "foreign"), "foreign"),
    "output is a file": (compile_line("-o", "calib.npz"), "calib.npz"),
    "output where nobody can write": (compile_line("-o", "/proc/out.qc"), "/proc"),
    "not an artifact": (["eval", "foreign", "--data", "calib.npz"], "foreign"),
    "run without inputs": (["run", "foreign"], "--inputs"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_input_is_one_line_and_exit_2(work: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = np.load("calib.npz")["x"]
    (work / "cut.onnx").write_bytes((work / "two.onnx").read_bytes()[:700])
    write_model(work / "nan.onnx", poison=float("nan"))
    np.savez("name.npz", z=data)
    np.savez("shape.npz", x=data[:, :9])
    np.savez("nan.npz", x=np.where(data > 2, np.nan, data))
    (work / "foreign").mkdir()
    (work / "foreign" / "diary.txt").write_text("mine")
    before = {p for p in work.rglob("*") if "cache" not in p.parts}
    arguments, culprit = BAD_LINES[name]
    assert run_command(arguments) == 2
    captured = capsys.readouterr()
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("qcompile: ")
    assert culprit in last
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert {p for p in work.rglob("*") if "cache" not in p.parts} == before


def test_infeasible_budget_names_the_smallest_feasible_one(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "plan.toml").write_text(PIPELINE.replace("uniform", "allocate").replace('spec = "int4-sym-g32-fp16"', ""))
    line = ["two.onnx", "--target", "onnx", "--pipeline", "plan.toml", "--calib", "calib.npz", "--budget", "1bits"]
    assert run_command(line) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "smallest" in last
    assert not (work / "two.qc").exists()


def test_a_bug_is_one_line_with_a_log_and_exit_1(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import qcompiler.api

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("no\nluck")

    monkeypatch.setattr(qcompiler.api, "gather", broken)
    assert run_command(compile_line()) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "this is a bug" in line
    log = Path(line.rsplit(" ", 1)[-1])
    assert "ZeroDivisionError" in log.read_text()
    log.unlink()


def test_an_interrupt_that_a_library_makes_another_error_of_is_one(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import qcompiler.api

    def library(*_: object, **__: object) -> None:
        try:
            cli._interrupt(signal.SIGINT, None)
        except KeyboardInterrupt:
            raise RuntimeError from None

    monkeypatch.setattr(cli, "_interrupts", [])
    monkeypatch.setattr(qcompiler.api, "gather", library)
    assert run_command(compile_line()) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"])
def test_interrupt_leaves_nothing_but_the_cache(work: Path, number: int, code: int) -> None:
    """A real signal to a real process, while the target's files are being verified."""
    slow = work / "sitecustomize.py"
    slow.write_text(
        "import time, qcompiler.artifact.verify as v\n"
        "def call(self, inputs, outputs):\n    open('waiting', 'w').close(); time.sleep(60)\n"
        "v.FreshProcess._call = call\n"
    )
    (work / "plain.toml").write_text(PIPELINE.replace("uniform", "allocate").replace('spec = "int4-sym-g32-fp16"', ""))
    environment = {**os.environ, "PYTHONPATH": str(work)}

    def listen() -> None:  # a shell's background jobs, of which this may be one, are born deaf to SIGINT
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    command = [sys.executable, "-m", "qcompiler.cli", *compile_line()]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=listen)
    deadline = time.monotonic() + 60
    while not (work / "waiting").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert ("interrupted" in err.strip().splitlines()[-1]) == (number == signal.SIGINT)
    assert left_behind(work) <= {"sitecustomize.py", "waiting", "__pycache__"}
    assert list((work / "cache").rglob("*.npz"))


def test_full_disk_leaves_nothing(work: Path) -> None:
    """The limit on file sizes stands for a disk that fills up while the artifact is written."""
    code = (
        "import resource, sys; from qcompiler.cli import run_command; import qcompiler.api as api\n"
        "real = api.emit\n"
        "def emit(*a):\n    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); return real(*a)\n"
        "api.emit = emit\n"
        f"sys.exit(run_command({compile_line()!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "no room left" in done.stderr.strip().splitlines()[-1]
    assert left_behind(work) == set()


def test_help_and_version_start_quickly() -> None:
    """No heavy library is imported before a command runs."""
    code = (
        "import sys; from qcompiler.cli import run_command; assert run_command(['--version']) == 0\n"
        "heavy = {'onnx', 'onnxruntime', 'numpy', 'onnx_ir', 'torch', 'tvm', 'jinja2'} & set(sys.modules)\n"
        "print(heavy or 'light')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0].startswith("qcompiler ")
    assert done.stdout.splitlines()[-1] == "light"


def test_a_figure_says_of_which_output_it_is() -> None:
    assert of_outputs({"y": "logits"}) == of_outputs({"y": "logits"}, "y") == ""
    assert of_outputs({"y": "logits", "z": "values"}) == ", mean of the outputs that differ"
    assert of_outputs({"y": "logits", "z": "values"}, "y") == " (output 'y')"
