"""Rates with the intervals that belong to them, and the difference of two rates on the same prompts.

    Wilson score interval:  (p + z²/2n ± z sqrt(p (1 - p)/n + z²/4n²)) / (1 + z²/n)

It holds where the plain p ± z sqrt(p (1 - p)/n) collapses: 0 of 520 means at most 0.7 %, not exactly 0.
Sources: Wilson 1927; Newcombe, Statistics in Medicine 17 (1998) 2635, method 10, for paired differences; McNemar 1947
in its exact binomial form.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


def wilson(hits: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """(low, high) of `hits / n` as fractions; 95 % for z = 1.96.

    `hits` may be a sum of scores between 0 and 1. Such scores vary no more than zeros and ones of the same mean, so the
    interval of their mean is then rather too wide than too narrow.

    Raises:
        ValueError: `n` below 1, or `hits` outside 0 ... n.
    """
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"hits: expected 0 to n with n >= 1, got {hits} of {n}")
    p, scale = hits / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    middle = p + z * z / (2 * n)
    # At the ends the terms cancel exactly, but not in floating point.
    low = 0.0 if hits == 0 else (middle - half) / scale
    high = 1.0 if hits == n else (middle + half) / scale
    return low, high


@dataclass(frozen=True)
class Rate:
    """`hits` of `n`, or the mean of `n` scores between 0 and 1 whose sum is `hits`; 95 % Wilson interval.

    Of nothing (n = 0) the value is NaN and the interval 0 to 1.
    """

    hits: float
    n: int

    def __post_init__(self) -> None:
        if self.n < 0 or not 0 <= self.hits <= self.n:
            raise ValueError(f"hits: expected 0 to n, got {self.hits} of {self.n}")

    @classmethod
    def of(cls, values: Iterable[float | bool]) -> Rate:
        """Of booleans, or of scores between 0 and 1."""
        known = list(values)
        # fsum of ones may not pass n, but a mean of ones that rounding has lifted would.
        return cls(min(math.fsum(known), len(known)) if known else 0, len(known))

    @property
    def value(self) -> float:
        return self.hits / self.n if self.n else math.nan

    @property
    def low(self) -> float:
        return wilson(self.hits, self.n)[0] if self.n else 0.0

    @property
    def high(self) -> float:
        return wilson(self.hits, self.n)[1] if self.n else 1.0

    def to_dict(self) -> dict[str, Any]:
        """value, low, high as fractions, hits and n."""
        hits = int(self.hits) if float(self.hits).is_integer() else self.hits
        return {"value": self.value, "low": self.low, "high": self.high, "hits": hits, "n": self.n}

    def __str__(self) -> str:
        """ "3.1 % [1.9, 5.0] of 520"."""
        if not self.n:
            return "- of 0"
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}] of {self.n}"


@dataclass(frozen=True)
class PairedDifference:
    """How a rate changed between two runs on the same prompts.

    Attributes:
        n: prompts.
        both, only_first, only_second: prompts that hit in both runs, or in one of them.
    """

    n: int
    both: int
    only_first: int
    only_second: int

    @property
    def value(self) -> float:
        """Rate of the second minus rate of the first."""
        return (self.only_second - self.only_first) / self.n

    @property
    def p_value(self) -> float:
        """Two-sided exact McNemar test: were the changed prompts as likely to change one way as the other?"""
        changed, fewer = self.only_first + self.only_second, min(self.only_first, self.only_second)
        if changed == 0:
            return 1.0
        tail = sum(math.comb(changed, i) for i in range(fewer + 1))
        return min(1.0, 2 * tail / 2**changed)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % (low, high) of `value`: Newcombe's hybrid of the two Wilson intervals with their correlation."""
        neither = self.n - self.both - self.only_first - self.only_second
        first, second = self.both + self.only_first, self.both + self.only_second
        p1, p2 = first / self.n, second / self.n
        (l1, u1), (l2, u2) = wilson(first, self.n), wilson(second, self.n)
        product = first * (self.n - first) * second * (self.n - second)
        cross = float(self.both * neither - self.only_first * self.only_second)
        cross = max(cross - self.n / 2, 0.0) if cross > 0 else cross  # Newcombe's continuity correction
        phi = cross / math.sqrt(product) if product else 0.0
        down, up = (p2 - l2, u1 - p1), (u2 - p2, p1 - l1)
        low, high = (math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b)) for a, b in (down, up))
        return max(-1.0, self.value - low), min(1.0, self.value + high)

    def to_dict(self) -> dict[str, Any]:
        low, high = self.interval
        counts = {"n": self.n, "only_first": self.only_first, "only_second": self.only_second}
        return {"value": self.value, "low": low, "high": high, "p_value": self.p_value, **counts}


def paired_difference(first: Sequence[bool], second: Sequence[bool]) -> PairedDifference:
    """The change from `first` to `second`, which hold one truth value per prompt in the same order.

    Raises:
        ValueError: different lengths, or nothing.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"second: expected as many values as first, at least 1; got {len(first)} and {len(second)}")
    pairs = [(bool(a), bool(b)) for a, b in zip(first, second, strict=True)]
    return PairedDifference(
        len(pairs), pairs.count((True, True)), pairs.count((True, False)), pairs.count((False, True))
    )
