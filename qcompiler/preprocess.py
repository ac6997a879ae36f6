"""From an image file to a model's input, described in one line of text.

    resize=256,crop=224,mean=0.485/0.456/0.406,std=0.229/0.224/0.225,layout=nchw

resize   the shorter side becomes this many pixels; HxW resizes to exactly that
crop     the centre, this many pixels square, or HxW
range    pixels run from 0 to this (1 by default; 255 keeps the bytes)
mean     subtracted, one number or one a channel joined by "/"; in units of `range`
std      divided by, after that
order    rgb (default) or bgr
layout   nchw or nhwc; by default what the input's shape says

What is left out gets a default: the size of the model's input, mean 0.5 and std 0.5 of a range of 1, that is
values from -1 to 1; an input of type uint8 gets the bytes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from qcompiler.errors import BadData, BadOption

Size = tuple[int, int]
MAX_SIDE = 16384
_KEYS = ("resize", "crop", "range", "mean", "std", "order", "layout")


@dataclass(frozen=True)
class Preprocess:
    """What happens to an image.

    Attributes:
        resize: (height, width), or (side, 0) for the shorter side; None leaves the size alone.
        crop: (height, width) of the centre, or None.
        full: value of a white pixel before mean and std.
        mean: one number or one a channel.
        std: one number or one a channel, not zero.
        order: of the colours.
        layout: "nchw", "nhwc" or "" to follow the input's shape.
    """

    resize: Size | None = None
    crop: Size | None = None
    full: float = 1.0
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    order: Literal["rgb", "bgr"] = "rgb"
    layout: Literal["", "nchw", "nhwc"] = ""

    @staticmethod
    def parse(text: str) -> Preprocess:
        """Read the one-line form.

        Raises:
            BadOption: an unknown key or a value that means nothing.
        """
        given: dict[str, str] = {}
        for part in filter(None, (p.strip() for p in text.split(","))):
            key, _, value = part.partition("=")
            if key not in _KEYS or key in given:
                known = ", ".join(_KEYS)
                raise BadOption(
                    f"'{part}' means nothing", "--preprocess", f"use each of {known} at most once, as key=value"
                )
            given[key] = value.strip().lower()
        try:
            return _build(given)
        except ValueError as error:
            raise BadOption(str(error), "--preprocess", "for example resize=256,crop=224,mean=0.5,std=0.5") from error

    def apply(self, path: Path, channels: int) -> npt.NDArray[Any]:
        """One image as [height, width, channels]: float32, or uint8 where mean is 0, std 1 and range 255.

        Raises:
            BadData: the file is no image, or an image of enormous size.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path) as opened:
                    image = opened.convert("L" if channels == 1 else "RGB")
        except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
            raise BadData(f"cannot be read as an image ({error})", str(path), "remove or repair it") from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise BadData("is an image of enormous size", str(path), "remove or shrink it") from error
        pixels = np.asarray(_cropped(_resized(image, self.resize), self.crop))
        pixels = pixels[..., None] if channels == 1 else pixels[..., :: 1 if self.order == "rgb" else -1]
        if self.full == 255 and self.mean == (0.0,) and self.std == (1.0,):
            return np.ascontiguousarray(pixels)
        scaled = pixels.astype(np.float32) * np.float32(self.full / 255)
        return (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)


def _build(given: dict[str, str]) -> Preprocess:
    mean, std = _numbers(given.get("mean", "0.5")), _numbers(given.get("std", "0.5"))
    full = _numbers(given.get("range", "1"))[0]
    if not all(np.isfinite([full, *mean, *std])) or 0 in std or full <= 0:
        raise ValueError("range and std must be finite and not zero")
    if {len(mean), len(std)} - {1, 3}:
        raise ValueError("mean and std take one or three numbers")
    if full == 255 and "mean" not in given and "std" not in given:
        mean, std = (0.0,), (1.0,)
    order, layout = given.get("order", "rgb"), given.get("layout", "")
    if order not in ("rgb", "bgr") or layout not in ("", "nchw", "nhwc"):
        raise ValueError("order is rgb or bgr, layout is nchw or nhwc")
    resize = _size(given["resize"]) if "resize" in given else None
    if resize and "x" not in given["resize"]:
        resize = (resize[0], 0)
    crop = _size(given["crop"]) if "crop" in given else None
    return Preprocess(resize, crop, full, mean, std, order, layout)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split("/"))
    except ValueError:
        raise ValueError(f"'{text}' is no number, nor several joined by '/'") from None


def _size(text: str) -> Size:
    parts = text.split("x")
    sides = [int(part) for part in parts if part.isascii() and part.isdigit()]
    if len(parts) not in (1, 2) or len(sides) < len(parts) or not all(0 < side <= MAX_SIDE for side in sides):
        raise ValueError(f"'{text}' is no size: give pixels, as 224 or 224x320")
    return (sides[0], sides[-1])


def _resized(image: Image.Image, size: Size | None) -> Image.Image:
    if size is None:
        return image
    height, width = size
    if not width:
        scale = height / min(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        if max(width, height) > MAX_SIDE:
            raise BadData(f"an image of {image.width}x{image.height} is too narrow to resize")
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _cropped(image: Image.Image, size: Size | None) -> Image.Image:
    if size is None:
        return image
    top, left = (image.height - size[0]) // 2, (image.width - size[1]) // 2
    return image.crop((left, top, left + size[1], top + size[0]))
