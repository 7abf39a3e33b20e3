"""`python -m benches.gpu.end_to_end`: what the kernels are worth inside a language model.

A Llama with the widths of Llama-3-8B and random weights from its configuration, fewer layers so that it is made in
seconds; bf16. Two questions:

* one SAE on one layer: tokens per second of the forward pass up to that layer's z, and of the SAE's training step on
  those activations (dense eager beside ours);
* LoRA r = 16 on all seven linears: milliseconds of a training step (forward, backward, AdamW) and of the projection of
  every LoRA matrix after it, and the projection's share.

The share of the whole model is not that of a few layers: embedding, head and loss cost a step the same at any depth,
and a projection has a cost of its own for every call. So a step is timed at all layers of the model and at half of
them; their difference is what layers cost, and a step of 32 layers is extrapolated from it. The projection of all 448
matrices is measured, on the matrices of `benches.projection`, as the device's time behind other work, which is what it
finds after a backward pass. Their quotient is the share that the target speaks of.

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

from .. import projection, torch_paths
from ..problem import LR
from . import peers
from .clock import attempt, behind_other_work, measure
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
    layers: int = 32  # of the whole model, which nothing here makes


TINY = Sizes(64, 128, 4, 2, 256, 2, 16, 512, 4, 2, 16, 8, 2)


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
    once = attempt(lambda: measure(plan.apply_, rounds))
    say(rows, "projection of its matrices", once, matrices=len(weights), r=sizes.rank, **share(once, without))

    def both() -> Tensor:
        loss = step()
        plan.apply_()
        return loss

    say(rows, "LoRA step with projection", attempt(lambda: measure(both, rounds)), tokens=n, matrices=len(weights))
    of_half = attempt(lambda: with_half_the_layers(model, lambda: measure(step, rounds)))
    depth, half = len(model.model.layers), len(model.model.layers) // 2  # type: ignore[union-attr, arg-type]
    say(rows, f"LoRA step, {half} of {depth} layers", of_half, tokens=n)
    entries = projection.problem(sizes.layers, sizes.rank, device.type)
    whole = rk.ProjectionPlan(entries)
    found = attempt(lambda: behind_other_work(whole.apply_, rounds))
    deep = extrapolated(without, of_half, depth, half, sizes.layers)
    say(rows, f"projection of {len(entries)} matrices, queue full", found, r=sizes.rank, **share(found, deep))
    say(rows, f"LoRA step of {sizes.layers} layers, extrapolated", deep, tokens=n)


def share(part: dict[str, Any], step: dict[str, Any]) -> dict[str, float]:
    """What a measurement is of a step's, where there are both."""
    return {"percent_of_step": 100 * part["ms"] / step["ms"]} if "ms" in part and "ms" in step else {}


def extrapolated(step: dict[str, Any], of_half: dict[str, Any], depth: int, half: int, layers: int) -> dict[str, Any]:
    """{"ms"} of a step of so many layers, from those of `depth` and of `half`."""
    if "ms" not in step or "ms" not in of_half:
        return {"error": f"needs at least the steps of {depth} and of {half} layers"}
    return {"ms": step["ms"] + (layers - depth) * (step["ms"] - of_half["ms"]) / (depth - half)}


def with_half_the_layers(model: nn.Module, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """`run` while the model has the first half of its decoder layers."""
    decoder: Any = model.model
    layers = decoder.layers
    decoder.layers = layers[: len(layers) // 2]
    try:
        return run()
    finally:
        decoder.layers = layers


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
