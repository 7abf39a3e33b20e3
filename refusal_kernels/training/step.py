"""sae_step: one training step of a TopK sparse autoencoder on fused primitives, without an autograd graph.

    encode  ->  decode + residual + loss (one pass)  ->  latent-major backward  [ ->  Adam, inside the backward ]

The plain route, `topk_encode`, `sparse_decode`, `loss.backward()`, `optimizer.step()`, stays first-class and gives the
same gradients; this one keeps no graph, writes no [N, F] and no [N*k, d] tensor, needs no host synchronisation, and
where the back-end fuses Adam into the backward it never writes the weight gradients at all.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import Request, requested_backend, select
from ..backends.heads import run
from ..checks import check_encoder, check_k, check_not_negative, check_number, compute_dtype, matmul_dtype
from ..ops.library import without_autocast
from .auxk import AuxGradients, aux_k_gradients, check_dead, check_k_aux, flat_rows
from .optimizer import SAEAdam, check_sae_parameters


class SAEStepOutput(NamedTuple):
    """What a step measured; 0-dim tensors on the device of x unless a shape is given; none needs a gradient. With a
    head axis every tensor has it in front: one loss per head, fire_counts [H, F], values [H, N, k]."""

    loss: Tensor  # mse + aux_alpha * aux_loss
    mse: Tensor  # sum ||x_hat - x||^2 / N
    aux_loss: Tensor  # AuxK term, unweighted; 0 where it was not computed: nothing dead, or aux_alpha 0
    fvu: Tensor  # sum ||x_hat - x||^2 / sum ||x - mean(x)||^2 over this batch
    l0: Tensor  # positive values per token
    fire_counts: Tensor  # [F] int64: tokens of this batch in which the latent's value is > 0
    values: Tensor  # [N, k]
    indices: Tensor  # [N, k] int64


@torch._disable_dynamo  # it writes gradients, parameters and counts: traced, they went astray without a word
def sae_step(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    k: int,
    *,
    dead: Tensor | None = None,
    k_aux: int | None = None,
    aux_alpha: float = 1 / 32,
    grad_scale: float = 1.0,
    optimizer: SAEAdam | None = None,
    backend: str | None = None,
) -> SAEStepOutput:
    """Loss, metrics and gradients of a TopK sparse autoencoder; with `optimizer`, its step as well.

    Equivalent to::

        values, indices = rk.topk_encode(x, W_enc, b_enc, k, b_dec)
        x_hat = rk.sparse_decode(values, indices, W_dec, b_dec)
        mse = (x_hat - x).square().sum() / N
        loss = mse + aux_alpha * rk.aux_k_loss(x, x - x_hat, W_enc, b_enc, W_dec, b_dec, dead, k_aux)
        (grad_scale * loss).backward()                      # accumulates into .grad, as backward() does
        optimizer.step(); optimizer.zero_grad()             # only with optimizer; .grad is then left alone

    With a head axis, which is there if and only if W_enc has three dimensions, H autoencoders take their step in one
    call: the gradients and updates are those of a loop over heads, that is of the sum of the H losses; `max_grad_norm`
    of the optimizer is then the norm over all heads.

    Frozen parameters, which do not require a gradient, get none and are not stepped. Under torch.compile it is a graph
    break.

    Args:
        x: [..., d], or [H, ..., d], activations, N >= 1 rows (per head), because the mean over an empty batch is not
            defined (the operators themselves take one); no gradient is computed for it. Any float dtype: promoted to
            the weights', or under autocast computed in the autocast dtype with fp32 sums and gradients.
        W_enc, W_dec: [F, d]; b_enc: [F]; b_dec: [d]; or [H, F, d], [H, F], [H, d]: leaf tensors of one dtype, or biases
            of fp32 beside weights of 16 bits; no two in the same memory (for tied weights take the plain route); at
            least one must require a gradient.
        k: latents per token.
        dead: int64 [D], the distinct dead latents AuxK trains (see `DeadLatents.rows`); None or empty: no AuxK and no
            cost. With heads [H, D]: each head's latents, then -1 up to the longest list.
        k_aux: dead latents per token, d // 2 by default.
        aux_alpha: weight of the AuxK term, at least 0.
        grad_scale: finite factor on all gradients, 1 / micro-batches for gradient accumulation.
        optimizer: an `SAEAdam` over exactly these four tensors.
        backend: as in `topk_encode`.

    Returns:
        SAEStepOutput, without having waited for the device.

    Raises:
        ValueError, TypeError: an argument is not as said above; the message names it.
        BackendError: an explicitly requested back-end cannot run this.

    Source: Gao et al., arXiv 2406.04093, equations 3-5 and section A.2.
    """
    op = "sae_step"
    n_latents, d = check_encoder(op, x, W_enc, b_enc, b_dec, heads=True)
    check_sae_parameters(op, W_enc, b_enc, W_dec, b_dec)
    k = check_k(op, k, n_latents)
    k_aux = check_k_aux(op, k_aux, d)
    aux_alpha = check_not_negative(op, "aux_alpha", aux_alpha)
    grad_scale = check_number(op, "grad_scale", grad_scale, "a finite number", math.isfinite)
    if dead is not None:
        check_dead(op, dead, n_latents, W_enc.shape[0] if W_enc.dim() == 3 else None)
    parameters = (W_enc, b_enc, W_dec, b_dec)
    if optimizer is not None:
        if not isinstance(optimizer, SAEAdam):
            raise TypeError(
                f"{op}: optimizer must be a refusal_kernels.SAEAdam or None; got {type(optimizer).__name__}"
            )
        if any(mine is not theirs for mine, theirs in zip(parameters, optimizer.parameters, strict=True)):
            raise ValueError(f"{op}: optimizer must hold exactly the tensors W_enc, b_enc, W_dec, b_dec of this call")
    if not any(p.requires_grad for p in parameters):
        raise ValueError(
            f"{op}: at least one of W_enc, b_enc, W_dec, b_dec must require a gradient; got none that does"
        )
    if x.numel() == 0:
        raise ValueError(f"{op}: x must hold at least one token; got shape {tuple(x.shape)}")
    return _Step(x, parameters, k, dead, k_aux, aux_alpha, grad_scale, optimizer, backend).run()


class _Step:
    """The state of one call: operands in their matrix-product dtype, and what forward leaves for backward."""

    def __init__(
        self,
        x: Tensor,
        parameters: tuple[Tensor, Tensor, Tensor, Tensor],
        k: int,
        dead: Tensor | None,
        k_aux: int,
        aux_alpha: float,
        grad_scale: float,
        optimizer: SAEAdam | None,
        backend: str | None,
    ) -> None:
        self.parameters, self.optimizer = parameters, optimizer
        W_enc, b_enc, W_dec, b_dec = (p.detach() for p in parameters)
        self.rows = matmul_dtype(x.device.type, x.dtype, W_enc.dtype)
        self.ct = compute_dtype(self.rows)
        self.heads = W_enc.shape[0] if W_enc.dim() == 3 else None
        self.x = x.detach().reshape(*W_enc.shape[:-2], -1, x.shape[-1]).to(self.rows).contiguous()
        self.copies = optimizer is not None and optimizer.copy_dtype == self.rows
        if self.copies and optimizer is not None:
            self.W_enc, self.W_dec = (optimizer.copy_of(p) for p in parameters[::2])
        else:
            self.W_enc, self.W_dec = W_enc.to(self.rows).contiguous(), W_dec.to(self.rows).contiguous()
        self.b_enc, self.b_dec = b_enc.to(self.ct).contiguous(), b_dec.to(self.ct).contiguous()
        self.k, self.k_aux, self.aux_alpha, self.grad_scale = k, k_aux, aux_alpha, grad_scale
        self.dead = None if dead is None or dead.numel() == 0 or aux_alpha == 0 else dead.to(x.device)
        request = Request(x.device.type, self.rows, n_latents=W_enc.shape[-2], d=W_enc.shape[-1], k=k)
        self.backend: Any = select("sae_step", request, requested_backend(backend))

    @torch.no_grad()
    def run(self) -> SAEStepOutput:
        optimizer = self.optimizer
        with without_autocast(self.x.device.type):
            values, indices = self._primitive("topk_encode", self.x, self.W_enc, self.b_enc, self.k, self.b_dec)
            e, squares = self._primitive("decode_residual", self.x, values, indices, self.W_dec, self.b_dec)
            aux = self._aux(e)
            output = self._measure(values, indices, squares, aux)
            if optimizer is None:
                self._accumulate(e, values, indices, aux)
            elif self._can_fuse(optimizer):
                self._fused_step(optimizer, e, values, indices, aux)
            else:
                over = self.backend.overwrites_gradients
                dW_enc, dW_dec = optimizer.gradient_buffers(self.ct, zero=not over)
                db_enc, db_dec = self._add_gradients(e, values, indices, aux, dW_enc, dW_dec, over)
                gradients = dict(zip(self.parameters, (dW_enc, db_enc, dW_dec, db_dec), strict=True))
                free = [gradients[p] if p.requires_grad else None for p in self.parameters]
                optimizer.apply_gradients(free[0], free[1], free[2], free[3], backend=self.backend.name)
        return output

    def _primitive(self, name: str, *arguments: Any, **options: Any) -> Any:
        return run(self.backend, name, self.heads, *arguments, **options)

    @property
    def _scale(self) -> float:
        """d(grad_scale * mse)/d(x_hat) = scale * e."""
        return 2.0 * self.grad_scale / self.x.shape[-2]

    def _aux(self, e: Tensor) -> AuxGradients | None:
        if self.dead is None:
            return None
        weight = self.aux_alpha * self.grad_scale
        args = (self.x, e, self.W_enc, self.b_enc, self.W_dec, self.b_dec)
        return aux_k_gradients(*args, self.dead, self.k_aux, weight)

    def _measure(self, values: Tensor, indices: Tensor, squares: Tensor, aux: AuxGradients | None) -> SAEStepOutput:
        n = self.x.shape[-2]
        total = squares.sum(-1)
        mse = total / n
        aux_loss = torch.zeros_like(mse) if aux is None else aux.loss
        fired = (values > 0).flatten(-2)
        counts = torch.zeros(self.W_enc.shape[:-1], dtype=torch.int64, device=values.device)
        counts.scatter_add_(-1, indices.flatten(-2), fired.to(torch.int64))
        return SAEStepOutput(
            loss=mse + self.aux_alpha * aux_loss,
            mse=mse,
            aux_loss=aux_loss,
            fvu=total / self._total_variance(),
            l0=fired.sum(-1) / n,
            fire_counts=counts,
            values=values,
            indices=indices,
        )

    def _total_variance(self) -> Tensor:
        """sum_n ||x_n - mean||^2, per head. Centred before it is squared, so that a large mean costs no digits; on a
        CPU in chunks that stay in cache, where one [N, d] temporary would be paid for in page faults at every step."""
        mean = self.x.mean(-2, keepdim=True, dtype=self.ct)
        rows = 256 if self.x.device.type == "cpu" else max(1, self.x.shape[-2])
        parts = self.x.split(rows, dim=-2)
        return torch.stack([(part - mean).square_().flatten(-2).sum(-1) for part in parts]).sum(0)

    def _add_gradients(
        self,
        e: Tensor,
        values: Tensor,
        indices: Tensor,
        aux: AuxGradients | None,
        dW_enc: Tensor,
        dW_dec: Tensor,
        over: bool,
    ) -> tuple[Tensor, Tensor]:
        """Adds the weights' gradients to dW_enc and dW_dec, or with `over` puts them in the place of what is there;
        returns (db_enc, db_dec). AuxK included."""
        db_enc = torch.zeros_like(self.b_enc)
        options = {"accumulate": False} if over else {}
        weights = (self.W_enc, self.W_dec, self.b_dec)
        buffers = (dW_enc, db_enc, dW_dec)
        self._primitive("sae_backward", e, self.x, values, indices, *weights, self._scale, *buffers, **options)
        if aux is not None and self.dead is not None:
            # Distinct rows, so index_add_ has one owner per row and stays deterministic; padding adds zeros.
            if self.heads is None:
                rows = self.dead
            else:
                rows = flat_rows(self.dead, self.W_enc.shape[1]).flatten()
            d = self.W_enc.shape[-1]
            dW_enc.view(-1, d).index_add_(0, rows, aux.dW_enc.view(-1, d))
            dW_dec.view(-1, d).index_add_(0, rows, aux.dW_dec.view(-1, d))
            db_enc.view(-1).index_add_(0, rows, aux.db_enc.view(-1))
        W_enc = self.W_enc.to(self.ct)
        through = db_enc @ W_enc if self.heads is None else torch.bmm(db_enc[:, None], W_enc)[:, 0]
        return db_enc, self._b_dec_gradient(e, through)

    def _b_dec_gradient(self, e: Tensor, through_encoder: Tensor) -> Tensor:
        """b_dec enters as x_hat + b_dec and as x - b_dec: its gradient is scale * sum_n e_n - db_enc W_enc."""
        return self._scale * e.sum(-2, dtype=self.ct) - through_encoder

    def _accumulate(self, e: Tensor, values: Tensor, indices: Tensor, aux: AuxGradients | None) -> None:
        dW_enc, dW_dec = (self._own_gradient(weight) for weight in self.parameters[::2])
        # Zeros are written and read for nothing where the kernel can overwrite, which it does to both or to neither.
        over = dW_enc is None and dW_dec is None and self.backend.overwrites_gradients
        make = torch.empty_like if over else torch.zeros_like
        W_enc, W_dec = (weight.detach() for weight in self.parameters[::2])
        contiguous: Any = {"dtype": self.ct, "memory_format": torch.contiguous_format}
        dW_enc = make(W_enc, **contiguous) if dW_enc is None else dW_enc
        dW_dec = make(W_dec, **contiguous) if dW_dec is None else dW_dec
        db_enc, db_dec = self._add_gradients(e, values, indices, aux, dW_enc, dW_dec, over)
        for parameter, gradient in zip(self.parameters, (dW_enc, db_enc, dW_dec, db_dec), strict=True):
            if not parameter.requires_grad or parameter.grad is gradient:
                continue
            if parameter.grad is None:
                parameter.grad = gradient.to(parameter.dtype)
            else:
                parameter.grad += gradient

    def _own_gradient(self, weight: Tensor) -> Tensor | None:
        """Its .grad, where the kernels can add a weight's gradient to it."""
        if (
            (grad := weight.grad) is not None
            and weight.requires_grad
            and grad.dtype == self.ct
            and grad.is_contiguous()
            and not grad.is_neg()
        ):
            return grad
        return None

    def _can_fuse(self, optimizer: SAEAdam) -> bool:
        """Clipping needs the norm of the whole gradient first; the kernel moves all parameters, frozen or not, with one
        bias correction; under autocast it has to take weights of another dtype than the copies that forward used."""
        weights = (self.parameters[0], self.parameters[2])
        dtypes = (self.rows, torch.float32) if self.backend.fuses_mixed_precision else (self.rows,)
        return (
            self.backend.primitive("sae_backward_adam") is not None
            and optimizer.max_grad_norm is None
            and all(p.requires_grad for p in self.parameters)
            and optimizer.in_step
            and (self.backend.fuses_compact_state or not optimizer.compact)
            and all(w.dtype in dtypes and w.is_contiguous() for w in weights)
            and self.parameters[1].is_contiguous()  # b_enc, which the kernel steps in place as well
        )

    def _fused_step(
        self, optimizer: SAEAdam, e: Tensor, values: Tensor, indices: Tensor, aux: AuxGradients | None
    ) -> None:
        W_enc, b_enc, W_dec, _ = (p.detach() for p in self.parameters)
        step, *_ = [optimizer.advance(p) for p in self.parameters]  # equal for all: they are in step
        moments = [m for p in self.parameters[:3] for m in optimizer.moments(p)]
        extra: tuple[Tensor | None, ...] = (None, None, None, None)
        if aux is not None:
            extra = (self.dead, aux.dW_enc, aux.db_enc, aux.dW_dec)
        weights = self.parameters[::2]
        more: tuple[Any, ...] = ()
        if optimizer.compact:
            more = (*(optimizer.low(p) for p in weights), tuple(optimizer.salt(p) for p in weights))
        if self.copies and self.backend.fuses_copies:
            more = (*(more or (None, None, None)), self.W_enc, self.W_dec)
        through_encoder = self._primitive(
            "sae_backward_adam",
            e,
            self.x,
            values,
            indices,
            W_enc,
            b_enc,
            W_dec,
            self.b_dec,
            self._scale,
            *moments,
            *step.arguments(),
            optimizer.remove_parallel_grad,
            optimizer.unit_norm_decoder,
            *extra,
            *more,
        )
        if self.copies and self.backend.fuses_copies:
            optimizer.copies_written()
        optimizer.update_vector(self.parameters[3], self._b_dec_gradient(e, through_encoder), step)
