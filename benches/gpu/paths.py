"""`python -m benches.gpu.paths`: which path of the encoder is ahead for one narrow autoencoder, on a GPU.

Both paths of triton_kernels/encode.py, grouped with two keys and with three, at several d, F and k of one autoencoder,
in bf16: what `encode.path_of` may be given. Before they are timed, paths are compared: the share of entries with the
same latent. The last rows say up to which d a grouped path was ahead for an F and a k, from the smallest d on.

Prediction for an H200, from (65536, 128, 4096, 32), where grouped takes 1.3 to 1.6 ms and chunked 1.9 to 2.5: the
product grows with d on both paths, what chunked adds to it (8 bytes for each pre-activation, written and read) does
not, nor what grouped adds but for the rows that are computed again. So they meet near d = 512 at k 32, and earlier at
larger k.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Any

import torch
import typer

from refusal_kernels.triton_kernels import encode

from ..problem import Problem
from ..shapes import Shape
from .clock import attempt, measure
from .rows import Rows


def numbers(text: str) -> list[int]:
    """The integers of a list as options have it."""
    try:
        found = [int(part) for part in text.split()]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise typer.BadParameter(f"expected positive integers separated by spaces; got {text!r}")
    return found


def ahead(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every F and k the largest d up to which, from the smallest on, a grouped path was the fastest; 0: none."""
    found = []
    for f, k in sorted({(row["f"], row["k"]) for row in rows}):
        most = 0
        for d in sorted({row["d"] for row in rows if (row["f"], row["k"]) == (f, k)}):
            times = {
                row["name"]: row["ms"] for row in rows if (row["d"], row["f"], row["k"]) == (d, f, k) and "ms" in row
            }
            if "chunked" not in times or min(times, key=lambda name: times[name]) == "chunked":
                break
            most = d
        found.append({"name": "grouped is ahead up to", "f": f, "k": k, "d": most})
    return found


def main(
    n: Annotated[int, typer.Option(min=1, help="Rows.")] = 32768,
    ds: Annotated[str, typer.Option(help="Widths, separated by spaces.")] = "64 128 256 512 1024",
    fs: Annotated[str, typer.Option(help="Latents.")] = "4096 16384",
    ks: Annotated[str, typer.Option(help="Latents that are kept of a row.")] = "32 64",
    rounds: Annotated[int, typer.Option(min=1, help="Calls of each path at most.")] = 7,
    device: Annotated[str, typer.Option(help="cuda, or cpu under Triton's interpreter, to see that it runs.")] = "cuda",
) -> None:
    """Prints one JSON object per line: each path at each shape, then what follows from them."""
    told, rows = Rows(compared=device == "cuda"), list[dict[str, Any]]()
    narrow = torch.bfloat16 if device == "cuda" else torch.float16  # the interpreter has no arithmetic in bf16
    for d, f, k in itertools.product(numbers(ds), numbers(fs), numbers(ks)):
        shape = Shape(n, d, f, k)
        problem = Problem(shape, device, distinct=False)
        W_enc, b_enc, _, b_dec = problem.parameters
        arguments = (problem.x.to(narrow), W_enc.to(narrow), b_enc, k, b_dec)
        wanted = encode.topk_encode(*arguments, path="chunked")[1]
        for path in encode.PATHS:
            found = encode.topk_encode(*arguments, path=path)[1]
            same = (wanted[:, :, None] == found[:, None, :]).any(2).float().mean().item()
            timed = attempt(lambda path=path, a=arguments: measure(lambda: encode.topk_encode(*a, path=path), rounds))
            row = {"shape": str(shape), "d": d, "f": f, "k": k, "name": path, "same_latents": same, **timed}
            rows.append(row)
            told.tell(row)
    for row in ahead(rows):
        told.tell(row)
    told.end()


if __name__ == "__main__":
    typer.run(main)
