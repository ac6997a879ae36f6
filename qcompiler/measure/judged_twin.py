"""The FX twin of a model together with the losses of `loss`, differentiable in the weights of its sites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qcompiler.calibration import Calibration
from qcompiler.errors import BadModel
from qcompiler.graph.sites import Site
from qcompiler.measure.fx_twin import fx_twin
from qcompiler.measure.loss import Kind, output_kind
from qcompiler.measure.samples import samples_for_one
from qcompiler.measure.shorten import shortened
from qcompiler.measure.stream import calibration_of
from qcompiler.model import Model

if TYPE_CHECKING:
    import torch

Feeds = Mapping[str, npt.NDArray[Any]]
_LENGTH = 512  # positions of a text
_BATCH_WORK, _LARGEST_BATCH = 1 << 26, 64  # weights times samples; a backward pass holds every activation
_INPUT_WORK = 32  # an input element counts as so many weights
_TINY = 1e-12


class JudgedTwin:
    """A twin, the data that it is judged on, and its losses.

    Args:
        model: float, with calibration data.
        sites: whose weights gradients are wanted for.
        samples: of the data, at most, evenly spread; more count as one where one is a single row.
        batch: samples at a time, counted in the same way; as many as memory suggests if None.
        kinds: how to judge an output, where `loss.output_kind` should not decide.

    Attributes:
        batches: the feeds. samples: how many in all. kinds: by output, what it was taken for.
        weights: a parameter for each site.

    Raises:
        MissingExtra: torch is not installed.
        BadModel: an operator has no differentiable form, or no output is a float.
        BadData: there is no calibration data.
    """

    def __init__(
        self, model: Model, sites: Sequence[Site], samples: int, batch: int | None, kinds: Mapping[str, Kind] | None
    ) -> None:
        self._module = fx_twin(model.ir)
        self._module.requires_grad_(requires_grad=False)
        self.weights: list[torch.Tensor] = [self._weight(str(site.weight.name)) for site in sites]
        data = calibration_of(model)
        self._inputs = [str(v.name) for v in model.graph.inputs if v.const_value is None]
        wanted = min(samples * samples_for_one(model.ir, data), data.count)
        size = batch * -(-wanted // samples) if batch else _batch(sites, data)
        self.batches: list[Feeds] = [shortened(model.ir, f, _LENGTH) for f in data.spread(wanted).batches(size)]
        self.samples = wanted
        self._outputs = [str(v.name) for v in model.graph.outputs]
        self.kinds: dict[str, Kind] = {}
        self._power: dict[str, float] = {}
        self._look(kinds or {}, model.name)

    def count(self, feeds: Feeds) -> int:
        """Samples in a batch, which weigh equally in the loss."""
        return max((a.shape[0] for a in feeds.values() if a.ndim), default=1)

    def loss(self, feeds: Feeds) -> torch.Tensor:
        """A batch's loss relative to the model's own outputs: 0, with a gradient of 0; only its curvature says much."""
        import torch

        total, outputs = torch.zeros(()), self._run(feeds)
        for name, kind in self.kinds.items():
            output = outputs[name]
            if kind == "values":
                power = self._power[name] * self.count(feeds)
                total = total + ((output - output.detach()) ** 2).sum() / power
            else:
                log = self._log(name, output)
                total = total + (log.detach().exp() * (log.detach() - log)).sum(-1).mean()
        return total

    def scores(self, feeds: Feeds, generator: torch.Generator, draws: int) -> Iterator[torch.Tensor]:
        """Random numbers whose gradients g have E[g g^T] = the Hessian of a batch's `loss`.

        The product of random signs with the output, for classes with sqrt(p) ln p of each. The gradient of the log
        likelihood of a drawn class has the same second moment, but rare classes make it stray far more.
        """
        import torch

        outputs = self._run(feeds)
        for _ in range(draws):
            total = torch.zeros(())
            for name, kind in self.kinds.items():
                if kind == "values":
                    output = outputs[name]
                    size = self._power[name] * self.count(feeds) / 2
                else:
                    log = self._log(name, outputs[name])
                    output, size = log.detach().exp().sqrt() * log, len(log)
                signs = torch.randint(0, 2, output.shape, generator=generator).to(output.dtype) * 2 - 1
                total = total + (output * signs).sum() / np.sqrt(size)
            yield total

    def _run(self, feeds: Feeds) -> dict[str, torch.Tensor]:
        import torch

        found = self._module(*(torch.from_numpy(np.array(feeds[name])) for name in self._inputs))
        return dict(zip(self._outputs, found, strict=True))

    def _log(self, name: str, output: torch.Tensor) -> torch.Tensor:
        """Log probabilities [rows, classes]."""
        import torch

        flat = output.reshape(-1, output.shape[-1])
        if self.kinds[name] == "probabilities":
            flat = flat.clamp(min=_TINY).log()
        return torch.log_softmax(flat, -1)

    def _look(self, kinds: Mapping[str, Kind], where: str) -> None:
        """Decide what outputs are, on the first batch, and the mean power of one sample of each."""
        import torch

        seen: dict[str, Kind] = {}
        power: dict[str, float] = {}
        for feeds in self.batches:
            with torch.no_grad():
                for name, output in self._run(feeds).items():
                    if output.is_floating_point() and output.numel():
                        array = output.numpy()
                        seen.setdefault(name, kinds.get(name) or output_kind(array))
                        power[name] = power.get(name, 0.0) + float(np.square(array, dtype=np.float64).sum())
        rows = max(sum(self.count(feeds) for feeds in self.batches), 1)
        self._power = {name: total / rows or 1.0 for name, total in power.items()}
        self.kinds = seen
        if not seen:
            raise BadModel("no output is a float, so nothing can be differentiated", where, "use a forward-only method")

    def _weight(self, name: str) -> torch.Tensor:
        nodes = self._module.graph.nodes
        target = next(str(n.target) for n in nodes if n.op == "get_attr" and n.meta.get("value") == name)
        return self._module.get_parameter(target).requires_grad_()


def _batch(sites: Sequence[Site], data: Calibration) -> int:
    size = max(sum(site.count for site in sites), 1)
    for feeds in data.batches(1, 1):
        size = max(size, _INPUT_WORK * sum(array.size for array in feeds.values()))
    return int(np.clip(_BATCH_WORK // size, 1, _LARGEST_BATCH))
