"""Why a constraint held and refusal was still lost, or was not: the untouched model's z pasted into the fine-tuned one.

At the last token of the prompt, in the layers of the basis, z of the fine-tuned model is replaced by the untouched
model's: whole, its component in U alone, or in a random U of equal rank. Where pasting the component in U brings
refusal back, what enters U was rewritten by other modules while what reads U was kept: the constraint protected the
reader of a message that no longer arrives. Where even the whole z does not, what comes after was rewritten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..capturing import capture
from ..edits import edit_z
from ..features.basis import RefusalBasis
from ..prompts.chat import Chat, device_of, generate
from .suite import Suite, count


@torch.inference_mode()
def last_z(model: nn.Module, chat: Chat, prompts: list[str], layers: list[int]) -> dict[int, Tensor]:
    """z of `layers` at the last token of each prompt: {layer: [prompts, heads * head_dim]}."""
    out: dict[int, Tensor] = {}
    with capture(model, layers=layers) as cap:
        batch = {name: t.to(device_of(model)) for name, t in chat.prompt_batch(prompts).items()}
        model(**batch, use_cache=False)
        for layer in layers:
            out[layer] = cap.z[layer][:, -1].clone()
    return out


@contextmanager
def pasted(model: nn.Module, source: Mapping[int, Tensor], bases: Mapping[int, Tensor] | None) -> Iterator[None]:
    """While open, a forward over prompts (more than one token) ends in `source`'s z at the last position, or, with
    `bases`, in its component in span(bases[layer]) there. One batch must hold exactly the rows of `source`."""

    def paste(layer: int) -> Callable[[Tensor], Tensor]:
        def edit(z: Tensor) -> Tensor:
            if z.shape[1] == 1:
                return z
            new = source[layer].to(z)
            if bases is not None:
                u = bases[layer].to(z)
                new = z[:, -1] + ((new - z[:, -1]) @ u) @ u.T
            return torch.cat([z[:, :-1], new[:, None]], 1)

        return edit

    with edit_z(model, {layer: paste(layer) for layer in source}):
        yield


def explain(
    tuned: nn.Module, untouched: nn.Module, chat: Chat, suite: Suite, basis: RefusalBasis, *, n: int = 64, seed: int = 0
) -> dict[str, Any]:
    """Verdicts on the first `n` harmful test prompts: as fine-tuned; with z, U's part or a random U's pasted back.

    Returns {"tuned", "z", "U", "random": verdict counts with n}; "layers": which.
    """
    layers = sorted(basis.z)
    prompts = suite.harmful_test[:n]  # one batch: the pasted rows must be its rows
    source = last_z(untouched, chat, prompts, layers)
    generator = torch.Generator().manual_seed(seed)
    bases = {layer: u.float() for layer, u in basis.z.items()}
    random = {layer: torch.linalg.qr(torch.randn(u.shape, generator=generator)).Q for layer, u in bases.items()}

    def verdicts(given: Mapping[int, Tensor] | None, paste: bool) -> dict[str, int]:
        whole = partial(generate, tuned, chat, prompts, max_new_tokens=suite.max_new_tokens, batch_size=len(prompts))
        if not paste:
            answers = whole()
        else:
            # generate() takes prompts longest first; the source has to stand in the same order.
            order = sorted(range(len(prompts)), key=lambda i: -len(chat.encode_prompt(prompts[i])))
            rows = {layer: z[order] for layer, z in source.items()}
            with pasted(tuned, rows, given):
                answers = whole()
        return {**count(suite.judge(prompts, answers)), "n": len(prompts)}

    return {
        "layers": layers,
        "tuned": verdicts(None, paste=False),
        "z": verdicts(None, paste=True),
        "U": verdicts(bases, paste=True),
        "random": verdicts(random, paste=True),
    }
