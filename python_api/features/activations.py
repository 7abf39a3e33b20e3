"""Reading activations for a basis: z at chosen positions, means over prompts, and singular vectors without storage.

    G = sum_t x_t x_t^T     [d, d] in fp64; its eigenvectors are X's right singular vectors, sigma = sqrt(lambda)

A Gram matrix squares the condition number: fp64 keeps directions down to sigma_i / sigma_1 of about 1e-7, below the
rounding noise of fp32 activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ..capturing import capture
from ..prompts.chat import AnswerBatch, Chat, Encoded, by_length, generate

Positions: TypeAlias = Literal["last", "answer"]
"""The last prompt token; or the positions that predict the tokens of the answer."""

# Below this share of sigma_1 a direction is rounding noise of fp32 activations.
RTOL = 1e-6


class Gram:
    """Running sum over rows of activations.

    Args:
        width: d.
    """

    def __init__(self, width: int) -> None:
        self.width, self.rows = width, 0
        self.sum: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Adds rows x [..., d], on whatever device the first of them was."""
        rows = x.detach().reshape(-1, self.width).double()
        if self.sum is None:
            self.sum = torch.zeros(self.width, self.width, dtype=torch.float64, device=rows.device)
        self.sum.addmm_(rows.T, rows)
        self.rows += rows.shape[0]

    def top(self, rank: int, what: str) -> Tensor:
        """U [d, r] fp32 on the CPU, r = rank or fewer where the rows span fewer directions, strongest first.

        Raises ValueError naming `what` for no rows, rows that are zero, or not finite.
        """
        if self.sum is None or not bool(torch.isfinite(self.sum).all()) or not bool(self.sum.any()):
            raise ValueError(f"{what}: expected activations that are finite and not all zero, from {self.rows} tokens")
        values, vectors = torch.linalg.eigh(self.sum)
        sigma = values.clamp_min(0).sqrt()
        kept = int((sigma > RTOL * sigma[-1]).sum().clamp_max(rank))
        return vectors.flip(1)[:, :kept].float().cpu().contiguous()


def encode_asked(chat: Chat, prompt: str, answer: str | None) -> Encoded:
    """The prompt with its answer; without one, or with an empty one, the prompt alone."""
    if answer is not None and answer.strip():
        return chat.encode(prompt, answer)
    ids = tuple(chat.encode_prompt(prompt))
    return Encoded(ids, len(ids))


def answer_positions(batch: AnswerBatch, encoded: Sequence[Encoded]) -> Tensor:
    """bool [n, length]: what predicts the answer, the last prompt token first; without an answer that token alone."""
    at = batch.predicting
    for row, e in enumerate(encoded):
        at[row, e.start - 1] = True
    return at


@torch.no_grad()
def activations(
    model: nn.Module,
    chat: Chat,
    columns: Mapping[int, Tensor],
    prompts: Sequence[str],
    answers: Sequence[str] | None,
    where: Positions,
    *,
    max_new_tokens: int = 24,
    batch_size: int = 32,
    progress: bool = False,
) -> Iterator[tuple[list[int], dict[int, Tensor], Tensor]]:
    """Yields (rows, {layer: z [n, columns]}, tokens of each row int64 [rows]), batch by batch, longest prompts first.

    Args:
        columns: {layer: columns of z to return}.
        answers: for "answer"; None: the model's own greedy ones. An empty answer leaves the last prompt token.
    """
    from tqdm.auto import tqdm

    if where == "answer" and answers is None:
        answering = "answering" if progress else None
        answers = generate(
            model, chat, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=answering
        )
    said = [None] * len(prompts) if where == "last" or answers is None else list(answers)
    encoded = [encode_asked(chat, prompt, answer) for prompt, answer in zip(prompts, said, strict=True)]
    bar = tqdm(total=len(prompts), desc="reading z", unit="prompt", disable=not progress, leave=False)
    with capture(model, list(columns)) as cap, bar:
        for rows in by_length([len(e.ids) for e in encoded], batch_size):
            batch = chat.batch([encoded[i] for i in rows])
            at = answer_positions(batch, [encoded[i] for i in rows])
            z = cap.run(batch.inputs, positions=at)
            parts = {layer: part.index_select(-1, columns[layer].to(part.device)) for layer, part in z.items()}
            yield rows, parts, at.sum(1)
            bar.update(len(rows))


def prompt_means(
    model: nn.Module,
    chat: Chat,
    columns: Mapping[int, Tensor],
    prompts: Sequence[str],
    where: Positions,
    **reading: Any,
) -> dict[int, Tensor]:
    """{layer: [prompts, columns]} fp64 on the CPU: the mean z of each prompt over its positions; see `activations`."""
    out = {layer: torch.zeros(len(prompts), len(at), dtype=torch.float64) for layer, at in columns.items()}
    for rows, z, counts in activations(model, chat, columns, prompts, None, where, **reading):
        owner = torch.repeat_interleave(torch.tensor(rows), counts)
        for layer, part in z.items():
            out[layer].index_add_(0, owner, part.double().cpu())
            out[layer][rows] /= counts[:, None]
    return out
