"""What every launcher shares: the device guard, the explicit compiler options, and the record of a shipped
configuration.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Contraction of a*b+c into one FMA is stated, not inherited: Triton changes its default between releases, and a
# result must not change bits with the release.
FP_FUSION = True


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def device_scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """A scalar argument as an fp32 tensor: it may live on the device, and reading it back would wait for the GPU."""
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=torch.float32).reshape(())
    return torch.full((), value, dtype=torch.float32, device=device)


ABSENT = "constexpr"  # the type of an argument that is None


@dataclass(frozen=True)
class Tiles:
    """The compile-time half of a launch: constexpr arguments and the two scheduling options."""

    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int = 3

    def options(self) -> dict[str, Any]:
        return {
            **self.constexprs,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": FP_FUSION,
        }


@dataclass(frozen=True)
class Configuration:
    """One kernel as it ships: everything that ahead-of-time compilation needs to build the binary a launch would use.

    `signature` maps each run-time argument to its Triton type ("*bf16", "i32", "fp32", ABSENT for None); the
    constexprs are in `tiles`.
    Pointers and the integers named in `divisible_by_16` carry the alignment attribute that the JIT would find on them.
    A `variant` differs from another configuration in a dtype, an index type or a flag only; tests compile it for one
    architecture.
    """

    kernel: Any
    label: str
    signature: Mapping[str, str]
    tiles: Tiles
    divisible_by_16: tuple[str, ...] = ()
    tensor_cores: bool = False
    variant: bool = False


def pointers(dtype: str, *names: str) -> dict[str, str]:
    """Signature entries of the arguments `<name>_ptr` that point to `dtype` ("bf16", "fp16", "fp32", "i32", "i64")."""
    return {f"{name}_ptr": f"*{dtype}" for name in names}


def integers(*names: str) -> dict[str, str]:
    """Signature entries of 32-bit integer arguments."""
    return dict.fromkeys(names, "i32")
