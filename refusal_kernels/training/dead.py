"""DeadLatents: which latents have not fired for a given number of tokens, kept on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import INDEX_DTYPES, check_shape, check_tensor, describe


class DeadLatents:
    """Tokens since each latent last fired, and the compact list of those that count as dead.

    A latent fires on a token when its value there is > 0. `update` never makes the host wait for a GPU: every
    `refresh_every` updates the list of dead rows is rebuilt on the device and its length copied to the host
    asynchronously; `rows` changes once that copy has arrived, so it lags behind by at least one update there (on a CPU
    it does not).

    Args:
        n_latents: F.
        dead_after_tokens: a latent is dead after this many tokens without firing (10 million in the literature).
        refresh_every: updates between two rebuilds of the list.
        device: where the counters live.
        heads: H, for autoencoders with a head axis: counters and `fire_counts` are then [H, F], `rows` [H, D].

    Source: Gao et al., arXiv 2406.04093, section A.2 (AuxK).
    """

    def __init__(
        self,
        n_latents: int,
        dead_after_tokens: int = 10_000_000,
        refresh_every: int = 10,
        device: torch.device | str | None = None,
        heads: int | None = None,
    ) -> None:
        for name, value in (
            ("n_latents", n_latents),
            ("dead_after_tokens", dead_after_tokens),
            ("refresh_every", refresh_every),
            ("heads", 1 if heads is None else heads),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"DeadLatents: {name} must be an integer of at least 1; got {value!r}")
        self.dead_after_tokens = dead_after_tokens
        self.refresh_every = refresh_every
        lead = () if heads is None else (heads,)
        self.tokens_since_fired = torch.zeros(*lead, n_latents, dtype=torch.int64, device=device)
        self._updates = 0
        self._rows = self.tokens_since_fired.new_empty(*lead, 0)
        self._count = 0
        self._pending: tuple[Tensor, Tensor, Any] | None = None

    @property
    def rows(self) -> Tensor:
        """int64 [D]: the dead latents of the last rebuild, ascending. With heads [H, D]: each head's, then -1."""
        return self._rows

    @property
    def fraction(self) -> float:
        """D / F of the last rebuild."""
        return self._count / self.tokens_since_fired.numel()

    @torch.no_grad()
    def update(self, fire_counts: Tensor, n_tokens: int) -> None:
        """Accounts for a batch: `fire_counts` [F] is in how many of its `n_tokens` tokens each latent fired.

        Raises ValueError or TypeError for a `fire_counts` that is no such tensor or a negative `n_tokens`.
        """
        if not isinstance(fire_counts, Tensor):
            raise TypeError(f"DeadLatents.update: fire_counts must be a tensor [F]; got {describe(fire_counts)}")
        check_tensor("DeadLatents.update", "fire_counts", fire_counts, INDEX_DTYPES)
        check_shape("DeadLatents.update", "fire_counts", fire_counts, self._shape, self._axes)
        if isinstance(n_tokens, bool) or not isinstance(n_tokens, int) or n_tokens < 0:
            raise ValueError(f"DeadLatents.update: n_tokens must be an integer of at least 0; got {n_tokens!r}")
        self.tokens_since_fired += n_tokens
        self.tokens_since_fired.masked_fill_(fire_counts.to(self.tokens_since_fired.device) > 0, 0)
        self._updates += 1
        if self._pending is not None:
            self._collect()
        if self._updates % self.refresh_every == 0 and self._pending is None:
            self._rebuild()

    def _rebuild(self) -> None:
        dead = self.tokens_since_fired >= self.dead_after_tokens
        if dead.device.type != "cuda" and dead.dim() == 1:
            self._rows = dead.nonzero().squeeze(1)
            self._count = self._rows.numel()
            return
        order = torch.argsort(dead, descending=True, stable=True)  # dead rows first, ascending
        found = dead.sum(-1)
        if dead.dim() == 2:  # here and not in `_take`: a mask from the host's counts would have to be copied back
            order = order.masked_fill(torch.arange(dead.shape[1], device=dead.device) >= found[:, None], -1)
        if dead.device.type != "cuda":
            self._take(order, found)
            return
        count = torch.empty(found.shape, dtype=torch.int64, device="cpu", pin_memory=True)
        count.copy_(found, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._pending = (order, count, arrived)

    def _collect(self) -> None:
        order, count, arrived = self._pending  # type: ignore[misc]
        if arrived.query():
            self._take(order, count)
            self._pending = None

    def _take(self, order: Tensor, count: Tensor) -> None:
        """`count` [] or [H] on the host, of the first entries of `order` [F] or [H, F]."""
        self._count = int(count.sum())
        self._rows = order[..., : int(count.max())]

    @property
    def _shape(self) -> tuple[int, ...]:
        return tuple(self.tokens_since_fired.shape)

    @property
    def _axes(self) -> str:
        return "[F]" if self.tokens_since_fired.dim() == 1 else "[H, F]"

    def state_dict(self) -> dict[str, Any]:
        """Tensors and counters that continue the tracking exactly."""
        return {
            "tokens_since_fired": self.tokens_since_fired.clone(),
            "rows": self._rows.clone(),
            "updates": self._updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; ValueError or TypeError when it is something else or belongs to
        another number of latents."""
        expected = ("tokens_since_fired", "rows", "updates")
        if not isinstance(state, dict) or any(name not in state for name in expected):
            got = f"the keys {sorted(state)}" if isinstance(state, dict) else describe(state)
            raise ValueError(f"DeadLatents.load_state_dict: state must hold {', '.join(expected)}; got {got}")
        for name in ("tokens_since_fired", "rows"):
            check_tensor("DeadLatents.load_state_dict", name, state[name], INDEX_DTYPES)
        tokens = state["tokens_since_fired"]
        check_shape("DeadLatents.load_state_dict", "tokens_since_fired", tokens, self._shape, self._axes)
        rows = state["rows"]
        if rows.dim() != tokens.dim() or rows.shape[:-1] != tokens.shape[:-1]:
            form = "[D]" if tokens.dim() == 1 else f"[{tokens.shape[0]}, D]"
            raise ValueError(f"DeadLatents.load_state_dict: rows must have shape {form}; got {tuple(rows.shape)}")
        self.tokens_since_fired.copy_(tokens)
        self._rows = rows.to(self.tokens_since_fired.device, torch.int64).clone()
        self._count = int((self._rows >= 0).sum())
        self._updates = int(state["updates"])
        self._pending = None
