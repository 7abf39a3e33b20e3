"""SAEAdam: Adam for the four tensors of a sparse autoencoder, with the decoder's constraints in the same pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends import BACKENDS, Backend, Request, requested_backend, select
from ..checks import check_encoder, check_shape, describe

PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")


@dataclass(frozen=True)
class AdamStep:
    """The scalars of one Adam step, as the kernels take them."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    bias_correction1: float
    bias_correction2: float

    def arguments(self) -> tuple[float, ...]:
        return self.lr, self.beta1, self.beta2, self.eps, self.bias_correction1, self.bias_correction2


class SAEAdam(torch.optim.Optimizer):
    """Adam over (W_enc, b_enc, W_dec, b_dec) that keeps the decoder rows at unit norm.

    Equivalent to, per step::

        W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) / W_dec.square().sum(1, keepdim=True) * W_dec
        torch.nn.utils.clip_grad_norm_([W_enc, b_enc, W_dec, b_dec], max_grad_norm)
        torch.optim.Adam([W_enc, b_enc, W_dec, b_dec], lr, betas, eps).step()
        W_dec.data /= W_dec.data.norm(dim=1, keepdim=True)

    Parallel removal, Adam and normalisation read and write each row once. `step()` takes the gradients from `.grad`;
    `sae_step(..., optimizer=this)` applies them without ever writing them out where the back-end can. State per
    parameter is torch.optim.Adam's (`step`, `exp_avg`, `exp_avg_sq`), so checkpoints of either load into the other.
    Learning-rate schedulers work as with any optimizer.

    Args:
        W_enc, W_dec: [F, d] leaf tensors; b_enc: [F]; b_dec: [d]; all of one dtype (fp32, or fp64 on the reference and
            CPU).
        lr, betas, eps: as in torch.optim.Adam.
        unit_norm_decoder: divide every decoder row by its norm after the update (rows of norm 0 stay 0).
        remove_parallel_grad: take the part of a decoder row's gradient that lies along the row out of it.
        max_grad_norm: clip the global gradient norm (of all four tensors, after parallel removal) to this, or None.
        backend: as in the operators.

    Raises:
        ValueError, TypeError: a tensor or number is not as said above; the message names it.

    Source: Kingma & Ba, arXiv 1412.6980; the constraints: Bricken et al. 2023, Gao et al., arXiv 2406.04093, section A.
    """

    def __init__(
        self,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        unit_norm_decoder: bool = True,
        remove_parallel_grad: bool = True,
        max_grad_norm: float | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        check_sae_parameters("SAEAdam", W_enc, b_enc, W_dec, b_dec)
        if not lr >= 0:
            raise ValueError(f"SAEAdam: lr must be at least 0; got {lr!r}")
        if not (len(betas) == 2 and all(0 <= b < 1 for b in betas)):
            raise ValueError(f"SAEAdam: betas must be two numbers in [0, 1); got {betas!r}")
        if not eps >= 0:
            raise ValueError(f"SAEAdam: eps must be at least 0; got {eps!r}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"SAEAdam: max_grad_norm must be greater than 0 or None; got {max_grad_norm!r}")
        requested_backend(backend)
        self.unit_norm_decoder = unit_norm_decoder
        self.remove_parallel_grad = remove_parallel_grad
        self.max_grad_norm = max_grad_norm
        self.backend = backend
        self._gradient_buffers: tuple[Tensor, Tensor] | None = None
        super().__init__([W_enc, b_enc, W_dec, b_dec], {"lr": lr, "betas": betas, "eps": eps})

    @property
    def parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(W_enc, b_enc, W_dec, b_dec)."""
        return tuple(self.param_groups[0]["params"])  # type: ignore[return-value]

    def moments(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """(exp_avg, exp_avg_sq) of a parameter, made as zeros on first use."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        return state["exp_avg"], state["exp_avg_sq"]

    def gradient_buffers(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Zeroed tensors of the shapes of W_enc and W_dec, the same ones at every step: fresh ones would be paid for in
        page faults. Only a step that has to see the whole gradient before it moves (clipping) asks for them."""
        W_enc, _, W_dec, _ = self.parameters
        buffers = self._gradient_buffers
        if buffers is None or buffers[0].dtype != dtype or buffers[0].device != W_enc.device:
            options: dict[str, Any] = {"dtype": dtype, "device": W_enc.device}
            buffers = self._gradient_buffers = (
                torch.empty(W_enc.shape, **options),
                torch.empty(W_dec.shape, **options),
            )
        torch._foreach_zero_(buffers)
        return buffers

    def advance(self) -> AdamStep:
        """Counts one step of all four parameters and returns its scalars."""
        group = self.param_groups[0]
        beta1, beta2 = group["betas"]
        for parameter in group["params"]:
            self.moments(parameter)
            self.state[parameter]["step"] += 1
        t = float(self.state[group["params"][0]]["step"])
        # Learning-rate schedulers look for this mark of a step taken before them; `sae_step` does not go through
        # `step()`.
        self._opt_called = True
        return AdamStep(float(group["lr"]), beta1, beta2, group["eps"], 1 - beta1**t, 1 - beta2**t)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step from the `.grad` of the four tensors; a missing gradient counts as zero. `.grad` is only read."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        dW_enc, db_enc, dW_dec, db_dec = grads
        self.apply_gradients(dW_enc, db_enc, dW_dec, db_dec, backend=self.backend)
        return loss

    @torch.no_grad()
    def apply_gradients(
        self, dW_enc: Tensor, db_enc: Tensor, dW_dec: Tensor, db_dec: Tensor, backend: str | None = None
    ) -> None:
        """The same step from gradients given as tensors of the parameters' shapes; they are only read."""
        W_enc, b_enc, W_dec, b_dec = self.parameters
        chosen = self._select(W_enc, backend)
        factor = None
        if self.max_grad_norm is not None:
            factor = self._clip_factor(self.max_grad_norm, dW_enc, db_enc, dW_dec, db_dec)
        step = self.advance()
        self._rows(chosen, W_enc, dW_enc, step, factor, False, False)
        self._rows(chosen, W_dec, dW_dec, step, factor, self.remove_parallel_grad, self.unit_norm_decoder)
        self.update_vector(b_enc, db_enc, step, factor)
        self.update_vector(b_dec, db_dec, step, factor)

    def _clip_factor(
        self, max_grad_norm: float, dW_enc: Tensor, db_enc: Tensor, dW_dec: Tensor, db_dec: Tensor
    ) -> Tensor:
        """min(1, max_grad_norm / (norm + 1e-6)) as a 0-dim tensor: clip_grad_norm_'s formula, no gradient written."""
        squares = torch.stack(torch._foreach_norm([dW_enc, db_enc, dW_dec, db_dec])).square().sum()
        if self.remove_parallel_grad:
            W_dec = self.parameters[2]
            along = torch.einsum("fd,fd->f", dW_dec, W_dec)
            squared_norm = torch.einsum("fd,fd->f", W_dec, W_dec)
            squares -= torch.where(squared_norm > 0, along.square() / squared_norm, 0).sum()
        norm = squares.clamp(min=0).sqrt()
        return (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)

    def update_vector(self, parameter: Tensor, grad: Tensor, step: AdamStep, factor: Tensor | None = None) -> None:
        """Adam on a bias: too small for a kernel of its own."""
        m, v = self.moments(parameter)
        BACKENDS["reference"].adam_rows(  # type: ignore[attr-defined]
            parameter[None], grad[None], m[None], v[None], *step.arguments(), factor, False, False
        )

    def _rows(
        self,
        chosen: Backend,
        W: Tensor,
        g: Tensor,
        step: AdamStep,
        factor: Tensor | None,
        remove_parallel: bool,
        unit_norm: bool,
    ) -> None:
        m, v = self.moments(W)
        target = W if W.is_contiguous() else W.contiguous()
        chosen.adam_rows(  # type: ignore[attr-defined]
            target, g.to(W.dtype).contiguous(), m, v, *step.arguments(), factor, remove_parallel, unit_norm
        )
        if target is not W:
            W.copy_(target)

    def _select(self, W: Tensor, backend: str | None) -> Backend:
        request = Request(W.device.type, W.dtype, n_latents=W.shape[0], d=W.shape[1])
        return select("sae_adam", request, requested_backend(backend))


def check_sae_parameters(op: str, W_enc: Any, b_enc: Any, W_dec: Any, b_dec: Any) -> tuple[int, int]:
    """The four tensors of a sparse autoencoder fit together; returns (F, d)."""
    if not isinstance(W_dec, Tensor):
        raise TypeError(f"{op}: W_dec must be a torch.Tensor; got {describe(W_dec)}")
    if not isinstance(b_dec, Tensor):
        raise TypeError(f"{op}: b_dec must be a torch.Tensor; got {describe(b_dec)}")
    n_latents, d = check_encoder(op, W_dec, W_enc, b_enc, b_dec, x_name="W_dec")
    check_shape(op, "W_dec", W_dec, (n_latents, d), "[F, d]")
    for name, tensor in (("b_enc", b_enc), ("W_dec", W_dec), ("b_dec", b_dec)):
        if tensor.dtype != W_enc.dtype:
            raise ValueError(f"{op}: {name} must have the dtype of W_enc, {W_enc.dtype}; got {tensor.dtype}")
    for name, tensor in zip(PARAMETERS, (W_enc, b_enc, W_dec, b_dec), strict=True):
        if not tensor.is_leaf:
            raise ValueError(f"{op}: {name} must be a leaf tensor (a parameter); got the result of an operation")
    return n_latents, d
