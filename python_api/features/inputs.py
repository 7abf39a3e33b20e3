"""The site "all": for every linear that is to be adapted, a basis of the inputs it gets on given prompts.

With U such a basis, an adapted weight with dW U = 0 acts on these prompts as the untouched one does, up to what U left
out: ||dW x|| <= ||dW|| ||x - U U^T x||. Refusal is then held by holding everything that leads to it, not single
features. What it holds is the whole context of the prompts: a basis from harmless prompts of the same form may serve
as well, and is the control to run beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..hooks import find_decoder
from ..prompts.chat import Chat, by_length, device_of, generate
from ..prompts.records import prompts_of
from .activations import Gram, answer_positions, encode_asked
from .basis import base_model

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linears of a decoder layer that LoRA adapts."""

InputPositions = Literal["prompt", "answer", "all"]

# fp64 Gram matrices held at once; wider models take several passes over the prompts.
MEMORY = 4 * 2**30


def adapted_linears(model: nn.Module, modules: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """{path in the base model: module} of the decoder layers' linears, in the order of the model.

    Args:
        modules: names ("v_proj") or paths ("model.layers.3.mlp.up_proj"); None: `LINEARS`. A module matches a name by
            the end of its path, as PEFT's target_modules do.

    Raises:
        ValueError: a name that matches nothing.
    """
    wanted = list(LINEARS if modules is None else modules)
    base = base_model(model)
    prefix = find_decoder(base)[0] + "."
    found: dict[str, nn.Module] = {}
    matched: set[str] = set()
    for path, module in base.named_modules():
        if not path.startswith(prefix) or not hasattr(module, "in_features"):
            continue
        names = [name for name in wanted if path == name or path.endswith("." + name)]
        if names:
            matched.update(names)
            found[path] = module
    missing = [name for name in wanted if name not in matched]
    if not found or (modules is not None and missing):
        raise ValueError(f"modules: expected names of linears below {prefix[:-1]}, got {', '.join(missing)}")
    return found


@contextmanager
def watched_inputs(modules: Mapping[str, nn.Module], see: Any) -> Iterator[None]:
    """While open, `see(path, x)` is called with every module's input."""

    def hook(path: str) -> Any:
        return lambda _module, args: see(path, args[0])

    with ExitStack() as stack:
        for path, module in modules.items():
            stack.callback(module.register_forward_pre_hook(hook(path)).remove)
        yield


@torch.no_grad()
def input_basis(
    model: nn.Module,
    chat: Chat,
    prompts: Sequence[Any],
    *,
    modules: Sequence[str] | None = None,
    rank: int = 32,
    positions: InputPositions = "prompt",
    answers: Sequence[str] | None = None,
    max_new_tokens: int = 24,
    batch_size: int = 16,
    memory: int = MEMORY,
    progress: bool = False,
) -> dict[str, Tensor]:
    """{path: U [in_features, r]} of the untouched model's inputs on `prompts`; modules that share an input share U.

    Args:
        model: the untouched model; left as it was. Under PEFT give it with its adapter off, or before wrapping.
        prompts: records with a `prompt`, or strings: harmful ones, or harmless ones for the control.
        modules: as in `adapted_linears`.
        rank: directions per module, at most in_features; fewer where the inputs span fewer.
        positions: "prompt": every prompt token, BOS included, for the attention sink is part of what must stay;
            "answer": the positions that predict the answer; "all": both.
        answers: one a prompt; None: the model's own greedy answers. Used by "answer" and "all".
        memory: bytes of fp64 Gram matrices [in_features, in_features] held at once. More needs more passes.

    Equivalent to: torch.linalg.svd(X, full_matrices=False).Vh[:r].T of the inputs X [tokens, in_features].

    Raises:
        ValueError: naming the argument.
    """
    asked = prompts_of(prompts)
    if not asked:
        raise ValueError("prompts: expected at least one prompt, got none")
    if positions not in get_args(InputPositions):
        raise ValueError(f"positions: expected one of {', '.join(get_args(InputPositions))}; got {positions!r}")
    if answers is not None and (positions == "prompt" or len(answers) != len(asked)):
        raise ValueError(f"answers: expected {len(asked)} answers with positions 'answer' or 'all', got {len(answers)}")
    found = adapted_linears(model, modules)
    for path, module in found.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= module.in_features:  # type: ignore[operator]
            raise ValueError(f"rank: expected 1 to {module.in_features}, the inputs of {path}, got {rank!r}")
    if positions != "prompt" and answers is None:
        bar = "answering" if progress else None
        answers = generate(model, chat, asked, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=bar)
    said = [None] * len(asked) if answers is None else list(answers)
    encoded = [encode_asked(chat, prompt, answer) for prompt, answer in zip(asked, said, strict=True)]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        groups = _shared(model, chat.batch(encoded[:1]).inputs, found)
        out: dict[str, Tensor] = {}
        for part in _chunks(groups, found, memory):
            grams = {owner: Gram(int(found[owner].in_features)) for owner in part}  # type: ignore[arg-type]
            _pass(model, chat, encoded, positions, {owner: found[owner] for owner in part}, grams, batch_size, progress)
            for owner in part:
                u = grams.pop(owner).top(rank, f"inputs of {owner}")
                out |= dict.fromkeys(groups[owner], u)
    finally:
        for module in training:
            module.training = True
    return {path: out[path] for path in found}


def _shared(model: nn.Module, batch: Mapping[str, Tensor], found: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """{first path: paths} of the modules that are called with the very same tensor."""
    seen: dict[str, Tensor] = {}  # alive until the end, so that no address is used twice

    with watched_inputs(found, lambda path, x: seen.setdefault(path, x)):
        model(**{name: t.to(device_of(model)) for name, t in batch.items()}, use_cache=False)
    if missing := [path for path in found if path not in seen]:
        raise ValueError(f"modules: expected modules that run in every forward, got {', '.join(missing)}")
    groups: dict[int, list[str]] = {}
    for path in found:
        groups.setdefault(id(seen[path]), []).append(path)
    return {paths[0]: paths for paths in groups.values()}


def _chunks(groups: Mapping[str, Any], found: Mapping[str, nn.Module], memory: int) -> Iterator[list[str]]:
    part: list[str] = []
    held = 0
    for owner in groups:
        size = 8 * int(found[owner].in_features) ** 2  # type: ignore[arg-type]
        if part and held + size > memory:
            yield part
            part, held = [], 0
        part.append(owner)
        held += size
    yield part


def _pass(
    model: nn.Module,
    chat: Chat,
    encoded: Sequence[Any],
    positions: InputPositions,
    modules: Mapping[str, nn.Module],
    grams: Mapping[str, Gram],
    batch_size: int,
    progress: bool,
) -> None:
    from tqdm.auto import tqdm

    bar = tqdm(total=len(encoded), desc="reading inputs", unit="prompt", disable=not progress, leave=False)
    with bar:
        for rows in by_length([len(e.ids) for e in encoded], batch_size):
            batch = chat.batch([encoded[i] for i in rows]).to(device_of(model))
            prompt = batch.attention_mask.bool() & ~batch.targets
            answer = answer_positions(batch, [encoded[i] for i in rows])
            chosen = {"prompt": prompt, "answer": answer, "all": prompt | answer}[positions]

            def see(path: str, x: Tensor, chosen: Tensor = chosen) -> None:
                grams[path].add(x[chosen.to(x.device)])

            with watched_inputs(modules, see):
                model(**batch.inputs, use_cache=False)
            bar.update(len(rows))


@torch.no_grad()
def coverage(
    model: nn.Module,
    chat: Chat,
    prompts: Sequence[str],
    basis: Mapping[str, Tensor],
    *,
    batch_size: int = 16,
) -> dict[str, float]:
    """{path: 1 - sum ||x - U U^T x||^2 / sum ||x||^2} over the prompts' tokens without the first.

    How much of what a module reads on these prompts lies in its U. The first token is left out: as an attention sink
    it may be so large that it alone would fill the share.
    """
    modules = {path: module for path, module in base_model(model).named_modules() if path in basis}
    inside, whole = dict.fromkeys(basis, 0.0), dict.fromkeys(basis, 0.0)
    encoded = [encode_asked(chat, prompt, None) for prompt in prompts]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        for rows in by_length([len(e.ids) for e in encoded], batch_size):
            batch = chat.batch([encoded[i] for i in rows]).to(device_of(model))
            chosen = batch.attention_mask.bool() & ~batch.targets
            chosen[:, 0] = False

            def see(path: str, x: Tensor, chosen: Tensor = chosen) -> None:
                rows = x[chosen.to(x.device)].float()
                inside[path] += float((rows @ basis[path].to(rows)).square().sum())
                whole[path] += float(rows.square().sum())

            with watched_inputs(modules, see):
                model(**batch.inputs, use_cache=False)
    finally:
        for module in training:
            module.training = True
    return {path: inside[path] / whole[path] if whole[path] > 0 else 0.0 for path in basis}
