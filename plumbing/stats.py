"""Intervals and agreement: what a few hundred clips, or a few judges, allow to be said."""
import math
from collections import Counter
from collections.abc import Sequence

Z95 = 1.96                              # 95 % of a normal distribution lie within this many deviations


def wilson(share: float, n: float) -> tuple[float, float]:
    """95 % interval of a share (0..1) seen in n trials: Wilson's, which holds for small n and at 0 and 1."""
    centre = share + Z95 ** 2 / (2 * n)
    half = Z95 * math.sqrt(share * (1 - share) / n + Z95 ** 2 / (4 * n ** 2))
    scale = 1 + Z95 ** 2 / n
    return (centre - half) / scale, (centre + half) / scale


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval (normal approximation); NaN for a single value."""
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return mean, math.nan
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, Z95 * math.sqrt(variance / n)


def raw_agreement(ratings: Sequence[Sequence[str]]) -> float:
    """Share of pairs of judges who say the same, mean over items. ratings[item]: of two judges or more."""
    def of_item(row):
        agreeing = sum(count * (count - 1) for count in Counter(row).values())
        return agreeing / (len(row) * (len(row) - 1))
    return sum(map(of_item, ratings)) / len(ratings)


def cohens_kappa(ratings: Sequence[tuple[str, str]]) -> float:
    """Agreement of two judges beyond chance: 1 perfect, 0 as by chance, NaN where chance agrees always.

    ratings[item]: what the first says and what the second says; each has habits of his own.
    """
    first, second = (Counter(column) for column in zip(*ratings))
    chance = sum(first[answer] * second[answer] for answer in first) / len(ratings) ** 2
    return beyond(chance, raw_agreement(ratings))


def fleiss_kappa(ratings: Sequence[Sequence[str]]) -> float:
    """The same for any number of judges of one common habit, also where not all of them judged every item."""
    counts = Counter(answer for row in ratings for answer in row)
    chance = sum(count ** 2 for count in counts.values()) / counts.total() ** 2
    return beyond(chance, raw_agreement(ratings))


def beyond(chance: float, observed: float) -> float:
    """How far an agreement lies between that of chance (0) and a perfect one (1)."""
    return math.nan if chance == 1 else (observed - chance) / (1 - chance)
