"""The sparse code [N, k] transposed: for every latent, the tokens that use it, in ascending order (CSC).

    order [N k]      entry numbers n k + j, sorted by latent, ascending within a latent
    offsets [F + 1]  order[offsets[f] : offsets[f + 1]] are the entries of latent f

A stable sort is what makes every gradient reproducible: the order in which a latent's tokens are added is fixed, so
no atomics and no run-to-run differences. Nothing here waits for the device: all sizes follow from N, k and F alone.

A latent with more than `segment` entries ("hot") is split, so that the hottest one does not decide the time of the
whole kernel. The number of its segments is known on the device only, therefore a fixed number of segment programs is
launched, `max_segments` = floor(2 N k / segment), which bounds it: sum of ceil(c / s) over counts c > s is below sum
of 2 c / s.

Bytes: N k (4 + 8) read and written about 4 times by the radix sort, + F 8. Roofline prediction (2.1 M entries, H200):
0.2 ms. Measured on an H200: 0.43 ms with the host's launches, the sort alone 0.16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class CSC(NamedTuple):
    """Entries by latent; see the module's docstring. All tensors live on the device of the indices."""

    order: Tensor  # [N k] int32 where N k < 2^31 (kernels divide it by k, and a 64-bit division is four times dearer)
    offsets: Tensor  # [F + 1] int64
    segment: int  # entries per segment; a latent with more is hot
    segment_ends: Tensor  # [F] int64: running count of segments of hot latents, this latent's included
    segment_latent: Tensor  # [max_segments] int64: the hot latent of each segment, F where there is none


def tokens_of(offsets: Tensor, entries: int) -> Tensor:
    """[nnz] int32: the row of every entry of a CSR code with offsets [N + 1], N < 2^31. Waits for nothing."""
    n = offsets.numel() - 1
    rows = torch.arange(n, dtype=torch.int32, device=offsets.device)
    return rows.repeat_interleave(offsets[1:] - offsets[:-1], output_size=entries)


def csc_from_indices(indices: Tensor, n_latents: int, segment: int) -> CSC:
    """CSC of indices [N, k] or [nnz] (int32 or int64, each in [0, F)), with hot latents cut every `segment` entries.

    Of indices [H, N, k] the CSC of all heads together: entry (h N + n) k + j of latent h F + indices[h, n, j].
    """
    # 32-bit keys halve the radix passes of 64-bit ones.
    latents = indices.to(torch.int32)
    if indices.dim() == 3:
        heads = indices.shape[0]
        latents = latents + (torch.arange(heads, dtype=torch.int32, device=indices.device) * n_latents)[:, None, None]
        n_latents *= heads
    latents, order = torch.sort(latents.reshape(-1), stable=True)
    if order.numel() < 2**31:
        order = order.to(torch.int32)
    boundaries = torch.arange(n_latents + 1, dtype=torch.int32, device=indices.device)
    offsets = torch.searchsorted(latents, boundaries)
    counts = offsets[1:] - offsets[:-1]
    segments = torch.where(counts > segment, (counts + (segment - 1)) // segment, 0)
    segment_ends = torch.cumsum(segments, 0)
    max_segments = 2 * indices.numel() // segment
    numbers = torch.arange(max_segments, dtype=torch.int64, device=indices.device)
    return CSC(order, offsets, segment, segment_ends, torch.searchsorted(segment_ends, numbers, right=True))
