"""Are two samples of one distribution? The two-sample Kolmogorov-Smirnov test, and quantiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

TERMS: Final = 100  # of the series; far more than matter where p is not near 1


def ks_distance(first: Sequence[float], second: Sequence[float]) -> float:
    """The largest distance between the two empirical distribution functions, from 0 to 1."""
    first, second = sorted(first), sorted(second)
    position = [0, 0]
    largest = 0.0
    while position[0] < len(first) and position[1] < len(second):
        value = min(first[position[0]], second[position[1]])
        for which, sample in enumerate((first, second)):
            while position[which] < len(sample) and sample[position[which]] <= value:
                position[which] += 1
        largest = max(largest, abs(position[0] / len(first) - position[1] / len(second)))
    return largest


def ks_p_value(first: Sequence[float], second: Sequence[float]) -> float:
    """How likely two samples of one distribution are at least as far apart as these.

    Asymptotic, with Stephens's correction (Numerical Recipes, 3rd edition, section 14.3.3); good from about
    20 values each.
    """
    root = math.sqrt(len(first) * len(second) / (len(first) + len(second)))
    scaled = (root + 0.12 + 0.11 / root) * ks_distance(first, second)
    if scaled < 0.2:  # the series converges badly there, and p is 1 up to 12 digits
        return 1.0
    series = math.fsum((1 if term % 2 else -1) * math.exp(-2 * (term * scaled) ** 2) for term in range(1, TERMS + 1))
    return min(1.0, max(0.0, 2 * series))


def quantile(sample: Sequence[float], share: float) -> float:
    """The value below which so large a share (0 to 1) of the sample lies; of a sample that is not empty."""
    return sorted(sample)[min(len(sample) - 1, int(share * len(sample)))]
