"""Whether single heads carry what a change took away: their untouched z is put back into the changed model.

The untouched model reads the prompt; z of the chosen heads at its last token, where the answer is predicted from, goes
into the changed model while that reads the same prompt. New tokens are generated as the changed model would. If the
heads carry refusal, refusing returns; as many random heads beside them say what any heads would do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from ..capturing import capture
from ..edits import edit_z
from ..hooks import Positions, ZEdit, attention_geometry, head_columns
from ..prompts.chat import by_length, device_of, generate
from .dials import Head
from .measuring import ANSWER_BEGINS, Probe, Share


class _OnceAtTheEnd:
    """Puts `values` [batch, columns] at the last position of the first forward, the one that reads the prompt."""

    def __init__(self, values: Tensor, columns: Tensor) -> None:
        self.values, self.columns, self.done = values, columns, False

    def __call__(self, z: Tensor) -> Tensor:
        if self.done:
            return z
        self.done = True
        new = z.clone()
        new[:, -1, self.columns.to(z.device)] = self.values.to(z)
        return new


def refusals_with_heads_restored(
    model: nn.Module,
    probe: Probe,
    change: Callable[[Positions], AbstractContextManager[None]],
    heads: Sequence[Head],
) -> Share:
    """Harmful requests that `model` refuses under ``change`` with z of `heads` from the model without it."""
    geometry = attention_geometry(model)
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    columns = {layer: head_columns(geometry.head_dims[layer], found) for layer, found in by_layer.items()}
    prompts = [prompt.prompt for prompt in probe.harmful]
    said = [""] * len(prompts)
    lengths = [len(probe.chat.encode_prompt(prompt)) for prompt in prompts]
    for rows in by_length(lengths, probe.batch_size):  # longest first, as `generate` orders them: rows stay in place
        asked = [prompts[i] for i in rows]
        batch = {name: t.to(device_of(model)) for name, t in probe.chat.prompt_batch(asked).items()}
        last = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        last[:, -1] = True
        with capture(model, sorted(columns)) as cap:
            untouched = cap.run(batch, positions=last)
        with change(ANSWER_BEGINS), _restored(model, untouched, columns):
            answers = generate(model, probe.chat, asked, max_new_tokens=probe.max_new_tokens, batch_size=len(asked))
        for i, answer in zip(rows, answers, strict=True):
            said[i] = answer
    verdicts = probe.verdicts(said)
    return Share(verdicts.count("refuse"), len(verdicts))


@contextmanager
def _restored(model: nn.Module, untouched: dict[int, Tensor], columns: dict[int, Tensor]) -> Iterator[None]:
    edits: dict[int, ZEdit] = {layer: _OnceAtTheEnd(untouched[layer][:, c], c) for layer, c in columns.items()}
    with edit_z(model, edits):
        yield
