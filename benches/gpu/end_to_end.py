"""`python -m benches.gpu.end_to_end`: what the kernels are worth inside a language model.

A Llama with the widths of Llama-3-8B and random weights from its configuration, fewer layers so that it is made in
seconds; bf16. Two questions:

* one SAE on one layer: tokens per second of the forward pass up to that layer's z, and of the SAE's training step on
  those activations (dense eager beside ours);
* LoRA r = 16 on all seven linears: milliseconds of a training step (forward, backward, AdamW) and of the projection of
  every LoRA matrix after it, and the projection's share. Both grow with the number of layers, so that the share holds
  for the whole model.

`--tiny` takes the same path with small widths, on a CPU too, to see that it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import refusal_kernels as rk
from refusal_kernels.python_api import capture

from .. import torch_paths
from ..problem import LR
from . import peers
from .clock import attempt, measure
from .rows import Rows

LORA_RANK = 16


@dataclass(frozen=True)
class Sizes:
    """Widths of the model, tokens of a batch, latents and k of the SAE, columns of the projection's bases."""

    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128256
    sequences: int = 8
    length: int = 2048
    latents: int = 131072
    k: int = 64
    lora_sequences: int = 4
    lora_length: int = 1024
    rank: int = 64


TINY = Sizes(64, 128, 4, 2, 256, 2, 16, 512, 4, 2, 16, 8)


def language_model(sizes: Sizes, layers: int, device: torch.device) -> nn.Module:
    """Random weights in bf16; what they compute does not matter, how long it takes does."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=sizes.hidden, intermediate_size=sizes.intermediate, num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads, vocab_size=sizes.vocabulary, num_hidden_layers=layers, use_cache=False,
        max_position_embeddings=max(sizes.length, sizes.lora_length),
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def tokens(sizes: Sizes, sequences: int, length: int, device: torch.device) -> dict[str, Tensor]:
    ids = torch.randint(0, sizes.vocabulary, (sequences, length), device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def say(rows: Rows, name: str, result: dict[str, Any], **more: Any) -> None:
    """One row; with `tokens`, their rate."""
    if "ms" in result and "tokens" in more:
        result |= {"rate": more["tokens"] / result["ms"], "unit": "k tokens/s"}
    rows.tell({"name": name, **more, **result})


def sae_on_a_layer(rows: Rows, model: nn.Module, sizes: Sizes, layer: int, device: torch.device, rounds: int) -> None:
    batch = tokens(sizes, sizes.sequences, sizes.length, device)
    n = batch["input_ids"].numel()
    with capture(model, layers=[layer]) as cap:
        say(
            rows, f"forward and capture, up to layer {layer}",
            attempt(lambda: measure(lambda: cap.run(batch), rounds)), tokens=n, layers=layer + 1,
        )  # fmt: skip
        x = cap.run(batch)[layer].to(torch.bfloat16)
    torch.manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(sizes.latents, x.shape[1], device=device), dim=1)
    leaves = [W_dec.clone(), torch.zeros(sizes.latents, device=device), W_dec, torch.zeros(x.shape[1], device=device)]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def ours() -> Callable[[], Tensor]:
        optimizer = rk.SAEAdam(*leaves, lr=LR, remove_parallel_grad=False)

        def step() -> Tensor:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                return rk.sae_step(x, *leaves, sizes.k, optimizer=optimizer).loss

        return step

    shape = {"tokens": n, "shape": f"{n}x{x.shape[1]}x{sizes.latents}x{sizes.k}"}
    say(rows, "SAE step, ours", attempt(lambda: measure(ours(), rounds)), **shape)
    dense = lambda: measure(peers.autograd_step(torch_paths.dense_loss, x, leaves, sizes.k), rounds)  # noqa: E731
    say(rows, "SAE step, dense", attempt(dense), **shape)


def lora_step(rows: Rows, model: nn.Module, sizes: Sizes, device: torch.device, rounds: int) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=LORA_RANK, target_modules="all-linear", bias="none", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config, autocast_adapter_dtype=True).train()  # type: ignore[arg-type]
    weights = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    batch = tokens(sizes, sizes.lora_sequences, sizes.lora_length, device)

    def step() -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = adapted(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    # A [16, in] loses its component along the inputs, B [out, 16] along the outputs. Every matrix has its own basis
    # in memory: in a real model q, k, v and gate, up share one.
    bases: dict[int, Tensor] = {}
    entries = []
    for weight in weights:
        dim = 1 if weight.shape[0] == LORA_RANK else 0
        n = weight.shape[dim]
        if n not in bases:
            bases[n] = rk.orthonormal_basis(torch.randn(n, min(sizes.rank, n // 2), device=device))
        entries.append((weight, bases[n].clone(), dim))
    plan = rk.ProjectionPlan(entries)
    n = batch["input_ids"].numel()
    without = attempt(lambda: measure(step, rounds))
    say(rows, "LoRA step", without, tokens=n, matrices=len(weights))
    projection = attempt(lambda: measure(plan.apply_, rounds))
    share = 100 * projection["ms"] / without["ms"] if "ms" in projection and "ms" in without else None
    say(rows, "projection of its matrices", projection, matrices=len(weights), r=sizes.rank, percent_of_step=share)

    def both() -> Tensor:
        loss = step()
        plan.apply_()
        return loss

    say(rows, "LoRA step with projection", attempt(lambda: measure(both, rounds)), tokens=n, matrices=len(weights))


def main(
    layers: Annotated[int, typer.Option(min=2, help="Decoder layers of the model.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Calls of everything at most.")] = 7,
    tiny: Annotated[bool, typer.Option("--tiny", help="Small widths, to see that it runs.")] = False,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
) -> None:
    """Prints one JSON object per line and measurement."""
    sizes, at = TINY if tiny else Sizes(), torch.device(device)
    rows, model = Rows(), language_model(sizes, layers, at)
    sae_on_a_layer(rows, model, sizes, layers // 2, at, rounds)
    if at.type == "cuda":
        torch.cuda.empty_cache()
    lora_step(rows, model, sizes, at, rounds)
    rows.end()


if __name__ == "__main__":
    typer.run(main)
