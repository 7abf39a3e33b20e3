"""Contrastive influence of every attention head on hallucination and on refusal.

    I_{l,i}(y|x) = log P_M(y|x) - log P_{M without (l,i)}(y|x)
    s_hall = mean over pairs of I(wrong) - I(right)        s_ref = mean over pairs of I(refusal) - I(harmful)

after arXiv 2510.07775. "Without" multiplies the head's z by eps at the positions that predict the answer. Exact mode
runs one forward per head and batch, from the ablated layer on (`ablation`). The screen is its first order in eps at 1,

    I_{l,i}(y|x) ~ (1 - eps) sum over these positions of <d log P / d z_i, z_i>

for all heads from one backward per batch. It misses what is not linear: a saturated softmax, heads that stand in for
one another. Mode "both" screens all heads and ablates the most promising.
"""

from __future__ import annotations

import hashlib
import math
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import refusal_kernels as rk

from ..checkpoint import atomic_file
from ..hooks import AttentionGeometry, attention_geometry, hook_z, o_proj_modules
from ..prompts.chat import AnswerBatch, Chat, Encoded, by_length, device_of
from ..prompts.records import ContrastPair, content_hash, set_hash
from .ablation import AblatedForwards, evaluating, logits_at, picked_log_probs
from .scores import SETS, HeadScores, InfluenceScore, Mode, SetName

DEFAULT_SHARE = 0.1
DEFAULT_REFINE = 0.15


def find_heads(
    model: nn.Module,
    tokenizer_or_chat: Any,
    hallucination_pairs: Sequence[ContrastPair],
    refusal_pairs: Sequence[ContrastPair],
    *,
    mode: Mode = "both",
    eps: float = 0.0,
    top: int | None = None,
    refine: float = DEFAULT_REFINE,
    refusal_beginnings: bool = False,
    batch_size: int = 32,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
    model_name: str | None = None,
) -> HeadScores:
    """Scores every query head by what its ablation does to two contrasts.

    Args:
        model: transformers causal LM with ``self_attn.o_proj``; any dtype. Log-probabilities are fp32.
        tokenizer_or_chat: a tokenizer, or a :class:`~refusal_kernels.python_api.prompts.chat.Chat`.
        hallucination_pairs: (right, wrong) answers as (`chosen`, `rejected`).
        refusal_pairs: (refusal, harmful completion) as (`chosen`, `rejected`).
        mode: "exact" ablates every head: L * H forwards per batch. "screen" needs one backward per batch. "both"
            screens all, then ablates the best `refine` of either score (their union, for both scores); rankings then
            come from the ablated heads alone.
        eps: factor of the ablated z.
        top: K, length of the top lists; default 10 % of all heads, at least 1.
        refine: share of the heads that "both" ablates per score, at least K / (L * H).
        refusal_beginnings: the refusal pairs' completions are beginnings, such as AdvBench's targets, and no end of
            turn is scored after them.
        batch_size: sequences per forward.
        out: a folder for partial results, kept after every layer; a later call with the same model, pairs and settings
            goes on from them (`resume`), also from mode "both" to "exact". None keeps nothing.
        progress: show a bar.
        model_name: for the provenance; default: the configuration's.

    Raises:
        TypeError, ValueError: no such model, pairs, mode or range; log-probabilities that are not finite.
    """
    start = time.perf_counter()
    geometry, pairs = _check(model, mode, eps, refine, batch_size, hallucination_pairs, refusal_pairs)
    n_heads = len(geometry.layers) * geometry.n_heads
    k = max(1, round(DEFAULT_SHARE * n_heads)) if top is None else top
    n_refined = max(1, math.ceil(refine * n_heads))
    if not 1 <= k <= (n_refined if mode == "both" else n_heads):
        raise ValueError(f"top: expected 1 to {n_refined if mode == 'both' else n_heads} heads (mode {mode}), got {k}")
    chat = tokenizer_or_chat if isinstance(tokenizer_or_chat, Chat) else Chat(tokenizer_or_chat)
    sets = {
        which: _Answers.of(chat, pairs[which], close=not (which == "refusal" and refusal_beginnings), size=batch_size)
        for which in SETS
    }
    fingerprint = model_fingerprint(model)
    settings = {"eps": eps, "refusal_beginnings": refusal_beginnings, "batch_size": batch_size, "system": chat.system}
    key = content_hash(fingerprint, *(set_hash(pairs[which]) for which in SETS), sorted(settings.items()))
    run = _Run(model, chat, geometry, eps, batch_size, _Partial(out, key, resume), progress)
    scores = HeadScores(mode, k)
    with evaluating(model):
        if mode != "exact":
            scores.screen = {which: run.screen(which, sets[which]) for which in SETS}
        if mode != "screen":
            wanted = torch.zeros(geometry.n_layers, geometry.n_heads, dtype=torch.bool)
            wanted[list(geometry.layers)] = mode == "exact"
            for score in scores.screen.values():
                wanted.view(-1)[score.sum.flatten().nan_to_num(nan=-math.inf).topk(n_refined).indices] = True
            scores.exact = run.exact(sets, wanted)
    scores.provenance = {
        "model": model_name or getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__,
        "model_fingerprint": fingerprint,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": str(device_of(model)),
        "pairs": {which: {"n": len(pairs[which]), "hash": set_hash(pairs[which])} for which in SETS},
        "settings": settings | {"mode": mode, "top": k, "refine": refine if mode == "both" else None},
        "versions": versions(),
        "seconds": round(time.perf_counter() - start, 2),
    }
    return scores


def _check(
    model: nn.Module, mode: str, eps: float, refine: float, batch_size: int, *pairs: Sequence[ContrastPair]
) -> tuple[AttentionGeometry, dict[SetName, list[ContrastPair]]]:
    if mode not in ("both", "exact", "screen"):
        raise ValueError(f"mode: expected both, exact or screen, got {mode!r}")
    if not math.isfinite(eps):
        raise ValueError(f"eps: expected a finite number, got {eps}")
    if not 0 < refine <= 1:
        raise ValueError(f"refine: expected a share in (0, 1], got {refine}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    checked: dict[SetName, list[ContrastPair]] = {}
    for which, given in zip(SETS, pairs, strict=True):
        checked[which] = list(given)
        if not checked[which]:
            raise ValueError(f"{which}_pairs: expected at least one pair, got none")
        for pair in checked[which]:
            if not isinstance(pair, ContrastPair):
                raise TypeError(f"{which}_pairs: expected ContrastPair, got {type(pair).__name__}")
    return attention_geometry(model), checked


@dataclass(frozen=True)
class _Answers:
    """The 2n answers of n pairs: chosen at 2p, rejected at 2p + 1."""

    encoded: list[Encoded]
    tokens: Tensor  # fp64 [2n], length of each answer
    batches: list[list[int]]

    @staticmethod
    def of(chat: Chat, pairs: Sequence[ContrastPair], close: bool, size: int) -> _Answers:
        encoded = [chat.encode(p.prompt, answer, close) for p in pairs for answer in (p.chosen, p.rejected)]
        # Prompts are read once per batch, answers once per head: answers of one length belong together.
        lengths = [len(e.ids) - e.start for e in encoded]
        return _Answers(encoded, torch.tensor(lengths, dtype=torch.float64), list(by_length(lengths, size)))

    def score(self, which: SetName, influence: Tensor) -> InfluenceScore:
        """`influence` fp64 [L, H, 2n] to the score of the pairs."""
        sign = -1.0 if which == "hallucination" else 1.0  # wrong - right, but refusal - harmful
        total, per_token = influence, influence / self.tokens
        return InfluenceScore.over_pairs(*(sign * (x[..., 0::2] - x[..., 1::2]) for x in (total, per_token)))


class _Partial:
    """Influences per batch in ``<out>/partial-<key>``; nothing where out is None."""

    def __init__(self, out: str | Path | None, key: str, resume: bool) -> None:
        self.folder = None if out is None else Path(out) / f"partial-{key}"
        self.resume = resume

    def load(self, name: str, shape: Sequence[int]) -> Tensor:
        """The kept influence fp64 [L, H, rows], NaN where there is none."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        empty = torch.full(list(shape), math.nan, dtype=torch.float64)
        if self.folder is None or not self.resume:
            return empty
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            return empty
        try:
            kept = load_file(path)["influence"]
        except (SafetensorError, KeyError, OSError) as error:
            raise ValueError(f"{path} cannot be read ({error}); remove it, and it is computed again") from error
        if kept.shape != empty.shape or kept.dtype != empty.dtype:
            raise ValueError(f"{path} must hold fp64 {list(shape)}; got {kept.dtype} {list(kept.shape)}")
        return kept

    def save(self, name: str, influence: Tensor) -> None:
        from safetensors.torch import save_file

        if self.folder is not None:
            with atomic_file(self.folder / f"{name}.safetensors") as temporary:
                save_file({"influence": influence}, temporary)


@dataclass
class _Run:
    model: nn.Module
    chat: Chat
    geometry: AttentionGeometry
    eps: float
    batch_size: int
    partial: _Partial
    progress: bool

    def _shape(self, rows: int) -> tuple[int, int, int]:
        return self.geometry.n_layers, self.geometry.n_heads, rows

    # ---- first order -----------------------------------------------------------------------------------------------
    def screen(self, which: SetName, answers: _Answers) -> InfluenceScore:
        from tqdm.auto import tqdm

        influence = torch.full(self._shape(len(answers.encoded)), math.nan, dtype=torch.float64)
        bar = tqdm(answers.batches, f"screen {which}", unit="batch", disable=not self.progress, leave=False)
        for number, rows in enumerate(bar):
            name = f"{which}-screen-{number:04d}"
            kept = self.partial.load(name, self._shape(len(rows)))
            if kept.isnan().all():
                batch = self.chat.batch([answers.encoded[i] for i in rows])
                kept[list(self.geometry.layers)] = first_order(self.model, batch, self.geometry) * (1 - self.eps)
                self._finite(kept, [(layer, slice(None)) for layer in self.geometry.layers])
                self.partial.save(name, kept)
            influence[..., rows] = kept
        return answers.score(which, influence)

    # ---- ablation --------------------------------------------------------------------------------------------------
    def exact(self, sets: Mapping[SetName, _Answers], wanted: Tensor) -> dict[SetName, InfluenceScore]:
        """`wanted` bool [L, H]: the heads to ablate."""
        from tqdm.auto import tqdm

        total = int(wanted.sum()) * sum(len(answers.batches) for answers in sets.values())
        out: dict[SetName, InfluenceScore] = {}
        with tqdm(total=total, desc="ablate", unit="head", disable=not self.progress, leave=False) as bar:
            self._checked = False
            for which, answers in sets.items():
                influence = torch.full(self._shape(len(answers.encoded)), math.nan, dtype=torch.float64)
                for number, rows in enumerate(answers.batches):
                    name = f"{which}-exact-{number:04d}"
                    kept = self.partial.load(name, self._shape(len(rows)))
                    missing = wanted & kept.isnan().any(-1)
                    bar.update(int(wanted.sum() - missing.sum()))
                    if missing.any():
                        for layer_done in self._ablate([answers.encoded[i] for i in rows], missing, kept):
                            self.partial.save(name, kept)
                            bar.update(layer_done)
                    influence[..., rows] = kept
                influence[~wanted] = math.nan  # an earlier run may have kept more
                out[which] = answers.score(which, influence)
        return out

    def _ablate(self, encoded: list[Encoded], missing: Tensor, influence: Tensor) -> Iterator[int]:
        """Fills `influence` [L, H, rows] layer by layer; yields how many heads that were."""
        # A batch smaller than batch_size leaves room to ablate several heads of a layer side by side; how many must not
        # depend on what is missing, or a resumed run would round otherwise.
        copies = max(1, min(self.batch_size // len(encoded), self.geometry.n_heads))
        with torch.inference_mode():
            forwards = AblatedForwards(self.model, encoded, self.chat.pad_id, self.eps, copies)
            base = forwards.log_probs.double().cpu()
            if not base.isfinite().all():
                raise ValueError("model: log-probabilities of the answers are not finite; try another dtype")
            if not self._checked:
                forwards.check()
                self._checked = True
            for layer in missing.any(1).nonzero()[:, 0].tolist():
                heads = missing[layer].nonzero()[:, 0].tolist()
                for first in range(0, len(heads), copies):
                    group = heads[first : first + copies]
                    influence[layer, group] = base - forwards.ablate(layer, group).double().cpu()
                self._finite(influence, [(layer, heads)])
                yield len(heads)

    def _finite(self, influence: Tensor, where: Sequence[tuple[int, Any]]) -> None:
        for layer, heads in where:
            if not influence[layer, heads].isfinite().all():
                raise ValueError(f"model: log-probabilities are not finite around layer {layer}; try another dtype")


def first_order(model: nn.Module, batch: AnswerBatch, geometry: AttentionGeometry) -> Tensor:
    """``<d log P(answer) / d z_i, z_i>`` summed over the predicting positions: fp64 [layers with o_proj, H, n].

    It is the derivative by a factor on the head's z there, at 1, and that is how it is computed: one factor per row,
    layer and head. Log P of a row depends on no other row, so one backward serves the batch.
    """
    batch = batch.to(device_of(model))
    n, (_, tokens) = len(batch.input_ids), batch.input_ids.shape
    at = batch.predicting
    factors = {i: torch.ones(n, geometry.n_heads, device=at.device, requires_grad=True) for i in geometry.layers}

    def scale(layer: int, z: Tensor) -> Tensor:
        factor = factors[layer].to(z.device).repeat_interleave(geometry.head_dims[layer], 1)
        # In fp32 and back: in bf16 the sum over tokens would lose the small terms.
        scaled = (z.float() * factor[:, None].expand(n, tokens, -1)).to(z.dtype)
        return torch.where(at.to(z.device)[..., None], scaled, z)

    with ExitStack() as stack:
        for layer, o_proj in o_proj_modules(model, geometry.layers).items():
            stack.callback(hook_z(o_proj, partial(scale, layer)).remove)
        stack.enter_context(logits_at(model, at))
        stack.enter_context(torch.enable_grad())
        logits = model(**batch.inputs, use_cache=False).logits
        log_probs = picked_log_probs(logits, batch.input_ids[batch.targets], at.nonzero()[:, 0], n)
        gradients = torch.autograd.grad(log_probs.sum(), list(factors.values()))
    return torch.stack([g.double().cpu().T for g in gradients])


def model_fingerprint(model: nn.Module) -> str:
    """A hash of every parameter's name, shape, dtype and up to 64 of its values, evenly spaced: training changes it,
    loading does not; it costs no reading of all weights."""
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // 64)
        values = flat[::step][:64].double().cpu() if not flat.is_meta else torch.zeros(0)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {values.tolist()}".encode())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """What a result was computed with."""
    import transformers

    return {
        "refusal_kernels": rk.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
