"""The inputs of a shape, and what every column must compute from them, in fp64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .shapes import Shape

SEED = 0
# sigma of the lognormal firing rates the tokens are planted with: trained dictionaries are heavy-tailed, and both the
# hot latents (load balance) and the cold ones (empty gradients) cost time.
RATE_SIGMA = 1.0
# Tokens whose k-th and (k+1)-th pre-activations are closer than this part of the largest are drawn again: fp32 products
# summed in another order differ by about 1e-6 of it, and all columns have to select the same latents.
MIN_GAP = 2e-5
CHECKED_LATENTS = 256
REFERENCE_CHUNK_BYTES = 256 << 20

LR, BETAS, EPS = 1e-3, (0.9, 0.999), 1e-8


@dataclass
class Gradients:
    """Reference gradients in fp64 at the checked latents (rows of F), and of b_dec."""

    rows: Tensor
    dW_enc: Tensor
    db_enc: Tensor
    dW_dec: Tensor
    db_dec: Tensor


class Problem:
    """One shape's tensors: x [N, d], W_enc, W_dec [F, d] (decoder rows of unit norm), b_enc [F], b_dec [d], all fp32.

    Tokens are sums of k dictionary rows with lognormal popularity plus noise, as activations of a trained dictionary
    are. `distinct=False` skips the redrawing of near-ties (for memory measurements, where nothing is compared).
    """

    def __init__(self, shape: Shape, device: str = "cpu", distinct: bool = True) -> None:
        self.shape, self.device = shape, torch.device(device)
        self._generator = torch.Generator(self.device).manual_seed(SEED)
        n, d, f, _k = shape
        self.W_dec = self._normal(f, d)
        self.W_dec /= torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True)
        self.W_enc = self.W_dec.clone()
        self.b_enc = 0.01 * self._normal(f)
        self.b_dec = 0.1 * self._normal(d)
        self._rates = torch.exp(RATE_SIGMA * self._normal(f))
        self.x = self._tokens(n)
        if distinct:
            self._redraw_ties()

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self._generator, device=self.device)

    def _tokens(self, n: int) -> Tensor:
        k, d = self.shape.k, self.shape.d
        planted = torch.multinomial(self._rates, n * k, replacement=True, generator=self._generator).view(n, k)
        weights = 1 + self._normal(n, k).abs()
        signal = torch.nn.functional.embedding_bag(planted, self.W_dec, mode="sum", per_sample_weights=weights)
        return signal + 0.5 * self._normal(n, d) / d**0.5 + self.b_dec

    def _redraw_ties(self) -> None:
        k = self.shape.k
        if k == self.shape.f:
            return
        rows = torch.arange(self.shape.n, device=self.device)
        for _ in range(20):
            top = self._pre(self.x[rows]).topk(k + 1, dim=1).values
            rows = rows[(top[:, k - 1] - top[:, k] < MIN_GAP * top[:, 0]) | (top[:, k - 1] <= 0)]
            if rows.numel() == 0:
                return
            self.x[rows] = self._tokens(rows.numel())
        raise RuntimeError(f"no inputs without near-ties found for the shape {self.shape}")

    def _pre(self, x: Tensor) -> Tensor:
        return torch.addmm(self.b_enc, x - self.b_dec, self.W_enc.t()).relu_()

    @property
    def parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.W_enc, self.b_enc, self.W_dec, self.b_dec

    @cached_property
    @torch.no_grad()
    def codes(self) -> tuple[Tensor, Tensor]:
        """(values [N, k], indices [N, k]) in fp32 by plain PyTorch: inputs of the decode group, and which latents are
        selected (without near-ties that does not depend on the precision)."""
        top = self._pre(self.x).topk(self.shape.k, dim=1)
        return top.values.contiguous(), top.indices.contiguous()

    @cached_property
    @torch.no_grad()
    def reference(self) -> tuple[Tensor, Tensor]:
        """(values [N, k], e = x_hat - x [N, d]) in fp64 for the selected latents, and from these values."""
        n, d, _, k = self.shape
        _, indices = self.codes
        values = torch.empty(n, k, dtype=torch.float64, device=self.device)
        e = torch.empty(n, d, dtype=torch.float64, device=self.device)
        chunk = max(1, REFERENCE_CHUNK_BYTES // (8 * k * d))
        for start in range(0, n, chunk):
            rows, active = slice(start, start + chunk), indices[start : start + chunk]
            x = self.x[rows].double()
            weights = self.W_enc[active].double()
            pre = torch.bmm(weights, (x - self.b_dec.double())[:, :, None]).squeeze(2) + self.b_enc.double()[active]
            values[rows] = pre.relu_()
            x_hat = torch.bmm(values[rows, None, :], self.W_dec[active].double()).squeeze(1) + self.b_dec.double()
            e[rows] = x_hat - x
        return values, e

    @cached_property
    @torch.no_grad()
    def gradients(self) -> Gradients:
        """d(sum ||e_n||^2 / N) in fp64 at CHECKED_LATENTS latents, spread from the most to the least active."""
        n, d, f, _ = self.shape
        values, e = self.reference
        _, indices = self.codes
        g = (2 / n) * e
        hits = torch.bincount(indices.flatten(), minlength=f)
        order = torch.argsort(hits, descending=True, stable=True)
        rows = order[torch.linspace(0, f - 1, min(CHECKED_LATENTS, f), device=self.device).long()]
        dv = torch.empty_like(values)
        chunk = max(1, REFERENCE_CHUNK_BYTES // (8 * self.shape.k * d))
        for start in range(0, n, chunk):
            part = slice(start, start + chunk)
            dv[part] = torch.bmm(self.W_dec[indices[part]].double(), g[part, :, None]).squeeze(2)
        dv *= values != 0
        db_enc = torch.zeros(f, dtype=torch.float64, device=self.device).index_add_(0, indices.flatten(), dv.flatten())
        centred = (self.x - self.b_dec).double()
        dW_enc, dW_dec = (torch.zeros(len(rows), d, dtype=torch.float64, device=self.device) for _ in range(2))
        position = torch.full((f,), -1, device=self.device)
        position[rows] = torch.arange(len(rows), device=self.device)
        token, slot = (position[indices] >= 0).nonzero(as_tuple=True)
        target = position[indices[token, slot]]
        dW_dec.index_add_(0, target, values[token, slot, None] * g[token])
        dW_enc.index_add_(0, target, dv[token, slot, None] * centred[token])
        through_encoder = torch.zeros(d, dtype=torch.float64, device=self.device)
        for start in range(0, f, 4096):
            through_encoder += db_enc[start : start + 4096] @ self.W_enc[start : start + 4096].double()
        return Gradients(rows, dW_enc, db_enc[rows], dW_dec, g.sum(0) - through_encoder)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||; NaN counts as infinite."""
    error = torch.linalg.vector_norm(actual.double() - expected) / torch.linalg.vector_norm(expected)
    return float("inf") if bool(error.isnan()) else float(error)
