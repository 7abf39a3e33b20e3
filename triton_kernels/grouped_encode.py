"""topk_encode for narrow rows and many heads: the product keeps 2 or 3 keys of every 32 latents, then rows are settled.

    pre = x W_enc^T + bias, accumulated in fp32; values, indices = the first k of a stable descending sort of relu(pre)

For d = 128 writing and filtering all pre-activations costs ten times their product (encode.py). Here they never leave
the registers:

* `_group_kernel`: tiles of the product; of each 32 neighbouring latents ("group") the two largest keys are stored, or
  on request the three largest.
  A key is 32 bits: the pre-activation's, made to order like integers, with the low 5 replaced by the latent's place.
* `_settle_kernel`: one program per row. tau is the k-th largest key. A margin below it decides which latents could be
  among the k best: of a group whose second key is below, its first alone; of a group whose second key is not, all 32,
  because what the group dropped may be as large. All of these are computed again, by sums in one fixed order over d;
  what beats the present k-th best is listed and the list reduced to its k best when it is full (64-bit keys, value then
  lower latent, as in encode.py). Groups of equal or clustered winners are more work, not another path.

Exactness. Call A a latent's pre-activation in the first kernel and B the one computed again; B depends on the row of x
and the row of W_enc alone, so equal latents tie. Both differ from the exact sum by at most s = d 2^-22 ||x|| max_f
||W_f||: d products, no error of a partial sum above 2^-22 of the sum of magnitudes, which the tensor cores' truncating
sums keep. A key T is within 2^-18 |A| of A. So |T - B| <= 2 s + 2^-18 |T|, to first order. The k latents whose keys are
tau or larger have B >= tau - (2 s + 2^-18 |tau|), hence so has every latent that is among the k best by B, and its key
is at least tau - (4 s + 2^-17 |tau|). The kernel's margin is 4 s + 2^-16 |tau|. A latent that was dropped has a key no
larger than its group's last: where that is below tau minus the margin, none is among the k best. So the result is
exactly the contract, for B, whatever the order, ties and distribution of the rows.
* Fewer than k positives: where tau minus the margin is not above 0, every latent whose key is above -4 s is computed
  again (no other has B > 0), and the groups that hold latents 0 .. k - 1 as well, among which the lowest unused are.
* NaN has the largest key. A margin or a limit that is NaN or infinite excludes nothing: the row is then computed again
  as a whole, exactly.

Work: 2 N F d flop and about 7 instructions per pre-activation; bytes: N F / 2 of keys written and read, a gather of 32
rows of W_enc (L2) per 32 candidates and per group computed again. Expected such groups per row of random order: 3.2 at
F 4096, k 32, and 11.3 at k 64. Roofline prediction (N 65536, d 128, F 4096, k 32, bf16, H200), per head: product and
keys 0.2 ms, settling 0.4 ms, in all 0.6 to 0.7 ms where the chunked path was measured at 2.45. Measured with 32
heads: 34.7 and 35.4 ms in two runs, 1.1 per head, where the chunked path takes 52.8 and 66.3: so the chooser
(encode.py) takes this path where there are heads. The prediction left out what the tiles of the product and the rows
computed again take from L2: by count 34 GB and some 80 GB for 32 heads, at 5.5 TB/s 6 and 15 ms.

Three keys: 0.24 groups per row are computed again at F 4096, k 32 instead of 3.2, and 1.7 at k 64 instead of 11.3, for
half as many keys more and five more minima and maxima per pre-activation. Prediction for 32 heads: settling 8 to 10 ms
where it takes some 20, the product 1 to 2 ms more, so 26 to 28 ms in all. Not yet run on a GPU: the chooser takes two
(`encode.PATHS`), and `benches.gpu.heads` measures both.

Workspace: keys of at most 128 MB, centred rows, and candidates of N CAPACITY 8 bytes for as many rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Configuration, Tiles, integers, pointers

GROUP = tl.constexpr(32)
_LEAST_SQUARE = tl.constexpr(2.0**-110)
_KEY_NOISE = tl.constexpr(2.0**-16)
_PAD = tl.constexpr(-(2**31))  # the key of what does not exist; below that of -inf


@triton.jit
def _larger_two(a1, a2, b1, b2):
    """The two largest of two pairs, each in descending order."""
    return tl.maximum(a1, b1), tl.maximum(tl.minimum(a1, b1), tl.maximum(a2, b2))


@triton.jit
def _larger_three(a1, a2, a3, b1, b2, b3):
    """The three largest of two triples, each in descending order: the n-th is max over i + j = n of min(a_i, b_j)."""
    second = tl.maximum(tl.minimum(a1, b1), tl.maximum(a2, b2))
    third = tl.maximum(tl.maximum(a3, b3), tl.maximum(tl.minimum(a2, b1), tl.minimum(a1, b2)))
    return tl.maximum(a1, b1), second, third


@triton.jit
def _ordered(value):
    """int32 that orders like the fp32 `value`, NaN above all."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(value != value, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _value(key):
    """The pre-activation of a key, rounded towards 0 to 18 bits of mantissa."""
    bits = tl.where(key < 0, key | 31, key & -32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["rows"])
def _group_kernel(
    x_ptr, w_ptr, bias_ptr, keys_ptr, rows, n_latents, groups, d,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """keys [H, rows, KEPT, groups]: the KEPT largest keys, 2 or 3, of every group of x [H, rows, d] w [H, n_latents,
    d]^T + bias."""
    head = tl.program_id(1).to(tl.int64)
    x_ptr += head * rows * d
    w_ptr += head * n_latents * d
    bias_ptr += head * n_latents
    # Tiles are walked as in encode.py.
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(n_latents, BLOCK_N)
    block = pid // (GROUP_M * tiles_n)
    block_rows = tl.minimum(tiles_m - block * GROUP_M, GROUP_M)
    tile_m = block * GROUP_M + (pid % (GROUP_M * tiles_n)) % block_rows
    tile_n = (pid % (GROUP_M * tiles_n)) // block_rows

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    x_tile = x_ptr + m.to(tl.int64)[:, None] * d + inner[None, :]
    w_tile = w_ptr + n.to(tl.int64)[None, :] * d + inner[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, d, BLOCK_K):
        live = inner < d - start
        a = tl.load(x_tile, mask=(m < rows)[:, None] & live[None, :], other=0.0)
        b = tl.load(w_tile, mask=(n < n_latents)[None, :] & live[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        x_tile += BLOCK_K
        w_tile += BLOCK_K
    total += tl.load(bias_ptr + n, mask=n < n_latents, other=0.0)[None, :]
    key = (_ordered(total) & -32) | (31 - n % GROUP)[None, :]
    key = tl.where((n < n_latents)[None, :], key, _PAD)
    key = tl.reshape(key, [BLOCK_M, BLOCK_N // GROUP, GROUP])
    if KEPT == 2:
        first, second = tl.reduce((key, tl.full(key.shape, _PAD, tl.int32)), 2, _larger_two)
    else:
        none = tl.full(key.shape, _PAD, tl.int32)
        first, second, third = tl.reduce((key, none, none), 2, _larger_three)
    group = tile_n * (BLOCK_N // GROUP) + tl.arange(0, BLOCK_N // GROUP)
    out = keys_ptr + (head * rows + m)[:, None] * KEPT * groups + group[None, :]
    exists = (m < rows)[:, None] & (group < groups)[None, :]
    tl.store(out, first, mask=exists)
    tl.store(out + groups, second, mask=exists)
    if KEPT == 3:
        tl.store(out + 2 * groups, third, mask=exists)


@triton.jit(do_not_specialize=["rows", "top", "n"])
def _settle_kernel(
    x_ptr, w_ptr, bias_ptr, widest_ptr, keys_ptr, list_ptr, values_ptr, indices_ptr,
    rows, top, n, n_latents, groups, d, k, noise,
    K: tl.constexpr, GROUPS: tl.constexpr, CAPACITY: tl.constexpr, BLOCK_D: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """One program settles one row: values, indices [H, n, k][head, top + row] from its keys [KEPT, groups]."""
    head = tl.program_id(1).to(tl.int64)
    row = head * rows + tl.program_id(0)
    x_ptr += row * d
    w_ptr += head * n_latents * d
    bias_ptr += head * n_latents
    keys_ptr += row * KEPT * groups
    list_ptr += row * CAPACITY

    both = tl.arange(0, 2 * GROUPS)
    largest = tl.topk(tl.load(keys_ptr + both, mask=both < 2 * groups, other=_PAD), K)
    tau = tl.max(tl.where(tl.arange(0, K) == k - 1, largest, _PAD))
    square = 0.0
    for start in range(0, d, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + column, mask=column < d, other=0.0).to(tl.float32)
        square += tl.sum(x * x)
    # Squares of numbers below 2^-60 may vanish: at least 2^-55 for d <= 1024, here and in widest. NaN stays NaN.
    square = tl.where(square < _LEAST_SQUARE, _LEAST_SQUARE, square)
    spread = noise * tl.sqrt(square) * tl.load(widest_ptr + head)
    # tau is NaN where fewer than k keys were kept: comparisons are written so that NaN excludes nothing.
    bound = _value(tau) - (spread + _KEY_NOISE * tl.abs(_value(tau)))
    few = ~(bound > 0.0)
    limit = tl.where(bound > -spread, bound, -spread)

    group = tl.arange(0, GROUPS)
    first = tl.load(keys_ptr + group, mask=group < groups, other=_PAD)
    second = tl.load(keys_ptr + groups + group, mask=group < groups, other=_PAD)
    last = second
    if KEPT == 3:
        last = tl.load(keys_ptr + 2 * groups + group, mask=group < groups, other=_PAD)
    whole = (last > _PAD) & ~(_value(last) < limit)
    whole = whole | ((group < groups) & (group * GROUP < tl.where(few, k, 0)))
    alone = ~whole & (first > _PAD) & ~(_value(first) < limit)
    # The row's keys are in registers: their place takes the latents and the groups to compute again.
    tl.debug_barrier()
    tl.store(keys_ptr + tl.cumsum(alone.to(tl.int32)) - 1, group * GROUP + 31 - (first & 31), mask=alone)
    tl.store(keys_ptr + (KEPT - 1) * groups + tl.cumsum(whole.to(tl.int32)) - 1, group, mask=whole)
    n_alone = tl.sum(alone.to(tl.int32))
    if KEPT == 3:
        beside = ~whole & (second > _PAD) & ~(_value(second) < limit)
        place = keys_ptr + n_alone + tl.cumsum(beside.to(tl.int32)) - 1
        tl.store(place, group * GROUP + 31 - (second & 31), mask=beside)
        n_alone += tl.sum(beside.to(tl.int32))
    n_whole = tl.sum(whole.to(tl.int32))
    tl.debug_barrier()

    lane = tl.arange(0, GROUP)
    slot = tl.arange(0, CAPACITY)
    rank = tl.arange(0, K)
    count = 0
    # Nothing below a positive bound is among the k best.
    least = tl.where(few, -1, (bound.to(tl.int32, bitcast=True).to(tl.int64) << 32) - 1)
    turns = tl.cdiv(n_alone, GROUP)
    # The last turn only reduces the list: the top-k is compiled once.
    for turn in range(turns + n_whole + 1):
        finish = turn == turns + n_whole
        at = turn * GROUP + lane
        latent = tl.load(keys_ptr + at, mask=at < n_alone, other=0)
        live = at < n_alone
        if turn >= turns:
            number = tl.load(keys_ptr + (KEPT - 1) * groups + tl.minimum(turn - turns, groups - 1))
            latent = tl.where(finish, n_latents, number * GROUP) + lane
            live = latent < n_latents
        total = tl.zeros([GROUP, BLOCK_D], dtype=tl.float32)
        for start in range(0, d, BLOCK_D):
            column = start + tl.arange(0, BLOCK_D)
            x = tl.load(x_ptr + column, mask=column < d, other=0.0).to(tl.float32)
            at_w = w_ptr + latent.to(tl.int64)[:, None] * d + column[None, :]
            w = tl.load(at_w, mask=live[:, None] & (column < d)[None, :], other=0.0)
            total += x[None, :] * w.to(tl.float32)
        pre = tl.sum(total, axis=1) + tl.load(bias_ptr + latent, mask=live, other=0.0)
        bits = tl.where(pre > 0.0, pre.to(tl.int32, bitcast=True), 0)
        bits = tl.where(pre != pre, 0x7FFFFFFF, bits)
        key = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - latent).to(tl.int64)
        keep = live & (key > least)
        found = tl.sum(keep.to(tl.int32))
        if finish | (count + found > CAPACITY):
            tl.debug_barrier()
            listed = tl.load(list_ptr + slot, mask=slot < count, other=-1)
            tl.debug_barrier()
            best = tl.topk(listed, K)
            if finish:
                out = (head * n + top + tl.program_id(0)) * k + rank
                value = (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)
                tl.store(values_ptr + out, value.to(values_ptr.dtype.element_ty), mask=rank < k)
                tl.store(indices_ptr + out, 0x7FFFFFFF - (best & 0x7FFFFFFF), mask=rank < k)
            else:
                tl.store(list_ptr + rank, best, mask=rank < k)
                least = tl.max(tl.where(rank == k - 1, best, -1))
                count = k
                keep = live & (key > least)
                found = tl.sum(keep.to(tl.int32))
        tl.store(list_ptr + count + tl.cumsum(keep.to(tl.int32)) - 1, key, mask=keep)
        count += found


_LARGEST_D = 1024
_LARGEST_KEYS = 128 << 20  # bytes of keys and of candidates
# (largest k, list capacity, groups, BLOCK_D): keys of so many groups, latents / 32, are held in registers.
# capacity - 32 >= k, or a group could overflow the list after a reduction. BLOCK_D 32 takes 145 registers on sm_90
# where 64 takes 208, but at the second shape ptxas then stops at 128 registers and spills.
_SHAPES = ((32, 128, 128, 32), (128, 256, 512, 64))


def _settle_tiles(largest: int, capacity: int, groups: int, block_d: int, kept: int = 2) -> Tiles:
    sizes = {"K": largest, "GROUPS": groups, "CAPACITY": capacity, "BLOCK_D": block_d, "KEPT": kept}
    return Tiles(sizes, num_warps=1)


def settle_tiles(n_latents: int, k: int, kept: int = 2) -> Tiles | None:
    """Tiles of `_settle_kernel`, or None where registers hold no row of so many keys."""
    return next((_settle_tiles(*row, kept) for row in _SHAPES if k <= row[0] and n_latents <= 32 * row[2]), None)


def group_tiles(dtype: torch.dtype, kept: int = 2) -> Tiles:
    # Small tiles and two stages, so that several programs share a multiprocessor and one's keys hide another's loads.
    if dtype == torch.float32:
        return Tiles({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "GROUP_M": 8, "KEPT": kept}, 4, num_stages=2)
    return Tiles({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8, "KEPT": kept}, 8, num_stages=2)


def supports(d: int, n_latents: int, k: int) -> bool:
    """Whether this path takes the shape: d <= 1024, F <= 16384, k <= 128."""
    return d <= _LARGEST_D and settle_tiles(n_latents, k) is not None


def encode_rows(
    x: Tensor,
    W_enc: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    values: Tensor,
    indices: Tensor,
    rows: int | None,
    kept: int = 2,
) -> None:
    """Writes values, indices [H, N, k] of x [H, N, d] - shift [H, d] with W_enc [H, F, d] and bias [H, F] fp32.

    `supports` the shape. `rows` bounds the rows per head of one launch. `kept`: keys that are stored of a group, 2 or
    3.
    """
    heads, n, d = x.shape
    n_latents, k = W_enc.shape[1], values.shape[2]
    groups = triton.cdiv(n_latents, 32)
    tiles, settle = group_tiles(x.dtype, kept), settle_tiles(n_latents, k, kept)
    assert settle is not None, "encode_rows is called for shapes that `supports` takes"
    capacity = settle.constexprs["CAPACITY"]
    rows = min(n, rows or max(1, _LARGEST_KEYS // (4 * max(kept * groups, 2 * capacity) * heads)))
    keys = torch.empty(heads * rows * kept * groups, dtype=torch.int32, device=x.device)
    listed = torch.empty(heads * rows * capacity, dtype=torch.int64, device=x.device)
    # The kernels take all heads' rows of one launch side by side.
    copied = shift is not None or rows < n
    centred = torch.empty(heads * rows * d if copied else 0, dtype=x.dtype, device=x.device)
    widest = torch.linalg.vector_norm(W_enc, dim=2, dtype=torch.float32).amax(1).clamp_min_(2.0**-55)
    for top in range(0, n, rows):
        r = min(rows, n - top)
        block = x
        if copied:
            block = centred[: heads * r * d].view(heads, r, d)
            if shift is None:
                block.copy_(x[:, top : top + r])
            else:
                torch.sub(x[:, top : top + r], shift[:, None], out=block)
        programs = triton.cdiv(r, tiles.constexprs["BLOCK_M"]) * triton.cdiv(n_latents, tiles.constexprs["BLOCK_N"])
        _group_kernel[(programs, heads)](block, W_enc, bias, keys, r, n_latents, groups, d, **tiles.options())
        _settle_kernel[(r, heads)](
            block, W_enc, bias, widest, keys, listed, values, indices,
            r, top, n, n_latents, groups, d, k, d * 2.0**-20, **settle.options(),
        )  # fmt: skip


def configurations() -> Iterator[Configuration]:
    """Both kernels of this file as they ship."""
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        for kept in (2, 3):
            of = f"{name}{',3 keys' * (kept - 2)}"
            yield Configuration(
                _group_kernel,
                f"encode.group[{of}]",
                {
                    **pointers(name, "x", "w"),
                    **pointers("fp32", "bias"),
                    **pointers("i32", "keys"),
                    **integers("rows", "n_latents", "groups", "d"),
                },
                group_tiles(dtype, kept),
                ("n_latents", "groups", "d"),
                tensor_cores=dtype != torch.float32,
                variant=dtype == torch.float16,
            )
            for row in _SHAPES:
                yield Configuration(
                    _settle_kernel,
                    f"encode.settle[{of},k<={row[0]},F<={32 * row[2]}]",
                    {
                        **pointers(name, "x", "w", "values"),
                        **pointers("fp32", "bias", "widest"),
                        **pointers("i32", "keys"),
                        **pointers("i64", "list", "indices"),
                        **integers("rows", "top", "n", "n_latents", "groups", "d", "k"),
                        "noise": "fp32",
                    },
                    _settle_tiles(*row, kept),
                    ("n_latents", "groups", "d", "k"),
                    variant=name != "bf16",
                )
