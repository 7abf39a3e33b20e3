"""What a search for heads found: a score per head, the two top lists, and whether they share more than by chance.

    s_hall = mean over pairs of I(wrong) - I(right)        s_ref = mean over pairs of I(refusal) - I(harmful)

A head of large s_hall pushes towards wrong answers, one of large s_ref towards refusing. With K heads on either list
out of N, chance lists share K^2 / N on average, hypergeometrically distributed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor

from ..checkpoint import read_json, write_json

SetName = Literal["hallucination", "refusal"]
SETS: tuple[SetName, SetName] = ("hallucination", "refusal")
Mode = Literal["both", "exact", "screen"]
FORMAT = "refusal-kernels-heads-1"


@dataclass(frozen=True)
class InfluenceScore:
    """One of the two scores for all heads; fp64 [L, H], NaN where a head was not evaluated or has no o_proj.

    Attributes:
        sum, sum_se: mean over pairs and its standard error, in nats, log P summed over an answer's tokens.
        token, token_se: the same of log P per token: refusals and compliances differ in length.
    """

    sum: Tensor
    sum_se: Tensor
    token: Tensor
    token_se: Tensor

    @staticmethod
    def over_pairs(differences: Tensor, per_token: Tensor) -> InfluenceScore:
        """Both arguments fp64 [L, H, pairs]: I of the one completion minus I of the other."""

        def error(x: Tensor) -> Tensor:
            n = x.shape[-1]
            return x.std(-1) / math.sqrt(n) if n > 1 else torch.full(x.shape[:-1], math.nan, dtype=x.dtype)

        return InfluenceScore(differences.mean(-1), error(differences), per_token.mean(-1), error(per_token))


@dataclass(frozen=True)
class Overlap:
    """The heads that are on both top lists, beside what two random lists of this length would share.

    Attributes:
        heads: (layer, head), in the order of s_hall.
        k, n_heads: length of either list, number of heads they were drawn from.
        jaccard: heads shared / heads on either list.
        expected: K^2 / N, the mean number of shared heads of random lists.
        expected_jaccard: the mean Jaccard index of random lists.
        p_value: probability that random lists share at least as many.
    """

    heads: tuple[tuple[int, int], ...]
    k: int
    n_heads: int
    jaccard: float
    expected: float
    expected_jaccard: float
    p_value: float

    @staticmethod
    def of(hallucination: list[tuple[int, int]], refusal: list[tuple[int, int]], n_heads: int) -> Overlap:
        k = len(hallucination)
        shared = tuple(head for head in hallucination if head in set(refusal))
        chance = [math.comb(k, x) * math.comb(n_heads - k, k - x) / math.comb(n_heads, k) for x in range(k + 1)]
        return Overlap(
            heads=shared,
            k=k,
            n_heads=n_heads,
            jaccard=len(shared) / (2 * k - len(shared)),
            expected=k * k / n_heads,
            expected_jaccard=sum(p * x / (2 * k - x) for x, p in enumerate(chance)),
            p_value=min(1.0, sum(chance[len(shared) :])),
        )


@dataclass
class HeadScores:
    """What `find_heads` returns.

    Attributes:
        mode: "exact", "screen" or "both". Rankings come from the exact scores, under "screen" from the screen's; under
            "both" only heads that were refined have exact scores, and only they are ranked.
        k: length of the top lists.
        exact, screen: {"hallucination": s_hall, "refusal": s_ref}; empty where the mode has none.
        provenance: model, pairs, settings, versions, seconds.
    """

    mode: Mode
    k: int
    exact: dict[SetName, InfluenceScore] = field(default_factory=dict)
    screen: dict[SetName, InfluenceScore] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def ranked(self) -> dict[SetName, InfluenceScore]:
        """The scores that the rankings use."""
        return self.screen if self.mode == "screen" else self.exact

    @property
    def s_hall(self) -> Tensor:
        """fp64 [L, H], summed log P; NaN for heads that are not ranked."""
        return self.ranked["hallucination"].sum

    @property
    def s_ref(self) -> Tensor:
        """fp64 [L, H], summed log P; NaN for heads that are not ranked."""
        return self.ranked["refusal"].sum

    @property
    def n_heads(self) -> int:
        """Heads that were candidates: all of the layers that have o_proj."""
        scores = self.screen or self.exact
        return int((~scores["refusal"].sum.isnan()).sum())

    def top(self, which: SetName, k: int | None = None, by: Literal["sum", "token"] = "sum") -> list[tuple[int, int]]:
        """The `k` heads (layer, head) of largest score, best first; ties to the earlier head.

        Raises:
            ValueError: more heads than were ranked.
        """
        score: Tensor = getattr(self.ranked[which], by)
        k = self.k if k is None else k
        ranked = int((~score.isnan()).sum())
        if not 1 <= k <= ranked:
            raise ValueError(f"k: expected 1 to {ranked}, the number of ranked heads, got {k}")
        order = score.flatten().nan_to_num(nan=-math.inf).sort(descending=True, stable=True).indices[:k].tolist()
        return [divmod(i, score.shape[1]) for i in order]

    def overlap(self, k: int | None = None, by: Literal["sum", "token"] = "sum") -> Overlap:
        """Top-K(s_hall) and top-K(s_ref) compared."""
        return Overlap.of(self.top("hallucination", k, by), self.top("refusal", k, by), self.n_heads)

    def spearman(self, which: SetName) -> float | None:
        """Rank correlation of screen and exact over the heads that have both; None where fewer than 3 have."""
        if not self.exact or not self.screen:
            return None
        pair = torch.stack([self.screen[which].sum.flatten(), self.exact[which].sum.flatten()])
        return spearman(*pair[:, ~pair.isnan().any(0)])

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data; NaN becomes None in a file."""
        overlap = self.overlap()

        def plain(scores: dict[SetName, InfluenceScore]) -> dict[str, Any]:
            return {s: {name: value.tolist() for name, value in vars(score).items()} for s, score in scores.items()}

        return {
            "format": FORMAT,
            "mode": self.mode,
            "k": self.k,
            "top": {which: [list(head) for head in self.top(which)] for which in SETS},
            "overlap": vars(overlap) | {"heads": [list(head) for head in overlap.heads]},
            "overlap_per_token": {"heads": [list(head) for head in self.overlap(by="token").heads]},
            "spearman_screen_exact": {which: self.spearman(which) for which in SETS},
            "provenance": self.provenance,
            "exact": plain(self.exact),
            "screen": plain(self.screen),
        }

    def save(self, path: str | PathLike[str]) -> None:
        """As JSON, atomically."""
        write_json(path, self.as_dict())

    @staticmethod
    def load(path: str | PathLike[str]) -> HeadScores:
        """What `save` wrote. FileNotFoundError; ValueError for another file."""
        data = read_json(path)
        if data.get("format") != FORMAT:
            raise ValueError(f"{path} must be a file of head scores ({FORMAT}); got format {data.get('format')!r}")

        def scores(name: str) -> dict[SetName, InfluenceScore]:
            return {
                which: InfluenceScore(**{field_: _tensor(data[name][which][field_]) for field_ in _FIELDS})
                for which in SETS
                if which in data[name]
            }

        try:
            loaded = HeadScores(data["mode"], int(data["k"]), scores("exact"), scores("screen"), data["provenance"])
            shapes = {value.shape for s in loaded.ranked.values() for value in vars(s).values()}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is a damaged file of head scores: {error!r}") from None
        if len(shapes) != 1 or set(loaded.ranked) != set(SETS):
            raise ValueError(f"{path} is a damaged file of head scores: its tables do not match")
        return loaded


_FIELDS = ("sum", "sum_se", "token", "token_se")


def _tensor(rows: list[list[float | None]]) -> Tensor:
    return torch.tensor([[math.nan if v is None else float(v) for v in row] for row in rows], dtype=torch.float64)


def spearman(a: Tensor, b: Tensor) -> float | None:
    """Spearman's rank correlation of two vectors, ties sharing their mean rank; None for fewer than 3 values or none
    that differ."""
    if len(a) < 3:
        return None
    ranks = torch.stack([_ranks(a), _ranks(b)])
    ranks = ranks - ranks.mean(1, keepdim=True)
    norms = ranks.norm(dim=1)
    return None if norms.min() == 0 else float(ranks[0] @ ranks[1] / (norms[0] * norms[1]))


def _ranks(x: Tensor) -> Tensor:
    _, where, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[where]
