"""What a model's output loses when one operator is disturbed, without gradients and on a few samples (OHQ).

Two ways to disturb operator i, both after "On-Chip Hardware-Aware Quantization" (2023): its weight is
quantized, or random blocks of its output are set to zero. The second knows nothing of formats and wants one number a
site; as the loss grows with the energy of a small disturbance, a format that errs by ||dW||^2 / ||W||^2 counts as
much as a mask that takes away this share (our derivation). Losses are divided by the largest, so they lie in [0, 1].
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration import Calibration
from qcompiler.formats import QuantSpec
from qcompiler.formats.varied import effective
from qcompiler.graph.sites import FLOATS, Site, find_sites
from qcompiler.measure.experiment import Menus, Store
from qcompiler.measure.loss import Kind, Reference
from qcompiler.measure.runner import Runner
from qcompiler.measure.sensitivity import Sensitivity, sensitivities, separable
from qcompiler.measure.stream import calibration_of
from qcompiler.model import Model
from qcompiler.progress import Progress, Silent

Array = npt.NDArray[Any]
_BLOCK = 16  # neighbouring elements of an output
_PREFIX = "qcompiler/mask/"


def masked_sensitivity(
    model: Model,
    sites: Sequence[Site],
    candidates: Menus,
    *,
    disturb: Literal["weight", "output"] = "weight",
    samples: int = 8,
    synthetic: bool = False,
    share: float = 0.125,
    draws: int = 4,
    kinds: Mapping[str, Kind] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Sensitivity:
    """Losses of every candidate in [0, 1]: 1 is the largest finite one.

    Args:
        model: float; its probes are cached if it has a cache.
        sites: of `model`.
        candidates: as in `sensitivities`.
        disturb: "weight": quantized in each format. "output": random blocks of 16 neighbouring elements become 0.
        samples: a few, evenly spread over the data.
        synthetic: made-up samples instead of the calibration data, which then need not be there.
        share: of the blocks of an output that become 0.
        draws: masks tried at each site.
        kinds: how to judge an output, where `loss.output_kind` should not decide.
        seed: of made-up samples and of masks.
        progress: shows how far and how long.

    Returns:
        Without cross terms.

    Raises:
        BadData: there is no calibration data, and none may be made up.
        ValueError: `share` is not above 0 and at most 1, or `draws` not positive.
    """
    if not 0 < share <= 1 or draws < 1:
        raise ValueError(f"share {share} and draws {draws}: give a share above 0 and at most 1, and at least one draw")
    if synthetic:
        model = replace(model, calibration=Calibration.synthetic_for(model.ir, samples, seed))
    if disturb == "weight":
        found = sensitivities(model, sites, candidates, samples=samples, effort="full", kinds=kinds, progress=progress)
        return _normalised(replace(found, sketches=tuple(s[:, :0] for s in found.sketches), mode="masked"))
    begin = time.monotonic()
    masks = _Masks(model, sites, samples, kinds)
    store = Store(model, "mask", "spread", samples, sorted((kinds or {}).items()))
    losses: dict[str, npt.NDArray[np.float64]] = {}
    for index in (progress or Silent()).track(range(len(sites)), "masks"):
        stored = store.get(
            lambda i=index: {"losses": masks.losses(i, share, draws, seed)}, sites[index].name, share, draws, seed
        )
        losses[sites[index].name] = stored["losses"]

    def loss(site: Site, spec: QuantSpec) -> tuple[float, float]:
        tried, scale = losses[site.name], _relative_error(site, spec) / share
        spread = float(tried.std(ddof=1)) / np.sqrt(len(tried)) if len(tried) > 1 else 0.0
        return float(tried.mean()) * scale, spread * scale

    made = separable(
        sites, candidates, loss, "masked",
        kinds=masks.kinds, samples=masks.samples, probes=len(sites) * draws, begin=begin,
    )  # fmt: skip
    return _normalised(made)


def _normalised(found: Sensitivity) -> Sensitivity:
    every = np.concatenate([np.zeros(0), *found.loss])
    most = float(every[np.isfinite(every)].max(initial=0)) or 1.0
    loss, noise = (tuple(values / most for values in rows) for rows in (found.loss, found.noise))
    return replace(found, loss=loss, noise=noise)


def _relative_error(site: Site, spec: QuantSpec) -> float:
    """||Q(W) - W||^2 / ||W||^2."""
    matrix = site.matrix()
    change = effective(matrix, spec).decode() - matrix
    size = float(np.square(matrix, dtype=np.float64).sum())
    return float(np.square(change, dtype=np.float64).sum()) / size if size else 0.0


class _Masks:
    """A copy of a model in which the outputs of all sites' operations are multiplied by masks, which are fed."""

    def __init__(self, model: Model, sites: Sequence[Site], samples: int, kinds: Mapping[str, Kind] | None) -> None:
        copy = model.ir.clone()
        own = {site.name: site for site in find_sites(copy)}
        self._masked = [_insert(copy, own[site.name], index) for index, site in enumerate(sites)]
        names = [mask for masks in self._masked for mask, _ in masks]
        values = [value for masks in self._masked for _, value in masks]
        wanted = [str(v.name) for v in copy.graph.outputs]
        self._runner = Runner(copy, outputs=wanted)
        data = calibration_of(model)
        self.samples = min(samples, data.count)
        dtypes = {str(v.name): v.dtype for v in copy.graph.inputs if v.dtype is not None}
        self._feeds = [
            {**feeds, **{name: np.ones(1, dtypes[name].numpy()) for name in names}}
            for feeds in data.spread(samples).batches(samples)
        ]
        shapes = Runner(copy, outputs=values)
        self._shapes = [{name: array.shape for name, array in shapes(feeds).items()} for feeds in self._feeds]
        self._references = [Reference(self._runner(feeds), kinds, 1) for feeds in self._feeds]
        self.kinds: Mapping[str, Kind] = self._references[0].kinds

    def losses(self, site: int, share: float, draws: int, seed: int) -> npt.NDArray[np.float64]:
        """The loss of each draw of masks at one site, float64 [draws]."""
        rng = np.random.default_rng([seed, site])
        found = np.zeros(draws)
        for draw in range(draws):
            for feeds, shapes, reference in zip(self._feeds, self._shapes, self._references, strict=True):
                masks = {
                    mask: _mask(shapes[value], share, rng).astype(feeds[mask].dtype)
                    for mask, value in self._masked[site]
                }
                losses = reference.losses(self._runner({**feeds, **masks}))
                found[draw] += float(losses.mean()) / len(self._feeds)
        return found


def _insert(model: ir.Model, site: Site, index: int) -> list[tuple[str, str]]:
    """Multiply the outputs of a site's operations; the names of the masks and of the values as they were before."""
    made: list[tuple[str, str]] = []
    for number, user in enumerate(site.users):
        whole = user.outputs[0]
        name, is_output = str(whole.name), whole.is_graph_output()
        dtype = whole.dtype if whole.dtype in FLOATS else ir.DataType.FLOAT
        mask = ir.val(f"{_PREFIX}{index}.{number}", dtype)
        multiply = ir.node("Mul", [whole, mask])
        masked = multiply.outputs[0]
        masked.type, masked.shape = whole.type, whole.shape
        whole.replace_all_uses_with(masked, replace_graph_outputs=is_output)
        multiply.replace_input_with(0, whole)
        whole.name, masked.name = f"{name}/whole", name
        model.graph.insert_after(user, multiply)
        model.graph.inputs.append(mask)
        made.append((str(mask.name), str(whole.name)))
    return made


def _mask(shape: tuple[int, ...], share: float, rng: np.random.Generator) -> Array:
    """Ones, and zeros in a share of the blocks (at least one)."""
    size = int(np.prod(shape))
    blocks = max(1, -(-size // _BLOCK))
    kept = np.ones(blocks, np.bool_)
    kept[rng.choice(blocks, max(1, round(share * blocks)), replace=False)] = False
    return np.repeat(kept, _BLOCK)[:size].reshape(shape)
