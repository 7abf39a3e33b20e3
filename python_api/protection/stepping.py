"""Projection around an optimizer's step: the modes "update", "weight" and "gradient" as hooks on any torch optimizer.

With P = I - s U U^T along the constrained dimension of a LoRA factor p:

    update     p <- p_before + P (p - p_before)    after the step (what Adam-NSCL does to Adam's update)
    weight     p <- P p                            after the step
    gradient   g <- P g                            before the step (the paper; exact for SGD, leaks under Adam, whose
                                                   division by sqrt(v) does not commute with P)

Where p starts in the complement of span U and s = 1, P p = p_before + P (p - p_before): update and weight are then the
same map and run as the second, which needs no copy of p and does not let rounding add up over the steps.

The hooks sit on the innermost optimizer, so they run exactly when it steps: not in the steps that a GradScaler skips,
nor in the micro-steps of gradient accumulation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

import refusal_kernels as rk

MEASURE_AFTER = 10  # steps: Adam's first ones are sign-like, and its leak is there at once


class ProtectionWarning(UserWarning):
    """What protection does not cover, or does not keep."""


@dataclass(frozen=True)
class Factor:
    """A constrained LoRA factor: dim 1 of A [r, in] for an input side, dim 0 of B [out, r] for an output side."""

    name: str
    parameter: nn.Parameter
    U: Tensor
    dim: int

    def entry(self, tensor: Tensor) -> tuple[Tensor, Tensor, int]:
        return tensor, self.U.to(tensor.device), self.dim


def innermost(optimizer: Any) -> Optimizer:
    """The torch optimizer inside of accelerate's and other wrappers. TypeError where there is none."""
    inner = optimizer
    # accelerate's wrapper is an Optimizer by class, but never ran Optimizer.__init__ and has no hooks.
    while not hasattr(inner, "_optimizer_step_pre_hooks") and getattr(inner, "optimizer", None) is not None:
        inner = inner.optimizer
    if not isinstance(inner, Optimizer) or not hasattr(inner, "_optimizer_step_pre_hooks"):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return inner


def projects_itself(optimizer: Optimizer, factors: list[Factor], mode: str, strength: float) -> bool:
    """Whether `optimizer` is a ProjectedAdamW that holds the trained factors as mode "update" would, so that no hook is
    needed.

    Raises:
        ValueError: it holds some of them, but not all, in another mode, or in another subspace or strength: hooks
            would project a second time what it projects already.
    """
    if not isinstance(optimizer, rk.ProjectedAdamW):
        return False
    trained = [f for f in factors if f.parameter.requires_grad]
    if not any(optimizer.held(f.parameter) for f in trained):
        return False
    if mode != "update" or optimizer.strength != strength:
        raise ValueError(
            f"optimizer: this ProjectedAdamW projects updates itself, with strength {optimizer.strength:g}, which fits "
            f"mode='update' of the same strength only; got mode {mode!r}, strength {strength:g}. Give it bases=[], or "
            "take another optimizer"
        )
    for f in trained:
        held = optimizer.held(f.parameter)
        if held is None or held[1] != f.dim or not torch.equal(held[0], f.U.to(held[0])):
            why = "does not hold" if held is None else "holds in another subspace"
            raise ValueError(
                f"optimizer: this ProjectedAdamW {why} {f.name}, though it holds other constrained adapter weights; "
                "protection.optimizer() makes one that fits"
            )
    return True


class StepProjector:
    """The hooks of one mode on one optimizer.

    Args:
        factors: what is constrained.
        from_complement: whether the factors start without a component in their U.
        leak: measures the leak; asked once in mode "gradient".

    Raises:
        TypeError: not a torch optimizer, nor a wrapper of one.
        ValueError: the optimizer does not hold every factor that is trained, or none is trained.
    """

    def __init__(
        self,
        optimizer: Any,
        factors: list[Factor],
        mode: Literal["update", "weight", "gradient"],
        strength: float,
        from_complement: bool,
        leak: Callable[[], float],
    ) -> None:
        self.optimizer = innermost(optimizer)
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        self._factors = [f for f in factors if f.parameter.requires_grad]
        if not self._factors:
            raise ValueError(
                "optimizer: no constrained adapter weight is trainable (is_trainable=True was not given, or another "
                "adapter is active?)"
            )
        if missing := [f.name for f in self._factors if id(f.parameter) not in held]:
            raise ValueError(
                f"optimizer: {len(missing)} constrained adapter weights are not among its parameters, {missing[0]} for "
                "one; attach the optimizer that trains them, or use mode='forward', which needs none"
            )
        self._mode, self._strength, self._leak, self._steps = mode, strength, leak, 0
        self._before: list[Tensor] = []
        if mode == "update" and strength == 1 and from_complement:
            self._mode = "weight"
        elif mode == "update":
            self._before = [torch.empty_like(f.parameter) for f in self._factors]
        if self._mode != "gradient":
            entries = [f.entry(f.parameter.detach()) for f in self._factors]
            self._plan = rk.ProjectionPlan(entries, strength)
        self._handles: list[RemovableHandle] = [
            self.optimizer.register_step_pre_hook(self._pre),
            self.optimizer.register_step_post_hook(self._post),
        ]

    @torch.no_grad()
    def _pre(self, *_: Any) -> None:
        if self._mode == "gradient":
            entries = [f.entry(f.parameter.grad) for f in self._factors if f.parameter.grad is not None]
            if entries:
                rk.ProjectionPlan(entries, self._strength).apply_()
        for before, f in zip(self._before, self._factors, strict=False):
            before.copy_(f.parameter)

    @torch.no_grad()
    def _post(self, *_: Any) -> None:
        self._steps += 1
        if self._mode == "gradient":
            if self._steps == MEASURE_AFTER and self._strength == 1:
                self._warn(self._leak())
            return
        for before, f in zip(self._before, self._factors, strict=False):
            f.parameter.sub_(before)
        self._plan.apply_()
        for before, f in zip(self._before, self._factors, strict=False):
            f.parameter.add_(before)

    def _warn(self, leak: float) -> None:
        if leak > 1e-3:
            warnings.warn(
                f"mode='gradient' does not keep the promise under {type(self.optimizer).__name__}: after "
                f"{self._steps} steps the leak is {leak:.3f} (the share of an adapter's update that violates its "
                "constraint). Projected gradients keep the update in the complement under plain SGD only; "
                "mode='forward' keeps it there under every optimizer",
                ProtectionWarning,
                stacklevel=2,
            )

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
