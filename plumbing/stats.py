"""Intervals: what a few hundred clips allow to be said; and tables."""
import math
from collections.abc import Sequence

Z95 = 1.96                              # 95 % of a normal distribution lie within this many deviations


def wilson(share: float, n: float) -> tuple[float, float]:
    """95 % interval of a share (0..1) seen in n trials: Wilson's, which holds for small n and at 0 and 1."""
    centre = share + Z95 ** 2 / (2 * n)
    half = Z95 * math.sqrt(share * (1 - share) / n + Z95 ** 2 / (4 * n ** 2))
    return (centre - half) / (1 + Z95 ** 2 / n), (centre + half) / (1 + Z95 ** 2 / n)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval (normal approximation); NaN for a single value."""
    n, mean = len(values), sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (n - 1) if n > 1 else math.nan
    return mean, Z95 * math.sqrt(variance / n)


def paired_interval(gained: int, lost: int, n: int) -> tuple[float, float]:
    """95 % interval of the difference of two shares of the same n items, of which `gained` count in the first
    alone and `lost` in the second alone: Agresti and Min's, which adds half an item of each kind."""
    mean = (gained - lost) / (n + 2)
    half = Z95 * math.sqrt(gained + lost + 1 - (gained - lost) ** 2 / (n + 2)) / (n + 2)
    return mean - half, mean + half


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [titles, ["---"] * len(titles), *rows])
