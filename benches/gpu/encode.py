"""`python -m benches.gpu.encode`: the chunked encoder by the shape of its chunks and by its row filter, on a GPU.

What triton_kernels/encode.py chooses of these (`chunk_shape`, `_LISTS`) and whether the CUDA filter should stand in the
place of Triton's is for this table to say. Filters: Triton's with the shipped list, Triton's with a list and a step
twice as long (half the steps, longer reductions), and CUDA's. Chunks: rows x latents of the fp32 buffer.

Prediction for an H200 at the canonical shape: the product 49.8 ms, Triton's filter 16 ms whatever the chunk, half of it
with the longer step, CUDA's 3 to 6 ms, 4 us of launch and drain per chunk. Measured 2026-11-27: all of them within 62
to 71 ms, the two kernels nearly alike, the longer step no gain, larger chunks up to 128 MB 2 ms. The CUDA filter is
another since (row_filter.cu has its prediction) and not yet measured. Compared first: the share of latents that a
variant has in common with the shipped encoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import torch
import typer

from refusal_kernels import native
from refusal_kernels.backends.cuda import FILTER_CAPACITY, FILTER_MOST_K
from refusal_kernels.triton_kernels import encode
from refusal_kernels.triton_kernels.launch import Tiles

from ..problem import Problem
from ..shapes import Shape
from .clock import measure
from .rows import Rows

# Rows, latents: as shipped; 32 MB, which an L2 holds, 256 and 512 MB. Three more shapes were between these.
CHUNKS = (None, (4096, 2048), (8192, 8192), (16384, 8192))


def filters(k: int) -> Iterator[tuple[str, encode.RowFilter]]:
    """Name and kernel of every row filter that takes k and is there."""
    if (shipped := encode.list_tiles(k)) is not None:
        yield "Triton", encode.triton_filter(shipped)
        twice = {name: shipped.constexprs[name] * (1 if name == "K" else 2) for name in ("K", "CAPACITY", "STEP")}
        yield "Triton, twice the step", encode.triton_filter(Tiles(twice, shipped.num_warps))
    cuda = native.operator("refusal_kernels_cuda", "row_filter")
    if cuda is not None and torch.cuda.is_available() and k <= FILTER_MOST_K:
        yield "CUDA", encode.RowFilter(FILTER_CAPACITY, cuda)


def main(
    shape: Annotated[str, typer.Option(help="N,d,F,k.")] = "32768,4096,131072,64",
    rounds: Annotated[int, typer.Option(min=1, help="Calls of each variant at most.")] = 3,
    device: Annotated[str, typer.Option(help="cuda, or cpu under Triton's interpreter, to see that it runs.")] = "cuda",
) -> None:
    """Prints one JSON object per line and variant."""
    sizes = Shape.parse(shape)
    problem = Problem(sizes, device, distinct=False)
    x, we = problem.x.to(torch.bfloat16), problem.W_enc.to(torch.bfloat16)
    arguments = (x, we, problem.b_enc, sizes.k, problem.b_dec)
    _, wanted = encode.topk_encode(*arguments)

    def timed(row_filter: encode.RowFilter, chunk: tuple[int, int] | None) -> dict[str, Any]:
        _, found = encode.topk_encode(*arguments, row_filter=row_filter, chunk=chunk)
        same = torch.stack([(found[i, :, None] == wanted[i]).any(-1).float().mean() for i in range(0, len(x), 97)])
        ran = measure(lambda: encode.topk_encode(*arguments, row_filter=row_filter, chunk=chunk), rounds)
        return {"same_latents": same.mean().item(), **ran}

    rows = Rows(compared=device == "cuda", shape=str(sizes))
    for name, row_filter in filters(sizes.k):
        for chunk in CHUNKS:
            by = "chunks as shipped" if chunk is None else f"chunks of {chunk[0]} x {chunk[1]}"
            rows.attempt(f"{name}, {by}", lambda f=row_filter, c=chunk: timed(f, c))
    rows.end()


if __name__ == "__main__":
    typer.run(main)
