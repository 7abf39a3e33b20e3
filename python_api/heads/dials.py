"""Three ways to turn a model's truthfulness, each with a strength, each beside controls that only look the same.

* `iti`: inference-time intervention (arXiv 2306.03341). z of a head gets alpha * sigma * d added: d the unit difference
  of its mean z after right and after wrong answers, sigma the standard deviation of z along d.
* `scale`: z of the hallucination heads is multiplied by 1 ... 0.
* `lora`: a rank-1 LoRA is fine-tuned on wrong answers, and beta times its update is subtracted (`adapter`).

The first two act on z at the positions that predict an answer, the last prompt token included; the third is a change
of weights and acts everywhere. Controls are random heads, random directions of the same norm, random updates of the
same norm. A positive control, `refusal`, scales the refusal heads: it shows that ASR can move, and what restoring heads
looks like where they carry refusal for certain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..capturing import capture
from ..edits import edit_z
from ..hooks import AttentionGeometry, Positions, ZEdit, attention_geometry
from ..prompts.chat import Chat, by_length
from ..prompts.records import ContrastPair

Head = tuple[int, int]
Apply = Callable[[float, Positions], AbstractContextManager[None]]


@dataclass(frozen=True)
class Dial:
    """Something that is turned.

    Attributes:
        name: "iti", "scale", "lora" or "refusal".
        control: "" for the dial itself; else what is random about it.
        seed: of the control.
        strengths: where it is measured; the untouched model is no part of them.
        apply: ``apply(strength, positions)``, a context manager under which the model is changed.
        what: the heads or modules it acts on, in words.
    """

    name: str
    control: str
    seed: int
    strengths: tuple[float, ...]
    apply: Apply
    what: str

    def label(self, strength: float) -> str:
        """What names a point of this dial in files."""
        return f"{self.name}/{self.control or 'dial'}/{self.seed}/{strength:g}"


def spell(heads: Sequence[Head]) -> str:
    """ "3.6, 3.1": layer.head."""
    return ", ".join(f"{layer}.{head}" for layer, head in heads)


def random_heads(geometry: AttentionGeometry, n: int, without: Sequence[Head], seed: int) -> list[Head]:
    """`n` heads that are not among `without`, as far as there are so many."""
    rest = [(layer, h) for layer in geometry.layers for h in range(geometry.n_heads) if (layer, h) not in set(without)]
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rest[i] for i in order[:n]]


# ---------------------------------------------------------------------------------------------------------- scaling


def scale_dial(
    model: nn.Module,
    heads: Sequence[Head],
    factors: Sequence[float],
    control: str = "",
    seed: int = 0,
    name: str = "scale",
) -> Dial:
    """z of `heads` times a factor."""
    geometry = attention_geometry(model)
    columns = {layer: torch.zeros(geometry.n_heads * geometry.head_dims[layer]) for layer, _ in heads}
    for layer, head in heads:
        columns[layer].view(geometry.n_heads, -1)[head] = 1.0

    def apply(factor: float, positions: Positions) -> AbstractContextManager[None]:
        return edit_z(model, {layer: partial(_times, 1 + (factor - 1) * c) for layer, c in columns.items()}, positions)

    return Dial(name, control, seed, tuple(factors), apply, f"heads {spell(heads)}")


def _times(factor: Tensor, z: Tensor) -> Tensor:
    return z * factor.to(z)


# ---------------------------------------------------------------------------------------------- truthful directions


@dataclass(frozen=True)
class TruthfulDirections:
    """Per head, where right and wrong answers differ.

    Attributes:
        directions: fp32 [L, H, head_dim], unit vectors from wrong to right (0 where the layer has no o_proj).
        sigma: fp32 [L, H], standard deviation of z along them, right and wrong answers together.
        accuracy: fp32 [L, H], share of held-out halves' activations on the right side of the midpoint: a mass-mean
            probe, two folds over pairs.
    """

    directions: Tensor
    sigma: Tensor
    accuracy: Tensor

    def top(self, k: int) -> list[Head]:
        """The `k` heads of largest probe accuracy, ties to the earlier head."""
        order = self.accuracy.flatten().sort(descending=True, stable=True).indices[:k].tolist()
        return [divmod(i, self.accuracy.shape[1]) for i in order]


def truthful_directions(
    model: nn.Module, chat: Chat, pairs: Sequence[ContrastPair], batch_size: int = 32
) -> TruthfulDirections:
    """From z at the last token of right (`chosen`) and wrong (`rejected`) answers.

    Raises:
        ValueError: fewer than 4 pairs, or layers whose heads differ in width.
    """
    if len(pairs) < 4:
        raise ValueError(f"pairs: expected at least 4 for a direction and its probe, got {len(pairs)}")
    geometry = attention_geometry(model)
    encoded = [chat.encode(p.prompt, answer, close=False) for p in pairs for answer in (p.chosen, p.rejected)]
    z = torch.zeros(geometry.n_layers, geometry.n_heads, len(encoded), geometry.head_dim)
    with capture(model, per_head=True) as cap:
        for rows in by_length([len(e.ids) for e in encoded], batch_size):
            batch = chat.batch([encoded[i] for i in rows])
            last = torch.zeros_like(batch.targets)
            last[torch.arange(len(rows)), batch.attention_mask.sum(1) - 1] = True
            for layer, values in cap.run(batch.inputs, positions=last).items():
                z[layer][:, rows] = values.float().cpu().transpose(0, 1)
    right, wrong = z[:, :, 0::2], z[:, :, 1::2]
    difference = right.mean(2) - wrong.mean(2)
    directions = difference / difference.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    sigma = torch.einsum("lhnd,lhd->lhn", z, directions).std(-1)
    folds = [
        _probe(right[:, :, i::2], wrong[:, :, i::2], right[:, :, 1 - i :: 2], wrong[:, :, 1 - i :: 2]) for i in (0, 1)
    ]
    return TruthfulDirections(directions, sigma, (folds[0] + folds[1]) / 2)


def _probe(right: Tensor, wrong: Tensor, other_right: Tensor, other_wrong: Tensor) -> Tensor:
    """Accuracy [L, H] on the other half of a probe along the difference of means of this half."""
    d = right.mean(2) - wrong.mean(2)
    middle = ((right.mean(2) + wrong.mean(2)) / 2 * d).sum(-1, keepdim=True)
    above = [torch.einsum("lhnd,lhd->lhn", z, d) > middle for z in (other_right, other_wrong)]
    return (above[0].float().mean(-1) + (~above[1]).float().mean(-1)) / 2


def iti_dial(
    model: nn.Module,
    found: TruthfulDirections,
    heads: Sequence[Head],
    alphas: Sequence[float],
    control: str = "",
    seed: int = 0,
    random_directions: bool = False,
) -> Dial:
    """alpha * sigma * direction added to z of `heads`; `random_directions` keeps sigma and draws unit vectors."""
    generator = torch.Generator().manual_seed(seed)
    shift: dict[int, Tensor] = {}
    for layer, head in heads:
        direction = found.directions[layer, head]
        if random_directions:
            direction = torch.nn.functional.normalize(torch.randn(direction.shape, generator=generator), dim=0)
        shift.setdefault(layer, torch.zeros(found.directions.shape[1:]))[head] = found.sigma[layer, head] * direction

    def apply(alpha: float, positions: Positions) -> AbstractContextManager[None]:
        edits: dict[int, ZEdit] = {layer: partial(_plus, alpha * v.flatten()) for layer, v in shift.items()}
        return edit_z(model, edits, positions)

    return Dial("iti", control, seed, tuple(alphas), apply, f"heads {spell(heads)}")


def _plus(shift: Tensor, z: Tensor) -> Tensor:
    return z + shift.to(z)
