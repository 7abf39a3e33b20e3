"""The PyTorch contestants: a dense code under autograd, and sparse paths written by hand.

They are written to be hard to beat with PyTorch alone. What costs a pass over [N, F] and is not needed is left out:
ReLU in place; the decoder bias folded into the encoder's (`b_enc - W_enc b_dec`), which saves autograd the product
d(pre) W_enc that the gradient of b_dec would otherwise take; fused Adam. The sparse path has several forms of each
part. The column `sparse` takes the usual ones (fresh, bag, index_add), the column `best` whichever is fastest:

encode     fresh     relu_(addmm) and topk, as everybody writes it
           reused    the same, into an [N, F] buffer kept between calls (no page faults)
           chunked   the same, in row blocks of CHUNK_BYTES kept between calls (no [N, F] at all)
decode     bag       embedding_bag(mode="sum", per_sample_weights)
           csr       a sparse CSR code times W_dec (MKL)
gradients  autograd  what autograd makes of topk and embedding_bag: the encoder's side of it is dense
           index_add the [N k, d] products added into zeroed gradients, in chunks kept in cache
           bags      one stable sort by latent, then embedding_bag once more with latents as bags of tokens
           csc       the transposed code as a sparse CSC matrix times e and x (MKL)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import BETAS, EPS, LR, Problem

CHUNK_BYTES = 32 << 20

Codes = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


# --- dense ---------------------------------------------------------------------------------------------------------


def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, k: int) -> Codes:
    """(values, indices) [N, k] of the k largest relu((x - b_dec) W_enc^T + b_enc)."""
    values, indices = torch.addmm(b_enc, x - b_dec, W_enc.t()).relu_().topk(k, dim=1)
    return values, indices


def dense_decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """x_hat [N, d] by way of the dense code [N, F]."""
    codes = values.new_zeros(values.shape[0], W_dec.shape[0]).scatter_(1, indices, values)
    return torch.addmm(b_dec, codes, W_dec)


def dense_loss(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int) -> Tensor:
    """sum ||x_hat - x||^2 / N with a dense code, for autograd."""
    pre = torch.addmm(b_enc - torch.mv(W_enc, b_dec), x, W_enc.t())
    values, indices = pre.relu_().topk(k, dim=1)
    return (dense_decode(values, indices, W_dec, b_dec) - x).square().sum() / x.shape[0]


def bag_loss(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int) -> Tensor:
    """The same with embedding_bag as decoder, for autograd."""
    pre = torch.addmm(b_enc - torch.mv(W_enc, b_dec), x, W_enc.t())
    values, indices = pre.relu_().topk(k, dim=1)
    x_hat = F.embedding_bag(indices, W_dec, mode="sum", per_sample_weights=values) + b_dec
    return (x_hat - x).square().sum() / x.shape[0]


# --- sparse --------------------------------------------------------------------------------------------------------


class SparsePath:
    """The sparse path of one problem: its parts in every form, and the buffers that a form keeps between calls."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._buffers: dict[str, Tensor] = {}
        self.encoders: dict[str, Callable[[], Codes]] = {
            "fresh": self.encode_fresh,
            "reused": self.encode_reused,
            "chunked": self.encode_chunked,
        }
        self.decoders: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"bag": self.decode_bag, "csr": self.decode_csr}
        self.weight_gradients: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
            "index_add": self.index_add,
            "bags": self.bags,
            "csc": self.csc,
        }

    def buffer(self, name: str, *size: int) -> Tensor:
        """The buffer of that name, kept until `drop_buffers`."""
        if name not in self._buffers:
            self._buffers[name] = self.problem.x.new_empty(size)
        return self._buffers[name]

    def drop_buffers(self) -> None:
        self._buffers.clear()

    def encode_fresh(self) -> Codes:
        p = self.problem
        return encode(p.x, p.W_enc, p.b_enc, p.b_dec, p.shape.k)

    def encode_reused(self) -> Codes:
        p = self.problem
        pre = self.buffer("pre", p.shape.n, p.shape.f)
        torch.addmm(p.b_enc, p.x - p.b_dec, p.W_enc.t(), out=pre)
        values, indices = pre.relu_().topk(p.shape.k, dim=1)
        return values, indices

    def encode_chunked(self) -> Codes:
        p = self.problem
        n, _, f, k = p.shape
        rows = max(1, min(n, CHUNK_BYTES // (4 * f)))
        pre = self.buffer("chunk", rows, f)
        values, indices = p.x.new_empty(n, k), torch.empty(n, k, dtype=torch.int64, device=p.device)
        centred, W = p.x - p.b_dec, p.W_enc.t()
        for start in range(0, n, rows):
            block = slice(start, min(n, start + rows))
            part = pre[: block.stop - start]
            torch.addmm(p.b_enc, centred[block], W, out=part)
            torch.topk(part.relu_(), k, dim=1, out=(values[block], indices[block]))
        return values, indices

    def decode_bag(self, values: Tensor, indices: Tensor) -> Tensor:
        p = self.problem
        return F.embedding_bag(indices, p.W_dec, mode="sum", per_sample_weights=values).add_(p.b_dec)

    def decode_csr(self, values: Tensor, indices: Tensor) -> Tensor:
        p = self.problem
        n, _, f, k = p.shape
        starts = torch.arange(0, n * k + 1, k, device=p.device)
        codes = torch.sparse_csr_tensor(
            starts, indices.flatten(), values.flatten(), size=(n, f), check_invariants=False
        )
        return torch.sparse.mm(codes, p.W_dec).add_(p.b_dec)

    def gradients(self, form: str, values: Tensor, indices: Tensor, e: Tensor) -> Gradients:
        """(dW_enc, db_enc, dW_dec, db_dec) of sum ||e_n||^2 / N, e = x_hat - x [N, d]."""
        p = self.problem
        n, _, f, k = p.shape
        g = e * (2 / n)
        flat = indices.flatten()
        starts = torch.arange(0, n * k, k, device=p.device)
        # What autograd calls for embedding_bag: <g_n, W_dec[i]> without the [N, k, d] gather.
        bag_of = torch.arange(n, device=p.device).repeat_interleave(k)
        dv = torch.ops.aten._embedding_bag_per_sample_weights_backward(g, p.W_dec, flat, starts, bag_of, 0)
        dv = dv.view(n, k).mul_(values != 0)
        dW_enc, dW_dec = self.weight_gradients[form](values, dv, indices, g, p.x - p.b_dec)
        db_enc = dv.new_zeros(f).index_add_(0, flat, dv.flatten())
        return dW_enc, db_enc, dW_dec, g.sum(0) - torch.mv(p.W_enc.t(), db_enc)

    def index_add(self, values: Tensor, dv: Tensor, indices: Tensor, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        n, d, f, k = self.problem.shape
        dW_enc, dW_dec = self.buffer("dW_enc", f, d).zero_(), self.buffer("dW_dec", f, d).zero_()
        rows = max(1, min(n, CHUNK_BYTES // (4 * k * d)))
        products = self.buffer("products", rows, k, d)
        for start in range(0, n, rows):
            block = slice(start, min(n, start + rows))
            part = products[: block.stop - start]
            into = indices[block].flatten()
            torch.mul(values[block, :, None], g[block, None, :], out=part)
            dW_dec.index_add_(0, into, part.view(-1, d))
            torch.mul(dv[block, :, None], x[block, None, :], out=part)
            dW_enc.index_add_(0, into, part.view(-1, d))
        return dW_enc, dW_dec

    def bags(self, values: Tensor, dv: Tensor, indices: Tensor, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        _, _, f, k = self.problem.shape
        flat = indices.flatten()
        order = torch.sort(flat, stable=True).indices
        starts = torch.bincount(flat, minlength=f).cumsum(0)
        starts = torch.cat((starts.new_zeros(1), starts[:-1]))
        tokens = torch.div(order, k, rounding_mode="floor")
        return tuple(  # type: ignore[return-value]
            F.embedding_bag(tokens, rows, starts, mode="sum", per_sample_weights=weights.flatten()[order])
            for rows, weights in ((x, dv), (g, values))
        )

    def csc(self, values: Tensor, dv: Tensor, indices: Tensor, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        n, _, f, k = self.problem.shape
        starts = torch.arange(0, n * k + 1, k, device=x.device)
        return tuple(  # type: ignore[return-value]
            torch.sparse_csc_tensor(starts, indices.flatten(), weights.flatten(), size=(f, n), check_invariants=False)
            @ rows
            for rows, weights in ((x, dv), (g, values))
        )


# --- optimiser -----------------------------------------------------------------------------------------------------


def adam(parameters: list[Tensor], moments: list[tuple[Tensor, Tensor]]) -> torch.optim.Adam:
    """torch's fused Adam over `parameters`, on given moments (exp_avg, exp_avg_sq)."""
    optimizer = torch.optim.Adam(parameters, lr=LR, betas=BETAS, eps=EPS, fused=True)
    for parameter, (m, v) in zip(parameters, moments, strict=True):
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        optimizer.state[parameter] = {"step": step, "exp_avg": m, "exp_avg_sq": v}
    return optimizer


@torch.no_grad()
def unit_norm_(W_dec: Tensor) -> None:
    """Rows of W_dec divided by their norm, in place."""
    W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True))
