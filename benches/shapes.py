"""What is measured: shapes, groups, columns."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """N tokens of width d, F latents, k of them active per token."""

    n: int
    d: int
    f: int
    k: int

    def __str__(self) -> str:
        return f"{self.n}x{self.d}x{self.f}x{self.k}"

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Shape of "N,d,F,k" or "NxdxFxk"; ValueError when it is not four positive integers with k <= F."""
        parts = text.replace("x", ",").split(",")
        if len(parts) != 4 or not all(p.strip().isdecimal() and int(p) > 0 for p in parts):
            raise ValueError(f"a shape is four positive integers N,d,F,k; got {text!r}")
        shape = cls(*(int(p) for p in parts))
        if shape.k > shape.f:
            raise ValueError(f"a shape needs k <= F; got {text!r}")
        return shape


SHAPES = (
    Shape(4096, 512, 16384, 32),
    Shape(2048, 128, 4096, 32),
    Shape(512, 1024, 16384, 32),
    Shape(256, 4096, 32768, 64),
)

GROUPS = ("encode", "decode", "backward", "step")

COLUMNS = ("dense", "compile", "sparse", "best", "ours", "floor")

# Where dense beats sparse: small dictionaries and large k, at fixed N and d.
CROSSOVER_LATENTS = (512, 1024, 2048, 4096, 8192)
CROSSOVER_K = (8, 32, 128, 512)
CROSSOVER_N, CROSSOVER_D = 1024, 512
CROSSOVER_SHAPES = tuple(Shape(CROSSOVER_N, CROSSOVER_D, f, k) for f in CROSSOVER_LATENTS for k in CROSSOVER_K if k < f)
CROSSOVER_GROUPS = ("decode", "step")
