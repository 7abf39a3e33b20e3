"""Where a refusal basis comes from: SAE latents, a difference of means, the span of activations, or chance.

    sae               left singular vectors of W_dec[R]^T, the input scale undone, R by `refusal_features`
    mean-difference   mean z of harmful prompts minus mean z of harmless ones (Arditi et al., arXiv 2406.11717), then
                      the leading directions of what is left of the single differences
    activation-svd    leading right singular vectors of the z of harmful prompts at the tokens of the model's own
                      refusals (X_s of SaLoRA, Li et al., arXiv 2501.01765)
    random            uniform over subspaces of the same rank: the control

All give one U [n_heads * head_dim, r] a layer, fp32, orthonormal, the most important direction first. With heads
selected, everything is computed on their columns and U is zero outside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

import refusal_kernels as rk

from ..hooks import HeadSelection, attention_geometry, head_columns, resolve_heads, resolve_layers
from ..prompts.chat import Chat
from ..prompts.records import ContrastPair, prompts_of, set_hash
from ..sae import TopKSAE
from .activations import Gram, Positions, activations, prompt_means
from .attribution import FeatureReport, refusal_features
from .basis import RefusalBasis
from .site_sae import site_saes

Source = Literal["sae", "mean-difference", "activation-svd", "random"]
SOURCES: tuple[Source, ...] = get_args(Source)

Prompts = Sequence[Any]
"""Records with a `prompt`, or strings."""


def find_basis(
    source: Source,
    model: nn.Module,
    chat: Chat,
    *,
    layers: Sequence[int] | None = None,
    heads: HeadSelection = None,
    rank: int | None = None,
    harmful: Prompts = (),
    benign: Prompts | None = None,
    twins: Sequence[tuple[str, str]] | None = None,
    pairs: Sequence[ContrastPair] | None = None,
    hallucination_pairs: Sequence[ContrastPair] | None = None,
    saes: Mapping[int, TopKSAE] | None = None,
    report: FeatureReport | None = None,
    positions: Positions | None = None,
    seed: int = 0,
    model_name: str | None = None,
    max_new_tokens: int = 24,
    batch_size: int = 32,
    progress: bool = False,
    **attribution: Any,
) -> RefusalBasis:
    """The directions of `source` at `layers`, with `twins` and provenance in the basis.

    Args:
        source: "sae", "mean-difference", "activation-svd" or "random".
        model: a transformers causal LM, bare or wrapped by PEFT; left as it was.
        layers: None: those of `saes` for "sae", for the others every layer.
        heads: use only these heads: a sequence for every layer or {layer: heads}. None: all.
        rank: directions per layer. May be None for "sae" only, where it caps what the SVD leaves of R.
        harmful: harmful prompts. "mean-difference" and "activation-svd" need them, or `twins`, or `pairs`.
        benign: harmless prompts, for "mean-difference" without twins.
        twins: (harmful, harmless) prompts; "mean-difference" takes the differences within them. They go into the basis
            for the pre-flight check, whatever the source.
        pairs, hallucination_pairs, saes, report, **attribution: "sae": what `refusal_features` takes (n, tau, steps,
            ablation), or its finished report. "activation-svd" takes the refusals from `pairs` if given.
        positions: "last": z at the last prompt token, one vector a prompt; "answer": z at the positions that predict
            the model's own greedy answer. Default: "last" for mean-difference, "answer" for activation-svd.
        seed: of the random directions.
        model_name: kept in the provenance; default: the name the model was loaded by.
        max_new_tokens: of the model's own answers.

    Raises:
        TypeError, ValueError: what the source needs and did not get, a rank that the width or the data cannot give,
            a layer whose R is empty.
    """
    if source not in SOURCES:
        raise ValueError(f"source: expected one of {', '.join(SOURCES)}; got {source!r}")
    if rank is None and source != "sae":
        raise ValueError(f"rank: expected an integer for source {source!r}, got None")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank: expected an integer from 1 on, got {rank!r}")
    if attribution and source != "sae":
        raise ValueError(f"{', '.join(attribution)}: expected with source 'sae' only, got source {source!r}")
    if positions not in (None, *get_args(Positions)):
        raise ValueError(f"positions: expected 'last' or 'answer', got {positions!r}")
    if layers is None and source == "sae" and saes:
        layers = sorted(saes)
    chosen = resolve_layers(model, layers)
    columns = _columns(model, chosen, heads)
    settings: dict[str, Any] = {"rank": rank, "seed": seed if source == "random" else None}
    common: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "progress": progress}
    used: dict[str, Sequence[Any]] = {}
    if source == "sae":
        if not saes or set(chosen) - set(saes):
            raise ValueError(f"saes: expected an SAE for each of the layers {chosen}, got {sorted(saes or {})}")
        saes = {layer: saes[layer] for layer in chosen}
        if report is None:
            if not pairs:
                raise ValueError("pairs: expected refusal pairs for source 'sae', got none")
            used = {"pairs": pairs, "hallucination_pairs": hallucination_pairs or ()}
            report = refusal_features(
                model, chat, saes, pairs, hallucination_pairs, heads=heads, progress=progress, **attribution
            )
        bases = basis_from_features(model, saes, report.features, heads=heads)
        if rank is not None:
            bases = {layer: u[:, :rank].contiguous() for layer, u in bases.items()}
        settings |= report.settings | {
            "latents": {str(layer): report.features[layer] for layer in chosen},
            "saes": {str(layer): sae_provenance(sae) for layer, sae in saes.items()},
        }
    elif source == "random":
        generator = torch.Generator().manual_seed(seed)
        small = {layer: _random(len(at), _fits(rank, len(at), layer), generator) for layer, at in columns.items()}
        bases = _embed(model, small, columns)
    else:
        harmful = harmful or [pair[0] for pair in twins or ()] or list(pairs or ())
        if not harmful:
            raise ValueError(f"harmful: expected harmful prompts, twins or pairs for source {source!r}, got none")
        where: Positions = positions or ("last" if source == "mean-difference" else "answer")
        settings |= {"positions": where}
        if source == "mean-difference":
            settings["of"] = "twins" if twins else "harmful and benign prompts"
            used = {"twins": twins} if twins else {"harmful": harmful, "benign": benign or ()}
            small = _mean_difference(model, chat, columns, rank, harmful, benign, twins, where, common)
        else:
            answers = None
            if where == "answer" and pairs:
                harmful, answers = list(pairs), [pair.chosen for pair in pairs]
            used = {"pairs": pairs} if pairs and answers else {"harmful": harmful}
            small = _activation_svd(model, chat, columns, rank, prompts_of(harmful), answers, where, common)
        bases = _embed(model, small, columns)
    provenance = {
        "source": source,
        "model": model_name or getattr(getattr(model, "config", None), "_name_or_path", None),
        "heads": _heads_text(model, chosen, heads),
        "settings": settings,
        "prompts": {name: {"n": len(p), "hash": set_hash(list(p))} for name, p in used.items() if p},
        "versions": versions(),
    }
    return RefusalBasis(bases, {}, list(twins or ()), provenance)


def basis_from_features(
    model: nn.Module,
    saes: Mapping[int, TopKSAE],
    features: Mapping[int, Sequence[int]],
    *,
    heads: HeadSelection = None,
    rtol: float = 1e-3,
) -> dict[int, Tensor]:
    """{layer: U}: an orthonormal basis of the span of the latents' decoder directions, input scale undone.

    U are the left singular vectors of W_dec[R]^T / input_scale with sigma_i > rtol * sigma_1, in falling sigma_i.
    ValueError for a layer without latents, or whose directions vanish on the selected heads.
    """
    bases = {}
    for layer, site in site_saes(model, {layer: saes[layer] for layer in features}, heads).items():
        chosen = list(features[layer])
        if not chosen:
            raise ValueError(f"features: expected at least one latent of layer {layer}, got none")
        vectors = site.directions()[chosen].T
        if not bool(vectors.any()):
            raise ValueError(f"features: the latents of layer {layer} write nothing into the selected heads")
        # Only the rows that are written to: rounding would leave traces in the others.
        rows = vectors.any(1)
        u = rk.orthonormal_basis(vectors[rows], rtol)
        bases[layer] = torch.zeros(len(rows), u.shape[1])
        bases[layer][rows.cpu()] = u.cpu()
    return bases


def random_like(basis: RefusalBasis, seed: int = 0) -> RefusalBasis:
    """Random directions of the same ranks in the same columns, shared where `basis` shares: the control of a basis."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[int, Tensor] = {}

    def once(u: Tensor) -> Tensor:
        if id(u) not in made:
            rows = u.cpu().any(1)  # zero outside selected heads stays zero
            new = torch.zeros(u.shape)
            new[rows] = _random(int(rows.sum()), u.shape[1], generator)
            made[id(u)] = new.to(u.device)
        return made[id(u)]

    z = {layer: once(u) for layer, u in basis.z.items()}
    inputs = {path: once(u) for path, u in basis.inputs.items()}
    return RefusalBasis(z, inputs, list(basis.twins), {"source": "random", "like": basis.provenance, "seed": seed})


def difference_basis(differences: Tensor, mean: Tensor, rank: int) -> Tensor:
    """Orthonormal U [m, rank], fp32: `mean` [m] first, then the leading directions of what is left of `differences`.

    Equivalent to: mean / |mean|, then the right singular vectors of differences [n, m] without their part along it.
    """
    if not 1 <= rank <= min(len(differences) + 1, differences.shape[1]):
        raise ValueError(
            f"rank: expected 1 to {min(len(differences) + 1, differences.shape[1])} from {len(differences)} prompts of "
            f"width {differences.shape[1]}, got {rank}"
        )
    differences, mean = differences.double(), mean.double()
    if not float(mean.norm()) > 0:
        raise ValueError("harmful, benign: expected prompts whose mean z differ, got equal means")
    first = (mean / mean.norm())[:, None]
    rest = differences - differences @ first @ first.T
    others = torch.linalg.svd(rest, full_matrices=False).Vh[: rank - 1].T
    # QR makes the join orthonormal to the last bit of fp64; its signs are arbitrary, the first one's is the mean's.
    u = torch.linalg.qr(torch.cat([first, others], 1)).Q
    u[:, 0] *= torch.sign(u[:, 0] @ first[:, 0])
    return u.float().contiguous()


def _mean_difference(
    model: nn.Module,
    chat: Chat,
    columns: Mapping[int, Tensor],
    rank: int | None,
    harmful: Prompts,
    benign: Prompts | None,
    twins: Sequence[tuple[str, str]] | None,
    where: Positions,
    common: Mapping[str, Any],
) -> dict[int, Tensor]:
    if twins:
        harmful, benign = [pair[0] for pair in twins], [pair[1] for pair in twins]
    if not benign:
        raise ValueError("benign: expected harmless prompts or twins for source 'mean-difference', got none")
    theirs, ours = (
        prompt_means(model, chat, columns, prompts_of(prompts), where, **common) for prompts in (harmful, benign)
    )
    out = {}
    for layer, z in theirs.items():
        # Without twins every harmful prompt is compared with the mean of the harmless ones.
        differences = z - (ours[layer] if twins else ours[layer].mean(0))
        mean = z.mean(0) - ours[layer].mean(0)
        out[layer] = difference_basis(differences, mean, _fits(rank, z.shape[1], layer))
    return out


def _activation_svd(
    model: nn.Module,
    chat: Chat,
    columns: Mapping[int, Tensor],
    rank: int | None,
    prompts: Sequence[str],
    answers: Sequence[str] | None,
    where: Positions,
    common: Mapping[str, Any],
) -> dict[int, Tensor]:
    grams = {layer: Gram(len(at)) for layer, at in columns.items()}
    for _rows, z, _counts in activations(model, chat, columns, prompts, answers, where, **common):
        for layer, part in z.items():
            grams[layer].add(part)
    return {layer: gram.top(_fits(rank, gram.width, layer), f"layer {layer}") for layer, gram in grams.items()}


def _columns(model: nn.Module, layers: Sequence[int], heads: HeadSelection) -> dict[int, Tensor]:
    geometry = attention_geometry(model)
    return {
        layer: head_columns(geometry.head_dims[layer], range(geometry.n_heads) if chosen is None else chosen)
        for layer, chosen in resolve_heads(model, layers, heads).items()
    }


def _embed(model: nn.Module, small: Mapping[int, Tensor], columns: Mapping[int, Tensor]) -> dict[int, Tensor]:
    geometry = attention_geometry(model)
    out = {}
    for layer, u in small.items():
        out[layer] = torch.zeros(geometry.n_heads * geometry.head_dims[layer], u.shape[1])
        out[layer][columns[layer]] = u.float().cpu()
    return out


def _random(width: int, rank: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(width, rank, generator=generator)).Q


def _fits(rank: int | None, width: int, layer: int) -> int:
    if rank is None or rank > width:
        raise ValueError(f"rank: expected 1 to {width}, the width of the (selected) z of layer {layer}, got {rank}")
    return rank


def _heads_text(model: nn.Module, layers: Sequence[int], heads: HeadSelection) -> dict[str, list[int]] | None:
    if heads is None:
        return None
    selected = resolve_heads(model, layers, heads)
    return {str(layer): chosen for layer, chosen in selected.items() if chosen is not None}


def sae_provenance(sae: TopKSAE) -> dict[str, Any]:
    """Sizes of an SAE, where it was trained, and a hash of its tensors."""
    import hashlib

    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(sae.state_dict().items()):
        # bf16 has no counterpart in numpy; its bytes do.
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    config = sae.config
    return {
        "hash": digest.hexdigest(),
        "n_latents": config.n_latents,
        "k": config.k,
        "layer": config.layer,
        "model": config.model_name,
    }


def versions() -> dict[str, str]:
    import transformers

    return {
        "refusal_kernels": rk.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
