"""Which latents of an SAE carry refusal: gradient attribution, with what they do to truthfulness filtered out.

    a_f(metric) = E_prompts  sum_t  f_t * < W_dec[f], d metric / d z_t >

    metric_ref  = log P(refusal) - log P(compliance)      metric_hall = log P(right) - log P(wrong)
    R = the n latents of largest a_ref > 0 with |zscore(a_hall)| <= tau * zscore(a_ref)

The SAE stands in the model with its error term kept, z = x_hat + (z - x_hat).detach(): the forward is unchanged, and
z is linear in every latent, so that d metric / d f_t is <W_dec[f], d metric / d z_t> and one backward of the ordinary
model gives it for all latents of all layers. Padding, the first token of a sequence and BOS are left out.

With steps > 1 the gradient is averaged on the way from ablated latents to the clean ones (integrated gradients):

    a_f = E sum_t (f_t - f_t^abl) * mean_i < W_dec[f], d metric / d z_t at f^abl + (i + 1/2)/steps (f - f^abl) >

Sources: Yeo et al., arXiv 2505.23556 (integrated gradients for refusal latents); Marks et al., arXiv 2403.19647 (error
term). The filter and its defaults are this package's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..edits import edit_z
from ..hooks import HeadSelection
from ..prompts.chat import AnswerBatch, Chat, answer_log_probs, by_length, device_of
from ..prompts.records import ContrastPair
from ..sae import TopKSAE
from .basis import RefusalBasis
from .intervening import content_mask
from .site_sae import SiteSAE, site_saes


@dataclass(eq=False)
class LayerFeatures:
    """One layer's attribution.

    Attributes:
        a_ref, a_hall: fp32 [n_latents]; a_hall is None where no hallucination pairs were given.
        mass: fp32 [n_latents], the mean of f_t over the content tokens of the refusal pairs.
        refusal: R, latents of falling a_ref.
        filtered: latents that the hallucination filter kept out of R, of falling a_ref, at most 32.
        fires: bool [n_latents]: fired on some pair. z-scores are over these.
    """

    a_ref: Tensor
    a_hall: Tensor | None
    mass: Tensor
    refusal: list[int]
    filtered: list[int]
    fires: Tensor


@dataclass(eq=False)
class FeatureReport:
    """What `refusal_features` found: {layer: LayerFeatures} and the settings it was found with."""

    layers: dict[int, LayerFeatures]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def features(self) -> dict[int, list[int]]:
        """Layer -> R."""
        return {layer: found.refusal for layer, found in self.layers.items()}

    def table(self, top: int = 10) -> str:
        """The `top` latents of every R as text."""
        lines = ["layer  latent      a_ref     a_hall       mass"]
        for layer, found in self.layers.items():
            for f in found.refusal[:top]:
                hall = "-" if found.a_hall is None else f"{float(found.a_hall[f]):.4f}"
                lines.append(f"{layer:5d}{f:8d}{float(found.a_ref[f]):11.4f}{hall:>11}{float(found.mass[f]):11.5f}")
            if len(found.refusal) > top:
                lines.append(f"{layer:5d}  ... {len(found.refusal) - top} more")
            if not found.refusal:
                lines.append(f"{layer:5d}  no latent has a_ref > 0 and passes the filter")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold: per layer R and the filtered latents with their figures, and the settings."""

        def row(found: LayerFeatures, f: int) -> dict[str, Any]:
            return {
                "latent": f,
                "a_ref": float(found.a_ref[f]),
                "a_hall": None if found.a_hall is None else float(found.a_hall[f]),
                "mass": float(found.mass[f]),
            }

        layers = {
            str(layer): {
                "refusal": [row(found, f) for f in found.refusal],
                "filtered": [row(found, f) for f in found.filtered],
                "latents_that_fire": int(found.fires.sum()),
                "sum_a_ref": float(found.a_ref.sum()),
            }
            for layer, found in self.layers.items()
        }
        return {"layers": layers, "settings": self.settings}


class _Sums:
    """Running sums over pairs of one layer, on the SAE's device: attribution in fp64, activation, what fired."""

    def __init__(self, site: SiteSAE) -> None:
        n, device = site.sae.config.n_latents, site.sae.W_enc.device
        self.attribution = torch.zeros(n, dtype=torch.float64, device=device)
        self.activation = torch.zeros(n, dtype=torch.float64, device=device)
        self.tokens = 0

    def add_attribution(self, values: Tensor, indices: Tensor, slopes: Tensor, sign: float) -> None:
        self.attribution.index_add_(0, indices.flatten(), sign * (values * slopes).double().flatten())

    def add_activation(self, values: Tensor, indices: Tensor) -> None:
        self.activation.index_add_(0, indices.flatten(), values.double().flatten())
        self.tokens += values.shape[0]


@torch.no_grad()
def attribute(
    model: nn.Module,
    chat: Chat,
    sites: Mapping[int, SiteSAE],
    pairs: Sequence[ContrastPair],
    *,
    steps: int = 1,
    ablation: RefusalBasis | None = None,
    close: bool = True,
    batch_size: int = 16,
    progress: str | None = None,
) -> dict[int, tuple[Tensor, Tensor]]:
    """{layer: (a [n_latents], mean activation [n_latents])}, both fp32, for log P(chosen) - log P(rejected).

    The two completions are two sequences; the metric's sum over both falls apart into a sum over each, with the sign of
    the completion. log P sums over a completion's tokens, with `close` the end of turn too. See `refusal_features`.
    """
    from tqdm.auto import tqdm

    signed = [(chat.encode(pair.prompt, pair.chosen, close), 1.0) for pair in pairs]
    signed += [(chat.encode(pair.prompt, pair.rejected, close), -1.0) for pair in pairs]
    directions = {layer: site.directions() for layer, site in sites.items()}
    sums = {layer: _Sums(site) for layer, site in sites.items()}
    training = [module for module in model.modules() if module.training]
    model.eval()
    bar = tqdm(total=len(signed), desc=progress, unit="answer", disable=progress is None, leave=False)
    try:
        for rows in by_length([len(e.ids) for e, _ in signed], batch_size):
            batch = chat.batch([signed[i][0] for i in rows])
            signs = torch.tensor([signed[i][1] for i in rows])
            _add_batch(model, batch, signs, content_mask(chat, batch.inputs), sites, directions, sums, steps, ablation)
            bar.update(len(rows))
    finally:
        bar.close()
        for module in training:
            module.training = True
    return {
        layer: ((s.attribution / len(pairs)).float(), (s.activation / max(1, s.tokens)).float())
        for layer, s in sums.items()
    }


def _add_batch(
    model: nn.Module,
    batch: AnswerBatch,
    signs: Tensor,
    content: Tensor,
    sites: Mapping[int, SiteSAE],
    directions: Mapping[int, Tensor],
    sums: Mapping[int, _Sums],
    steps: int,
    ablation: RefusalBasis | None,
) -> None:
    clean, slopes_of = _gradients(model, batch, signs, dict.fromkeys(sites))
    for layer, site in sites.items():
        d = directions[layer]
        rows = content.to(d.device)
        z = clean[layer][rows.to(clean[layer].device)]
        values, indices = site.encode(z)
        sums[layer].add_activation(values, indices)
        gradient = slopes_of[layer]
        base: tuple[Tensor, Tensor] | None = None
        if steps > 1:
            if ablation is not None:
                u = ablation.z[layer].to(z.device)
                base = site.encode(z.float() - (z.float() @ u) @ u.T)
            gone = -site.write(values, indices, d) + (0 if base is None else site.write(*base, d))
            shift = torch.zeros(clean[layer].shape, dtype=torch.float32, device=d.device)
            shift[rows] = gone.detach()
            gradient = torch.zeros_like(shift)
            for i in range(steps):
                moved = shift * (1 - (i + 0.5) / steps)
                gradient += _gradients(model, batch, signs, {layer: moved})[1][layer].to(gradient) / steps
        g = gradient.to(d)[rows]
        sums[layer].add_attribution(values, indices, _slopes(g, d, indices), 1.0)
        if base is not None:
            sums[layer].add_attribution(*base, _slopes(g, d, base[1]), -1.0)


def _slopes(gradient: Tensor, directions: Tensor, indices: Tensor) -> Tensor:
    """<directions[indices], gradient>: [N, width], [F, width], [N, k] -> [N, k]."""
    # Token by token blocks: the gathered rows are [tokens, k, width].
    chunk = max(1, 2**24 // max(1, indices.shape[-1] * directions.shape[1]))
    parts = [
        torch.einsum("nkd,nd->nk", directions[i], g)
        for i, g in zip(indices.split(chunk), gradient.split(chunk), strict=True)
    ]
    return torch.cat(parts) if parts else indices.to(gradient.dtype)


def _gradients(
    model: nn.Module, batch: AnswerBatch, signs: Tensor, shifts: Mapping[int, Tensor | None]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """({layer: z}, {layer: d metric / d z}), each [rows, tokens, width], of z + shift at the layers of `shifts`."""
    at: dict[int, Tensor] = {}

    def watch(layer: int, shift: Tensor | None, z: Tensor) -> Tensor:
        if shift is not None:
            z = z + shift.to(z)
        # The lowest layer starts the graph, whether or not the parameters want gradients.
        at[layer] = z if z.requires_grad else z.detach().requires_grad_()
        return at[layer]

    edits = {layer: _bind(watch, layer, shift) for layer, shift in shifts.items()}
    device = device_of(model)
    with torch.enable_grad(), edit_z(model, edits):
        logits = model(**batch.to(device).inputs, use_cache=False).logits
        metric = (answer_log_probs(logits, batch) * signs.to(logits.device)).sum()
        layers = list(at)
        gradients = torch.autograd.grad(metric, [at[layer] for layer in layers])
    return {layer: at[layer].detach() for layer in layers}, dict(zip(layers, gradients, strict=True))


def _bind(function: Any, layer: int, shift: Tensor | None) -> Any:
    return lambda z: function(layer, shift, z)


def refusal_features(
    model: nn.Module,
    chat: Chat,
    saes: Mapping[int, TopKSAE],
    refusal_pairs: Sequence[ContrastPair],
    hallucination_pairs: Sequence[ContrastPair] | None = None,
    *,
    n: int = 32,
    tau: float = 0.5,
    steps: int = 1,
    ablation: RefusalBasis | None = None,
    heads: HeadSelection = None,
    refusal_beginnings: bool = False,
    batch_size: int = 16,
    progress: bool = False,
) -> FeatureReport:
    """The latents that push towards refusing and do not move truthfulness; the formulas are in this module's docstring.

    Args:
        model: a transformers causal LM, bare or wrapped by PEFT; left as it was.
        saes: {layer: SAE of that layer's z}. Every layer is judged on its own.
        refusal_pairs: chosen is the refusal, rejected the compliance.
        hallucination_pairs: chosen is right, rejected wrong; None switches the filter off.
        n: size of R per layer, at most.
        tau: how much truthfulness a refusal latent may carry: |zscore(a_hall)| <= tau * zscore(a_ref), z-scores over
            the latents that fire on any pair.
        steps: 1: the gradient at the clean latents times the latent. More: integrated gradients, `steps` more passes a
            layer and batch.
        ablation: for steps > 1, directions whose removal from z gives the ablated latents where the path begins (a
            `mean-difference` basis); None: it begins where all latents are 0.
        heads: count only what the latents write into these heads.
        refusal_beginnings: the refusal pairs' completions are beginnings (AdvBench's targets): no end of turn is
            scored after them.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    for name, count in (("n", n), ("steps", steps), ("batch_size", batch_size)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name}: expected an integer from 1 on, got {count!r}")
    if not tau >= 0:
        raise ValueError(f"tau: expected 0 or more, got {tau!r}")
    if not refusal_pairs or (hallucination_pairs is not None and not hallucination_pairs):
        raise ValueError("refusal_pairs, hallucination_pairs: expected at least one pair, got none")
    sites = site_saes(model, saes, heads)
    if ablation is not None:
        if steps == 1:
            raise ValueError("ablation: expected None with steps = 1, which integrates nothing")
        if missing := sorted(set(sites) - set(ablation.z)):
            raise ValueError(f"ablation: expected directions of layers {list(sites)}, got none of {missing}")
        ablation.check(model)
    settings: dict[str, Any] = {"steps": steps, "ablation": ablation, "batch_size": batch_size}
    close = not refusal_beginnings
    ref = attribute(model, chat, sites, refusal_pairs, close=close, progress="a_ref" if progress else None, **settings)
    hall = None
    if hallucination_pairs is not None:
        hall = attribute(model, chat, sites, hallucination_pairs, progress="a_hall" if progress else None, **settings)
    layers = {}
    for layer, (a_ref, mass) in ref.items():
        a_hall, other_mass = (None, mass) if hall is None else hall[layer]
        fires = (mass > 0) | (other_mass > 0)
        chosen, filtered = select(a_ref, a_hall, fires, n, tau)
        layers[layer] = LayerFeatures(a_ref, a_hall, mass, chosen, filtered, fires)
    return FeatureReport(
        layers,
        {
            "n": n,
            "tau": tau if hall is not None else None,
            "steps": steps,
            "refusal_beginnings": refusal_beginnings,
            "path_from": None if steps == 1 else "zero latents" if ablation is None else repr(ablation),
            "refusal_pairs": len(refusal_pairs),
            "hallucination_pairs": None if hallucination_pairs is None else len(hallucination_pairs),
        },
    )


def select(a_ref: Tensor, a_hall: Tensor | None, fires: Tensor, n: int, tau: float) -> tuple[list[int], list[int]]:
    """(R, up to 32 latents of R's kind that the filter kept out), both of falling a_ref [n_latents]."""
    candidates = fires & (a_ref > 0)
    passes = candidates
    if a_hall is not None:
        passes = candidates & (_zscore(a_hall, fires).abs() <= tau * _zscore(a_ref, fires))
    order = torch.sort(a_ref, descending=True, stable=True).indices
    return order[passes[order]][:n].tolist(), order[(candidates & ~passes)[order]][:32].tolist()


def _zscore(a: Tensor, among: Tensor) -> Tensor:
    chosen = a[among].double()
    if not len(chosen):
        return torch.zeros_like(a, dtype=torch.float64)
    return (a.double() - chosen.mean()) / chosen.std(correction=0).clamp_min(torch.finfo(torch.float64).tiny)
