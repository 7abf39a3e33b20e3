"""Quality of SAEs on held-out tokens: how well they reconstruct z, and what the model loses by reading x_hat instead.

Per layer, over all tokens but padding, the first of each sequence and BOS, which training leaves out as well:

    fvu                 sum ||x - x_hat||^2 / sum ||x - mean x||^2, raw scale, mean over all the tokens
    explained_variance  1 - fvu
    cosine              mean cosine similarity of x and x_hat
    l0                  mean number of values > 0 per token
    silent_fraction     share of the latents that fire on none of these tokens
    dead_fraction       share that counted as dead when training ended, from the SAE's metadata; None if unknown
    ce_clean, ce_spliced, ce_zero
                        next-token cross entropy in nats: untouched; z replaced by x_hat; z replaced by 0
    loss_recovered      (ce_zero - ce_spliced) / (ce_zero - ce_clean), 1 = nothing lost; None where zeroing z costs
                        nothing, because then the ratio says nothing

"All layers" splices every SAE at once. Loss recovered: Bricken et al. 2023; Kissane et al., arXiv 2406.17759.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .capturing import capture, splice
from .sae import TopKSAE

Batch = Mapping[str, Tensor]
Edits = dict[int, Callable[[Tensor], Tensor]]

# Below this many nats, removing z altogether hardly changes the loss and the ratio is noise.
LEAST_EFFECT = 1e-2


class _Reconstruction:
    """Running sums in fp64 for one layer: x has a mean far from 0, and sum x^2 - (sum x)^2 / N cancels in fp32."""

    def __init__(self, sae: TopKSAE) -> None:
        self.sae = sae
        device = sae.W_enc.device
        self.n_tokens = 0
        self.sum_x = torch.zeros(sae.config.d_in, dtype=torch.float64, device=device)
        self.sum_xx, self.sum_ee, self.cosine, self.fired = torch.zeros(4, dtype=torch.float64, device=device)
        self.fire_counts = torch.zeros(sae.config.n_latents, dtype=torch.int64, device=device)

    def add(self, x: Tensor, backend: str | None) -> None:
        x = x.to(self.sum_x.device)
        values, indices = self.sae.encode(x, backend=backend)
        x, x_hat = x.double(), self.sae.decode(values, indices, backend=backend).double()
        positive = values > 0
        self.n_tokens += x.shape[0]
        self.sum_x += x.sum(0)
        self.sum_xx += x.square().sum()
        self.sum_ee += (x - x_hat).square().sum()
        self.cosine += nn.functional.cosine_similarity(x, x_hat, dim=1).sum()
        self.fired += positive.sum()
        self.fire_counts.scatter_add_(0, indices.flatten(), positive.flatten().long())

    def result(self) -> dict[str, Any]:
        spread = float(self.sum_xx - self.sum_x.square().sum() / self.n_tokens)
        fvu = float(self.sum_ee) / spread if spread > 0 else math.nan
        return {
            "fvu": fvu,
            "explained_variance": 1 - fvu,
            "cosine": float(self.cosine) / self.n_tokens,
            "l0": float(self.fired) / self.n_tokens,
            "silent_fraction": float((self.fire_counts == 0).double().mean()),
            "dead_fraction": self.sae.config.metadata.get("dead_fraction"),
        }


@torch.no_grad()
def evaluate(
    model: nn.Module,
    saes: Mapping[int, TopKSAE],
    batches: Sequence[Batch],
    *,
    bos_token_id: int | None = None,
    loss_after: int | None = None,
    backend: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """The figures of this module's docstring.

    Args:
        model: a transformers causal LM; left as it was.
        saes: {layer: SAE of that layer's o_proj input}.
        batches: held-out batches with input_ids and, where there is padding, attention_mask, each [sequences, length].
        bos_token_id: the tokenizer's, if it has one; tokens with it are left alone.
        loss_after: count the cross entropy only where this token came before in the same document (the token that opens
            an answer, for a model that never learned to predict prompts). None: everywhere.
        backend: of the operators.

    Returns a dict that JSON can hold: {"tokens", "layers": {"1": {...}, ...}, "all_layers": {...}}; "all_layers" (cross
    entropies and loss_recovered) only for more than one SAE. Raises ValueError without SAEs or batches.
    """
    if not saes or not batches:
        raise ValueError(
            f"evaluate: expected at least one SAE and one batch; got {len(saes)} SAEs, {len(batches)} batches"
        )
    layers = sorted(saes)
    sums = {layer: _Reconstruction(saes[layer]) for layer in layers}
    positions = [content_positions(batch, bos_token_id) for batch in batches]
    bar = partial(tqdm, total=len(batches), unit="batch", disable=not progress, leave=False)
    with capture(model, layers=layers) as cap:
        for batch, kept in bar(zip(batches, positions, strict=True), desc="evaluating SAEs"):
            for layer, z in cap.run(batch, positions=kept).items():
                sums[layer].add(z, backend)

    groups: dict[str, list[int]] = {str(layer): [layer] for layer in layers}
    if len(layers) > 1:
        groups["all_layers"] = layers
    edits: dict[tuple[str, str], Edits] = {("", "ce_clean"): {}}
    for group, members in groups.items():
        edits[group, "ce_spliced"] = {layer: _reconstructor(saes[layer], backend) for layer in members}
        edits[group, "ce_zero"] = dict.fromkeys(members, torch.zeros_like)
    totals = dict.fromkeys(edits, 0.0)
    n_predicted = 0
    training = model.training
    model.eval()
    try:
        for batch, kept in bar(zip(batches, positions, strict=True), desc="evaluating the spliced model"):
            targets = next_tokens(batch, bos_token_id, loss_after)
            for key, functions in edits.items():
                with splice(model, functions, positions=kept) if functions else contextlib.nullcontext():
                    nats, count = _cross_entropy(model, batch, targets)
                totals[key] += nats
            n_predicted += count
    finally:
        model.train(training)

    clean = totals["", "ce_clean"] / max(n_predicted, 1)
    report: dict[str, Any] = {"tokens": sums[layers[0]].n_tokens, "layers": {}}
    for group, members in groups.items():
        spliced = totals[group, "ce_spliced"] / max(n_predicted, 1)
        zero = totals[group, "ce_zero"] / max(n_predicted, 1)
        figures: dict[str, Any] = {
            "ce_clean": clean,
            "ce_spliced": spliced,
            "ce_zero": zero,
            "loss_recovered": (zero - spliced) / (zero - clean) if zero - clean > LEAST_EFFECT else None,
        }
        if group == "all_layers":
            report["all_layers"] = figures
        else:
            report["layers"][group] = sums[members[0]].result() | figures
    return report


def content_positions(batch: Batch, bos_token_id: int | None = None) -> Tensor:
    """bool [sequences, length]: the real tokens but the first of each sequence and BOS.

    Those are attention sinks: outliers without content, left out of training by `ActivationBuffer` too.
    """
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    kept = mask.bool() & (mask.cumsum(1) != 1)
    return kept if bos_token_id is None else kept & (ids != bos_token_id)


def _reconstructor(sae: TopKSAE, backend: str | None) -> Callable[[Tensor], Tensor]:
    def reconstruct(z: Tensor) -> Tensor:
        return sae(z.to(sae.W_enc.device), backend=backend).to(z)

    return reconstruct


def next_tokens(batch: Batch, bos_token_id: int | None = None, loss_after: int | None = None) -> Tensor:
    """int64 [sequences, length - 1]: the token each position has to predict, -100 where none is counted.

    Padding is on neither side of a prediction. `loss_after` as in `evaluate`; BOS begins a new document.
    """
    ids = batch["input_ids"]
    targets = ids[:, 1:].clone()
    if (mask := batch.get("attention_mask")) is not None:
        targets[~(mask[:, 1:].bool() & mask[:, :-1].bool())] = -100
    if loss_after is not None:
        position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)

        def last_seen(token: int) -> Tensor:
            return torch.where(ids == token, position, -1).cummax(1).values

        opened = last_seen(loss_after)
        open_here = opened >= 0 if bos_token_id is None else opened > last_seen(bos_token_id)
        targets[~open_here[:, :-1]] = -100
    return targets


def _cross_entropy(model: nn.Module, batch: Batch, targets: Tensor) -> tuple[float, int]:
    """Summed cross entropy of `targets` in nats, and how many there are."""
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in batch.items() if name in ("input_ids", "attention_mask")}
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    nats = nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), targets.reshape(-1).to(device), reduction="sum"
    )
    return float(nats), int((targets != -100).sum())


def format_table(report: Mapping[str, Any]) -> str:
    """The report as a plain text table, one row per layer."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None or value != value else format(value, form)

    header = (
        "layer",
        "FVU",
        "expl. var.",
        "L0",
        "dead",
        "silent here",
        "CE clean",
        "CE spliced",
        "CE zeroed",
        "loss recovered",
    )
    rows = [header]
    entries = [*report["layers"].items()]
    if "all_layers" in report:
        entries.append(("all", report["all_layers"]))
    for name, figures in entries:
        rows.append(
            (
                str(name),
                number(figures.get("fvu"), ".4f"),
                number(figures.get("explained_variance"), ".4f"),
                number(figures.get("l0"), ".1f"),
                number(figures.get("dead_fraction"), ".1%"),
                number(figures.get("silent_fraction"), ".1%"),
                number(figures["ce_clean"], ".4f"),
                number(figures["ce_spliced"], ".4f"),
                number(figures["ce_zero"], ".4f"),
                number(figures["loss_recovered"], ".1%"),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    if any(figures["loss_recovered"] is None for _, figures in entries):
        lines.append(f"loss recovered -: zeroing z costs less than {LEAST_EFFECT} nats, too little for a ratio")
    return "\n".join(lines)
