"""What a training step must move and compute on a GPU, and the milliseconds that follow on a given device.

bf16 activations and products, fp32 weights, moments and sums, int32 entry numbers; N tokens, d features, F latents, k
active ones, P = 2 F d weights. Gathered rows count once per entry, wherever they come from: the second-level cache can
make them faster than the copy rate that a prediction takes, never fewer. What the benchmarks print as "predicted" is a
lower bound with nothing overlapped and nothing lost to launches; the docstrings of the kernels say what they expect
beyond it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..shapes import Shape

ROW = 2  # bytes of a bf16 number
WIDE = 4  # of fp32
CODE = ROW + 8  # of an active latent: its value and int64 index
ENTRY = WIDE + 8  # of an entry of the transposed codes under sort: an int32 latent and an int64 number
SORT_PASSES = 4  # of a radix sort over the bits of F, each reading and writing
# Of a weight in the optimiser: p, m, v read and written in fp32, and the bf16 copy that the products read, written.
ADAM_BYTES = 6 * WIDE + ROW
# The same with master weights in halves, of which one is what the products read, and bf16 moments.
COMPACT_ADAM_BYTES = 2 * 4 * ROW


@dataclass(frozen=True)
class Device:
    """What a device does, as `benches.gpu.limits` measures it: TFLOP/s of a bf16 product, GB/s of a copy, and GB/s that
    rows of pre-activations are read at from the second-level cache (not measured: the rate of kernels.md's H200)."""

    tflops: float
    gbps: float
    cache_gbps: float = 5500.0

    @staticmethod
    def of(limits: list[dict[str, object]]) -> Device | None:
        """From the rows of the stage "limits"; None where they lack one."""
        rates = {row.get("name"): row["rate"] for row in limits if "rate" in row}
        product, copy = rates.get("bf16 product 8192^3"), rates.get("copy")
        return Device(float(product), float(copy)) if product and copy else None  # type: ignore[arg-type]

    def compute(self, flops: float) -> float:
        """Milliseconds."""
        return flops / self.tflops / 1e9

    def move(self, size: float) -> float:
        """Milliseconds of `size` bytes through memory."""
        return size / self.gbps / 1e6


def product_flops(s: Shape) -> int:
    """x W_enc^T."""
    return 2 * s.n * s.f * s.d


def filter_bytes(s: Shape) -> int:
    """Every fp32 pre-activation read once, out of the buffer that a chunk of the product was written into."""
    return s.n * s.f * WIDE


def decode_bytes(s: Shape) -> int:
    """Codes and k rows of W_dec per token; x read, the residual written."""
    return s.n * s.k * (CODE + s.d * ROW) + 2 * s.n * s.d * ROW


def transpose_bytes(s: Shape) -> int:
    """N k entries sorted by latent, and F + 1 offsets."""
    return SORT_PASSES * 2 * s.n * s.k * ENTRY + 8 * (s.f + 1)


def gradient_gather_bytes(s: Shape) -> int:
    """A row of e and one of x for every entry, its value and number, each latent's row of W_dec."""
    return s.n * s.k * (2 * s.d * ROW + CODE) + s.f * s.d * ROW


def backward_bytes(s: Shape) -> int:
    """The gathers, and both gradients written."""
    return gradient_gather_bytes(s) + 2 * s.f * s.d * WIDE


def fused_optimizer_bytes(s: Shape, adam_bytes: int = ADAM_BYTES) -> int:
    """The gathers, and Adam on the rows while they are in registers: no gradient is written."""
    return gradient_gather_bytes(s) + 2 * s.f * s.d * adam_bytes


def aux_flops(s: Shape) -> int:
    """Five products over the dead tenth of the latents: their activations, their reconstruction, three gradients."""
    return 5 * 2 * s.n * (s.f // 10) * s.d


# Of a weight while a step runs: its fp32 parameter, two moments, the bf16 copy of autocast; PyTorch's also a gradient.
STATE_BYTES = {
    "ours": 14, "default": 14, "dead": 14, "compact": 8, "sparse": 18, "dense": 18, "compile": 18, "copies": 14,
    "cuda": 14, "cuda-compact": 8,
}  # fmt: skip
ACTIVATION_BYTES = {"dense": 4, "compile": 4, "sparse": 2}  # of a pre-activation, where all are kept


def least_step_bytes(column: str, s: Shape) -> int:
    """What one of the columns of benches.gpu.sae cannot be run without, all smaller tensors left out."""
    return STATE_BYTES[column] * 2 * s.f * s.d + ACTIVATION_BYTES.get(column, 0) * s.n * s.f


def step_ms(s: Shape, at: Device, adam_bytes: int) -> float:
    moved = decode_bytes(s) + transpose_bytes(s) + fused_optimizer_bytes(s, adam_bytes)
    return PREDICTIONS["encode, ours"](s, at) + at.move(moved)


def unfused_step_ms(s: Shape, at: Device, adam_bytes: int) -> float:
    """The same where gradients are written, and read by Adam."""
    moved = decode_bytes(s) + transpose_bytes(s) + backward_bytes(s) + 2 * s.f * s.d * (adam_bytes + WIDE)
    return PREDICTIONS["encode, cuda filter"](s, at) + at.move(moved)


INTEGER_RATE = 1400 / 790  # 8-bit products against 16-bit ones, H200
LEFT = 2  # products that the 8-bit screen leaves per row, in units of k


def screened_gather_bytes(s: Shape) -> int:
    """A row of W_enc for every product that is computed again."""
    return s.n * LEFT * s.k * s.d * ROW


PREDICTIONS: dict[str, Callable[[Shape, Device], float]] = {
    "product alone": lambda s, at: at.compute(product_flops(s)),
    "encode, ours": lambda s, at: at.compute(product_flops(s)) + filter_bytes(s) / at.cache_gbps / 1e6,
    "encode, cuda filter": lambda s, at: PREDICTIONS["encode, ours"](s, at),
    "encode, int8 screen": lambda s, at: (
        at.compute(product_flops(s)) / INTEGER_RATE
        + filter_bytes(s) / at.cache_gbps / 1e6
        + at.move(screened_gather_bytes(s))
    ),
    "decode + residual, ours": lambda s, at: at.move(decode_bytes(s)),
    "transpose, ours": lambda s, at: at.move(transpose_bytes(s)),
    "backward, ours": lambda s, at: at.move(transpose_bytes(s) + backward_bytes(s)),
    "backward, cuda": lambda s, at: PREDICTIONS["backward, ours"](s, at),
    "step, ours": lambda s, at: step_ms(s, at, ADAM_BYTES),
    "step, ours, a tenth dead": lambda s, at: PREDICTIONS["step, ours"](s, at) + at.compute(aux_flops(s)),
    "step, ours compact": lambda s, at: step_ms(s, at, COMPACT_ADAM_BYTES),
    "step, ours, copies": lambda s, at: step_ms(s, at, ADAM_BYTES),
    "step, cuda, Adam inside": lambda s, at: step_ms(s, at, ADAM_BYTES),
    "step, cuda compact, Adam inside": lambda s, at: step_ms(s, at, COMPACT_ADAM_BYTES),
    # Of runs before 2026-11-29.
    "step, cuda": lambda s, at: unfused_step_ms(s, at, ADAM_BYTES),
    "step, cuda compact": lambda s, at: unfused_step_ms(s, at, COMPACT_ADAM_BYTES),
}


def predicted(name: str, shape: Shape, device: Device) -> float | None:
    """Milliseconds of one of the benchmarks' rows; None for rows without a model, such as other people's code."""
    found = PREDICTIONS.get(name)
    return None if found is None else found(shape, device)
