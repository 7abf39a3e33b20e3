"""topk_encode with an 8-bit screen: exact results, most of the multiply-adds on integer tensor cores.

    pre = (x - b_dec) W_enc^T + b_enc       accumulated in fp32
    values, indices = the first k of a stable descending sort of relu(pre)

A pre-activation matters only if it is among its row's k best. Rows and latents are rounded to 8 bits
(int8_rounding.py), whose products run at twice the rate of 16-bit ones, have no error (int32) and bound the true
product. Only pairs whose bound says that they could be among the k best are computed from the operands as they came,
and only these values are ranked and returned.

Bound. With s, norm, rest of a row and of a latent as int8_rounding.py defines them, by Cauchy-Schwarz,

    |<x - b_dec, w> - s_x s_w <q_x, q_w> / 128| <= rest_x norm_w + (norm_x + rest_x) rest_w

x - b_dec is what fp32 makes of it, element by element, here and where a value is computed. A value is a sum in fp32 of
d products, in chains of d / 128 and then of 128, plus the bias: within (d / 128 + 129) u norm_x norm_w + u |b_enc| of
its exact number, u = 2^-24. The screen's own arithmetic adds at most 21 u norm_x norm_w (five roundings of a product of
norms + rests, and rest <= norm) and 2 u |b_enc|. So

    bound = (rest_x + noise norm_x) norm_w + (norm_x + rest_x) rest_w + 2^-21 |b_enc|,    noise = (d / 128 + 192) u

and the rounding of the bound itself is in the 1.001 of norm and rest.

How, for a block of rows and a chunk of latents whose integer products stay in the L2 cache:

* `_screen_kernel`: one program per row appends to its list what has upper = product + bound >= the row's limit and
  upper > 0. When the list is full, the limit rises to the k-th largest lower = product - bound in it (k latents have at
  least that), and what is below the limit leaves the list. If there is no room even then, the row is given up.
* The limit starts from a guess: k-th best values are a similar multiple of norm_x in all rows. The first rows are
  encoded the ordinary way, the others start from a bit less than their smallest multiple. Nothing relies on it: a row
  whose k-th value turns out to be below its start is given up. Without a guess the list would have to hold all that a
  row's bounds cannot tell apart before its best latents have been seen.
* `_settle_kernel`: computes the listed latents of a row, the k with the largest upper first. Their k-th value is the
  first limit, so the others have one bound to make up for, not two. A row with fewer than k positives gets zeros at
  the lowest unused latents, which are among latents 0 .. k - 1. Ties go to the lower latent.
* Rows that were given up, and those with NaN, infinities or numbers near 2^50, go through encode.py as a whole. Their
  number is read by the host: the one synchronisation of a call, so it cannot be captured into a CUDA graph.
* Latents with such numbers are listed in every row. NaN orders above all.

How many pairs are left depends on the bound against the spread of pre-activations: sqrt(d) (rest_x / norm_x + rest_w /
norm_w) is 1.1 standard deviations at d = 4096. Simulated there, with F 65536, k 64: rows that are sums of 64 to 200
latents, a trained autoencoder's, leave 65 to 131 pairs with up to 10 % of noise and 530 with 20 %, and 0 to 6 % of them
are given up; without the guess all are. Random rows leave 1600 and are given up.

Work: 2 N F d integer operations, 2 N m d flop for m pairs left per row, whose rows of W_enc are gathered. Roofline
prediction (N 32768, d 4096, F 131072, k 64, bf16, H200): product 26 ms at 1400 Top/s, rounding 1, screen 2, settling
3.5 at m = 70, 7 at 128, 15 at 300: 33 to 44 ms, where the ordinary encoder was measured at 65.8. The ordinary filter
took about 10 ms more than its bytes, bound by latency as the screen is: 43 to 54 ms is as likely. No gain is left if m
exceeds 500 or a third of the rows is given up. Measured on an
H200: 131 and 123 ms in two runs, twice the ordinary encoder's time, its latents those of a stable sort on 256 rows; why
it misses the prediction threefold is not known, and its value tests have not been run on a GPU.

Workspace: F d bytes of rounded latents, products of at most 128 MB, at most 64 MB of lists and rounded rows.

Source: the certificate is Cauchy-Schwarz on the rounding errors, as in the 8-bit screen of CPUs (csrc/cpu/screen.h).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import encode
from .encode import rank_bits
from .grouped_encode import _ordered
from .int8_rounding import FACTS, padded, product, round_rows
from .launch import Configuration, Tiles, integers, on_device, pointers

GROUP = tl.constexpr(32)  # latents that one turn of `_settle_kernel` computes
_BLOCK_D = tl.constexpr(128)
_BIAS_NOISE = tl.constexpr(2.0**-21)
_LOWEST = tl.constexpr(-(2**31))  # the key of what does not exist
_LOWEST_64 = tl.constexpr(-(2**63))


@triton.jit
def _least_limit(multiple_ptr, norm):
    """(the start, its key): what the row's upper bounds must reach at first; 0 and 1, "positive", without a guess."""
    start = tl.load(multiple_ptr) * norm
    return start, tl.maximum(_ordered(start), 1)


@triton.jit(do_not_specialize=["rows"])
def _screen_kernel(
    sums_ptr, w_facts_ptr, bias_ptr, x_facts_ptr, multiple_ptr, list_ptr, count_ptr, limit_ptr,
    rows, columns, width, first, n_latents, k, noise,
    K: tl.constexpr, CAPACITY: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One program owns one row: of its chunk, sums [columns] int32, what may be among the k best goes into its list.

    list [R, 3, CAPACITY] int32: latents, keys of upper and of lower bounds (`_ordered`: compared as integers, NaN above
    all); a count above CAPACITY says that the row was given up.
    """
    row = tl.program_id(0).to(tl.int64)
    sums_ptr += row * width
    list_ptr += row * 3 * CAPACITY
    norm_x = tl.load(x_facts_ptr + rows + row)
    rest_x = tl.load(x_facts_ptr + 2 * rows + row)
    scale_x = tl.load(x_facts_ptr + row) * 0.0078125
    spread = rest_x + noise * norm_x
    length = norm_x + rest_x
    count = tl.where(norm_x < float("inf"), 0, CAPACITY + 1)
    _, limit = _least_limit(multiple_ptr, norm_x)
    if first > 0:
        count = tl.load(count_ptr + row)
        limit = tl.load(limit_ptr + row)
    w_facts_ptr += first
    bias_ptr += first
    lane = tl.arange(0, STEP)
    slot = tl.arange(0, CAPACITY)
    if count <= CAPACITY:
        next_sum = tl.load(sums_ptr + lane, mask=lane < columns, other=0)
        for start in range(0, columns, STEP):
            column = start + lane
            live = column < columns
            total = next_sum
            next_sum = tl.load(sums_ptr + column + STEP, mask=column + STEP < columns, other=0)
            scale = tl.load(w_facts_ptr + column, mask=live, other=0.0)
            norm = tl.load(w_facts_ptr + n_latents + column, mask=live, other=0.0)
            rest = tl.load(w_facts_ptr + 2 * n_latents + column, mask=live, other=0.0)
            bias = tl.load(bias_ptr + column, mask=live, other=0.0)
            middle = total.to(tl.float32) * (scale_x * scale) + bias
            bound = norm * spread + rest * length + _BIAS_NOISE * tl.abs(bias)
            upper = _ordered(middle + bound)
            # A row that is given up goes on without columns.
            keep = (column < tl.where(count <= CAPACITY, columns, 0)) & (upper >= limit)
            found = tl.sum(keep.to(tl.int32))
            if found > 0:
                lower = middle - bound
                lower = tl.where(lower == lower, _ordered(lower), _LOWEST)
                if count + found > CAPACITY:
                    # Barriers as in encode.py: the list lives in global memory.
                    tl.debug_barrier()
                    lowers = tl.load(list_ptr + 2 * CAPACITY + slot, mask=slot < count, other=_LOWEST)
                    best = tl.topk(lowers, K)
                    limit = tl.maximum(limit, tl.max(tl.where(tl.arange(0, K) == k - 1, best, _LOWEST)))
                    # Only now the rest: registers do not hold the list and what a top-k needs.
                    uppers = tl.load(list_ptr + CAPACITY + slot, mask=slot < count, other=_LOWEST)
                    latents = tl.load(list_ptr + slot, mask=slot < count, other=0)
                    lowers = tl.load(list_ptr + 2 * CAPACITY + slot, mask=slot < count, other=_LOWEST)
                    tl.debug_barrier()
                    stays = uppers >= limit
                    place = tl.cumsum(stays.to(tl.int32)) - 1
                    tl.store(list_ptr + place, latents, mask=stays)
                    tl.store(list_ptr + CAPACITY + place, uppers, mask=stays)
                    tl.store(list_ptr + 2 * CAPACITY + place, lowers, mask=stays)
                    count = tl.sum(stays.to(tl.int32))
                    keep = keep & (upper >= limit)
                    if count + tl.sum(keep.to(tl.int32)) > CAPACITY:
                        count += CAPACITY + 1
                    keep = keep & (column < tl.where(count <= CAPACITY, columns, 0))
                    found = tl.sum(keep.to(tl.int32))
                place = list_ptr + count + tl.cumsum(keep.to(tl.int32)) - 1
                tl.store(place, first + column, mask=keep)
                tl.store(place + CAPACITY, upper, mask=keep)
                tl.store(place + 2 * CAPACITY, lower, mask=keep)
                count += found
    tl.store(count_ptr + row, count)
    tl.store(limit_ptr + row, limit)


@triton.jit(do_not_specialize=["rows", "top"])
def _settle_kernel(
    x_ptr, w_ptr, b_dec_ptr, bias_ptr, x_facts_ptr, multiple_ptr, list_ptr, count_ptr, limit_ptr, found_ptr,
    values_ptr, indices_ptr, computed_ptr, rows, top, d, k,
    K: tl.constexpr, CAPACITY: tl.constexpr, FOUND: tl.constexpr,
):  # fmt: skip
    """One program settles one row: values, indices [N, k][top + row] from its list.

    computed [N][top + row] is the number of products that were computed, or -1 where the row is given up.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += (top + row) * d
    list_ptr += row * 3 * CAPACITY
    order_ptr = list_ptr + 2 * CAPACITY  # the place of the lower bounds, which are done with
    found_ptr += row * FOUND
    start, _ = _least_limit(multiple_ptr, tl.load(x_facts_ptr + rows + row))
    listed = tl.load(count_ptr + row)
    if listed > CAPACITY:
        tl.store(computed_ptr + top + row, -1)
    else:
        slot = tl.arange(0, CAPACITY)
        rank = tl.arange(0, K)
        lane = tl.arange(0, GROUP)
        upper = tl.load(list_ptr + CAPACITY + slot, mask=slot < listed, other=_LOWEST)
        alive = upper >= tl.load(limit_ptr + row)  # which is positive
        key = tl.where(alive, (upper.to(tl.int64) << 32) | slot, _LOWEST_64)
        largest = tl.topk(key, K)
        n_alive = tl.sum(alive.to(tl.int32))
        n_first = tl.minimum(n_alive, k)
        others = alive & (key < tl.max(tl.where(rank == k - 1, largest, _LOWEST_64)))
        tl.store(order_ptr + rank, (largest & 0x7FFFFFFF).to(tl.int32), mask=rank < n_first)
        tl.store(order_ptr + n_first + tl.cumsum(others.to(tl.int32)) - 1, slot, mask=others)
        tl.debug_barrier()

        place = tl.arange(0, FOUND)
        count = 0
        computed = 0
        least = tl.full([], 0xFFFFFFFF, tl.int64)  # what is positive exceeds it
        first_turns = tl.cdiv(n_first, GROUP)
        turns = tl.cdiv(n_alive, GROUP)
        fillers = tl.cdiv(k, GROUP)
        # The last turn only reduces what was found: the top-k is compiled once.
        for turn in range(turns + fillers + 1):
            finish = turn == turns + fillers
            if finish | (turn == first_turns) | (count + GROUP > FOUND):
                tl.debug_barrier()
                keys = tl.load(found_ptr + place, mask=place < count, other=-1)
                tl.debug_barrier()
                best = tl.topk(keys, K)
                kth = tl.max(tl.where(rank == k - 1, best, -1))
                if finish:
                    out = (top + row) * k + rank
                    value = (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)
                    tl.store(values_ptr + out, value.to(values_ptr.dtype.element_ty), mask=rank < k)
                    tl.store(indices_ptr + out, 0x7FFFFFFF - (best & 0x7FFFFFFF), mask=rank < k)
                    below = (start > 0.0) & ((kth >> 32).to(tl.int32) < _ordered(start))
                    tl.store(computed_ptr + top + row, tl.where(below, -1, computed))
                else:
                    tl.store(found_ptr + rank, best, mask=rank < tl.minimum(count, k))
                    least = tl.maximum(least, kth)
                    count = tl.minimum(count, k)
            at = turn * GROUP + lane
            live = at < n_alive
            slots = tl.load(order_ptr + at, mask=live, other=0)
            latent = tl.load(list_ptr + slots, mask=live, other=0)
            upper_of = tl.load(list_ptr + CAPACITY + slots, mask=live, other=_LOWEST)
            live = live & (upper_of >= (least >> 32).to(tl.int32))
            filling = turn >= turns
            if filling:  # zeros, at latents that are not among the positives: fewer than k of 0 .. k - 1 are
                latent = at - turns * GROUP
                live = latent < tl.where((count < k) & (turn < turns + fillers), k, 0)
            wanted = tl.sum(live.to(tl.int32))
            if wanted > 0:
                computed += wanted
                total = tl.zeros([GROUP, _BLOCK_D], dtype=tl.float32)
                for begin in range(0, d, _BLOCK_D):
                    column = begin + tl.arange(0, _BLOCK_D)
                    exists = column < d
                    x = tl.load(x_ptr + column, mask=exists, other=0.0).to(tl.float32)
                    x -= tl.load(b_dec_ptr + column, mask=exists, other=0.0)
                    at_w = w_ptr + latent.to(tl.int64)[:, None] * d + column[None, :]
                    w = tl.load(at_w, mask=live[:, None] & exists[None, :], other=0.0)
                    total += x[None, :] * w.to(tl.float32)
                pre = tl.sum(total, axis=1) + tl.load(bias_ptr + latent, mask=live, other=0.0)
                bits = rank_bits(pre)
                exact = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - latent).to(tl.int64)
                keep = live & (exact > least)
                if filling:
                    keep = live & (bits == 0)
                tl.store(found_ptr + count + tl.cumsum(keep.to(tl.int32)) - 1, exact, mask=keep)
                count += tl.sum(keep.to(tl.int32))


MOST_K, MOST_COLUMNS = 256, 65536  # 127^2 65536 < 2^31, and see int8_rounding.py
# (largest k, keys that were computed): the second is at least k + 32.
_FOUND = ((64, 256), (256, 512))
_CAPACITY, _STEP = 1024, 512
_SEEDS, _ROWS_PER_SEED = 64, 8  # rows that are encoded first, where there are so many times as many
_MARGIN = 0.97
_LARGEST_WORKSPACE = 64 << 20  # bytes of lists and rounded rows


def _screen_tiles(largest: int) -> Tiles:
    return Tiles({"K": largest, "CAPACITY": _CAPACITY, "STEP": _STEP}, num_warps=4)


def _settle_tiles(largest: int, found: int) -> Tiles:
    return Tiles({"K": largest, "CAPACITY": _CAPACITY, "FOUND": found}, num_warps=4 if largest <= 64 else 8)


def supports(d: int, k: int) -> bool:
    """Whether the screen takes the shape: k <= 256, d <= 65536."""
    return k <= MOST_K and d <= MOST_COLUMNS


def _chunk_shape(x: Tensor, n_latents: int, k: int) -> tuple[int, int]:
    """(rows, latents) of a chunk: as encode.py's, with fewer rows where their lists would take too much."""
    rows, columns = encode.chunk_shape(x, n_latents, k)
    bytes_of_row = 12 * _CAPACITY + 8 * _FOUND[-1][1] + padded(x.shape[1])
    return max(1, min(rows, _LARGEST_WORKSPACE // bytes_of_row)), columns


def _multiple_of(values: Tensor, norms: Tensor) -> Tensor:
    """What every row may start from, in units of its norm, from the k-th values [S, k] of some rows and norms [S]."""
    known = norms.isfinite() & (norms > 0)
    multiples = torch.where(known, values[:, -1].float() / norms, torch.inf).amin()
    return torch.where(multiples.isfinite() & (multiples > 0), multiples * _MARGIN, 0)


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    b_dec: Tensor | None,
    *,
    chunk: tuple[int, int] | None = None,
    seeds: int | None = None,
) -> tuple[Tensor, Tensor]:
    """values [N, k] in x's dtype and indices [N, k] int64; see the module's docstring.

    x [N, d] and W_enc [F, d] share one dtype of fp32, bf16, fp16; b_enc [F] and b_dec [d] are fp32; `supports` d and k.
    `chunk` = (rows, latents) overrides the size of the work buffers, `seeds` the number of rows that are encoded first.

    Equivalent to: torch.sort(torch.relu((x - b_dec) @ W_enc.T + b_enc), descending=True, stable=True), first k columns.
    """
    values = torch.empty(x.shape[0], k, dtype=x.dtype, device=x.device)
    indices = torch.empty(x.shape[0], k, dtype=torch.int64, device=x.device)
    if x.shape[0] > 0:
        with on_device(x):
            computed = screen(x, W_enc, b_enc, k, b_dec, values, indices, chunk, seeds)
        left = (computed < 0).nonzero()[:, 0]  # the host waits here
        if left.numel() > 0:
            values[left], indices[left] = encode.topk_encode(x[left], W_enc, b_enc, k, b_dec)
    return values, indices


def screen(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    b_dec: Tensor | None,
    values: Tensor,
    indices: Tensor,
    chunk: tuple[int, int] | None = None,
    seeds: int | None = None,
) -> Tensor:
    """`topk_encode` but for the rows that are given up. Returns [N] int32: how many products were computed for a row
    (F for the seeds), or -1 where it was given up."""
    (n, d), n_latents, device = x.shape, W_enc.shape[0], x.device
    rows, columns = chunk or _chunk_shape(x, n_latents, k)
    # Without b_dec, zeros: half as many kernels.
    shift = torch.zeros(d, dtype=torch.float32, device=device) if b_dec is None else b_dec
    if seeds is None:
        seeds = _SEEDS if n >= _SEEDS * _ROWS_PER_SEED else 0
    rows, columns = max(min(rows, n), seeds), min(columns, n_latents)
    # cuBLAS wants a multiple of 8 columns: a last chunk of fewer is computed with rounded latents that do not exist.
    room = triton.cdiv(n_latents, 8) * 8
    q_w = torch.empty(room, padded(d), dtype=torch.int8, device=device)
    q_w[n_latents:] = 0
    w_facts = torch.empty(FACTS, n_latents, dtype=torch.float32, device=device)
    round_rows(W_enc, None, q_w, w_facts)
    q_x = torch.empty(rows, padded(d), dtype=torch.int8, device=device)
    x_facts = torch.empty(FACTS * rows, dtype=torch.float32, device=device)
    multiple = torch.zeros((), dtype=torch.float32, device=device)
    if seeds > 0:
        facts = x_facts[: FACTS * seeds].view(FACTS, seeds)
        round_rows(x[:seeds], shift, q_x, facts)
        values[:seeds], indices[:seeds] = encode.topk_encode(x[:seeds], W_enc, b_enc, k, b_dec)
        multiple = _multiple_of(values[:seeds], facts[1])

    largest, found = next(row for row in _FOUND if k <= row[0])
    screening, settling = _screen_tiles(largest), _settle_tiles(largest, found)
    sums = torch.empty(rows * triton.cdiv(columns, 8) * 8, dtype=torch.int32, device=device)
    lists = torch.empty(rows, 3, screening.constexprs["CAPACITY"], dtype=torch.int32, device=device)
    keys = torch.empty(rows, found, dtype=torch.int64, device=device)
    computed = torch.full((n,), n_latents, dtype=torch.int32, device=device)
    count, limit = (torch.empty(rows, dtype=torch.int32, device=device) for _ in range(2))
    noise = (padded(d) // 128 + 192) * 2.0**-24
    for top in range(seeds, n, rows):
        r = min(rows, n - top)
        facts = x_facts[: FACTS * r].view(FACTS, r)
        round_rows(x[top : top + r], shift, q_x, facts)
        for first in range(0, n_latents, columns):
            c = min(columns, n_latents - first)
            width = min(triton.cdiv(c, 8) * 8, room - first)
            product(q_x[:r], q_w[first : first + width], sums[: r * width].view(r, width))
            _screen_kernel[(r,)](
                sums, w_facts, b_enc, facts, multiple, lists, count, limit,
                r, c, width, first, n_latents, k, noise, **screening.options(),
            )  # fmt: skip
        _settle_kernel[(r,)](
            x, W_enc, shift, b_enc, facts, multiple, lists, count, limit, keys, values, indices, computed,
            r, top, d, k, **settling.options(),
        )  # fmt: skip
    return computed


def configurations() -> Iterator[Configuration]:
    """Both kernels of this file as they ship."""
    state = {**pointers("fp32", "x_facts", "multiple"), **pointers("i32", "list", "count", "limit")}
    for largest, found in _FOUND:
        yield Configuration(
            _screen_kernel,
            f"int8.screen[k<={largest}]",
            {
                **state,
                **pointers("i32", "sums"),
                **pointers("fp32", "w_facts", "bias"),
                **integers("rows", "columns", "width", "first", "n_latents", "k"),
                "noise": "fp32",
            },
            _screen_tiles(largest),
            ("columns", "width", "first", "n_latents", "k"),
        )
        for name in ("bf16", "fp16", "fp32"):
            yield Configuration(
                _settle_kernel,
                f"int8.settle[{name},k<={largest}]",
                {
                    **state,
                    **pointers(name, "x", "w", "values"),
                    **pointers("fp32", "b_dec", "bias"),
                    **pointers("i64", "found", "indices"),
                    **pointers("i32", "computed"),
                    **integers("rows", "top", "d", "k"),
                },
                _settle_tiles(largest, found),
                ("d", "k"),
                variant=name != "bf16",
            )
