"""`python -m benches.gpu.limits`: what the device can do, by the fastest code others wrote: the roofs of everything.

Predictions for an H200, written down before measuring (tokens 8192, F 131072), and what the runs of 2026-11-26 and
2026-11-27 measured:

    copy                                            4.3 TB/s            4.22, 4.28
    bf16 product                                    790 TFLOP/s         756, 799
    the encoder's chunk product into fp32,          at the rate of      668, 699; 724 at best (2048 x 2048 or 3072),
    2048 x 4096 x 4096                              a large one         661, 665 at 2048 x 8192: 0.83 to 0.93 of it
    torch.topk of k = 64                            1.5e11 elements/s   1.38e11, 1.39e11 in bf16
                                                    0.9e11              0.90e11, 0.91e11 in fp32
    gather of random 8 KB rows                      4 TB/s              3.76, 3.77

So a chunk's product loses 7 to 17 % of a large one's rate, which benches/gpu/model.py does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .clock import attempt, measure
from .rows import Rows

Case = tuple[str, str, float, Callable[[], Any]]  # name, unit, work in that unit times a millisecond, call


def copy() -> Iterator[Case]:
    source, target = (torch.randn(1 << 30, device="cuda") for _ in range(2))
    yield "copy", "GB/s", 8 * source.numel() / 1e6, lambda: target.copy_(source)


def product() -> Iterator[Case]:
    a, b, out = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    yield "bf16 product 8192^3", "TFLOP/s", 2 * 8192**3 / 1e9, lambda: torch.mm(a, b, out=out)


def chunks() -> Iterator[Case]:
    """The encoder's product as it is called: a block of rows times one slice of the latents after another."""
    x, w = (torch.randn(n, 4096, dtype=torch.bfloat16, device="cuda") for n in (2048, 131072))
    for columns in (2048, 3072, 4096, 8192):
        out = torch.empty(2048, columns, device="cuda")
        starts = range(0, 131072 - columns + 1, columns)

        def run(columns: int = columns, out: Tensor = out, starts: range = starts) -> None:
            for first in starts:
                torch.ops.aten.mm.dtype_out(x, w[first : first + columns].T, torch.float32, out=out)

        work = 2 * 2048 * 4096 * columns * len(starts) / 1e9
        yield f"chunked bf16 product into fp32 [2048, {columns}]", "TFLOP/s", work, run


def gather() -> Iterator[Case]:
    w = torch.randn(131072, 4096, dtype=torch.bfloat16, device="cuda")
    picked = torch.randint(0, 131072, (1 << 18,), device="cuda")
    out = torch.empty(1 << 18, 4096, dtype=torch.bfloat16, device="cuda")
    yield "gather of 8 KB rows", "GB/s", 4 * out.numel() / 1e6, lambda: torch.index_select(w, 0, picked, out=out)


def selection() -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        pre = torch.randn(8192, 131072, dtype=dtype, device="cuda").relu_()
        name = f"topk 64 of 131072, {str(dtype).removeprefix('torch.')}"
        yield name, "Gelement/s", pre.numel() / 1e6, lambda pre=pre: pre.topk(64, dim=1)


def sort() -> Iterator[Case]:
    entries = torch.randint(0, 131072, (1 << 21,), dtype=torch.int32, device="cuda")
    yield "stable sort of 2 M int32", "Gelement/s", entries.numel() / 1e6, lambda: torch.sort(entries, stable=True)


def main() -> None:
    """One JSON object per line: name, unit, rate, milliseconds."""
    rows = Rows(peers=True)
    for group in (copy, product, chunks, gather, selection, sort):
        for name, unit, work, run in group():
            result = attempt(lambda run=run: measure(run))
            if "ms" in result:
                result["rate"] = work / result["ms"]
            rows.tell({"name": name, "unit": unit, **result})
    rows.end()


if __name__ == "__main__":
    main()
