"""What a training step must move and compute on a GPU, and the milliseconds that follow on a given device.

bf16 activations and products, fp32 weights, moments and sums, int32 entry numbers; N tokens, d features, F latents, k
active ones, P = 2 F d weights. A kernel takes the longer of its arithmetic and its bytes, an operator the sum of its
kernels; launches, and what a kernel loses beside its roof, are not in it. So a prediction is what the present design
would take at the rates that the same run measured. It is no lower bound of any design, and one thing in it is known
only in part: where gathered rows come from.

* Rows that a kernel gathers again and again, out of a set that the second-level cache holds, come through memory once
  and then from the cache: `Device.gather`. The decoder works through W_dec in slices of 256 columns for that: at F
  131072 they have 67 MB beside 60 of cache, and it took 17.7 GB of rows and codes in 2.3 ms, where memory would have
  needed 4.1. An earlier form of this model counted every gathered row as memory traffic: the decoder was at 118 to
  174 % of it. The cache's rate is the fastest that was seen, by that kernel, so that 100 % is that kernel's own best.
* Out of a larger set rows are counted as memory traffic, though the most frequent of them are in the cache.
* Chunks of pre-activations larger than the cache are written to memory and read from there; the product's kernel writes
  them while it computes.

The docstrings of the kernels say what they expect beyond this.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from .. import projection
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
# As triton_kernels has them, where importing it would need Triton: encode.py's buffer and its rows, decode.py's slice,
# grouped_encode.py's group. tests/test_gpu_model.py holds them together.
LARGEST_BUFFER, BLOCK_ROWS = 128 << 20, 1 << 13
SLICE = 256
GROUP = 32
# Of a second-level cache: a set a little larger stays in it nearly as well, as what is asked for often stays.
NEARLY = 1.25


@dataclass(frozen=True)
class Device:
    """What a device does, as `benches.gpu.limits` measures it: TFLOP/s of a bf16 product, GB/s of a copy; GB/s of rows
    out of the second-level cache and its bytes, an H200's where a run does not say."""

    tflops: float
    gbps: float
    cache_gbps: float = 7700.0
    cache_bytes: float = 60 << 20

    @staticmethod
    def of(limits: list[dict[str, object]], cache_mib: float | None = None) -> Device | None:
        """From the rows of the stage "limits"; None where they lack one."""
        rates = {row.get("name"): row["rate"] for row in limits if "rate" in row}
        product, copy = rates.get("bf16 product 8192^3"), rates.get("copy")
        if not product or not copy:
            return None
        size = Device.cache_bytes if cache_mib is None else cache_mib * 2**20
        return Device(float(product), float(copy), cache_bytes=size)  # type: ignore[arg-type]

    def compute(self, flops: float) -> float:
        """Milliseconds."""
        return flops / self.tflops / 1e9

    def move(self, size: float) -> float:
        """Milliseconds of `size` bytes through memory."""
        return size / self.gbps / 1e6

    def holds(self, size: float) -> bool:
        """Whether the second-level cache holds a working set of so many bytes, or nearly."""
        return size <= NEARLY * self.cache_bytes

    def gather(self, rows: float, distinct: float, other: float, held: float) -> float:
        """Milliseconds of a kernel that gathers `rows` bytes, `distinct` of them different, out of `held` bytes at a
        time, and moves `other` bytes once."""
        if not self.holds(held):
            return self.move(rows + other)
        return max(self.move(distinct + other), (rows + other) / self.cache_gbps / 1e6)

    def buffered(self, size: float, held: float) -> float:
        """Milliseconds of `size` bytes written to, or read from, a buffer of `held` bytes that is used again."""
        return self.move(size) if held > self.cache_bytes else size / self.cache_gbps / 1e6


def product_flops(s: Shape) -> int:
    """x W_enc^T."""
    return 2 * s.n * s.f * s.d


def filter_bytes(s: Shape) -> int:
    """Every fp32 pre-activation once, into the buffer that a chunk of the product is written to, or out of it."""
    return s.n * s.f * WIDE


def product_ms(s: Shape, at: Device, chunk: tuple[int, int] | None = None) -> float:
    """Of the product into a chunk's buffer, W_enc read once per block of rows; `chunk` = (rows, latents)."""
    rows, size = buffer_of(s, chunk)
    moved = at.move(s.n * s.d * ROW + math.ceil(s.n / rows) * s.f * s.d * ROW)
    return max(at.compute(product_flops(s)), moved + at.buffered(filter_bytes(s), size))


def buffer_of(s: Shape, chunk: tuple[int, int] | None = None) -> tuple[int, int]:
    """(rows, bytes) of the buffer of pre-activations."""
    if chunk is not None:
        return min(chunk[0], s.n), min(chunk[0], s.n) * min(chunk[1], s.f) * WIDE
    rows = min(s.n, BLOCK_ROWS)
    return rows, min(LARGEST_BUFFER, rows * s.f * WIDE)


def chunked_ms(s: Shape, at: Device, chunk: tuple[int, int] | None = None, passes: int = 1) -> float:
    """The product, and a filter that reads each chunk `passes` times."""
    return product_ms(s, at, chunk) + passes * at.buffered(filter_bytes(s), buffer_of(s, chunk)[1])


def groups_again(s: Shape, kept: int) -> float:
    """Groups of a row that the grouped encoder computes again, in random order: those that hold `kept` or more of the k
    largest, as what they dropped may be among them."""
    ways = math.comb(s.f, s.k)
    fewer = sum(math.comb(GROUP, i) * math.comb(s.f - GROUP, s.k - i) for i in range(min(kept, s.k + 1)))
    return s.f / GROUP * (1 - fewer / ways)


def grouped_ms(s: Shape, at: Device, kept: int = 2) -> float:
    """The product with `kept` keys of 4 bytes a group, then rows of W_enc for what is computed again."""
    keys = s.n * s.f // GROUP * kept * WIDE
    product = max(at.compute(product_flops(s)), at.move(s.n * s.d * ROW + s.f * s.d * ROW + keys))
    rows = s.n * (s.k + GROUP * groups_again(s, kept)) * s.d * ROW
    held = s.f * s.d * ROW
    return product + at.gather(rows, held, keys + s.n * s.k * CODE + s.n * s.d * ROW, held)


def encode_ms(s: Shape, at: Device, path: str = "chunked") -> float:
    """By one of the paths of triton_kernels/encode.py."""
    return chunked_ms(s, at) if path == "chunked" else grouped_ms(s, at, 3 if path == "grouped, 3 keys" else 2)


def alone_ms(s: Shape, at: Device) -> float:
    """The product alone into a bf16 matrix."""
    moved = s.n * s.d + s.f * s.d + s.n * s.f
    return max(at.compute(product_flops(s)), at.move(ROW * moved))


def decode_ms(s: Shape, at: Device, residual: bool = True) -> float:
    """Codes and k rows of W_dec per token, a slice of its columns at a time; x_hat written, or x read and e written."""
    row = s.d * ROW
    other = s.n * s.k * CODE + (2 if residual else 1) * s.n * row
    return at.gather(s.n * s.k * row, min(s.n * s.k, s.f) * row, other, s.f * min(s.d, SLICE) * ROW)


def transpose_bytes(s: Shape) -> int:
    """N k entries sorted by latent, and F + 1 offsets."""
    return SORT_PASSES * 2 * s.n * s.k * ENTRY + 8 * (s.f + 1)


def latents_ms(s: Shape, at: Device, weight_bytes: int) -> float:
    """A row of e and one of x for every entry, its value and number, each latent's row of W_dec; and `weight_bytes` for
    every weight of both matrices."""
    both = 2 * s.d * ROW
    other = s.n * s.k * CODE + s.f * s.d * ROW + 2 * s.f * s.d * weight_bytes
    return at.gather(s.n * s.k * both, s.n * both, other, s.n * both)


def backward_ms(s: Shape, at: Device) -> float:
    """Both gradients written, after the transpose."""
    return at.move(transpose_bytes(s)) + latents_ms(s, at, WIDE)


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


def step_ms(s: Shape, at: Device, adam_bytes: int, path: str = "chunked") -> float:
    """Adam on the rows while they are in registers: no gradient is written."""
    parts = decode_ms(s, at) + at.move(transpose_bytes(s)) + latents_ms(s, at, adam_bytes)
    return encode_ms(s, at, path) + parts


def unfused_step_ms(s: Shape, at: Device, adam_bytes: int) -> float:
    """The same where gradients are written, and read by Adam."""
    return encode_ms(s, at) + decode_ms(s, at) + backward_ms(s, at) + at.move(2 * s.f * s.d * (adam_bytes + WIDE))


INTEGER_RATE = 1400 / 790  # 8-bit products against 16-bit ones, H200
LEFT = 2  # products that the 8-bit screen leaves per row, in units of k


def settle_ms(s: Shape, at: Device) -> float:
    """A row of W_enc for every product that the 8-bit screen leaves."""
    again, held = s.n * LEFT * s.k * s.d * ROW, s.f * s.d * ROW
    return at.gather(again, min(again, held), 0, held)


def screened_ms(s: Shape, at: Device) -> float:
    """The product in 8 bits, the filter, and what is computed again."""
    return product_ms(s, at) / INTEGER_RATE + at.buffered(filter_bytes(s), buffer_of(s)[1]) + settle_ms(s, at)


PREDICTIONS: dict[str, Callable[[Shape, Device, str], float]] = {
    "product alone": lambda s, at, path: alone_ms(s, at),
    "encode, ours": encode_ms,
    "encode, cuda filter": lambda s, at, path: chunked_ms(s, at),
    "encode, int8 screen": lambda s, at, path: screened_ms(s, at),
    # A pass that counts and one that writes.
    "encode, batch top-k": lambda s, at, path: chunked_ms(s, at, passes=2),
    "encode, threshold": lambda s, at, path: chunked_ms(s, at, passes=2),
    "decode + residual, ours": lambda s, at, path: decode_ms(s, at),
    "decode, cuda": lambda s, at, path: decode_ms(s, at, residual=False),
    "decode, CSR": lambda s, at, path: decode_ms(s, at, residual=False),
    "transpose, ours": lambda s, at, path: at.move(transpose_bytes(s)),
    "backward, ours": lambda s, at, path: backward_ms(s, at),
    "backward, cuda": lambda s, at, path: backward_ms(s, at),
    "step, ours": lambda s, at, path: step_ms(s, at, ADAM_BYTES, path),
    "step, ours, default options": lambda s, at, path: step_ms(s, at, ADAM_BYTES, path),
    "step, ours, a tenth dead": lambda s, at, path: step_ms(s, at, ADAM_BYTES, path) + at.compute(aux_flops(s)),
    "step, ours compact": lambda s, at, path: step_ms(s, at, COMPACT_ADAM_BYTES, path),
    "step, ours, copies": lambda s, at, path: step_ms(s, at, ADAM_BYTES, path),
    "step, cuda, Adam inside": lambda s, at, path: step_ms(s, at, ADAM_BYTES),
    "step, cuda compact, Adam inside": lambda s, at, path: step_ms(s, at, COMPACT_ADAM_BYTES),
    "SAE step, ours": lambda s, at, path: step_ms(s, at, ADAM_BYTES, path),
    # Of runs before 2026-11-29.
    "step, cuda": lambda s, at, path: unfused_step_ms(s, at, ADAM_BYTES),
    "step, cuda compact": lambda s, at, path: unfused_step_ms(s, at, COMPACT_ADAM_BYTES),
}
# Rows of benches.gpu.heads: name -> (the same of one autoencoder, path of the encoder). In one launch or in a loop, a
# head's bytes are its own.
OF_HEADS = {
    **{f"encode, all heads, {path}": ("encode, ours", path) for path in ("grouped", "grouped, 3 keys", "chunked")},
    "step, all heads": ("step, ours", "grouped"),
    "step, all heads, default options": ("step, ours, default options", "grouped"),
    "step, all heads compact": ("step, ours compact", "grouped"),
    "step, all heads, cuda": ("step, ours", "grouped"),
    "step, loop over heads": ("step, ours", "grouped"),
}
ONE_HEAD = "encode, one head, "
CHUNKS = re.compile(r", chunks (?:as shipped|of (\d+) x (\d+))$")  # rows of benches.gpu.encode
# Bytes of benches.gpu.projection's columns: times that all matrices and all bases pass through memory, in fp32. For
# an optimizer p, m, v, g and the movement that it stores in between.
PASSES = {
    "ours": (3, 2),
    "ours, cuda": (2, 1),
    "ours, one launch": (2, 1),  # of HBM; that the L2 gives twice as much is in lora_projection_lagged.py
    "floor": (2, 1),
    "optimizer, AdamW": (7, 0),
    "optimizer, difference": (18, 2),
    "optimizer, ours": (10, 2),
}


def plan_bytes(name: str, r: int, layers: int = 32) -> int | None:
    """Of a call on the LoRA matrices of benches.projection with bases of r columns; None without a model."""
    passes = PASSES.get(re.sub(r", (graph|queue full)$", "", name))
    if passes is None:
        return None
    widths = list(projection.LINEARS.values())
    matrices = sum(projection.LORA_RANK * (inputs + outputs) for inputs, outputs, _ in widths)
    of_inputs = {basis: inputs for inputs, _, basis in widths}
    bases = r * (sum(of_inputs.values()) + sum(outputs for _, outputs, _ in widths))
    return layers * WIDE * (passes[0] * matrices + passes[1] * bases)


def predicted(name: str, shape: Shape, device: Device, path: str = "chunked") -> float | None:
    """Milliseconds of one of the benchmarks' rows; None for rows without a model, such as other people's code. `path`
    is the one that our encoder takes at this shape without heads."""
    if (chunks := CHUNKS.search(name)) is not None:
        rows, columns = chunks.groups()
        return chunked_ms(shape, device, None if rows is None else (int(rows), int(columns)))
    found = PREDICTIONS.get(name)
    return None if found is None else found(shape, device, path)


def prediction_of(row: dict[str, object], device: Device, path: str = "chunked") -> float | None:
    """The same for a whole row: of a plan by its "r", of several heads by "32 x N..." in its "shape"."""
    name = str(row.get("name", ""))
    if isinstance(r := row.get("r"), int):
        size = plan_bytes(name, r)
        return None if size is None else device.move(size)
    heads, _, shape = str(row.get("shape", "")).rpartition(" x ")
    try:
        sizes = Shape.parse(shape)
    except ValueError:
        return None
    if name.startswith(ONE_HEAD):
        return predicted("encode, ours", sizes, device, name.removeprefix(ONE_HEAD))
    if not heads:
        return predicted(name, sizes, device, path)
    if name not in OF_HEADS:
        return None
    one = predicted(OF_HEADS[name][0], sizes, device, OF_HEADS[name][1])
    return None if one is None else int(heads) * one
