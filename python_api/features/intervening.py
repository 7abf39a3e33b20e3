"""Answers and log-probabilities of a model while z is edited: what the causal check and the pre-flight check run on.

An edit may depend on the batch (which rows it holds, where their padding and BOS are), and during generation it is
called once for the whole prompt and then once for every new token. So edits are made per batch, by a function that is
given the batch's rows and its content mask, and the two wrappers below tell the prompt from what follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..edits import edit_z
from ..evaluate import content_positions
from ..hooks import ZEdit
from ..prompts.chat import Chat, by_length, generate, score_answers
from ..scoring.keywords import is_refusal

Judge: TypeAlias = "Callable[[Sequence[str], Sequence[str]], Sequence[bool]]"
"""(prompts, answers) -> which answers are refusals."""

MakeEdits: TypeAlias = "Callable[[list[int], Tensor], Mapping[int, ZEdit]]"
"""(rows of this batch, content bool [rows, tokens]) -> {layer: edit}; content: not padding, not the first token, not
BOS."""


def keyword_judge(prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
    """Refusals by phrases; see `scoring.keywords`."""
    return [is_refusal(answer) for answer in answers]


def judge_refusals(judge: Judge | None, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
    """The verdicts of `judge`, by default of `keyword_judge`. ValueError unless there is one for every answer."""
    verdicts = [bool(v) for v in (judge or keyword_judge)(prompts, answers)]
    if len(verdicts) != len(answers):
        raise ValueError(f"judge: expected {len(answers)} verdicts, one an answer, got {len(verdicts)}")
    return verdicts


def percent(hits: Sequence[bool]) -> float:
    """The share of true values in percent; 0 of nothing."""
    return 100.0 * sum(hits) / max(1, len(hits))


def everywhere(edits: Mapping[int, ZEdit]) -> MakeEdits:
    """The same edits for every batch and every token."""
    return lambda _rows, _content: edits


def at_content(edit: ZEdit, content: Tensor) -> ZEdit:
    """`edit` at the content tokens of the prompt (the first call) and at every token after it."""
    prompt = True

    def run(z: Tensor) -> Tensor:
        nonlocal prompt
        new = edit(z).to(z)
        if not prompt:
            return new
        prompt = False
        return torch.where(content.to(z.device)[..., None], new, z)

    return run


def paste_last(values: Tensor) -> ZEdit:
    """z of the prompt's last position (left-padded prompts) is `values` [batch, width]; later tokens are untouched."""
    prompt = True

    def run(z: Tensor) -> Tensor:
        nonlocal prompt
        if not prompt:
            return z
        prompt = False
        return torch.cat([z[:, :-1], values.to(z)[:, None]], 1)

    return run


def _batches(lengths: Sequence[int], batch_size: int, progress: str | None) -> Iterator[list[int]]:
    from tqdm.auto import tqdm

    with tqdm(total=len(lengths), desc=progress, unit="answer", disable=progress is None, leave=False) as bar:
        for rows in by_length(lengths, batch_size):
            yield rows
            bar.update(len(rows))


def content_mask(chat: Chat, batch: Mapping[str, Tensor]) -> Tensor:
    """bool [rows, tokens]: the tokens that carry content, as SAEs are trained on."""
    return content_positions(batch, getattr(chat.tokenizer, "bos_token_id", None))


def generate_edited(
    model: nn.Module,
    chat: Chat,
    prompts: Sequence[str],
    make: MakeEdits,
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    progress: str | None = None,
) -> list[str]:
    """Greedy answers, in order, of the model whose z is edited."""
    out = [""] * len(prompts)
    for rows in _batches([len(chat.encode_prompt(prompt)) for prompt in prompts], batch_size, progress):
        asked = [prompts[i] for i in rows]
        edits = make(rows, content_mask(chat, chat.prompt_batch(asked)))
        # Rows come sorted by length, which generate's own stable sort leaves in this order.
        with edit_z(model, edits):
            said = generate(model, chat, asked, max_new_tokens=max_new_tokens, batch_size=len(rows))
        for i, text in zip(rows, said, strict=True):
            out[i] = text
    return out


def score_edited(
    model: nn.Module,
    chat: Chat,
    questions: Sequence[tuple[str, str]],
    make: MakeEdits,
    *,
    batch_size: int = 32,
    progress: str | None = None,
) -> Tensor:
    """log P of every answer, summed over its tokens, fp64 [n], of the model whose z is edited."""
    encoded = [chat.encode(prompt, answer) for prompt, answer in questions]
    total = torch.zeros(len(encoded), dtype=torch.float64)
    for rows in _batches([len(e.ids) for e in encoded], batch_size, progress):
        edits = make(rows, content_mask(chat, chat.batch([encoded[i] for i in rows]).inputs))
        with edit_z(model, edits):
            total[rows] = score_answers(model, chat, [questions[i] for i in rows], batch_size=len(rows))[0]
    return total
