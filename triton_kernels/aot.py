"""Ahead-of-time compilation of the shipped configurations, without a GPU: what ptxas made of each kernel.

    python -m refusal_kernels.triton_kernels.aot --capability 90 [--match decode] [--part 0/2]

prints one JSON object per kernel: registers per thread, stack bytes (anything but 0 is a spill or a local array),
shared memory, the matrix instructions in use, and whether global memory is read 16 bytes at a time. Variants
(launch.py) are compiled for compute capability 90 only, with --all for every one that is asked for.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launch import ABSENT, Configuration
from .registry import configurations

VARIANT_CAPABILITY = 90  # where variants of a configuration are compiled
# The most shared memory a program may ask for, in bytes (CUDA C programming guide, table of technical specifications).
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
INTEGER_INSTRUCTION = {80: "IMMA", 90: "IGMMA", 100: "UTCIMMA"}  # the same for int8
WARP_INSTRUCTION = "HMMA"  # of one warp, on every architecture; what a product of fewer rows than a warpgroup's runs on
WARPGROUP_ROWS = 64
# Kernel -> the constexprs that say how many rows its products have, one for each product.
PRODUCTS = {
    "_gemm_kernel": ("BLOCK_M",),
    "_group_kernel": ("BLOCK_M",),
    "_product_kernel": ("BLOCK_M",),
    "coefficients_kernel": ("TR",),
    "update_kernel": ("BN",),
    "lora_coefficients_kernel": ("PADDED",),
    "lora_update_kernel": ("BF", "BN"),
    "lora_lagged_kernel": ("PADDED", "BF", "BN"),
    "adam_coefficients_kernel": ("PADDED",),
    "adam_update_kernel": ("BF", "BN"),
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What ptxas reports about one kernel on one architecture; sizes in bytes."""

    label: str
    capability: int
    registers: int
    stack: int
    shared: int
    matrix_instruction: str  # all that occur, joined by "+"
    wide_loads: bool


def work(capabilities: Sequence[int], match: str = "", variants: bool = False) -> list[tuple[Configuration, int]]:
    """What is compiled: every configuration for each of `capabilities`, but for `variants`, without which these are
    compiled for `VARIANT_CAPABILITY` alone."""
    found = [c for c in configurations() if re.search(match, c.label)]
    return [(c, at) for c in found for at in capabilities if at == VARIANT_CAPABILITY or variants or not c.variant]


def expected_instructions(configuration: Configuration, capability: int) -> str:
    """The matrix instructions that a configuration must be compiled to, as `Compiled` has them; "" for none.

    fp32 operands of an "ieee" product go to FMA units: tensor cores would cut them to tf32.
    """
    kernel, types = configuration.kernel, configuration.signature.values()
    if "tl.dot(" not in kernel.src:
        return ""
    sixteen_bits = "*bf16" in types or "*fp16" in types
    if 'input_precision="ieee"' in kernel.src and not sixteen_bits:
        return ""
    own = (INTEGER_INSTRUCTION if "*i8" in types else MATRIX_INSTRUCTION)[capability]
    rows = [configuration.tiles.constexprs[name] for name in PRODUCTS[kernel.__name__]]
    return "+".join(sorted({own if n >= WARPGROUP_ROWS else WARP_INSTRUCTION for n in rows}))


def build(configuration: Configuration, capability: int) -> Any:
    """Triton's compiled kernel for compute capability `capability` (80, 90, 100), as the JIT would have it for 16-byte
    aligned tensors; nothing can be launched."""
    tiles = configuration.tiles
    names = configuration.kernel.arg_names
    types = {**configuration.signature, **dict.fromkeys(tiles.constexprs, "constexpr")}
    signature = {name: types[name] for name in names}
    aligned = [
        position
        for position, name in enumerate(names)
        if signature[name].startswith("*") or name in configuration.divisible_by_16
    ]
    attributes = {(position,): [["tt.divisibility", 16]] for position in aligned}
    options = {name: value for name, value in tiles.options().items() if name not in tiles.constexprs}
    absent = {name: None for name in names if signature[name] == ABSENT and name not in tiles.constexprs}
    constants = {**absent, **tiles.constexprs}
    source = ASTSource(configuration.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_configuration(configuration: Configuration, capability: int) -> Compiled:
    """What ptxas made of it for compute capability `capability`."""
    kernel = build(configuration, capability)
    ptx = kernel.asm["ptx"]
    instruction = ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        usage = _cuobjdump("-res-usage", path)
        # Disassembling costs more than compiling, so only what asked for a matrix instruction is looked into.
        if re.search(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)", ptx):
            instruction = "+".join(sorted(set(re.findall(r"\b[A-Z0-9]+MMA\b", _cuobjdump("-sass", path)))))
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if numbers is None:
        raise RuntimeError(f"cuobjdump reported no resource usage for {configuration.label}: {usage!r}")
    return Compiled(
        label=configuration.label,
        capability=capability,
        registers=int(numbers[1]),
        stack=int(numbers[2]),
        shared=kernel.metadata.shared,
        matrix_instruction=instruction,
        wide_loads=re.search(r"ld\.global[.\w:]*\.(v4\.b32|v2\.b64|v8\.b32|v4\.b64)|cp\.async\.\S+ .*, 0x10", ptx)
        is not None,
    )


def _cuobjdump(option: str, path: Path) -> str:
    tool = knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, option, str(path)], capture_output=True, text=True, check=True).stdout


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="+", default=[90], choices=sorted(SHARED_LIMIT))
    parser.add_argument("--match", default="", help="only configurations whose label this regular expression finds")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th configuration, starting with the i-th")
    parser.add_argument("--all", action="store_true", help="variants for every --capability too")
    options = parser.parse_args(arguments)
    part, parts = (int(number) for number in options.part.split("/"))
    for configuration, capability in work(options.capability, options.match, options.all)[part::parts]:
        print(json.dumps(dataclasses.asdict(compile_configuration(configuration, capability))), flush=True)


if __name__ == "__main__":
    main()
