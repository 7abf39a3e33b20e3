"""Log-probabilities of answers with single heads ablated; what an ablation leaves alone is computed once.

Ablating head (l, i) multiplies its columns of z, o_proj's input, by eps at the positions that predict the answer. Two
things do not change, and are computed once for a batch:

* the positions before those: the prompt but its last token goes through the model once, into a key/value cache, and
  only the predicting positions are computed again;
* the layers before l: they return what they returned without the ablation.

So an ablated forward computes layers l … L - 1 at the predicting positions, and the final norm and lm_head there. All
of it runs inside the model's own forward, which keeps masks, rotary embeddings, scaled or capped logits as each family
has them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks import attention_geometry, decoder_layers, hook_z, o_proj_modules
from ..prompts.chat import Encoded, device_of

_PLAIN_CACHES = ("DynamicLayer", "DynamicSlidingWindowLayer")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; each module's own flag is put back."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _returning(modules: Sequence[nn.Module], values: Sequence[Any]) -> Iterator[None]:
    """Inside, each module returns its value instead of computing one."""
    own = [module.__dict__.get("forward") for module in modules]  # accelerate puts one on the instance
    for module, value in zip(modules, values, strict=True):
        module.__dict__["forward"] = partial(_constant, value)
    try:
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward


def _constant(value: Any, *_args: Any, **_kwargs: Any) -> Any:
    return value


@contextmanager
def logits_at(model: nn.Module, positions: Tensor) -> Iterator[None]:
    """Inside, the model's logits are [1, n, vocabulary]: those of the n True entries of `positions`, row by row.

    Equivalent to: ``logits[positions][None]``, with the lm_head computed there only.
    """
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if not isinstance(head, nn.Module):
        raise TypeError(f"model: expected a causal LM with an lm_head, got {type(model).__name__}")
    at = positions.nonzero(as_tuple=True)  # once, not in every forward: it waits for the device

    def pick(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        rows, columns = (index.to(hidden.device) for index in at)
        return (hidden[rows, columns][None], *args[1:])

    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


def picked_log_probs(logits: Tensor, targets: Tensor, rows: Tensor, n: int) -> Tensor:
    """log P summed per row, fp32 [n], of `targets` [m] under `logits` [1, m, vocabulary]; `rows` [m] says whose."""
    chosen = logits[0].float()
    targets, rows = targets.to(chosen.device), rows.to(chosen.device)
    log_p = chosen.gather(1, targets[:, None])[:, 0] - chosen.logsumexp(1)
    return torch.zeros(n, device=chosen.device).index_add(0, rows, log_p)


class AblatedForwards:
    """One batch of answers, ready to be scored under the ablation of any head.

    Args:
        model: transformers causal LM in eval mode (`evaluating`).
        encoded: prompts with answers, n of them; each prompt has at least one token.
        pad_id: any token; padding is masked.
        eps: what the head's z is multiplied by.
        copies: heads ablated at once, side by side in the batch: n * copies rows go through the model.

    Attributes:
        log_probs: fp32 [n], without ablation.

    The residual stream at the predicting positions of every layer is kept: L * n * copies * answer length * d_model.

    Raises:
        ValueError: a prompt without tokens.
    """

    def __init__(
        self, model: nn.Module, encoded: Sequence[Encoded], pad_id: int, eps: float = 0.0, copies: int = 1
    ) -> None:
        if any(e.start < 1 for e in encoded):
            raise ValueError("encoded: expected prompts of at least one token, got one without")
        self.model, self.eps, self.copies = model, eps, copies
        self._n = len(encoded)
        self._layers = decoder_layers(model)
        self._geometry = attention_geometry(model)
        self._o_proj = o_proj_modules(model, self._geometry.layers)
        self._lay_out([e for _ in range(copies) for e in encoded], pad_id)
        self._cache = self._read_prompts()
        self._outputs: list[Any] = []
        self._embedded: list[tuple[nn.Module, Any]] = []
        self.log_probs = self._record()[: self._n]

    def _lay_out(self, rows: Sequence[Encoded], pad_id: int) -> None:
        # Prompts but their last token end in one column, so that the predicting positions begin in one column.
        device = device_of(self.model)
        self._prefix = max(e.start - 1 for e in rows)
        suffix = max(len(e.ids) - e.start for e in rows)
        ids = torch.full((len(rows), self._prefix + suffix), pad_id)
        mask, targets = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, e in enumerate(rows):
            first, read = self._prefix - (e.start - 1), len(e.ids) - 1  # the last token is predicted, never read
            ids[row, first : first + read] = torch.tensor(e.ids[:-1])
            mask[row, first : first + read] = 1
            targets[row, self._prefix : first + read] = torch.tensor(e.ids[e.start :])
        at = mask.bool()
        at[:, : self._prefix] = False
        self._targets, self._rows = targets[at], at.nonzero()[:, 0]
        self._ids, self._mask, self._at = ids.to(device), mask.to(device), at.to(device)
        self._position_ids = (self._mask.cumsum(1) - 1).clamp_min(0)

    def _read_prompts(self) -> Any:
        """The prompts' key/value cache, or None where there is none that an ablated forward could share."""
        if self._prefix == 0:
            return None
        columns = slice(0, self._prefix)
        nothing = torch.zeros_like(self._mask[:, columns], dtype=torch.bool)
        nothing[0, -1] = True
        with logits_at(self.model, nothing):
            cache = self.model(
                input_ids=self._ids[:, columns],
                attention_mask=self._mask[:, columns],
                position_ids=self._position_ids[:, columns],
                use_cache=True,
            ).past_key_values
        # These grow by concatenation and leave the old tensors alone; recurrent states, for one, change in place.
        if all(type(layer).__name__ in _PLAIN_CACHES for layer in getattr(cache, "layers", [None])):
            return cache
        return None

    def _forward(self) -> Tensor:
        first = 0 if self._cache is None else self._prefix
        extra: dict[str, Any] = {"use_cache": False}
        if self._cache is not None:
            cache = copy.copy(self._cache)
            cache.layers = [copy.copy(layer) for layer in self._cache.layers]
            extra = {"use_cache": True, "past_key_values": cache}
        with logits_at(self.model, self._at[:, first:]):
            logits = self.model(
                input_ids=self._ids[:, first:],
                attention_mask=self._mask,
                position_ids=self._position_ids[:, first:],
                **extra,
            ).logits
        return picked_log_probs(logits, self._targets, self._rows, len(self._ids))

    def _record(self) -> Tensor:
        get = getattr(self.model, "get_input_embeddings", None)
        embedding = get() if callable(get) else None
        with ExitStack() as stack:
            for layer in self._layers:
                stack.callback(layer.register_forward_hook(lambda _m, _a, output: self._outputs.append(output)).remove)
            if isinstance(embedding, nn.Module):
                handle = embedding.register_forward_hook(lambda m, _a, output: self._embedded.append((m, output)))
                stack.callback(handle.remove)
            log_probs = self._forward()
        if len(self._outputs) != len(self._layers):
            raise ValueError(
                f"model: expected each of {len(self._layers)} decoder layers to run once in a forward, "
                f"got {len(self._outputs)} runs"
            )
        return log_probs

    @contextmanager
    def _from(self, layer: int) -> Iterator[None]:
        """Inside, everything before decoder layer `layer` returns what it returned without ablation."""
        once = self._embedded if len(self._embedded) == 1 else []
        modules = [*(module for module, _ in once), *self._layers[:layer]]
        with _returning(modules, [*(value for _, value in once), *self._outputs[:layer]]):
            yield

    def check(self) -> None:
        """ValueError for a model whose layers leave later ones something beside the residual stream (shared keys)."""
        for layer in {len(self._layers) // 2, len(self._layers) - 1}:
            try:
                with self._from(layer):
                    again = self._forward()[: self._n]
                same = torch.allclose(again, self.log_probs, rtol=1e-3, atol=1e-3)
            except (RuntimeError, KeyError, AttributeError, TypeError) as error:
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    raise
                same = False
            if not same:
                raise ValueError(
                    f"model: layers of {type(self.model).__name__} pass more than the residual stream to later ones, "
                    "so no forward can start in the middle; use mode='screen'"
                )

    def ablate(self, layer: int, heads: Sequence[int]) -> Tensor:
        """log P of the n answers with one head of `layer` ablated: fp32 [len(heads), n], at most `copies` heads."""
        if not 0 < len(heads) <= self.copies:
            raise ValueError(f"heads: expected 1 to {self.copies} heads, got {len(heads)}")
        at = self._at if self._cache is None else self._at[:, self._prefix :]
        head_dim = self._geometry.head_dims[layer]
        columns = torch.zeros(len(at), 1, self._geometry.n_heads * head_dim, dtype=torch.bool, device=at.device)
        for copy_, head in enumerate(heads):
            rows = slice(copy_ * self._n, (copy_ + 1) * self._n)
            columns[rows, :, head * head_dim : (head + 1) * head_dim] = True
        where = columns & at[..., None]

        def edit(z: Tensor) -> Tensor:
            return torch.where(where.to(z.device), z * self.eps if self.eps else torch.zeros_like(z), z)

        handle = hook_z(self._o_proj[layer], edit)
        try:
            with self._from(layer):
                log_probs = self._forward()
        finally:
            handle.remove()
        return log_probs.view(self.copies, self._n)[: len(heads)]
