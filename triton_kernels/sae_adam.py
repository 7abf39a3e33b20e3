"""sae_backward_adam: the backward of the SAE loss straight into Adam; the gradients of the weights are never written.

Per latent f, with g_n = scale e_n and its entries (n, j) in ascending order of the token (csc.py):

    dW_dec[f] = sum of values_nj g_n,  dW_enc[f] = sum of dpre_nj (x_n - b_dec),  db_enc[f] = sum of dpre_nj
    + the rows of AuxK where f is one of extra_rows
    dW_dec[f] -= <dW_dec[f], w> w / ||w||^2  (remove_parallel), then Adam, then w / ||w||  (unit_norm)
    Adam on W_enc[f] and b_enc[f];  through += db_enc[f] W_enc[f]  (the weights before the step)

and sum_f db_enc[f] W_enc[f] [d], what b_dec's gradient needs of the encoder, is returned. One program takes every
P-th latent: it keeps the latent's rows in registers while it adds, updates and stores them, and its own share of the
returned sum, so that this is a sum of P rows in a fixed order. Latents without entries take their momentum step like
all others (dense Adam). The segments of hot latents are added up before, by latents.py's kernel. Deterministic, no
atomics, no synchronisation.

Heads: all tensors may have a head axis in front. It is the second axis of the grid, so that every head has its P
programs and its own returned sum; entries and latents are numbered through all heads as in backward.py. With AuxK's
rows every head is a launch of its own on its part of the tensors (compact state goes through gradient buffers then).

Bytes: N k 2 d times the element size gathered + 24 per weight (w, m, v of two matrices, read and written, fp32) = F d
48. Roofline prediction (N 32768, d 4096, F 131072, k 64, bf16 activations, H200): 7 ms of gathers + 6.5 ms of Adam.
Measured: 25 ms (step less encode and decode); one program of 16 warps fills a multiprocessor, so that its reductions
and dependent loads are not hidden by another's. Rows wider than 4096 go through gradient buffers and adam_rows.

Copies: with fp32 weights beside 16-bit activations the 16-bit copies that the next forward pass reads may be written in
this pass, 2 bytes a weight, where two casts would read 4 and write 2; they are not read here. Not yet run on a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adam import CONSTRAINTS, FORMS, adam_compact_rows, adam_rows, adam_update
from .backward import sae_backward, segment_length
from .compact import load_wide, store_copy, store_moments, store_weight, upper_half, words
from .csc import csc_from_indices
from .latents import add_entries, block_tiles, hot_parts, rounded_to
from .launch import ABSENT, Configuration, device_scalar, integers, on_device, pointers


@triton.jit
def as_seen(w, low_ptr, ptr):
    """fp32 weights as the forward pass saw them: their bf16 halves, or a copy in the dtype of the activations."""
    if low_ptr is not None:
        return upper_half(w)
    else:
        return rounded_to(w, ptr)


@triton.jit(do_not_specialize=["n_latents", "programs", "segment", "salt_enc", "salt_dec"])
def _step_kernel(
    e_ptr, x_ptr, values_ptr, order_ptr, offsets_ptr, ends_ptr, scale_ptr, b_dec_ptr,
    w_enc_ptr, low_enc_ptr, m_enc_ptr, v_enc_ptr, b_enc_ptr, m_b_ptr, v_b_ptr,
    w_dec_ptr, low_dec_ptr, m_dec_ptr, v_dec_ptr, copy_enc_ptr, copy_dec_ptr,
    part_dec_ptr, part_enc_ptr, part_db_ptr,
    position_ptr, extra_enc_ptr, extra_db_ptr, extra_dec_ptr, through_ptr,
    k, d, n_latents, programs, segment, salt_enc, salt_dec,
    step_size, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, root_bc2,
    HAS_BIAS: tl.constexpr, EXTRA: tl.constexpr, PARALLEL: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_D: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head = 0
    if not EXTRA:  # AuxK's rows leave no register for the axis: with them every head is a launch of its own
        head = tl.program_id(1)
    column = tl.arange(0, BLOCK_D)
    live = column < d
    if HAS_BIAS:
        b_dec_ptr += head * d
    scale = tl.load(scale_ptr)
    through = tl.zeros([BLOCK_D], dtype=tl.float32)
    for turn in range(tl.cdiv(n_latents - pid, programs)):
        latent = (head * n_latents + pid + turn * programs).to(tl.int64)
        at = latent * d + column
        begin = tl.load(offsets_ptr + latent)
        end = tl.load(offsets_ptr + latent + 1)
        parts = tl.where(end - begin > segment, tl.cdiv(end - begin, segment), 0)
        w = load_wide(w_dec_ptr, low_dec_ptr, at, live)
        # A hot latent's entries are in its parts already: the loop over them is then empty.
        dw_dec, dw_enc, db = add_entries(
            begin, tl.where(parts > 0, begin, end), as_seen(w, low_dec_ptr, e_ptr), column, live, scale,
            e_ptr, x_ptr, values_ptr, order_ptr, b_dec_ptr, values_ptr, k, d,
            True, False, HAS_BIAS, BLOCK_D, UNROLL, STAGES,
        )  # fmt: skip
        first = tl.load(ends_ptr + latent) - parts
        for part in range(first, first + parts):
            dw_dec += tl.load(part_dec_ptr + part * d + column, mask=live, other=0.0)
            dw_enc += tl.load(part_enc_ptr + part * d + column, mask=live, other=0.0)
            db += tl.load(part_db_ptr + part)
        if EXTRA:
            position = tl.load(position_ptr + latent)
            if position >= 0:
                dw_dec += tl.load(extra_dec_ptr + position * d + column, mask=live, other=0.0).to(tl.float32)
                dw_enc += tl.load(extra_enc_ptr + position * d + column, mask=live, other=0.0).to(tl.float32)
                db += tl.load(extra_db_ptr + position).to(tl.float32)

        if PARALLEL:
            square = tl.sum(w * w)
            dw_dec -= tl.where(square > 0.0, tl.sum(dw_dec * w) / tl.where(square > 0.0, square, 1.0), 0.0) * w
        m = load_wide(m_dec_ptr, None, at, live)
        v = load_wide(v_dec_ptr, None, at, live)
        w, m, v = adam_update(w, dw_dec, m, v, step_size, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, root_bc2)
        if UNIT:
            square = tl.sum(tl.where(live, w * w, 0.0))
            w /= tl.where(square > 0.0, tl.sqrt(square), 1.0)
        store_weight(w_dec_ptr, low_dec_ptr, at, live, w)
        if copy_dec_ptr is not None:
            store_copy(copy_dec_ptr, at, live, w)
        store_moments(m_dec_ptr, v_dec_ptr, at, live, m, v, salt_dec)

        w = load_wide(w_enc_ptr, low_enc_ptr, at, live)
        through += db * as_seen(w, low_enc_ptr, e_ptr)
        m = load_wide(m_enc_ptr, None, at, live)
        v = load_wide(v_enc_ptr, None, at, live)
        w, m, v = adam_update(w, dw_enc, m, v, step_size, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, root_bc2)
        store_weight(w_enc_ptr, low_enc_ptr, at, live, w)
        if copy_enc_ptr is not None:
            store_copy(copy_enc_ptr, at, live, w)
        store_moments(m_enc_ptr, v_enc_ptr, at, live, m, v, salt_enc)

        b = tl.load(b_enc_ptr + latent).to(tl.float32)
        m_b = tl.load(m_b_ptr + latent)
        v_b = tl.load(v_b_ptr + latent)
        b, m_b, v_b = adam_update(
            b, db, m_b, v_b, step_size, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, root_bc2
        )
        # Scalars: one thread stores them, after its own loads; the others' copies are not used again.
        tl.store(b_enc_ptr + latent, b)
        tl.store(m_b_ptr + latent, m_b)
        tl.store(v_b_ptr + latent, v_b)
    tl.store(through_ptr + (head * programs + pid).to(tl.int64) * d + column, through, mask=live)


# (BLOCK_D, UNROLL, warps, stages): 8 elements of every row per thread; 16 would spill at 2048 and 8192 columns.
_BLOCKS = ((128, 4, 1, 2), (512, 2, 2, 2), (1024, 2, 4, 2), (2048, 2, 8, 2), (4096, 2, 16, 2))
# What registers allow on every architecture. The widest block: one stage more where 16-bit rows meet fp32 weights and
# moments without AuxK's rows or copies; one less where weights in halves meet AuxK's rows, and for sm_100 where 16-bit
# rows meet bf16 moments of fp32 weights and where copies are fp16. Narrower ones: one less for state in fewer bytes
# (ptxas keeps to 128 registers on sm_100 whatever the number of threads), but for halves with AuxK's rows at 1024
# columns, where it would keep to 96. All: one less where entry numbers take 64 bits (sm_80); and without a constraint
# on the decoder where copies or halves are written (sm_90, sm_100) or 16-bit rows of 2048 meet fp32 weights (sm_90).
_MORE = (4096, 2, 16, 3)
_PROGRAMS = 1024  # a constant, so that the order of the returned sum does not depend on the GPU


def _block(
    d: int,
    rows: torch.dtype,
    weights: torch.dtype,
    moments: torch.dtype,
    extra: bool,
    copies: bool,
    constrained: bool,
    many: bool,
) -> tuple[int, int, int, int]:
    """int16 stands for numbers as words, as in FORMS; `constrained`: by at least one of the decoder's constraints;
    `many`: entry numbers of 64 bits."""
    block = next(b for b in _BLOCKS if b[0] >= d)
    widest = block[0] == _MORE[0]
    halves, narrow_moments = weights == torch.int16, moments == torch.int16
    mixed = weights == torch.float32 and rows != torch.float32
    if block[0] == 1024 and halves and extra and not narrow_moments:
        return block
    if widest:
        one_less = (halves and extra) or (mixed and narrow_moments) or (copies and rows == torch.float16)
    else:
        one_less = halves or narrow_moments
    if not constrained:
        one_less = one_less or copies or halves or (mixed and block[0] == 2048)
    if many or one_less:
        return (*block[:3], 1)
    return _MORE if widest and mixed and not extra and not copies else block


def sae_backward_adam(
    e: Tensor,
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    scale: float | Tensor,
    m_W_enc: Tensor,
    v_W_enc: Tensor,
    m_b_enc: Tensor,
    v_b_enc: Tensor,
    m_W_dec: Tensor,
    v_W_dec: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    bias_correction1: float,
    bias_correction2: float,
    remove_parallel: bool,
    unit_norm: bool,
    extra_rows: Tensor | None,
    extra_dW_enc: Tensor | None,
    extra_db_enc: Tensor | None,
    extra_dW_dec: Tensor | None,
    low_W_enc: Tensor | None = None,
    low_W_dec: Tensor | None = None,
    salts: tuple[int, int] | None = None,
    copy_W_enc: Tensor | None = None,
    copy_W_dec: Tensor | None = None,
    *,
    segment: int | None = None,
) -> Tensor:
    """One Adam step of W_enc, W_dec [F, d], b_enc [F] in place; returns db_enc @ W_enc [d] fp32, W_enc before the step.
    All with a head axis in front: [H, d].

    e = x_hat - x, x [N, d]; values, indices [N, k]; b_enc, the states m_*, v_* and b_dec fp32. W_enc, W_dec in x's
    dtype or fp32 beside 16-bit activations: the gradients are then those at the weights rounded as the forward pass saw
    them, and the step moves the fp32 weights. `extra_rows` [D] int64 are distinct latents to which extra_dW_enc
    [D, d], extra_db_enc [D], extra_dW_dec [D, d] are added; all None: none. With a head axis -1 pads extra_rows.

    `salts` (W_enc's, W_dec's) say that the state is compact, as `Backend.adam_compact_rows` has it: moments in bf16 are
    rounded stochastically, and bf16 weights with the int16 low_W_enc, low_W_dec are halves of fp32 master weights.
    `copy_W_enc`, `copy_W_dec`, in a 16-bit dtype, become the fp32 weights after the step, rounded to nearest.

    Equivalent to: sae_backward into zeroed buffers, += of the extra rows, adam_rows on W_enc and b_enc, and
    adam_rows(remove_parallel, unit_norm) on W_dec.
    """
    n_latents, d = W_dec.shape[-2:]
    n_heads = W_dec.numel() // (n_latents * d)
    numbers = (lr, beta1, beta2, eps, bias_correction1, bias_correction2)
    extras = (extra_dW_enc, extra_db_enc, extra_dW_dec)
    # An element's random word goes by its number through all heads, which a launch of its own does not know.
    numbered = salts is not None and extra_rows is not None and W_dec.dim() == 3
    if d > _BLOCKS[-1][0] or numbered:
        gradients = [torch.empty(t.shape, dtype=torch.float32, device=e.device) for t in (W_enc, b_enc, W_dec)]
        We, Wd = W_enc.to(e.dtype), W_dec.to(e.dtype)
        sae_backward(e, x, values, indices, We, Wd, b_dec, scale, *gradients, accumulate=False, segment=segment)
        if extra_rows is not None:
            rows = extra_rows.view(n_heads, -1)
            own = rows + torch.arange(n_heads, device=e.device)[:, None] * n_latents
            for gradient, extra in zip(gradients, extras, strict=True):
                if extra is not None:
                    summands = extra.view(own.numel(), -1).to(torch.float32).masked_fill((rows < 0).view(-1, 1), 0)
                    gradient.view(n_heads * n_latents, -1).index_add_(0, own.clamp(min=0).flatten(), summands)
        db_enc, We = gradients[1], We.to(torch.float32)
        wide_through = db_enc @ We if We.dim() == 2 else torch.bmm(db_enc[:, None], We)[:, 0]
        plain, constrained = (*numbers, None, False, False), (*numbers, None, remove_parallel, unit_norm)
        salt_enc, salt_dec = (None, None) if salts is None else salts
        _adam(W_enc, low_W_enc, gradients[0], m_W_enc, v_W_enc, plain, salt_enc)
        adam_rows(b_enc, gradients[1], m_b_enc, v_b_enc, *plain)
        _adam(W_dec, low_W_dec, gradients[2], m_W_dec, v_W_dec, constrained, salt_dec)
        for copy, W in ((copy_W_enc, W_enc), (copy_W_dec, W_dec)):
            if copy is not None:
                copy.copy_(W)
        return wide_through
    with on_device(e):
        csc = csc_from_indices(indices, n_latents, segment or segment_length(max(indices.numel(), 1), d))
        part_dec, part_enc, part_db = hot_parts(e, x, values, csc, W_dec, b_dec, scale)
        moments = [m_W_enc, v_W_enc, m_W_dec, v_W_dec]
        if salts is not None:
            moments = [words(moment) for moment in moments]
        weights = [W if low is None else W.view(torch.int16) for W, low in ((W_enc, low_W_enc), (W_dec, low_W_dec))]
        programs = min(_PROGRAMS, n_latents)
        through = torch.empty(*W_dec.shape[:-2], programs, d, dtype=torch.float32, device=e.device)
        tiles = block_tiles(
            _block(
                d,
                e.dtype,
                weights[0].dtype,
                moments[0].dtype,
                extra_rows is not None,
                copy_W_enc is not None,
                remove_parallel or unit_norm,
                csc.order.dtype == torch.int64,
            ),
            HAS_BIAS=b_dec is not None,
            EXTRA=extra_rows is not None,
            PARALLEL=remove_parallel,
            UNIT=unit_norm,
        )
        # All that has a head axis, in the order of the kernel's arguments. The last offset of a head is the next one's
        # first, behind the view.
        lead = W_dec.shape[:-2]
        offsets, ends = csc.offsets[:-1].view(*lead, n_latents), csc.segment_ends.view(*lead, n_latents)
        position = None if extra_rows is None else positions(extra_rows, n_latents)
        groups: tuple[tuple[Tensor | None, ...], ...] = (
            (offsets, ends),
            (
                b_dec,
                weights[0],
                low_W_enc,
                *moments[:2],
                b_enc,
                m_b_enc,
                v_b_enc,
                weights[1],
                low_W_dec,
                *moments[2:],
                *(None if copy is None else words(copy) for copy in (copy_W_enc, copy_W_dec)),
            ),
            (position, *extras, through),
        )
        factor = device_scalar(scale, e.device)
        apart = bool(lead) and extra_rows is not None
        for head in range(n_heads if apart else 1):
            entries, state, added = ([t[head] if apart and t is not None else t for t in group] for group in groups)
            _step_kernel[(programs, 1 if apart else n_heads)](
                e, x, values, csc.order, *entries, factor, *state,
                part_dec, part_enc, part_db, *added,
                values.shape[-1], d, n_latents, programs, csc.segment, *(salts or (0, 0)),
                lr / bias_correction1, beta1, 1 - beta1, beta2, 1 - beta2, eps, bias_correction2**0.5,
                **tiles.options(),
            )  # fmt: skip
        return through.sum(-2)


def positions(rows: Tensor, n_latents: int) -> Tensor:
    """[F'], F' > F: where in rows [D] a latent is, or -1; with heads [H, F'] of rows [H, D], whose padding with -1
    writes behind F. F' is even, so that every head's part is aligned alike."""
    width = n_latents + 2 - n_latents % 2
    position = torch.full((*rows.shape[:-1], width), -1, dtype=torch.int64, device=rows.device)
    numbers = torch.arange(rows.shape[-1], device=rows.device).expand(rows.shape)
    return position.scatter_(-1, torch.where(rows < 0, n_latents, rows), numbers)


def _adam(
    W: Tensor, low: Tensor | None, g: Tensor, m: Tensor, v: Tensor, numbers: tuple[Any, ...], salt: int | None
) -> None:
    if salt is None:
        adam_rows(W, g, m, v, *numbers)
    else:
        adam_compact_rows(W, low, g, m, v, *numbers, salt=salt)


_HALVES = ("halves", "halves+bf16 moments")
# (activations, weights, moments, biases, their moments): fp32 throughout, autocast, 16 bits throughout with biases of
# either kind, state in fewer bytes.
_STATES = {
    "fp32,fp32": ("fp32", "fp32", "fp32", "fp32", "fp32"),
    "bf16,fp32": ("bf16", "fp32", "fp32", "fp32", "fp32"),
    "fp16,fp32": ("fp16", "fp32", "fp32", "fp32", "fp32"),
    **{f"{name},{name}": (name,) * 5 for name in ("bf16", "fp16")},
    **{f"{name},{name} beside fp32": (name, name, name, "fp32", "fp32") for name in ("bf16", "fp16")},
    **{f"{name},bf16 moments": (name, "fp32", "i16", "fp32", "fp32") for name in ("fp32", "bf16", "fp16")},
    **{f"bf16,{form}": ("bf16", *FORMS[form], "fp32", "fp32") for form in _HALVES},
    **{f"bf16,{form},bf16 biases": ("bf16", *FORMS[form], "bf16", "fp32") for form in _HALVES},
}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "i16": torch.int16}
_EVERYWHERE = {("fp32,fp32", True), ("bf16,fp32", False), ("fp16,fp32", False)}  # of these and AuxK: not variants


def configurations() -> Iterator[Configuration]:
    """The kernel at every width in every form of activations and state, with and without rows of AuxK, with both of the
    decoder's constraints, one or none, and where fp32 weights have them with 16-bit copies. int64 entry numbers (N k >=
    2^31) at the widest block."""
    sums = ("part_dec", "part_enc", "part_db", "through")
    extras = ("extra_enc", "extra_db", "extra_dec")
    scalars = ("step_size", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "eps", "root_bc2")
    orders = [("i32", block) for block in _BLOCKS] + [("i64", _BLOCKS[-1])]
    flags = list(itertools.product((False, True), (*CONSTRAINTS, (False, False))))
    for (state, types), (order, block), (extra, (parallel, unit)) in itertools.product(_STATES.items(), orders, flags):
        name, weights, moments, biases, of_biases = types
        halves = weights == "i16"
        low = pointers("i16", "low_enc", "low_dec") if halves else dict.fromkeys(("low_enc_ptr", "low_dec_ptr"), ABSENT)
        for copies in (False, True) if weights == "fp32" != name else (False,):
            said = "+extra" * extra + "+copies" * copies + "-parallel" * (not parallel) + "-unit" * (not unit)
            yield Configuration(
                _step_kernel,
                f"sae_adam.step[{state},{order},{block[0]}{said}]",
                {
                    **pointers(name, "e", "x", "values"),
                    **pointers(weights, "w_enc", "w_dec"),
                    **low,
                    **pointers(moments, "m_enc", "v_enc", "m_dec", "v_dec"),
                    **(
                        pointers("i16" if name == "bf16" else name, "copy_enc", "copy_dec")
                        if copies else dict.fromkeys(("copy_enc_ptr", "copy_dec_ptr"), ABSENT)
                    ),
                    **pointers("fp32", "scale", "b_dec", *sums),
                    **pointers(biases, "b_enc"),
                    **pointers(of_biases, "m_b", "v_b"),
                    **pointers("i64", "offsets", "ends"),
                    **pointers(order, "order"),
                    "position_ptr": "*i64" if extra else ABSENT,
                    **(pointers("fp32", *extras) if extra else {f"{name}_ptr": ABSENT for name in extras}),
                    **integers("k", "d", "n_latents", "programs", "segment", "salt_enc", "salt_dec"),
                    **dict.fromkeys(scalars, "fp32"),
                },
                block_tiles(
                    _block(
                        block[0], _DTYPES[name], _DTYPES[weights], _DTYPES[moments],
                        extra, copies, parallel or unit, order == "i64",
                    ),
                    HAS_BIAS=True, EXTRA=extra, PARALLEL=parallel, UNIT=unit,
                ),
                ("k", "d"),
                variant=copies or order == "i64" or not (parallel and unit) or (state, extra) not in _EVERYWHERE,
            )  # fmt: skip
