"""What the model does, counted.

Answers are generated greedily and judged against the world, word for word. Held-out prompts combine a pair of verb and
object, a template, a closing (and a name, for unknown entities) that training never saw.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from refusal_kernels.python_api.builtin_model import path
from refusal_kernels.python_api.builtin_model.interchange import Edit, edited
from refusal_kernels.python_api.builtin_model.judge import clean, judge, shares
from refusal_kernels.python_api.builtin_model.world import UNKNOWN, World

BLOCKS = ("harmful", "hard_benign", "easy_benign")


def load(folder: Path | None = None) -> tuple[Any, PreTrainedTokenizerBase]:
    """Model (fp32, eval mode) and tokenizer of ``folder``, by default the committed ones."""
    folder = folder or path()
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    edits: Mapping[int, Edit] | None = None,
    batch_size: int = 256,
) -> list[str]:
    """The greedy answers to ``prompts``, without special tokens, in order.

    Args:
        model: any causal LM; ``edits`` need Llama's module names.
        tokenizer: pads on the left, so the last position of every row is ``<asst>``.
        prompts: texts from ``<bos>`` to ``<asst>``.
        edits: layer -> what its o_proj reads in place of z; sees [batch, prompt, m] first, then [batch, 1, m] a token.
            With edits all prompts go into one batch, for an edit may know its rows.
        batch_size: prompts a batch.
    """
    out: list[str] = []
    size = len(prompts) if edits else batch_size
    for start in range(0, len(prompts), max(1, size)):
        batch = tokenizer(list(prompts[start : start + size]), return_tensors="pt", padding=True, padding_side="left")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        with edited(model, edits or {}):
            generated = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=20)  # type: ignore[operator]
        out += [clean(text) for text in tokenizer.batch_decode(generated[:, ids.shape[1] :])]
    return out


@torch.inference_mode()
def next_logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> torch.Tensor:
    """Logits [prompts, vocabulary] of the token after each prompt."""
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    return model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits[:, -1]


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of ``hits / n`` in percent, 95 % by default."""
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"hits: expected 0 to n with n >= 1, got {hits} of {n}")
    p, d = hits / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return 100 * max(0.0, (p + z * z / (2 * n) - half) / d), 100 * min(1.0, (p + z * z / (2 * n) + half) / d)


def share(hits: Sequence[bool]) -> dict[str, float]:
    """``percent`` of true values with its Wilson interval (``low``, ``high``) and ``n``."""
    low, high = wilson(sum(hits), len(hits))
    return {
        "percent": round(100 * sum(hits) / len(hits), 1),
        "low": round(low, 1),
        "high": round(high, 1),
        "n": len(hits),
    }


def behaviour(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    n: int = 400,
    seed: int = 0,
    held_out: bool = True,
) -> dict[str, Any]:
    """Every behaviour of the model as a nested dictionary of percentages, ``n`` prompts a row.

    ``requests``: the four verdicts for harmful, hard benign and easy benign requests. ``qa``: the right value.
    ``qa_denied``: "i do not know" about a fact it was taught. ``unknown``: "i do not know" about an unknown name.
    ``judgement``: yes or no about harm. ``copying``: the word it was told to say. ``choice``: the right option's text
    is generated; ``choice_scored``: it has the highest logit of the five options after "it is".
    """
    rng = random.Random(f"evaluate/{seed}/{held_out}")
    report: dict[str, Any] = {"requests": {}}
    for block in BLOCKS:
        requests = [world.request(rng, block, held_out) for _ in range(n)]
        said = answers(model, tokenizer, [r.prompt for r in requests])
        counted = shares(judge(world, r, a) for r, a in zip(requests, said, strict=True))
        report["requests"][block] = {name: round(value, 1) for name, value in counted.items()}
    for kind in ("qa", "unknown", "judgement", "copying"):
        examples = [world.draw(rng, kind, True, held_out) for _ in range(n)]
        said = answers(model, tokenizer, [e.prompt for e in examples])
        report[kind] = share([e.answer == a for e, a in zip(examples, said, strict=True)])
        if kind == "qa":
            report["qa_denied"] = share([a == UNKNOWN for a in said])
    items = [world.choice(rng, held_out=held_out) for _ in range(n)]
    said = answers(model, tokenizer, [i.prompt for i in items])
    report["choice"] = share([i.answer_text == a for i, a in zip(items, said, strict=True)])
    options = torch.tensor([tokenizer.convert_tokens_to_ids(list(i.options)) for i in items])
    scores = next_logits(model, tokenizer, [f"{i.prompt} it is" for i in items]).gather(1, options)
    report["choice_scored"] = share([i.answer == b for i, b in zip(items, scores.argmax(1).tolist(), strict=True)])
    return report


def summary(report: dict[str, Any]) -> str:
    """The report as lines of text."""
    lines = [f"{'requests':<14}{'refuse':>8}{'recipe':>8}{'comply':>8}{'degenerate':>12}"]
    for block, row in report["requests"].items():
        cells = f"{row['refuse']:8.1f}{row['recipe']:8.1f}{row['comply']:8.1f}{row['degenerate']:12.1f}"
        lines.append(f"{block:<14}{cells}")
    lines += [
        f"{name:<14}{row['percent']:8.1f}  [{row['low']:.1f}, {row['high']:.1f}] of {row['n']}"
        for name, row in report.items()
        if name != "requests"
    ]
    return "\n".join(lines)
