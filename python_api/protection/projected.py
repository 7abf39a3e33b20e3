"""ProjectedLinear: a LoRA factor that is trained freely and runs projected (mode "forward").

    effective A = A (I - s U U^T)        effective B = (I - s U U^T) B

The parameter that optimizers, DistributedDataParallel and gradient clipping see is the free one, under the name it
has in PEFT. Whoever asks the module for `weight` gets the effective one: the forward, PEFT's merge,
`add_weighted_adapter`. The constraint therefore holds under every optimizer and every precision of its state.
`state_dict` speaks of effective weights too, so that what is saved opens in plain PEFT and computes the same, and
`load_state_dict` finds the free weight whose projection is what it was given.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

import refusal_kernels as rk

# The weight that each module computed last, to see whether somebody wrote to it. Not on the module: a tensor with a
# graph behind it could be neither copied nor pickled there.
_handed_out: WeakKeyDictionary[ProjectedLinear, Tensor] = WeakKeyDictionary()


class ProjectedLinear(nn.Linear):
    """nn.Linear whose `weight` is project_out(parameter, U, dim, strength). Made from a plain one by :meth:`of`.

    U stays outside of the buffers: as one it would be rounded by `model.bfloat16()`, no longer orthonormal then, and
    broadcast by DistributedDataParallel at every forward.
    """

    _refusal_basis: Tensor
    _refusal_dim: int
    _refusal_strength: float

    @classmethod
    def of(cls, linear: nn.Linear, basis: Tensor, dim: int, strength: float) -> ProjectedLinear:
        """Turns `linear` into a ProjectedLinear, in place: parameter, optimizer state and hooks stay what they are."""
        linear._refusal_basis = basis.to(linear.weight.device)  # type: ignore[assignment]
        linear._refusal_dim, linear._refusal_strength = dim, strength  # type: ignore[assignment]
        linear.__class__ = cls
        assert isinstance(linear, ProjectedLinear)
        return linear

    @property
    def free(self) -> nn.Parameter:
        """The parameter itself, unprojected."""
        return whole(self._parameters.get("weight"))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        free = self.free
        try:
            # Under autocast the products with U would run in half precision, and the promise with them.
            with torch.autocast(free.device.type, enabled=False):
                weight = rk.project_out(free, self._refusal_basis, self._refusal_dim, self._refusal_strength)
        except AttributeError as error:  # nn.Module would answer it with the unprojected parameter
            raise RuntimeError(f"the projected weight could not be computed: {error}") from error
        if not torch.compiler.is_compiling():
            self._check_written()
            _handed_out[self] = weight
        return weight

    def _check_written(self) -> None:
        """RuntimeError where the weight that was handed out last was written to: that reached no parameter."""
        if (last := _handed_out.pop(self, None)) is not None and not last.is_inference() and last._version:
            raise RuntimeError(
                "an in-place write to the weight of a protected LoRA factor was lost, because that weight is computed "
                "from the module's parameter: write to `.free`, or remove() the protection first and protect again "
                "(so for PEFT's reset_lora_parameters)"
            )

    @torch.no_grad()
    def effective(self) -> Tensor:
        """What the forward runs, without gradient; the parameter itself, bit for bit, where that is in place already.

        Projecting twice is projecting once only up to rounding. Leaving alone what is projected makes saving, loading
        and saving again give the same bits, and a resumed run those of an uninterrupted one.
        """
        weight = self.free.detach()
        if self._refusal_strength == 1 and self._component(weight) <= _tolerance(weight.dtype):
            return weight
        weight = self.weight.detach()
        if self._refusal_strength == 1 and self._component(weight) > _tolerance(weight.dtype):
            # Nearly all of it lay in span U; the rounding of the first pass is large against what is left.
            weight = rk.project_out(weight, self._refusal_basis, self._refusal_dim)
        return weight

    def _component(self, weight: Tensor) -> float:
        moved = weight.movedim(self._refusal_dim, -1).float()
        with torch.autocast(weight.device.type, enabled=False):
            inside, whole = (moved @ self._refusal_basis).norm(), moved.norm()
        return float(inside / whole) if whole > 0 else 0.0

    @torch.no_grad()
    def fold_(self) -> None:
        """Writes the effective weight into the parameter. At strength 1 the forward computes the same after it."""
        self.free.copy_(self.effective())

    def release(self) -> nn.Linear:
        """Back to a plain nn.Linear that holds the effective weight."""
        self._check_written()
        self.fold_()
        self.__class__ = nn.Linear  # type: ignore[assignment]
        for name in ("_refusal_basis", "_refusal_dim", "_refusal_strength"):
            delattr(self, name)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> ProjectedLinear:
        super()._apply(fn, recurse)
        self._refusal_basis = self._refusal_basis.to(self.free.device)  # moved with the module, never rounded
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:  # with keep_vars the caller wants the live parameters
            destination[prefix + "weight"] = self.effective()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        s, given = self._refusal_strength, state_dict.get(prefix + "weight")
        if isinstance(given, Tensor) and 0 < s < 1:
            # I - s U U^T undone: its inverse is I + s / (1 - s) U U^T.
            moved, basis = given.movedim(self._refusal_dim, -1).float(), self._refusal_basis.to(given.device)
            free = moved + s / (1 - s) * (moved @ basis) @ basis.T
            state_dict[prefix + "weight"] = free.movedim(-1, self._refusal_dim).to(given.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)


def whole(parameter: nn.Parameter | None) -> nn.Parameter:
    """`parameter`, unless another process holds a part of it: U^T B needs all of B. RuntimeError that says so."""
    if parameter is None or hasattr(parameter, "device_mesh") or parameter.numel() == 0:
        raise RuntimeError(
            "a protected adapter weight is sharded over processes (FSDP, tensor parallelism, ZeRO-3), which protection "
            "does not support; train with DistributedDataParallel, or keep the adapters out of the sharding"
        )
    return parameter


def _tolerance(dtype: torch.dtype) -> float:
    return max(4 * torch.finfo(torch.float32).eps, torch.finfo(dtype).eps / 2)
