"""A planned model as a differentiable twin whose exact transform, weight ranges and activation ranges can be learned.

Constants of the twin are functions of what is learned. Before a step they are computed and written to the twin's
parameters; after the step's samples the gradients of these go back through the functions: a matrix is transformed and
rounded once a step, however many samples the step has.

Only passes that learn import this file when they run, since it needs torch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from qcompiler.formats import QTensor
from qcompiler.formats.fit import quantize
from qcompiler.graph.sites import find_sites
from qcompiler.model import Model, StaticRange
from qcompiler.passes.round.learning_twin import Grid, LearningTwin
from qcompiler.passes.round.quantized_values import Target
from qcompiler.passes.transform.rounded_weight import RoundedWeight

Change = Callable[[torch.Tensor], torch.Tensor]
Ends = Mapping[str, tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]


class LearnedTransform(Protocol):
    """What the twin asks of a transform."""

    @property
    def kind(self) -> str:
        """What its parameters are called."""
        ...

    def parameters(self) -> list[torch.nn.Parameter]:
        """What is learned of it."""
        ...

    def forget(self) -> None:
        """Go back to changing nothing."""
        ...

    def attach(self, twin: TransformedTwin) -> None:
        """Say how constants change: `twin.change`."""
        ...

    def grid(self, target: Target, low: npt.NDArray[np.float32], high: npt.NDArray[np.float32]) -> Grid:
        """A grid for a value whose numbers, before the transform, lie between these."""
        ...


@dataclass(eq=False)
class _Leaf:
    """A constant as the twin sees it, and what makes it."""

    start: torch.Tensor
    parameter: torch.nn.Parameter
    changes: list[Change] = field(default_factory=list[Change])

    def made(self, changes: Sequence[Change] | None = None) -> torch.Tensor:
        """The constant after these changes, after all if None."""
        found = self.start
        for change in self.changes if changes is None else changes:
            found = change(found)
        return found


class TransformedTwin(LearningTwin):
    """The twin of a float model with a plan.

    Args:
        model: not rounded yet.
        transform: what is learned.
        targets: the values that get a static grid.
        ends: of these, as `LearnedTransform.grid` wants them.
        round_weights: or leave them float, and round activations only.

    Attributes:
        weights: by site. grids: by activation value.

    Raises:
        MissingExtra, BadModel: as `fx_twin`.
    """

    def __init__(
        self,
        model: Model,
        transform: LearnedTransform,
        targets: Sequence[Target],
        ends: Ends,
        *,
        round_weights: bool = True,
    ) -> None:
        plans = model.plan.sites
        super().__init__(model, narrow=all(plan.activation == "float" for plan in plans.values()))
        self._transform = transform
        self._leaves: dict[tuple[str, tuple[str, int] | None], _Leaf] = {}
        transform.attach(self)
        sites = [site for site in find_sites(model.ir) if site.name in plans]
        self.weights: dict[str, RoundedWeight] = {}
        for site in sites:
            spec, name = plans[site.name].weight if round_weights else None, str(site.weight.name)
            if spec is not None and site.activation is None and (name, None) not in self._leaves:
                tensor = torch.from_numpy(site.from_matrix(quantize(site.matrix(), spec).decode()))
                self.change(name, lambda _start, tensor=tensor: tensor)
            elif spec is not None:
                self.weights[site.name] = RoundedWeight(site, spec, site.matrix())
                self.change(name, self.weights[site.name])
            if plans[site.name].activation == "dynamic":
                self.insert_rows(site, plans[site.name])
        values = {str(v.name): v for node in model.graph for v in node.outputs}
        self.grids: dict[str, Grid] = {}
        for target in targets:
            name = str(target.value.name)
            like = None if target.like is None else str(target.like.name)
            self.grids[name] = transform.grid(target, *ends[name]) if like is None else self.grids[like]
            self.insert_grid(target, values.get(name), self.grids[name])
        self.close(model)

    def change(self, name: str, change: Change, at: tuple[str, int] | None = None) -> None:
        """Pass a constant through a differentiable function, behind those that it passes already.

        Args:
            name: of the initializer.
            change: from its tensor, in its layout, to one of the same shape.
            at: only as the operand of this number of the operation that makes this value; for all readers if None.
        """
        key = (name, at)
        if key not in self._leaves:
            self._leaves[key] = self._leaf(name, at)
        self._leaves[key].changes.append(change)

    def parameters(self) -> dict[str, list[torch.nn.Parameter]]:
        """What can be learned: the transform's own by its kind, "share" and "range" -> parameters, those there are."""
        found = {
            self._transform.kind: self._transform.parameters(),
            "share": [weight.share for weight in self.weights.values() if weight.share is not None],
            "range": [grid.ends for grid in dict.fromkeys(self.grids.values())],
        }
        return {kind: parameters for kind, parameters in found.items() if parameters}

    @contextmanager
    def step(self) -> Generator[None]:
        """Samples may be run inside; constants are those learned so far, gradients are there at the end."""
        made: list[torch.Tensor] = []
        for leaf in self._leaves.values():
            made.append(leaf.made())
            with torch.no_grad():
                leaf.parameter.copy_(made[-1])
            leaf.parameter.grad = None
        yield
        pairs = [(m, p.parameter.grad) for m, p in zip(made, self._leaves.values(), strict=True) if m.requires_grad]
        pairs = [(tensor, gradient.float()) for tensor, gradient in pairs if gradient is not None]
        if pairs:
            torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])
        for leaf in self._leaves.values():
            leaf.parameter.grad = None

    @torch.no_grad()
    def reset(self, *, transform: bool = False) -> None:
        """Begin again with the ranges of weights and activations; with the transform too, or as learned so far."""
        if transform:
            self._transform.forget()
        for leaf in self._leaves.values():
            last = leaf.changes[-1]
            if isinstance(last, RoundedWeight):
                last.begin(last.site.to_matrix(leaf.made(leaf.changes[:-1]).numpy()))
        for grid in self.grids.values():
            grid.ends.zero_()

    def ranges(self) -> dict[str, StaticRange]:
        """The static grids as learned so far, by the name of a value."""
        with torch.no_grad():
            ends = {name: [end.item() for end in grid.found()] for name, grid in self.grids.items()}
        return {name: grid.target.grid(*ends[name]) for name, grid in self.grids.items()}

    def codes(self, model: Model) -> dict[str, QTensor]:
        """The planned weights of a model that the transform was folded into, rounded as the twin rounds them."""
        found: dict[str, QTensor] = {}
        for site in find_sites(model.ir):
            spec = model.plan.sites[site.name].weight if site.name in model.plan.sites else None
            if site.name in self.weights:
                found[site.name] = self.weights[site.name].codes(site.matrix())
            elif spec is not None:
                found[site.name] = quantize(site.matrix(), spec)
        return found

    def _leaf(self, name: str, at: tuple[str, int] | None) -> _Leaf:
        target = str(self.node(name).target)
        start = getattr(self.module, target).detach().clone()
        parameter = torch.nn.Parameter(start.clone())
        if at is None:
            delattr(self.module, target)
            self.module.register_parameter(target, parameter)
        else:
            reader = self.node(at[0])
            if reader.target is operator.getitem:  # one of several results
                reader = reader.all_input_nodes[0]
            key = f"{target}_at_{reader.name}_{at[1]}"
            self.module.register_parameter(key, parameter)
            with self.module.graph.inserting_before(reader):
                reader.update_arg(at[1], self.module.graph.get_attr(key))
        return _Leaf(start, parameter)
