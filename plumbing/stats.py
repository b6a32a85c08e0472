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
    """Share of pairs of judges who say the same, mean over the items. ratings[item][judge]."""
    def of_item(row):
        agreeing = sum(count * (count - 1) for count in Counter(row).values())
        return agreeing / (len(row) * (len(row) - 1))
    return sum(map(of_item, ratings)) / len(ratings)


def kappa(ratings: Sequence[Sequence[str]]) -> float:
    """Agreement beyond chance, 1 = perfect, 0 = chance: Cohen's kappa of two judges, Fleiss' kappa of more.

    ratings[item][judge], every judge on every item. NaN where all ratings are the same, as by chance.
    """
    judges, categories = len(ratings[0]), sorted({rating for row in ratings for rating in row})

    # Cohen: each judge has habits of his own. Fleiss: all judges have the same.
    habits = [Counter(column) for column in zip(*ratings)]
    share = [{c: habit[c] / len(ratings) for c in categories} for habit in habits]
    if judges == 2:
        chance = sum(share[0][c] * share[1][c] for c in categories)
    else:
        chance = sum((sum(s[c] for s in share) / judges) ** 2 for c in categories)

    return math.nan if chance == 1 else (raw_agreement(ratings) - chance) / (1 - chance)
