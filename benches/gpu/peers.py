"""The PyTorch contestants on a GPU, under bf16 autocast with fp32 parameters, as people train.

dense     a dense code under autograd, fused Adam, unit norm: `torch_paths.dense_loss`
sparse    topk on the materialised pre-activations, embedding_bag, and the gradient rows added by index_add_
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import torch_paths
from ..problem import LR

# Of the [N k, d] products that index_add_ reads: large enough that launches do not matter.
PRODUCT_BYTES = 2 << 30


def autograd_step(loss: Callable[..., Tensor], x: Tensor, leaves: list[Tensor], k: int) -> Callable[[], Tensor]:
    """One step of `loss` under autocast: backward, fused Adam, unit norm of the decoder's rows."""
    optimizer = torch.optim.Adam(leaves, lr=LR, fused=True)

    def run() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            value = loss(x, *leaves, k)
        value.backward()
        optimizer.step()
        torch_paths.unit_norm_(leaves[2])
        return value.detach()

    return run


def sparse_step(x: Tensor, leaves: list[Tensor], k: int) -> Callable[[], Tensor]:
    """The same step by the sparse path: no dense code, gradients of the weights added up in fp32."""
    optimizer = torch.optim.Adam(leaves, lr=LR, fused=True)
    W_enc, b_enc, W_dec, b_dec = leaves
    n, d = x.shape
    flat_of = torch.arange(n, device=x.device)
    starts = torch.arange(0, n * k, k, device=x.device)
    rows = max(1, min(n, PRODUCT_BYTES // (4 * k * d)))
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)

    @torch.no_grad()
    def run() -> Tensor:
        we, wd = W_enc.to(x.dtype), W_dec.to(x.dtype)
        bias = torch.addmv(b_enc, W_enc, b_dec, alpha=-1)
        values, indices = torch.addmm(bias.to(x.dtype), x, we.T).relu_().topk(k, dim=1)
        flat = indices.flatten()
        x_hat = F.embedding_bag(indices, wd, mode="sum", per_sample_weights=values) + b_dec.to(x.dtype)
        e = x_hat - x
        g = e * (2 / n)
        # In fp32: this operator has no bf16 on CUDA.
        dv = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            g.float(), W_dec, flat, starts, flat_of.repeat_interleave(k), 0
        )
        dv = dv.view(n, k).mul_(values != 0).to(x.dtype)
        torch._foreach_zero_([leaf.grad for leaf in leaves])
        centred = x - b_dec.to(x.dtype)
        for start in range(0, n, rows):
            block = slice(start, min(n, start + rows))
            into = indices[block].flatten()
            for coefficients, source, leaf in ((values, g, W_dec), (dv, centred, W_enc)):
                products = coefficients[block, :, None].float() * source[block, None, :].float()
                leaf.grad.index_add_(0, into, products.view(-1, d))
        b_enc.grad.index_add_(0, flat, dv.flatten().float())
        b_dec.grad.copy_(g.sum(0, dtype=torch.float32) - torch.mv(W_enc.t(), b_enc.grad))
        optimizer.step()
        torch_paths.unit_norm_(W_dec)
        return e.float().square().sum() / n

    return run
