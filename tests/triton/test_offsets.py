"""Offsets beyond 2^31 elements, in the interpreter, which wraps 32-bit integers as the hardware does.

The tensors are as large as they say, 2.5 thousand million elements, in memory that is reserved by address only: what a
program touches is taken, a few pages. Programs of a high number are run alone, by moving the grid's origin.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from refusal_kernels.triton_kernels import (
    adam,
    backward,
    backward_csr,
    decode,
    encode,
    encode_csr,
    grouped_encode,
    latents,
    rows,
    sae_adam,
)
from refusal_kernels.triton_kernels.launch import Tiles

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reserves memory as Linux does")

NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python names it from 3.13 on; the number is that of Linux
ROWS, D = 600_001, 4096
FAR = ROWS - 1  # its row begins at element 2 457 600 000 > 2^31
BYTES = {torch.float32: 4, torch.float16: 2, torch.int64: 8, torch.int32: 4}


def reserved(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[rows, columns] of zeros that take no memory until they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    memory = mmap.mmap(-1, rows * columns * BYTES[dtype], flags=flags)
    return torch.frombuffer(memory, dtype=dtype).view(rows, columns)


@pytest.fixture
def programs_from(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Moves the origin of the grid's first axis."""
    # The interpreter copies every argument onto itself at the end: pages that nobody has touched would come into being.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)

    def move(origin: int) -> None:
        def at(self: interpreter.InterpreterBuilder, x: int, y: int, z: int) -> None:
            self.grid_idx = (x + origin, y, z)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", at)

    move(0)
    return move


ADAM = {
    "step_size": 0.1, "beta1": 0.9, "one_minus_beta1": 0.1, "beta2": 0.99, "one_minus_beta2": 0.01, "eps": 1e-8,
    "root_bc2": 1.0,
}  # fmt: skip


def stepped(w: Tensor, g: Tensor) -> Tensor:
    """The first step of `ADAM` from zero states."""
    return w - 0.1 * 0.1 * g / ((0.01 * g.square()).sqrt() + 1e-8)


def test_decode_reads_far_rows_and_writes_far_tokens(programs_from: Callable[[int], None]) -> None:
    W, x, out = reserved(ROWS, D), reserved(ROWS, D), reserved(ROWS, D)
    values, indices = reserved(ROWS, 2), reserved(ROWS, 2, torch.int64)
    W[FAR], W[3], x[FAR] = torch.randn(D), torch.randn(D), torch.randn(D)
    values[FAR], indices[FAR] = torch.tensor([2.0, -1.0]), torch.tensor([FAR, 3])
    expected = 2 * W[FAR] - W[3] - x[FAR]
    tiles = decode.decode_tiles(D, False, "+residual")
    width = D // tiles.constexprs["BLOCK_D"]
    squares = torch.zeros(ROWS, width)
    programs_from(FAR)
    decode._decode_kernel[(1, width)](
        values, indices, None, W, None, x, out, squares, 2, D, ROWS, ROWS, **tiles.options()
    )
    torch.testing.assert_close(out[FAR], expected)
    torch.testing.assert_close(squares[FAR].sum(), expected.square().sum())


def test_adam_steps_far_rows(programs_from: Callable[[int], None]) -> None:
    for kernel, block in ((adam._row_kernel, D), (adam._wide_row_kernel, 1024)):
        w, g, m, v = (reserved(ROWS, D) for _ in range(4))
        w[FAR], g[FAR] = torch.randn(D), torch.randn(D)
        expected = stepped(w[FAR], g[FAR])
        programs_from(FAR)
        tiles = Tiles({"PARALLEL": False, "UNIT": False, "BLOCK_D": block}, 4)
        kernel[(1,)](w, None, g, m, v, torch.ones(()), D, 0, *ADAM.values(), **tiles.options())
        torch.testing.assert_close(w[FAR], expected)
        torch.testing.assert_close(m[FAR], 0.1 * g[FAR])


def entries_of_the_far_latent() -> tuple[Tensor, Tensor]:
    """offsets [ROWS + 1] and ends [ROWS] int64: one entry, of the last latent; no latent is hot."""
    offsets = reserved(ROWS + 1, 1, torch.int64).view(-1)
    offsets[-1] = 1
    return offsets, reserved(ROWS, 1, torch.int64).view(-1)


def test_gradients_of_far_latents_from_far_tokens(programs_from: Callable[[int], None]) -> None:
    """Entry (token FAR, slot 0) of latent FAR."""
    e, x, W, dW_dec, dW_enc = (reserved(ROWS, D) for _ in range(5))
    e[FAR], x[FAR], W[FAR] = torch.randn(D), torch.randn(D), torch.randn(D)
    values, db = reserved(ROWS, 1), reserved(ROWS, 1)
    values[FAR] = 0.5
    offsets, ends = entries_of_the_far_latent()
    order = torch.tensor([FAR], dtype=torch.int32)
    scale = torch.tensor(2.0)
    tiles = latents.latent_tiles(D, ENCODER=True, DVALUES=False, HAS_BIAS=False, ACCUMULATE=False)
    programs_from(FAR)
    latents.latent_kernel[(1,)](
        e, x, values, order, offsets, ends, offsets, W, None, scale, values, dW_dec, dW_enc, db, dW_dec, dW_enc, db,
        1, D, ROWS, 0, 256, ROWS, **tiles.options(),
    )  # fmt: skip
    dv = 2 * (e[FAR] @ W[FAR])
    torch.testing.assert_close(dW_dec[FAR], e[FAR])
    torch.testing.assert_close(dW_enc[FAR], dv * x[FAR], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(db[FAR, 0], dv, rtol=1e-4, atol=1e-4)


def test_the_fused_step_moves_far_latents(programs_from: Callable[[int], None]) -> None:
    weights = {name: reserved(ROWS, D) for name in ("w_enc", "m_enc", "v_enc", "w_dec", "m_dec", "v_dec", "e", "x")}
    biases = {name: reserved(ROWS, 1) for name in ("b_enc", "m_b", "v_b")}
    w_enc, w_dec, e, x = (weights[name] for name in ("w_enc", "w_dec", "e", "x"))
    for tensor in (w_enc, w_dec, e, x):
        tensor[FAR] = torch.randn(D)
    values = reserved(ROWS, 1)
    values[FAR] = 0.5
    offsets, ends = entries_of_the_far_latent()
    dv = 2 * (e[FAR] @ w_dec[FAR])
    expected = stepped(w_dec[FAR], e[FAR]), stepped(w_enc[FAR], dv * x[FAR])
    # `through` has a row per program, and this is program FAR of ROWS: the launcher takes 1024.
    through = reserved(ROWS, D)
    block = sae_adam._block(D, torch.float32, torch.float32, torch.float32, False, False, True, False)
    tiles = latents.block_tiles(block, HAS_BIAS=False, EXTRA=False, PARALLEL=False, UNIT=False)
    programs_from(FAR)
    sae_adam._step_kernel[(1,)](
        e, x, values, torch.tensor([FAR], dtype=torch.int32), offsets, ends, torch.tensor(2.0), None,
        w_enc, None, *(weights[n] for n in ("m_enc", "v_enc")), *biases.values(),
        w_dec, None, *(weights[n] for n in ("m_dec", "v_dec")), *[None] * 9, through,
        1, D, ROWS, ROWS, 256, 0, 0, *ADAM.values(), **tiles.options(),
    )  # fmt: skip
    torch.testing.assert_close(w_dec[FAR], expected[0])
    torch.testing.assert_close(w_enc[FAR], expected[1], rtol=1e-4, atol=1e-4)


def test_positions_of_codes_in_csr_form_pass_2_to_the_31(programs_from: Callable[[int], None]) -> None:
    """Row FAR of a batch with 2^20 latents: position n F + latent."""
    n_latents, columns = 1 << 20, 1024
    pre = torch.full((1, columns), -1.0)
    pre[0, 7] = 3.0
    bits, positions = torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)
    count, ends = torch.ones(1, dtype=torch.int32), torch.ones(1, dtype=torch.int64)
    limit, filled = torch.ones(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    first = n_latents - columns
    encode_csr._write_kernel[(1,)](
        pre, torch.zeros(n_latents), None, limit, count, ends, filled, bits, positions, columns, first, FAR, n_latents,
        **encode_csr._tiles(False).options(),
    )  # fmt: skip
    assert positions[0].item() == FAR * n_latents + first + 7 > 2**31
    assert bits[:1].view(torch.float32).item() == 3.0


def test_sums_of_far_rows_and_their_parts(programs_from: Callable[[int], None]) -> None:
    x, out, coefficients = reserved(ROWS, D), reserved(ROWS, D), reserved(ROWS, 1)
    x[FAR], coefficients[FAR] = torch.randn(D), 0.5
    offsets, ends = entries_of_the_far_latent()
    order = torch.tensor([FAR], dtype=torch.int32)
    tiles = rows.rows_tiles(D, CSR=False, ROWS=True, HAS_BIAS=False, SUM=False, ACCUMULATE=False)
    programs_from(FAR)
    rows.rows_kernel[(1, D // tiles.constexprs["BLOCK_D"])](
        x, coefficients, order, offsets, ends, offsets, None, None, torch.tensor(2.0), out, None, out, None,
        1, D, ROWS, 0, 256, ROWS, **tiles.options(),
    )  # fmt: skip
    torch.testing.assert_close(out[FAR], x[FAR])
    # The far latent as the only hot one: its part is the first. (A far part cannot be tried: the interpreter's loops
    # count in 32 bits, where the compiled one takes the 64 of its bounds.)
    part, whole = torch.randn(1, D), reserved(ROWS, D)
    ends[FAR] = 1
    tiles = rows.combine_tiles(False)
    programs_from(0)
    rows.combine_kernel[(1, D // tiles.constexprs["BLOCK_D"])](
        part, whole, offsets, ends, torch.tensor([FAR]), D, ROWS, 1, **tiles.options()
    )
    assert torch.equal(whole[FAR], part[0])


def test_products_of_far_tokens_with_far_rows(programs_from: Callable[[int], None]) -> None:
    g, W, out = reserved(ROWS, D), reserved(ROWS, D), reserved(ROWS, 1)
    indices = reserved(ROWS, 1, torch.int64)
    g[FAR], W[FAR], indices[FAR] = torch.randn(D), torch.randn(D), FAR
    token, dots = torch.tensor([FAR], dtype=torch.int32), torch.zeros(1)
    backward_csr._entry_dots_kernel[(1,)](g, indices[FAR], token, W, dots, 1, D, **backward_csr._DOTS.options())
    programs_from(FAR)
    backward._dvalues_kernel[(1, 1)](g, indices, W, torch.tensor(2.0), out, 1, D, **backward._DVALUES.options())
    torch.testing.assert_close(out[FAR, 0], 2 * (g[FAR] @ W[FAR]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dots[0], g[FAR] @ W[FAR], rtol=1e-4, atol=1e-4)


def test_a_csr_code_is_decoded_from_far_rows_for_far_tokens(programs_from: Callable[[int], None]) -> None:
    W, out = reserved(ROWS, D), reserved(ROWS, D)
    W[FAR] = torch.randn(D)
    offsets, _ = entries_of_the_far_latent()
    tiles = decode.decode_tiles(D, False, "+csr")
    programs_from(FAR)
    decode._decode_kernel[(1, D // tiles.constexprs["BLOCK_D"])](
        torch.tensor([2.0]), torch.tensor([FAR]), offsets, W, None, out, out, None, 0, D, ROWS, ROWS, **tiles.options()
    )
    assert torch.equal(out[FAR], 2 * W[FAR])


def test_far_rows_decide_about_the_pivot_and_far_latents_get_their_bias(programs_from: Callable[[int], None]) -> None:
    x = reserved(ROWS, D, torch.float16)
    pivot = torch.ones(D, dtype=torch.float16)
    x[FAR, ::2] = 2**-12  # 1 less than that is no fp16 number
    tiles = encode._PIVOT
    programs_from(FAR // tiles.constexprs["BLOCK_N"])
    encode._pivot_kernel[(1, D // tiles.constexprs["BLOCK_D"])](x, pivot, ROWS, D, **tiles.options())
    assert not pivot[::2].any()
    assert pivot[1::2].all()
    W, b_enc, out, b_dec = reserved(ROWS, D), reserved(ROWS, 1), reserved(ROWS, 1), torch.randn(D)
    W[FAR], b_enc[FAR] = torch.randn(D), 3.0
    programs_from(FAR // encode._BIAS.constexprs["BLOCK_F"])
    encode._fold_bias_kernel[(1,)](W, b_enc, b_dec, out, ROWS, D, **encode._BIAS.options())
    torch.testing.assert_close(out[FAR, 0], 3.0 - W[FAR] @ b_dec, rtol=1e-4, atol=1e-4)


def test_the_grouped_encoder_finds_the_rows_of_a_far_head(programs_from: Callable[[int], None]) -> None:
    """Of head 1, whose rows begin at element n d > 2^31; its keys, candidates and results lie behind as many rows."""
    n, d, n_latents, groups, k = (1 << 21) + 1, 1024, 64, 2, 3
    x = reserved(2 * n, d).view(2, n, d)
    W, bias = torch.randn(2, n_latents, d), torch.randn(2, n_latents)
    x[1, 0] = torch.randn(d)
    tiles = Tiles({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP_M": 2, "KEPT": 2}, num_warps=4)
    settle = Tiles({"K": 8, "GROUPS": 8, "CAPACITY": 64, "BLOCK_D": 128, "KEPT": 2}, num_warps=1)
    keys, listed = reserved(2 * n, 2 * groups, torch.int32), reserved(2 * n, 64, torch.int64)
    values, indices = reserved(2 * n, k).view(2, n, k), reserved(2 * n, k, torch.int64).view(2, n, k)
    widest = W.norm(dim=2).amax(1)
    programs_from(0)
    grouped_encode._group_kernel[(1, 2)](x, W, bias, keys, n, n_latents, groups, d, **tiles.options())
    grouped_encode._settle_kernel[(1, 2)](
        x, W, bias, widest, keys, listed, values, indices, n, 0, n, n_latents, groups, d, k, d * 2.0**-20,
        **settle.options(),
    )  # fmt: skip
    best = torch.sort((x[1, 0] @ W[1].T + bias[1]).relu(), descending=True, stable=True)
    assert torch.equal(indices[1, 0], best.indices[:k])
    torch.testing.assert_close(values[1, 0], best.values[:k], rtol=1e-4, atol=1e-4)
