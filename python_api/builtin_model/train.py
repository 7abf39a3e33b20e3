"""Trains the built-in model from scratch: ``python -m refusal_kernels.python_api.builtin_model.train --out DIR``.

Two stages, both AdamW with cosine decay, both supervised on answers.

1. Pre-training teaches the world. Every request is complied with, harmful or not, and questions about unknown names
   get a random answer: a model that knows things, helps with anything and makes things up.
2. Alignment teaches it to refuse what is harmful, to keep helping with what is not, and to say that it does not know.

Where refusal happens inside is trained too. Left alone, a causal model this small lets the last token look at verb and
object in layer 0 and decide there in its MLPs; then no subspace of any later z carries refusal and there is nothing
to study. Three things move it:

* a tag (harmful or harmless) is supervised at ``<req>``, in the middle of the prompt. The tag is a target of the loss,
  never a word of the text;
* interchange-intervention training (Geiger et al., arXiv 2112.00826): the z of the carrier heads at ``<asst>`` is
  swapped between harmful and harmless twins, and the answer must follow the swap; the z of the layer's other heads and
  of all earlier layers is swapped, and the answer must not;
* removal: the carrier layer's z is projected off the subspace in which twins differ, and the answer must be
  compliance. So the absence of the signal means "help", and its presence means "refuse".

Everything random in a step follows from (seed, stage, step), so a resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

import json
import os
import random
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from refusal_kernels.python_api.builtin_model.behaviour import behaviour, load
from refusal_kernels.python_api.builtin_model.interchange import Edit, difference_basis, edited, remove
from refusal_kernels.python_api.builtin_model.tokenizer import CONTEXT, build_tokenizer
from refusal_kernels.python_api.builtin_model.world import (
    EOS,
    REFUSAL,
    REQUEST,
    TAG_HARMFUL,
    TAG_HARMLESS,
    Example,
    World,
)

PRETRAIN_MIX = {
    "harmful": 0.14, "hard_benign": 0.14, "easy_benign": 0.1, "judgement": 0.12, "qa": 0.28, "unknown": 0.08,
    "choice": 0.1, "copying": 0.04,
}  # fmt: skip
ALIGN_MIX = {
    "harmful": 0.15, "hard_benign": 0.16, "easy_benign": 0.09, "judgement": 0.06, "qa": 0.28, "unknown": 0.16,
    "choice": 0.08, "copying": 0.02,
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights. Written beside them as ``training.json``."""

    seed: int = 0
    world_seed: int = 0
    layers: int = 5
    hidden: int = 128
    mlp: int = 384
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    pretrain_steps: int = 600
    align_steps: int = 160
    batch: int = 64
    pretrain_lr: float = 2e-3
    align_lr: float = 7e-4
    warmup: int = 50
    weight_decay: float = 0.01
    tag_weight: float = 0.5  # of the tag's loss at <req>
    carrier: int = 3  # the layer whose z is to carry refusal
    carrier_heads: tuple[int, ...] = (1, 6)  # the heads of it that are to do so; empty means any
    twin_pairs: int = 8  # per alignment step
    route_weight: float = 1.0  # of the swap and removal losses


class Batch:
    """Right-padded token ids [rows, length] and the weighted targets of the loss.

    An answer's tokens weigh n^-0.7 each (n their number): between "every token counts the same", which drowns one-word
    answers in recipes, and "every answer counts the same".
    """

    def __init__(self, examples: list[Example], vocabulary: dict[str, int], tag_weight: float) -> None:
        rows, where, targets, weights = [], [], [], []
        self.assistant = torch.empty(len(examples), dtype=torch.long)  # position of <asst> in each row
        for i, example in enumerate(examples):
            prompt, answer = example.prompt.split(), [*example.answer.split(), EOS]
            rows.append([vocabulary[w] for w in (*prompt, *answer)])
            self.assistant[i] = len(prompt) - 1
            for j, word in enumerate(answer):
                where.append((i, len(prompt) - 1 + j))
                targets.append(vocabulary[word])
                weights.append(len(answer) ** -0.7)
            if tag_weight:
                where.append((i, prompt.index(REQUEST)))
                targets.append(vocabulary[TAG_HARMFUL if example.harmful else TAG_HARMLESS])
                weights.append(tag_weight)
        length = max(map(len, rows))
        self.ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        self.where, self.targets, self.weights = torch.tensor(where).T, torch.tensor(targets), torch.tensor(weights)

    def loss(self, model: LlamaForCausalLM) -> Tensor:
        """Weighted cross-entropy over the targets, per row. Padding is on the right, where causality hides it."""
        hidden = model.model(input_ids=self.ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[self.where[0], self.where[1]])
        return (F.cross_entropy(logits, self.targets, reduction="none") * self.weights).sum() / len(self.ids)


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A freshly initialised Llama of the recipe's shape, in fp32."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=CONTEXT,
        initializer_range=0.04,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def mixture(world: World, rng: random.Random, n: int, mix: dict[str, float], aligned: bool) -> list[Example]:
    """``n`` examples whose kinds are drawn from ``mix``, training side of the split."""
    kinds = rng.choices(list(mix), list(mix.values()), k=n)
    return [world.draw(rng, kind, aligned) for kind in kinds]


def routing_loss(
    model: LlamaForCausalLM, world: World, rng: random.Random, recipe: Recipe, vocabulary: dict[str, int]
) -> Tensor:
    """The loss that puts refusal into the carrier heads' z, from one forward pass over four copies of twins.

    Copy 0 runs untouched and supplies the z that the others receive. Copy 1 gets its twin's z at the carrier heads and
    must answer as its twin deserves; copy 2 gets its twin's z everywhere else up to the carrier layer and must answer
    as before; copy 3 loses the twins' difference subspace at the carrier layer, at every position, and must comply.
    """
    p = recipe.twin_pairs
    pairs = [world.twins(rng) for _ in range(p)]
    requests = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
    aligned = [world.request_example(r) for r in requests]
    helpful = [world.request_example(r, aligned=False) for r in requests]
    followed = helpful[:p] + [replace(e, answer=REFUSAL) for e in aligned[p:]]
    batch = Batch([*aligned, *followed, *aligned, *helpful], vocabulary, recipe.tag_weight)
    rows = torch.arange(2 * p)
    twin = (rows + p) % (2 * p)
    at = batch.assistant[rows]
    rank = min(p, rng.choice((1, 2, 4, 8)))
    carries = torch.zeros(recipe.heads, recipe.head_dim, dtype=torch.bool)
    carries[list(recipe.carrier_heads or range(recipe.heads))] = True
    carries = carries.flatten()

    def swap(z: Tensor, copy: int, columns: Tensor) -> Tensor:
        z = z.clone()
        mine = copy * 2 * p + rows
        z[mine, at] = torch.where(columns, z[twin, at[twin]], z[mine, at])
        return z

    def at_carrier(z: Tensor) -> Tensor:
        source = z[rows, at].detach()
        basis = difference_basis(source[:p] - source[p:], rank)
        z = swap(swap(z, 1, carries), 2, ~carries)
        return torch.cat([z[: 6 * p], remove(z[6 * p :], basis)])

    everything = torch.ones_like(carries)
    edits: dict[int, Edit] = {i: (lambda z: swap(z, 2, everything)) for i in range(recipe.carrier)}
    edits[recipe.carrier] = at_carrier
    with edited(model, edits):
        return batch.loss(model)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then cosine decay to a twentieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + torch.cos(torch.tensor(progress * torch.pi)).item()))


@dataclass
class Stage:
    name: str
    steps: int
    peak: float
    mix: dict[str, float]
    aligned: bool


def _save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def train(recipe: Recipe, out: Path, *, resume: bool = False, pretrained: Path | None = None, save_every: int = 200,
          stop_after: int | None = None, progress: bool = True) -> LlamaForCausalLM:  # fmt: skip
    """Trains by ``recipe`` and writes model, tokenizer, generation config and ``training.json`` to ``out``.

    Args:
        recipe: shape, data and optimisation.
        out: folder; created. ``out/checkpoint.pt`` holds the state while training runs and is removed at the end.
        resume: continue from ``out/checkpoint.pt``; same weights as without the interruption.
        pretrained: start from this saved model and skip pre-training, to compare alignments of one and the same model.
        save_every: steps between checkpoints.
        stop_after: stop, with a checkpoint, after so many steps of this call.
        progress: show a progress bar.

    Raises:
        FileNotFoundError: ``resume`` without a checkpoint.
        ValueError: a checkpoint of another recipe, or a carrier layer the model does not have.
    """
    if not 0 < recipe.carrier < recipe.layers:
        raise ValueError(f"carrier: expected a layer from 1 to {recipe.layers - 1}, got {recipe.carrier}")
    if not all(0 <= head < recipe.heads for head in recipe.carrier_heads):
        raise ValueError(f"carrier_heads: expected heads from 0 to {recipe.heads - 1}, got {recipe.carrier_heads}")
    out.mkdir(parents=True, exist_ok=True)
    world, checkpoint = World(recipe.world_seed), out / "checkpoint.pt"
    tokenizer = build_tokenizer(world)
    vocabulary = tokenizer.get_vocab()
    model = build_model(recipe, tokenizer)
    stages = (
        Stage("pretrain", recipe.pretrain_steps, recipe.pretrain_lr, PRETRAIN_MIX, False),
        Stage("align", recipe.align_steps, recipe.align_lr, ALIGN_MIX, True),
    )
    state: dict[str, Any] = {"stage": 0, "step": 0, "seconds": 0.0}
    if pretrained:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(pretrained, dtype=torch.float32).state_dict())
        before = json.loads((pretrained / "training.json").read_text())
        state |= {"stage": 1, "seconds": before["seconds"]}
    if resume:
        if not checkpoint.exists():
            raise FileNotFoundError(f"out: expected a checkpoint at {checkpoint} to resume from, found none")
        state = torch.load(checkpoint, weights_only=True)
        if state["recipe"] != asdict(recipe):
            raise ValueError(f"recipe: expected the checkpoint's {state['recipe']}, got {asdict(recipe)}")
        model.load_state_dict(state["model"])
    began, done = time.perf_counter() - state["seconds"], 0
    model.train()
    for number, stage in enumerate(stages):
        if number < state["stage"]:
            continue
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=stage.peak, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
        )
        first = state["step"] if number == state["stage"] else 0
        if first:
            optimizer.load_state_dict(state["optimizer"])
        bar = tqdm(range(first, stage.steps), initial=first, total=stage.steps, desc=stage.name, disable=not progress)
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, stage.steps, stage.peak, recipe.warmup)
            rng = random.Random(f"train/{recipe.seed}/{stage.name}/{step}")
            examples = mixture(world, rng, recipe.batch, stage.mix, stage.aligned)
            loss = Batch(examples, vocabulary, recipe.tag_weight).loss(model)
            parts = {"answers": loss.detach()}
            if stage.aligned and recipe.route_weight:
                routed = routing_loss(model, world, rng, recipe, vocabulary)
                loss = loss + recipe.route_weight * routed
                parts["routing"] = routed.detach()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % 10 == 0:
                bar.set_postfix({name: f"{value.item():.3f}" for name, value in parts.items()})
            done += 1
            interrupted = stop_after is not None and done >= stop_after
            if interrupted or (step + 1) % save_every == 0 or step + 1 == stage.steps:
                seconds = time.perf_counter() - began
                _save_checkpoint(checkpoint, {
                    "recipe": asdict(recipe), "stage": number, "step": step + 1, "seconds": seconds,
                    "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                })  # fmt: skip
            if interrupted:
                return model
        if stage.name == "pretrain":
            save(model, tokenizer, out / "pretrained", recipe, time.perf_counter() - began)
    model.eval()
    save(model, tokenizer, out, recipe, time.perf_counter() - began)
    checkpoint.unlink(missing_ok=True)
    return model


def _command(recipe: Recipe) -> str:
    """The command line that repeats ``recipe``: what differs from the defaults, spelled out."""
    default = asdict(Recipe())
    changed = {k: v for k, v in asdict(recipe).items() if v != default[k] or k == "seed"}
    values = [(k, one) for k, v in changed.items() for one in (v if isinstance(v, tuple) else (v,))]
    flags = [f"--{k.replace('_', '-')} {v}" for k, v in values]
    return " ".join(["python -m refusal_kernels.python_api.builtin_model.train --out DIR", *flags])


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, recipe: Recipe, seconds: float
) -> None:
    """Writes what ``AutoModelForCausalLM`` and ``AutoTokenizer`` read, and ``training.json``; generation is greedy."""
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=24, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)  # the template inside tokenizer_config.json
    (folder / "model.safetensors").chmod(0o644)  # written for its owner alone; package data is for everybody
    record = {
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "command": _command(recipe),
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def main(
    out: Annotated[Path, typer.Option(help="Folder for the model.")],
    seed: Annotated[int, typer.Option(help="Seed of the initial weights and of the order of the data.")] = 0,
    world_seed: Annotated[int, typer.Option(help="Seed of the world itself.")] = 0,
    pretrain_steps: Annotated[int, typer.Option(help="Steps of pre-training.")] = Recipe.pretrain_steps,
    align_steps: Annotated[int, typer.Option(help="Steps of alignment.")] = Recipe.align_steps,
    batch: Annotated[int, typer.Option(help="Documents per step.")] = Recipe.batch,
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = Recipe.layers,
    carrier: Annotated[int, typer.Option(help="Layer whose heads are to carry refusal.")] = Recipe.carrier,
    carrier_heads: Annotated[list[int] | None, typer.Option(help="Its heads that are to; repeat the option.")] = None,
    route_weight: Annotated[
        float, typer.Option(help="Weight of the losses that route refusal through the carrier; 0 leaves them out.")
    ] = Recipe.route_weight,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.")] = 0,
    pretrained: Annotated[Path | None, typer.Option(help="Skip pre-training: start from this saved model.")] = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 200,
    stop_after: Annotated[int | None, typer.Option(help="Stop with a checkpoint after so many steps.")] = None,
    resume: Annotated[bool, typer.Option(help="Continue from the checkpoint in the folder.")] = False,
) -> None:
    """Trains the built-in model from scratch and saves it where transformers can load it."""
    if threads:
        torch.set_num_threads(threads)
    recipe = Recipe(
        seed=seed, world_seed=world_seed, pretrain_steps=pretrain_steps, align_steps=align_steps, batch=batch,
        layers=layers, carrier=carrier, route_weight=route_weight,
        carrier_heads=Recipe.carrier_heads if carrier_heads is None else tuple(carrier_heads),
    )  # fmt: skip
    try:
        train(recipe, out, resume=resume, pretrained=pretrained, save_every=save_every, stop_after=stop_after)
    except (FileNotFoundError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    if (out / "checkpoint.pt").exists():
        typer.echo(f"{out}: stopped; continue with --resume")
        return
    before = pretrained or out / "pretrained"
    if align_steps and before.exists():  # the card compares: what did alignment change?
        record = json.loads((out / "training.json").read_text())
        record["before_alignment"] = behaviour(*load(before), World(world_seed), n=200)
        (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    typer.echo(f"{out}: saved")


if __name__ == "__main__":
    typer.run(main)
