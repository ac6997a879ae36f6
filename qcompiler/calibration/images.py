"""A folder of images as rows of an input, decoded when they are needed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.files import image_files
from qcompiler.calibration.validate import dims, input_dtype, shape_text
from qcompiler.errors import BadData
from qcompiler.preprocess import Preprocess

_DEFAULT_SIDE = 224  # for models that take any size


@dataclass(frozen=True)
class ImageRows:
    """Images as an array [images, ...] that decodes what is sliced.

    Attributes:
        files: one a row.
        preprocess: complete: with sizes and a layout.
        shape: images first.
        dtype: of the rows.
    """

    files: tuple[Path, ...]
    preprocess: Preprocess
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @staticmethod
    def for_input(folder: Path, model: ir.Model, text: str | None) -> dict[str, ImageRows]:
        """The images of a folder for the one image input of a model, in the order of their names.

        Raises:
            BadData: the model takes something else than images.
        """
        where, inputs = str(folder), list(model.graph.inputs)
        shape = dims(inputs[0]) if len(inputs) == 1 else None
        if shape is None or len(shape) != 4:
            wants = ", ".join(f"{v.name} {shape_text(v)}" for v in inputs)
            raise BadData("images need a model with one input of four dimensions", where, f"this one takes {wants}")
        dtype = input_dtype(inputs[0])
        default = "range=255" if dtype == np.uint8 else ""
        spec = _complete(Preprocess.parse(default if text is None else text), shape, where, shape_text(inputs[0]))
        channels = shape[1] if spec.layout == "nchw" else shape[3]
        files = tuple(image_files(folder))
        first = _arranged(spec, files[0], channels or 3)
        return {str(inputs[0].name): ImageRows(files, spec, (len(files), *first.shape), first.dtype)}

    def __getitem__(self, key: slice, /) -> npt.NDArray[Any]:
        """Decode some rows."""
        channels = self.shape[1] if self.preprocess.layout == "nchw" else self.shape[3]
        rows = [_arranged(self.preprocess, file, channels) for file in self.files[key]]
        for file, row in zip(self.files[key], rows, strict=True):
            if row.shape != self.shape[1:]:
                raise BadData(f"gives {list(row.shape)}, the others {list(self.shape[1:])}", str(file), "set a crop")
        return np.stack(rows) if rows else np.empty((0, *self.shape[1:]), self.dtype)


def _complete(spec: Preprocess, shape: tuple[int | None, ...], where: str, text: str) -> Preprocess:
    """Fill in layout and sizes from the input's shape [batch, ...]."""
    layout = spec.layout or ("nhwc" if shape[3] in (1, 3) and shape[1] not in (1, 3) else "nchw")
    channels, sides = (shape[1], shape[2:]) if layout == "nchw" else (shape[3], shape[1:3])
    if channels not in (1, 3, None):
        raise BadData(f"the model's input {text} is no image", where, "give .npz data")
    if spec.crop is None and not (spec.resize and spec.resize[1]):
        crop = (sides[0] or _DEFAULT_SIDE, sides[1] or _DEFAULT_SIDE)
        if spec.resize is None:  # the whole picture if it can be had without distortion, else fit the crop
            spec = replace(spec, resize=(max(crop), 0))
        spec = replace(spec, crop=crop)
    return replace(spec, layout=layout)


def _arranged(spec: Preprocess, file: Path, channels: int) -> npt.NDArray[Any]:
    pixels = spec.apply(file, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)) if spec.layout == "nchw" else pixels
