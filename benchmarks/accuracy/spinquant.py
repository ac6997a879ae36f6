"""SpinQuant's acceptance test (methods.md, B7): learned rotations against random Hadamard matrices, W8A4 and W4A4.

Claim: the rotation that is learned from a random Hadamard matrix is better than the mean of eight of these, and than
the one that it began from, at equal stored bytes. A random matrix evens outliers out blindly; the cause of the gain is
that activations have a shape that a matrix can be fitted to. Control: all weights Gaussian and all gains even, where no
direction stands out and no rotation is better than another by much.

With matrices within heads learned too (R2), the same is claimed over Hadamard matrices in both places, and over what is
learned for the stream alone.

    nice -n 5 python benchmarks/accuracy/spinquant.py --assets ~/.cache/qc-assets
"""

from __future__ import annotations

from statistics import mean, pstdev

from harness import SEEDS, Claim, Fixture, assets_folder, fixture, measure
from mobilequant import without_outliers

from qcompiler.passes.plan.uniform import Uniform
from qcompiler.passes.round.nearest import Nearest
from qcompiler.passes.transform.rotate import Rotate
from qcompiler.passes.transform.spinquant import SpinQuant
from qcompiler.pipeline import Pipeline

MODEL, BLOCKS, SAMPLES = "smollm2_135m", 1, 8
WEIGHTS = {"W8A4": "int8-sym-channel-fp32", "W4A4": "int4-sym-channel-fp32"}
HADAMARDS = range(8)
CONTROL = 0.1  # dB


def plan(form: str) -> Uniform:
    """Formats of all sites; tables of embeddings stay float."""
    return Uniform(WEIGHTS[form], "dynamic", embeddings="float", activation_bits=4)


def learned(model: Fixture, seed: int, *, heads: bool = False) -> Fixture:
    """The same function behind a rotation that is learned from the Hadamard matrix of a seed, for rows of 4 bits."""
    passes = [plan("W8A4"), SpinQuant(epochs=4, squared=True, seed=seed, heads=heads)]
    return model.changed(lambda copy: Pipeline(passes, verify=False).run(copy))


def hadamard(model: Fixture, seed: int, *, heads: bool = False) -> Fixture:
    """The same function behind the Hadamard matrix."""
    return model.changed(lambda copy: Pipeline([Rotate(seed=seed, heads=heads)], verify=False).run(copy))


def main() -> None:
    """Measure all cases, then say what holds."""
    assets = assets_folder()
    claim = Claim("SpinQuant: learned rotation > mean of random Hadamard matrices, activations of 4 bits")
    models = [fixture(assets, MODEL, BLOCKS, seed=seed, samples=SAMPLES) for seed in SEEDS]
    means: dict[str, float] = {}
    for form in WEIGHTS:
        many = [measure(hadamard(models[0], seed), [plan(form), Nearest()]).sqnr_db for seed in HADAMARDS]
        means[form] = mean(many)
        print(
            f"  {form}: {len(many)} Hadamard matrices: mean {mean(many):.3f}, spread {pstdev(many):.3f} dB", flush=True
        )
    for seed, model in zip(SEEDS, models, strict=True):
        for case, start in ((MODEL, model), (f"{MODEL}, Gaussian", model.changed(without_outliers))):
            arms = {"Hadamard": hadamard(start, seed), "learned": learned(start, seed)}
            if start is model:
                arms["Hadamard, heads"] = hadamard(start, seed, heads=True)
                arms["learned, heads"] = learned(start, seed, heads=True)
            for arm, turned in arms.items():
                for form in WEIGHTS:
                    claim.record(f"{case} {form}", arm, measure(turned, [plan(form), Nearest()]))
        for form in WEIGHTS:
            claim.record(f"{MODEL} {form}", "mean of 8 Hadamards", means[form])
    for form in WEIGHTS:
        claim.better(f"{MODEL} {form}", "learned", "Hadamard")
        claim.better(f"{MODEL} {form}", "learned", "mean of 8 Hadamards")
        claim.better(f"{MODEL} {form}", "learned, heads", "Hadamard, heads")
        claim.better(f"{MODEL} {form}", "learned, heads", "learned")
        claim.vanishes(f"{MODEL}, Gaussian {form}", "learned", "Hadamard", CONTROL)
    claim.show()


if __name__ == "__main__":
    main()
