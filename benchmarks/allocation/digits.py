"""A convolution net on scikit-learn's digits, small enough that every allocation of its bits can be tried.

Four convolutions and two linear layers; 1000 images train it, 256 are calibration data, the rest is for tests.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from qcompiler.calibration import Calibration
from qcompiler.capture.torch import capture
from qcompiler.formats import parse_spec
from qcompiler.graph.sites import Site, find_sites
from qcompiler.model import Model

BITS = (2, 3, 4, 8)
SPECS = tuple(parse_spec(f"int{b}-sym-channel-fp32") for b in BITS)
TRAIN, CALIBRATION = 1000, 256


@dataclass(frozen=True)
class Digits:
    """A trained net.

    Attributes:
        model: with its calibration data.
        sites: its six weights, in order.
        test: the images that neither training nor calibration saw.
        accuracy: on these.
        sizes: float64 [6], weights of each site.
    """

    model: Model
    sites: list[Site]
    test: Calibration
    accuracy: float
    sizes: npt.NDArray[np.float64]


def digits(seed: int) -> Digits:
    """Split, train and capture for one seed."""
    table = np.loadtxt(_table(), delimiter=",")
    x = torch.tensor(table[:, :64] / 16.0, dtype=torch.float32).view(-1, 1, 8, 8)
    y = torch.tensor(table[:, 64].astype(np.int64))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    calibration, test = order[TRAIN : TRAIN + CALIBRATION], order[TRAIN + CALIBRATION :]
    net = _train(x[order[:TRAIN]], y[order[:TRAIN]], seed)
    with torch.no_grad():
        accuracy = float((net(x[test]).argmax(1) == y[test]).float().mean())
    model = capture(net, (x[:4],), name=f"digits{seed}")
    name = str(model.graph.inputs[0].name)
    model.calibration = Calibration.from_arrays({name: x[calibration].numpy()}, model.ir)
    sites = find_sites(model.ir)
    sizes = np.array([site.count for site in sites], np.float64)
    return Digits(model, sites, Calibration.from_arrays({name: x[test].numpy()}, model.ir), accuracy, sizes)


def _table() -> Path:
    """scikit-learn's file: 64 pixels and the label a row; the wheel is fetched once, as for the demo."""
    found = importlib.util.find_spec("sklearn")
    if found is not None and found.origin is not None:
        return Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    source = Path(__file__).parents[2] / "examples" / "demo_assets.py"
    spec = importlib.util.spec_from_file_location("demo_assets", source)
    assert spec is not None
    assert spec.loader is not None
    assets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(assets)
    return (
        assets.wheel("scikit-learn", Path.home() / ".cache" / "qcompiler-tests")
        / "sklearn"
        / "datasets"
        / "data"
        / "digits.csv.gz"
    )


def _train(x: torch.Tensor, y: torch.Tensor, seed: int) -> nn.Module:
    torch.set_num_threads(1)  # threads that wait for one another are slow on a busy machine
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(25):
        for batch in torch.randperm(len(x)).split(64):
            loss = nn.functional.cross_entropy(net(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()
