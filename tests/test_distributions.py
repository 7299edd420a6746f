"""tests.distributions: the judge of the timing tests is itself right."""

from __future__ import annotations

import random

import pytest

from tests.distributions import ks_distance, ks_p_value, quantile


def test_the_distance_of_what_is_the_same_apart_and_half_and_half() -> None:
    assert ks_distance([1, 2, 3], [3, 2, 1]) == 0
    assert ks_distance([1, 2, 3], [4, 5, 6]) == 1
    assert ks_distance([1, 2, 3, 4], [3, 4, 5, 6]) == 0.5
    assert ks_distance([1, 1, 1, 2], [1, 2, 2, 2]) == 0.5  # ties


@pytest.mark.parametrize(("distance", "p"), [(0.10, 0.6770), (0.15, 0.1938), (0.20, 0.0314), (0.25, 0.00304)])
def test_p_values_are_those_of_the_kolmogorov_distribution(distance: float, p: float) -> None:
    """Two samples of a hundred whose distribution functions are so far apart.

    The values are the formula's, computed by hand from λ = (√50 + 0.12 + 0.11/√50) · D and
    p = 2(e^(-2λ²) - e^(-8λ²) + e^(-18λ²)).
    """
    first = list(range(100))
    second = [value + round(100 * distance) for value in first]
    assert ks_distance(first, second) == pytest.approx(distance)
    assert ks_p_value(first, second) == pytest.approx(p, rel=0.03)


def test_samples_of_one_distribution_have_evenly_spread_p_values() -> None:
    rng = random.Random(7)
    values = [
        ks_p_value([rng.gauss(0, 1) for _ in range(100)], [rng.gauss(0, 1) for _ in range(100)]) for _ in range(500)
    ]
    for share in (0.05, 0.5):
        assert sum(value <= share for value in values) / len(values) == pytest.approx(share, abs=0.06)


def test_a_small_shift_is_seen_in_many_values() -> None:
    rng = random.Random(8)
    first = [rng.gauss(0, 1) for _ in range(1_000)]
    second = [rng.gauss(0.25, 1) for _ in range(1_000)]
    assert ks_p_value(first, second) < 0.001


def test_identical_samples_are_not_told_apart() -> None:
    assert ks_p_value([1.0] * 50, [1.0] * 50) == 1.0


def test_quantiles() -> None:
    assert [quantile([3, 1, 2], share) for share in (0, 0.5, 0.99, 1)] == [1, 2, 3, 3]
