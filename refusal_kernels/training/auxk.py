"""AuxK: dead latents learn to reconstruct what the living ones miss (Gao et al., arXiv 2406.04093, section A.2).

The dead set is compacted first, [D, d] instead of [F, d], and everything after is dense matrix products over it: with
k_aux in the hundreds a gather of k_aux rows per token moves far more bytes than the product. Tokens are taken in
chunks, so that the [tokens, D] activations never exceed `CHUNK_ELEMENTS`, on a GPU `GPU_CHUNK_ELEMENTS`.

With a head axis every head has its own dead latents. Their lists are padded with -1 to one length, so that the products
of all heads are batched ones; padding takes part in them and counts for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import FLOAT_DTYPES, check_encoder, check_k, check_shape, check_tensor

CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS = 1 << 22, 1 << 24
# Dead rows of a product in 16 bits are filled up with zeros to a multiple of this: of matrices whose rows do not begin
# at 16-byte boundaries cuBLAS makes little of its rate. A step with 13107 dead latents took 273 ms on an H200 without,
# 148 with (`benches.gpu.sae`, column dead).
PRODUCT_ROWS = 64


@dataclass(frozen=True)
class AuxGradients:
    """Gradients of the AuxK term for the D dead rows, and its value. With a head axis all have it in front, and rows of
    padding are 0."""

    loss: Tensor  # 0-dim, unweighted
    dW_enc: Tensor  # [D, d]
    db_enc: Tensor  # [D]
    dW_dec: Tensor  # [D, d]


def default_k_aux(d: int) -> int:
    """d / 2, the choice of sparsify, SAELens and dictionary_learning."""
    return max(1, d // 2)


def aux_scale(n_dead: int, k_aux: int) -> float:
    """min(D / k_aux, 1): a handful of dead latents cannot be asked for the whole residual."""
    return min(n_dead / k_aux, 1.0)


def aux_k_loss(
    x: Tensor,
    residual: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    dead: Tensor,
    k_aux: int | None = None,
) -> Tensor:
    """The AuxK loss, unweighted, differentiable in the weights and in x; the plain autograd route.

    Equivalent to, with s = min(D / k_aux, 1) and N tokens::

        acts = topk(relu((x - b_dec) @ W_enc[dead].T + b_enc[dead]), min(k_aux, D))   # zeros elsewhere
        loss = s * ((acts @ W_dec[dead] - residual.detach()) ** 2).sum() / N

    The residual x - x_hat is a constant target, and the decoder bias takes no part in the reconstruction. Gradients
    reach the dead rows of W_dec and of W_enc, b_enc, and b_dec through the encoder.

    Args:
        x: [..., d]; residual: [..., d] = x - x_hat; W_enc, W_dec: [F, d]; b_enc: [F]; b_dec: [d]; or with a head axis
            [H, ..., d], [H, F, d], [H, F], [H, d]: the loss is then [H], that of a loop over heads.
        dead: int64 [D], distinct latents; D = 0 gives a loss of 0. With heads [H, D]: a head's latents, then -1.
        k_aux: latents per token, d // 2 by default.
    """
    check_tensor("aux_k_loss", "b_dec", b_dec, FLOAT_DTYPES)
    n_latents, d = check_encoder("aux_k_loss", x, W_enc, b_enc, b_dec, heads=True)
    check_tensor("aux_k_loss", "W_dec", W_dec, FLOAT_DTYPES)
    check_shape("aux_k_loss", "W_dec", W_dec, tuple(W_enc.shape), "[F, d]")
    check_shape("aux_k_loss", "residual", residual, tuple(x.shape), "of x")
    k_aux = check_k_aux("aux_k_loss", k_aux, d)
    lead = W_enc.shape[:-2]
    check_dead("aux_k_loss", dead, n_latents, lead[0] if lead else None)
    x, residual = x.reshape(*lead, -1, d), residual.reshape(*lead, -1, d)
    if dead.numel() == 0 or x.numel() == 0:
        return x.new_zeros(lead) + b_dec[..., :0].sum(-1)  # 0, which backward() may be called on
    of = _dead_rows(W_enc, b_enc, W_dec, b_dec, dead, k_aux)
    acts = torch.relu((x - of.shift) @ of.enc.mT + of.bias)
    if of.padding is not None:
        acts = acts.masked_fill(of.padding, 0)
    if k_aux < dead.shape[-1]:
        top = torch.topk(acts, k_aux, dim=-1)
        acts = torch.zeros_like(acts).scatter(-1, top.indices, top.values)
    error = acts @ of.dec - residual.detach()
    return of.scale * error.square().sum((-2, -1)) / x.shape[-2]


class _DeadRows(NamedTuple):
    """What the products are of: [D, d], [1, D] and so on, or with heads [H, D, d], [H, 1, D]."""

    enc: Tensor  # [D, d]
    dec: Tensor  # [D, d]
    bias: Tensor  # [1, D]
    shift: Tensor  # b_dec, to be subtracted from [N, d]
    padding: Tensor | None  # with heads [H, 1, D]: whose activations are 0
    scale: Tensor | float  # `aux_scale`; with heads [H] on the device


def _dead_rows(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, dead: Tensor, k_aux: int) -> _DeadRows:
    if dead.dim() == 1:
        return _DeadRows(W_enc[dead], W_dec[dead], b_enc[dead][None], b_dec, None, aux_scale(dead.numel(), k_aux))
    rows = flat_rows(dead, W_enc.shape[1])
    enc, dec = (W.flatten(0, 1)[rows] for W in (W_enc, W_dec))
    scale = ((dead >= 0).sum(1).double() / k_aux).clamp(max=1.0).to(b_enc.dtype)
    return _DeadRows(enc, dec, b_enc.flatten()[rows][:, None], b_dec[:, None], (dead < 0)[:, None], scale)


def flat_rows(dead: Tensor, n_latents: int) -> Tensor:
    """dead [H, D] as numbers of rows of a matrix [H F, d]; padding as the head's first."""
    first = torch.arange(dead.shape[0], device=dead.device)[:, None] * n_latents
    return first + dead.clamp(min=0)


def check_k_aux(op: str, k_aux: int | None, d: int) -> int:
    """`k_aux` or its default; any integer of at least 1 (more than D simply takes every dead latent)."""
    return default_k_aux(d) if k_aux is None else check_k(op, k_aux, 2**62, name="k_aux")


def check_dead(op: str, dead: Tensor, n_latents: int, heads: int | None = None) -> None:
    """`dead` is an int64 vector of latents, or with heads a matrix of them padded with -1; their range is looked at on
    a CPU only (a GPU would be waited for)."""
    check_tensor(op, "dead", dead, (torch.int64,), min_dim=1)
    looked_at = dead.device.type == "cpu" and dead.numel() > 0 and not torch.compiler.is_compiling()
    if heads is not None:
        if dead.dim() != 2 or dead.shape[0] != heads:
            raise ValueError(
                f"{op}: dead must have shape [H, D] with H = W_enc.shape[0] = {heads}, because W_enc has a head axis: "
                f"each head's distinct latents, then -1; got shape {tuple(dead.shape)}"
            )
        if looked_at:
            if not -1 <= int(dead.min()) <= int(dead.max()) < n_latents:
                raise ValueError(
                    f"{op}: dead must hold latents in [0, F) with F = {n_latents}, or -1 behind them; "
                    f"got {int(dead.min())} to {int(dead.max())}"
                )
            if ((dead[:, :-1] < 0) & (dead[:, 1:] >= 0)).any():
                raise ValueError(f"{op}: dead must have -1 behind a head's latents only; got a latent after a -1")
        return
    if dead.dim() != 1:
        raise ValueError(f"{op}: dead must be a vector [D] of distinct latents; got shape {tuple(dead.shape)}")
    if looked_at and not 0 <= int(dead.min()) <= int(dead.max()) < n_latents:
        raise ValueError(
            f"{op}: dead must hold latents in [0, F) with F = {n_latents}; got {int(dead.min())} to {int(dead.max())}"
        )


def _operands(weights: Tensor) -> torch.dtype | None:
    """What the operands of the products are rounded to, as autocast rounds them; None: nothing, on a CPU and in fp32.
    Sums are in fp32. On a GPU tensor cores take 16 bits at ten times the rate of fp32."""
    return weights.dtype if weights.is_cuda and weights.dtype in (torch.bfloat16, torch.float16) else None


def _unit(squares: Tensor, operands: torch.dtype | None) -> Tensor | None:
    """The power of two by which the rows of errors are divided before they are rounded to 16 bits, so that none is
    longer than 1: an element of fp16 spans 2^-24 to 2^16 only. From the rows' squared lengths [tokens]: [1, 1], or with
    heads [H, 1, 1] of [H, tokens]."""
    if operands is None:
        return None
    length = squares.amax(-1, keepdim=True)[..., None].sqrt().clamp(min=2.0**-100)
    return torch.exp2(torch.ceil(torch.log2(length)))


def _product(a: Tensor, b: Tensor, operands: torch.dtype | None) -> Tensor:
    """a @ b, of matrices or of batches of them."""
    if operands is None:
        return a @ b
    a, b = a.to(operands), b.to(operands)
    if not a.is_cuda:  # out_dtype is a GPU's
        return a.float() @ b.float()
    return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=torch.float32)


def _plus_product(base: Tensor, a: Tensor, b: Tensor, operands: torch.dtype | None) -> Tensor:
    if operands is None:
        return (torch.addmm if a.dim() == 2 else torch.baddbmm)(base, a, b)
    return _product(a, b, operands).add_(base)


def _add_product(sums: Tensor, a: Tensor, b: Tensor, operands: torch.dtype | None, unit: Tensor | None) -> None:
    """sums += unit a @ b; `unit` comes with `operands`."""
    if unit is not None:
        sums.addcmul_(_product(a, b, operands), unit)
    elif a.dim() == 2:
        sums.addmm_(a, b)
    else:
        sums.baddbmm_(a, b)


@torch.no_grad()
def aux_k_gradients(
    x: Tensor,
    e: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    dead: Tensor,
    k_aux: int,
    weight: float,
) -> AuxGradients:
    """The gradients of `weight * aux_k_loss` for the dead rows, written out; e [N, d] = x_hat - x, so the target is -e.

    W_enc, W_dec in any dtype, biases and gradients in the one that sums are taken in. With a head axis: x, e
    [H, N, d], dead [H, D]; gradients [H, D, d] and [H, D], loss [H]. Every product is then one for all heads. Nothing
    waits for the device.

    Equivalent to autograd through `aux_k_loss` (tested), without keeping the [N, D] activations of the whole batch;
    with heads to a loop, on `dead[h][dead[h] >= 0]`.
    """
    n, ct = x.shape[-2], b_enc.dtype
    operands = _operands(W_enc)
    enc, dec, bias, shift, padding, scale = _dead_rows(W_enc, b_enc, W_dec, b_dec, dead, k_aux)
    n_dead = dead.shape[-1]
    if operands is None:
        enc, dec = enc.to(ct), dec.to(ct)
    elif (extra := -n_dead % PRODUCT_ROWS) > 0:
        enc, dec = (torch.nn.functional.pad(t, (0, 0, 0, extra)) for t in (enc, dec))
        bias = torch.nn.functional.pad(bias, (0, extra))
        padding = None if padding is None else torch.nn.functional.pad(padding, (0, extra), value=True)
    dW_enc, dW_dec = (torch.zeros(enc.shape, dtype=ct, device=x.device) for _ in range(2))
    db_enc = torch.zeros(enc.shape[:-1], dtype=ct, device=x.device)
    loss = torch.zeros(dead.shape[:-1], dtype=ct, device=x.device)
    chunk = max(1, (GPU_CHUNK_ELEMENTS if x.is_cuda else CHUNK_ELEMENTS) // db_enc.numel())
    for start in range(0, n, chunk):
        part = slice(start, start + chunk)
        centred = x[..., part, :].to(ct) - shift
        acts = _plus_product(bias, centred, enc.mT, operands).relu_()
        if padding is not None:
            acts.masked_fill_(padding, 0)
        if k_aux < dead.shape[-1]:
            top = torch.topk(acts, k_aux, dim=-1, sorted=False)
            acts = acts.zero_().scatter_(-1, top.indices, top.values)
        error = _plus_product(e[..., part, :].to(ct), acts, dec, operands)  # acts W_dec + e
        squares = error.square().sum(-1)
        loss += squares.sum(-1)
        if (unit := _unit(squares, operands)) is not None:
            error /= unit
        _add_product(dW_dec, acts.mT, error, operands, unit)
        dacts = _product(error, dec.mT, operands).mul_(acts != 0)
        _add_product(dW_enc, dacts.mT, centred, operands, unit)
        db_enc += dacts.sum(-2) if unit is None else dacts.sum(-2) * unit[..., 0]
    # Last, because 2 weight / n is small enough to leave nothing of an fp16 number.
    factor = scale * (2 * weight / max(n, 1))
    for gradient in (dW_enc, dW_dec, db_enc[..., None]):
        gradient *= factor[:, None, None] if isinstance(factor, Tensor) else factor
    if padding is not None:
        # 0 times an infinite error would be NaN in a row that belongs to a living latent.
        for gradient in (dW_enc, dW_dec, db_enc[..., None]):
            gradient.masked_fill_(padding.mT, 0)
    if dW_enc.shape[-2] > n_dead:
        dW_enc, dW_dec, db_enc = (t.narrow(dead.dim() - 1, 0, n_dead).contiguous() for t in (dW_enc, dW_dec, db_enc))
    return AuxGradients(loss * (scale / max(n, 1)), dW_enc, db_enc, dW_dec)
