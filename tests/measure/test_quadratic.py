"""Repairs and checks of a quadratic loss model."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest

from qcompiler.measure.quadratic import (
    clip_cross,
    fill_within,
    narrower_units,
    predicted,
    project_psd,
    shift_psd,
    unconstrained,
)

COUNTS = [3, 2, 4]
STARTS = np.cumsum([0, *COUNTS])


def random_gram(seed: int, coupling: float = 0.5) -> np.ndarray:
    """Losses that fall with the rank of the option, and signed cross terms; 0 within a unit."""
    rng = np.random.default_rng(seed)
    diagonal = np.concatenate([4.0 ** -np.arange(count) for count in COUNTS]) * rng.uniform(0.5, 2, sum(COUNTS))
    gram = rng.standard_normal((sum(COUNTS),) * 2) * coupling * np.sqrt(np.outer(diagonal, diagonal))
    gram = (gram + gram.T) / 2
    for low, high in pairwise(STARTS):
        gram[low:high, low:high] = 0
    np.fill_diagonal(gram, diagonal)
    return gram


def choices() -> list[np.ndarray]:
    return [STARTS[:-1] + np.array(options) for options in product(*map(range, COUNTS))]


@pytest.mark.parametrize("seed", range(5))
def test_repairs(seed: int) -> None:
    gram = random_gram(seed, coupling=2)
    assert np.linalg.eigvalsh(gram)[0] < -1e-3
    shifted, by = shift_psd(gram)
    projected = project_psd(gram)
    for repaired in (shifted, projected):
        np.testing.assert_allclose(repaired, repaired.T)
        assert np.linalg.eigvalsh(repaired)[0] > -1e-12
    filled = fill_within(STARTS, gram)
    for chosen in choices():
        assert predicted(shifted, chosen) == pytest.approx(predicted(gram, chosen) + by * len(COUNTS) / 2)
        assert predicted(filled, chosen) == pytest.approx(predicted(gram, chosen))
    np.testing.assert_allclose(project_psd(projected), projected, atol=1e-12)
    nearest = np.linalg.norm(projected - gram)
    assert nearest <= np.linalg.norm(shifted - gram)
    clipped, root = clip_cross(gram), np.sqrt(np.diag(gram))
    assert (np.abs(clipped) <= np.outer(root, root) * (1 + 1e-12)).all()
    np.testing.assert_array_equal(np.diag(clipped), np.diag(gram))


def test_what_is_convex_stays_as_it_is() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((9, 30))
    gram = vectors @ vectors.T
    np.testing.assert_allclose(project_psd(gram), gram, atol=1e-10)
    assert shift_psd(gram)[1] == 0
    np.testing.assert_array_equal(clip_cross(gram), gram)


def test_clipping_what_is_negative_or_infinite() -> None:
    gram = np.array([[-1.0, 3, 5], [3, 4, 9], [5, 9, np.inf]])
    np.testing.assert_array_equal(clip_cross(gram), [[0, 0, 0], [0, 4, 0], [0, 0, np.inf]])


@pytest.mark.parametrize("seed", range(20))
def test_the_unconstrained_minimum_is_that_of_enumeration(seed: int) -> None:
    gram = random_gram(seed, coupling=1.5)
    widest = [count - 1 for count in COUNTS]
    best = min(predicted(gram, chosen) for chosen in choices())
    found = unconstrained(STARTS, gram, widest)
    assert predicted(gram, found) == pytest.approx(best, abs=1e-9)
    narrower = narrower_units(STARTS, gram, widest)
    assert set(narrower) == {u for u in range(3) if found[u] != STARTS[u] + widest[u]}


def test_the_sanity_check_names_units_and_what_they_claim_to_gain() -> None:
    widest = [2, 1, 3]
    assert narrower_units(STARTS, random_gram(0, coupling=0), widest) == {}
    gram = np.diag(np.diag(random_gram(0)))
    gram[0, 3] = gram[3, 0] = -3.0  # two crude options that seem to cancel
    gains = narrower_units(STARTS, gram, widest)
    assert set(gains) == {0, 1}
    assert gains[0] == pytest.approx(3 - gram[0, 0] / 2 + gram[2, 2] / 2)
    assert narrower_units(STARTS, gram, widest, tolerance=3.0) == {}
    equal = np.zeros((9, 9))
    assert narrower_units(STARTS, equal, widest) == {}  # of equals the widest
