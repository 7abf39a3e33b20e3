"""The chunked encoder with the CUDA row filter in the place of Triton's: Triton interpreted, the filter by fibers.

So all that backend="cuda" does for topk_encode, but for cuBLAS and the launch.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from refusal_kernels import reference
from refusal_kernels.backends.cuda import FILTER_CAPACITY, FILTER_MOST_K
from refusal_kernels.triton_kernels import encode


@pytest.fixture
def row_filter(emulated_row_filter: ctypes.CDLL) -> encode.RowFilter:
    assert (emulated_row_filter.capacity(), emulated_row_filter.most_k()) == (FILTER_CAPACITY, FILTER_MOST_K)

    def run(
        pre: Tensor, bias: Tensor, keys: Tensor, count: Tensor, limit: Tensor, first: int, last: bool, k: int
    ) -> None:
        assert all(t.is_contiguous() for t in (pre, bias, keys, count, limit))
        assert keys.shape[1] == FILTER_CAPACITY
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (pre, bias, keys, count, limit)]
        rows, columns = pre.shape
        problem = emulated_row_filter.filter_chunk(
            *pointers, ctypes.c_int64(rows), columns, first, k, int(last), int(columns % 4 == 0), 0
        )
        assert problem is None, problem

    return encode.RowFilter(FILTER_CAPACITY, run)


@pytest.mark.parametrize(
    ("dtype", "n", "d", "n_latents", "k", "chunk"),
    [
        (torch.float32, 9, 20, 700, 17, (4, 256)),
        (torch.float16, 5, 12, 1300, 256, (8, 512)),
        (torch.float32, 3, 8, 61, 61, (2, 24)),
        (torch.float32, 2, 4, 900, 5, None),
    ],
)
@pytest.mark.parametrize("shifted", [False, True])
def test_the_encoder_with_it_is_exact_on_ties(
    row_filter: encode.RowFilter,
    dtype: torch.dtype,
    n: int,
    d: int,
    n_latents: int,
    k: int,
    chunk: tuple[int, int] | None,
    shifted: bool,
) -> None:
    torch.manual_seed(0)
    x, W, b, b_dec = (torch.randint(-2, 3, s).to(dtype) for s in ((n, d), (n_latents, d), (n_latents,), (d,)))
    shift = b_dec.float() if shifted else None
    values, indices = encode.topk_encode(x, W, b.float(), k, shift, chunk=chunk, row_filter=row_filter)
    want = reference.topk_encode(x.double(), W.double(), b.double(), k, b_dec.double() if shifted else None)
    assert torch.equal(indices, want[1])
    assert torch.equal(values, want[0].to(dtype))
