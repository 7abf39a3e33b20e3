"""adam_rows: parallel-gradient removal, Adam and row renormalisation of W [F, d] in one pass over each row.

    g' = g - <g, w> w / ||w||^2                            (remove_parallel; the norm of a decoder row is held fixed)
    g' = grad_scale g'                                     (gradient clipping)
    m  = beta1 m + (1 - beta1) g',  v = beta2 v + (1 - beta2) g'^2
    w  = w - lr / bc1 * m / (sqrt(v / bc2) + eps)          torch.optim.Adam; bc_i = 1 - beta_i^step
    w  = w / ||w||                                         (unit_norm)

A row of zero norm is left as it is by the removal and by the renormalisation. One program owns a row and keeps it in
registers (d <= 8192), so that both reductions cost no second read; wider rows are swept again, from L2. Without the
two row operations rows do not matter and the tensor is one flat vector. In place; every element is written by one
program: deterministic.

Bytes (fp32 parameters and states): 16 read + 12 written per parameter; about 20 flop. Roofline prediction (one
matrix, F 131072, d 4096: 15 GB, H200): 3.5 ms.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compact import load_wide, store_moments, store_weight, words
from .launch import ABSENT, Configuration, Tiles, device_scalar, on_device, pointers


@triton.jit
def adam_update(w, g, m, v, step_size, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, root_bc2):
    m = beta1 * m + one_minus_beta1 * g
    v = beta2 * v + one_minus_beta2 * g * g
    return w - step_size * m / (tl.sqrt(v) / root_bc2 + eps), m, v


@triton.jit(do_not_specialize=["salt"])
def _row_kernel(
    w_ptr, low_ptr, g_ptr, m_ptr, v_ptr, grad_scale_ptr, d, salt,
    step_size, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, root_bc2,
    PARALLEL: tl.constexpr, UNIT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program, one row, all of it in registers."""
    column = tl.arange(0, BLOCK_D)
    live = column < d
    at = tl.program_id(0).to(tl.int64) * d + column
    w = load_wide(w_ptr, low_ptr, at, live)
    g = tl.load(g_ptr + at, mask=live, other=0.0).to(tl.float32)
    if PARALLEL:
        square = tl.sum(w * w)
        g -= tl.where(square > 0.0, tl.sum(g * w) / tl.where(square > 0.0, square, 1.0), 0.0) * w
    g *= tl.load(grad_scale_ptr)
    m = load_wide(m_ptr, None, at, live)
    v = load_wide(v_ptr, None, at, live)
    w, m, v = adam_update(w, g, m, v, step_size, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, root_bc2)
    if UNIT:
        square = tl.sum(tl.where(live, w * w, 0.0))
        w /= tl.where(square > 0.0, tl.sqrt(square), 1.0)
    store_weight(w_ptr, low_ptr, at, live, w)
    store_moments(m_ptr, v_ptr, at, live, m, v, salt)


@triton.jit(do_not_specialize=["salt"])
def _wide_row_kernel(
    w_ptr, low_ptr, g_ptr, m_ptr, v_ptr, grad_scale_ptr, d, salt,
    step_size, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, root_bc2,
    PARALLEL: tl.constexpr, UNIT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The same for rows that registers do not hold: up to three sweeps, the later ones from L2."""
    row = tl.program_id(0).to(tl.int64) * d
    squares = tl.zeros([BLOCK_D], dtype=tl.float32)
    products = tl.zeros([BLOCK_D], dtype=tl.float32)
    grad_scale = tl.load(grad_scale_ptr)
    if PARALLEL:
        for start in range(0, d, BLOCK_D):
            column = start + tl.arange(0, BLOCK_D)
            live = column < d
            w = load_wide(w_ptr, low_ptr, row + column, live)
            squares += w * w
            products += w * tl.load(g_ptr + row + column, mask=live, other=0.0).to(tl.float32)
    square = tl.sum(squares)
    share = tl.where(square > 0.0, tl.sum(products) / tl.where(square > 0.0, square, 1.0), 0.0)
    # The norm is taken of what is stored, as the sweep that divides by it reads the stored row.
    squares = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(0, d, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        live = column < d
        at = row + column
        w = load_wide(w_ptr, low_ptr, at, live)
        g = tl.load(g_ptr + at, mask=live, other=0.0).to(tl.float32)
        g = (g - share * w) * grad_scale
        m = load_wide(m_ptr, None, at, live)
        v = load_wide(v_ptr, None, at, live)
        w, m, v = adam_update(w, g, m, v, step_size, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, root_bc2)
        store_weight(w_ptr, low_ptr, at, live, w)
        store_moments(m_ptr, v_ptr, at, live, m, v, salt)
        if low_ptr is None:
            w = w.to(w_ptr.dtype.element_ty).to(tl.float32)
        squares += tl.where(live, w * w, 0.0)
    if UNIT:
        square = tl.sum(squares)
        norm = tl.where(square > 0.0, tl.sqrt(square), 1.0)
        # Each thread reads back its own stores (same columns, same layout); the barrier says so to any layout.
        tl.debug_barrier()
        for start in range(0, d, BLOCK_D):
            column = start + tl.arange(0, BLOCK_D)
            live = column < d
            w = load_wide(w_ptr, low_ptr, row + column, live)
            store_weight(w_ptr, low_ptr, row + column, live, w / norm)


@triton.jit(do_not_specialize=["step_size", "root_bc2", "salt"])
def _flat_kernel(
    w_ptr, low_ptr, g_ptr, m_ptr, v_ptr, grad_scale_ptr, n, salt,
    step_size, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, root_bc2,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < n
    w = load_wide(w_ptr, low_ptr, at, live)
    g = tl.load(g_ptr + at, mask=live, other=0.0).to(tl.float32) * tl.load(grad_scale_ptr)
    m = load_wide(m_ptr, None, at, live)
    v = load_wide(v_ptr, None, at, live)
    w, m, v = adam_update(w, g, m, v, step_size, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, root_bc2)
    store_weight(w_ptr, low_ptr, at, live, w)
    store_moments(m_ptr, v_ptr, at, live, m, v, salt)


# (BLOCK_D, warps): 4 to 16 elements per thread.
_ROW_BLOCKS = ((128, 1), (512, 2), (1024, 4), (2048, 4), (4096, 8), (8192, 16))
_WIDE_BLOCK = (2048, 4)  # with 8 warps one of its forms spills on sm_90
_FLAT = Tiles({"BLOCK": 1024}, num_warps=4)


def _row_tiles(block: tuple[int, int], parallel: bool, unit: bool) -> Tiles:
    return Tiles({"PARALLEL": parallel, "UNIT": unit, "BLOCK_D": block[0]}, block[1])


def adam_rows(
    W: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    bias_correction1: float,
    bias_correction2: float,
    grad_scale: Tensor | float | None,
    remove_parallel: bool,
    unit_norm: bool,
) -> None:
    """One step on the rows of W [F, d] or [H, F, d], in place; g, m, v have W's shape; arithmetic in fp32.

    `grad_scale` is a float, a 0-dim tensor on the device (no synchronisation) or None for 1.

    Equivalent to: torch.optim.Adam's step with gradient grad_scale * (g - <g, w> w / ||w||^2) per row, then w / ||w||.
    """
    numbers = (lr, beta1, beta2, eps, bias_correction1, bias_correction2)
    _launch(W, None, g, m, v, 0, numbers, grad_scale, remove_parallel, unit_norm)


def adam_compact_rows(
    W: Tensor,
    low: Tensor | None,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    bias_correction1: float,
    bias_correction2: float,
    grad_scale: Tensor | float | None,
    remove_parallel: bool,
    unit_norm: bool,
    salt: int,
) -> None:
    """The same with bf16 moments, rounded stochastically, or with master weights in halves: see
    `refusal_kernels.backends.base.Backend.adam_compact_rows`."""
    if low is not None:
        W = W.view(torch.int16)
    numbers = (lr, beta1, beta2, eps, bias_correction1, bias_correction2)
    _launch(W, low, g, words(m), words(v), salt, numbers, grad_scale, remove_parallel, unit_norm)


def _launch(
    W: Tensor,
    low: Tensor | None,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    salt: int,
    numbers: tuple[float, ...],
    grad_scale: Tensor | float | None,
    remove_parallel: bool,
    unit_norm: bool,
) -> None:
    if W.numel() == 0:
        return
    lr, beta1, beta2, eps, bias_correction1, bias_correction2 = numbers
    # The complements are taken in double: 1 - float32(0.999) is off by 5e-5 of itself.
    scalars = (lr / bias_correction1, beta1, 1 - beta1, beta2, 1 - beta2, eps, bias_correction2**0.5)
    with on_device(W):
        scale = device_scalar(1.0 if grad_scale is None else grad_scale, W.device)
        if not (remove_parallel or unit_norm):
            n = W.numel()
            grid = (triton.cdiv(n, _FLAT.constexprs["BLOCK"]),)
            _flat_kernel[grid](W, low, g, m, v, scale, n, salt, *scalars, **_FLAT.options())
            return
        d = W.shape[-1]
        rows = W.numel() // d
        block = next((b for b in _ROW_BLOCKS if b[0] >= d), None)
        kernel = _wide_row_kernel if block is None else _row_kernel
        tiles = _row_tiles(block or _WIDE_BLOCK, remove_parallel, unit_norm)
        kernel[(rows,)](W, low, g, m, v, scale, d, salt, *scalars, **tiles.options())


CONSTRAINTS = ((True, True), (True, False), (False, True))  # parallel removal, unit norm
# What is stored of (weights, moments): fp32 numbers, bf16 moments, weights in halves, both.
FORMS = {
    "": ("fp32", "fp32"), "bf16 moments": ("fp32", "i16"), "halves": ("i16", "fp32"),
    "halves+bf16 moments": ("i16", "i16"),
}  # fmt: skip


# Form -> (weights, gradient, moments). Numbers of 16 bits throughout; with the fp32 gradient that a fused step of rows
# wider than its kernel's goes through; and what is stepped as a vector alone, the bf16 bias beside weights in halves.
_FORMS = {
    **{form: (weights, "fp32", moments) for form, (weights, moments) in FORMS.items()},
    **{name: (name, name, name) for name in ("bf16", "fp16")},
    **{f"{name}, fp32 gradient": (name, "fp32", name) for name in ("bf16", "fp16")},
    "bf16 beside fp32": ("bf16", "fp32", "fp32"),
}


def configurations() -> Iterator[Configuration]:
    """Every kernel of this file as it ships: in every form of parameters and states and with each constraint. A vector
    of 2^31 numbers and more has a length of 64 bits."""
    names = ("step_size", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "eps", "root_bc2")
    numbers = dict.fromkeys(names, "fp32")
    blocks = [(_row_kernel, f"adam.row[{block[0]}", block) for block in _ROW_BLOCKS]
    blocks += [(_wide_row_kernel, "adam.wide_row[", _WIDE_BLOCK)]
    for form, (weights, gradient, moments) in _FORMS.items():
        pointers_of = {
            **pointers(weights, "w"),
            **(pointers("i16", "low") if weights == "i16" else {"low_ptr": ABSENT}),
            **pointers(gradient, "g"),
            **pointers("fp32", "grad_scale"),
            **pointers(moments, "m", "v"),
        }
        said = f"+{form}" if form else ""
        rows = {"fp32 gradient": blocks[-2:], "bf16 beside fp32": []}.get(form.partition(", ")[2] or form, blocks)
        for (kernel, label, block), (parallel, unit) in itertools.product(rows, CONSTRAINTS):
            yield Configuration(
                kernel,
                label + ("+parallel" if parallel else "") + ("+unit" if unit else "") + said + "]",
                {**pointers_of, "d": "i32", "salt": "i32", **numbers},
                _row_tiles(block, parallel, unit),
                ("d",),
                variant=bool(form) or not (parallel and unit),
            )
        for length in ("i32", "i64"):
            said = ",".join(([form] if form else []) + (["i64"] if length == "i64" else []))
            yield Configuration(
                _flat_kernel,
                f"adam.flat[{said}]" if said else "adam.flat",
                {**pointers_of, "n": length, "salt": "i32", **numbers},
                _FLAT,
                ("n",),
                variant=bool(said),
            )
