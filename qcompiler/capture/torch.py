"""PyTorch modules: exported by torch, then normalised like any ONNX file."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qcompiler.capture.onnx import load_onnx
from qcompiler.errors import BadModel, BadOption, MissingExtra
from qcompiler.folders import temporary_folder
from qcompiler.model import Model

if TYPE_CHECKING:
    import torch

OPSET = 23  # the one opset where torch exports RMSNorm, rotary embedding and attention as single operations


def capture(
    module: torch.nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any],
    dynamic_shapes: dict[str, Any] | tuple[Any, ...] | list[Any] | None = None,
    name: str | None = None,
) -> Model:
    """Capture a module as a `Model`; it is exported in evaluation mode and otherwise left as it is.

    Nodes keep the path of the submodule they came from (metadata `qcompiler.module`) and weights are named
    after it.

    Args:
        module: any module that torch.export can trace.
        example_inputs: arguments for one call: a sequence of positional ones, or keyword arguments by name.
        dynamic_shapes: as for torch.export.export; by default the first axis of every tensor whose first axis
            all tensors share (and is larger than 1) may vary.
        name: of the model; the class's name in lower case by default.

    Raises:
        MissingExtra: torch is not installed.
        BadOption: `module` is no module, or it cannot be called with `example_inputs`.
        BadModel: torch cannot export the module.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingExtra("torch", "capturing a PyTorch module") from error
    args, kwargs = _arguments(module, example_inputs)
    shapes = dynamic_shapes if dynamic_shapes is not None else _shared_batch(module, args, kwargs)
    training = {m: m.training for m in module.modules()}
    module.eval()
    title = name or type(module).__name__.lower()
    try:
        with torch.no_grad(), temporary_folder("export") as folder:
            program = torch.onnx.export(
                module, args, kwargs=kwargs or None, dynamo=True, opset_version=OPSET,
                dynamic_shapes=shapes, verbose=False,
            )  # fmt: skip
            assert program is not None
            path = folder / f"{title}.onnx"
            program.save(str(path), external_data=True)
            return load_onnx(path)
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0][:300]
        raise BadModel(
            f"torch cannot export the module ({reason})",
            title,
            "see torch.export's guide to control flow and dynamic shapes",
        ) from error
    finally:
        for part, mode in training.items():
            part.training = mode


def _arguments(module: Any, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call; BadOption where `module` cannot be called with them."""
    import torch

    if not isinstance(module, torch.nn.Module):
        raise BadOption(f"a {type(module).__name__} is no torch.nn.Module", "module", "give the module, not its name")
    fix = "give the arguments of one call in a tuple: capture(module, (x,)), or by name in a dict"
    if isinstance(example_inputs, torch.Tensor) or not isinstance(example_inputs, Mapping | Sequence):
        raise BadOption(f"a {type(example_inputs).__name__} is not a tuple of arguments", "example_inputs", fix)
    by_name = isinstance(example_inputs, Mapping)
    args, kwargs = ((), dict(example_inputs)) if by_name else (tuple(example_inputs), {})
    try:
        inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise BadOption(f"the module cannot be called with them ({error})", "example_inputs", fix) from error
    return args, kwargs


def _shared_batch(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Dynamic first axis for all tensor arguments, if they agree on it; None where they do not."""
    import torch

    bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    tensors = {key: value for key, value in bound.items() if isinstance(value, torch.Tensor)}
    sizes = {value.shape[0] if value.ndim else 0 for value in tensors.values()}
    if len(tensors) != len(bound) or len(sizes) != 1 or min(sizes) < 2:
        return None
    return {key: {0: torch.export.Dim("batch", min=1)} for key in tensors}
