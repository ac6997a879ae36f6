"""Measurements that run in a process of their own, which may be killed, and say what they began and what they stored.

Each line of the log is "start" with what is measured next (one probe, or works that are timed in turns), or "put" with
the key of what is now stored.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import ShapeInferencePass

import qcompiler as qc
from qcompiler.calibration import Calibration
from qcompiler.formats import parse_spec
from qcompiler.graph.sites import Site, find_sites
from qcompiler.measure.cache import Cache
from qcompiler.measure.latency import Effort, Part, Shapes, Times
from qcompiler.measure.loss import Reference
from qcompiler.measure.probes import Probes
from qcompiler.measure.sensitivity import sensitivities
from qcompiler.measure.true_loss import TrueLoss
from qcompiler.model import Model
from qcompiler.plan import SitePlan
from qcompiler.progress import Silent

SPECS = [parse_spec(f"int{bits}-sym-channel-fp32") for bits in (2, 3, 4, 6, 8)]
_PAUSE = 0.004  # seconds that each measurement takes longer, so that it is there to be killed
_WORKS = 80


def proto() -> onnx.ModelProto:
    """Two convolutions, whose sums round otherwise where their weights are constant, and two products."""
    rng = np.random.default_rng(7)
    shapes = {"a": (16, 3, 3, 3), "b": (24, 16, 3, 3), "c": (24, 16), "d": (16, 15)}
    tensors = [numpy_helper.from_array((rng.standard_normal(s) * 0.2).astype("f"), n) for n, s in shapes.items()]
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["conv_a"], name="a"),
        helper.make_node("Relu", ["conv_a"], ["relu_a"]),
        helper.make_node("Conv", ["relu_a", "b"], ["conv_b"], name="b"),
        helper.make_node("Relu", ["conv_b"], ["relu_b"]),
        helper.make_node("GlobalAveragePool", ["relu_b"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("MatMul", ["flat", "c"], ["h"], name="c"),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "d"], ["y"], name="d"),
    ]
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", ["n", 3, 8, 8]), ("y", ["n", 15]))
    ]
    graph = helper.make_graph(nodes, "test", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def inputs(samples: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((samples, 3, 8, 8)).astype(np.float32)


def network(cache: Path) -> Model:
    """With samples for two batches."""
    made = ShapeInferencePass()(ir.from_proto(proto())).model
    data = Calibration.from_arrays({"x": inputs(600)}, made)
    return Model(made, calibration=data, cache=Cache(cache))


class Log:
    """Lines that are whole or not there, even if the process is killed."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, word: str, what: str) -> None:
        os.write(self._file, f"{word} {what}\n".encode())

    def start(self, *what: object) -> None:
        self.write("start", ",".join(str(part).replace(",", ";").replace(" ", "_") for part in what))
        time.sleep(_PAUSE)


def _listen(log: Log) -> None:
    """Write down what the measurements of this process begin and store."""
    put, probe, losses = Cache.put, Probes.probe, Reference.losses

    def listened_put(self: Cache, key: str, arrays: Any) -> None:
        put(self, key, arrays)
        log.write("put", key)

    def listened_probe(self: Probes, site: Site, spec: Any) -> Any:
        log.start(f"probe {self.number} {site.name} {spec}")
        return probe(self, site, spec)

    def listened_losses(self: Reference, outputs: Any) -> Any:
        digest = hashlib.blake2b(b"".join(outputs[name].tobytes() for name in self.kinds), digest_size=8)
        log.start(f"run {digest.hexdigest()}")
        return losses(self, outputs)

    Cache.put, Probes.probe, Reference.losses = listened_put, listened_probe, listened_losses


def single_losses(cache: Path, _log: Log) -> dict[str, np.ndarray]:
    model = network(cache)
    sites = find_sites(model.ir)
    found = sensitivities(model, sites, [SPECS] * len(sites), samples=600)
    return {"loss": np.array(found.loss), "noise": np.array(found.noise), "sketches": np.array(found.sketches)}


def true_losses(cache: Path, _log: Log) -> dict[str, np.ndarray]:
    model = network(cache)
    sites = find_sites(model.ir)
    choices = np.random.default_rng(1).integers(-1, len(SPECS), (20, len(sites)))
    return {"parts": TrueLoss(model, sites, [SPECS] * len(sites), samples=600).parts(choices)}


@dataclass
class Bench:
    """A clock whose works take made-up times, so that two runs find the same."""

    log: Log
    time: float = 0.0
    machine: str = "bench"

    def parts(self, site: Site, plan: SitePlan, shapes: Shapes) -> Sequence[Part]:
        raise NotImplementedError

    def build(self, works: Sequence[Any]) -> Callable[[Any], Callable[[], object]]:
        self.log.start(*works)

        def prepare(work: Hashable) -> Callable[[], None]:
            def run() -> None:
                time.sleep(_PAUSE / 20)
                self.time += 1 + int(str(work)) % 7  # whole seconds: differences are exact

            return run

        return prepare


def kernel_times(cache: Path, log: Log) -> dict[str, np.ndarray]:
    bench = Bench(log)
    times = Times(bench, Cache(cache), Effort(2, 2, 1, 1e9), lambda: bench.time, lambda: 0)
    found = times.measure(list(range(_WORKS)), Silent())
    return {"seconds": np.array([found[work] for work in range(_WORKS)])}


def compilation(cache: Path, _log: Log) -> dict[str, np.ndarray]:
    """Everything up to the plan."""
    os.environ["QCOMPILER_CACHE"] = str(cache)
    path = cache.parent / "net.onnx"
    if not path.exists():
        onnx.save(proto(), path)
    feeds = [{"x": part} for part in np.split(inputs(120), 30)]
    plan = qc.compile(path, "onnx", "4.5bits", feeds, explain=True).plan
    words = json.dumps([plan.to_json()["sites"], plan.solution["predicted_loss"], plan.solution["curve"]])
    return {"plan": np.frombuffer(words.encode(), np.uint8)}


WORK: dict[str, Callable[[Path, Log], dict[str, np.ndarray]]] = {
    "single losses": single_losses,
    "true losses": true_losses,
    "kernel times": kernel_times,
    "a compilation": compilation,
}


def child(what: str, cache: Path, log_path: Path, result: Path) -> None:
    """Run one of `WORK` and write what it found."""
    log = Log(log_path)
    _listen(log)
    found = WORK[what](cache, log)
    np.savez(result, allow_pickle=False, **found)
