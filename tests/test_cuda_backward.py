"""The CUDA backward's algorithm, without a GPU: csrc/cuda/sae_backward_team.h by fibers in the place of threads.

The same header is compiled by g++ that nvcc compiles into the kernels, in every shape, dtype and path that they are
compiled for. Warps run one after the other, in two orders; copies arrive when they are waited for and not before; loads
are held to their tensors and to 16-byte boundaries. What this cannot show: the hardware's memory model, speed. `-m gpu`
(tests/test_gpu.py) runs the kernel itself.
"""

from __future__ import annotations

import ctypes
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from refusal_kernels import native, reference
from refusal_kernels.backends import OPERATORS, Request
from refusal_kernels.backends.cuda import CudaBackend
from refusal_kernels.backends.heads import run
from refusal_kernels.triton_kernels.csc import csc_from_indices

ROOT = Path(__file__).resolve().parent.parent
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
every_dtype = pytest.mark.parametrize("dtype", TYPES)


class Problem(NamedTuple):
    """What sae_backward reads; see refusal_kernels.reference."""

    e: Tensor
    x: Tensor
    values: Tensor
    indices: Tensor
    W_dec: Tensor
    b_dec: Tensor | None
    scale: float = 0.25


def problem(dtype: torch.dtype, n: int, d: int, n_latents: int, k: int, hot: float = 0.5) -> Problem:
    """Latents 0 (in a share `hot` of the rows) and 1 are frequent, the last two are in no row; a fifth are fillers."""
    generator = torch.Generator().manual_seed(n + d + k)
    choice = torch.rand(n, n_latents, generator=generator)
    choice[:, 0] = torch.where(torch.rand(n, generator=generator) < hot, 2.0, 0.0)
    choice[:, 1] += 0.3
    choice[:, -2:] = -1
    indices = choice.topk(k, dim=1).indices
    values = torch.rand(n, k, generator=generator) + 0.1
    values[torch.rand(n, k, generator=generator) < 0.2] = 0
    e, x, W_dec = (torch.randn(rows, d, generator=generator).to(dtype) for rows in (n, n, n_latents))
    return Problem(e, x, values.to(dtype), indices, W_dec, torch.randn(d, generator=generator))


Gradients = tuple[Tensor, Tensor, Tensor]  # dW_enc, db_enc, dW_dec
Backward = Callable[..., Gradients]


@pytest.fixture
def backward(emulated_backward: ctypes.CDLL) -> Backward:
    def run(
        p: Problem,
        into: Gradients,
        segment: int = 256,
        accumulate: bool = True,
        backwards: bool = False,
        shape: int | None = None,
        first: int = 0,
    ) -> Gradients:
        """The gradients added to copies of `into`, NaN in all workspaces; `shape`: which one is expected to run;
        `first`: the row of e and x that the code's row 0 is."""
        *lead, n_latents, d = p.W_dec.shape
        heads = math.prod(lead)
        csc = csc_from_indices(p.indices, n_latents, segment)
        tokens = (csc.order // p.indices.shape[-1] + first).to(torch.int32)
        values = p.values.reshape(-1)[csc.order]
        segments = csc.segment_latent.numel()
        out = tuple(t.clone() for t in into)
        parts = [torch.full((segments, size), math.nan) for size in (d, 1, d)]
        dots, scale, ran = torch.full((max(1, values.numel()),), math.nan), torch.tensor(p.scale), ctypes.c_int32(-1)
        read = (p.e, p.x, p.W_dec, p.b_dec, scale, tokens, values, csc.offsets, csc.segment_ends, csc.segment_latent)
        pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (*read, *out, *parts, dots)]
        problem_found = emulated_backward.emulate_sae_backward(
            TYPES[p.e.dtype], *pointers, ctypes.c_int64(p.e.numel() // d), heads * n_latents, segments, segment,
            n_latents, d, int(accumulate), int(backwards), ctypes.byref(ran),
        )  # fmt: skip
        assert problem_found is None, problem_found
        assert shape is None or ran.value == shape
        return out  # type: ignore[return-value]

    return run


def start_of(p: Problem) -> Gradients:
    generator = torch.Generator().manual_seed(7)
    W, b = torch.randn(p.W_dec.shape, generator=generator), torch.randn(p.W_dec.shape[:-1], generator=generator)
    return W, b, -W


def expected(p: Problem, into: Gradients, dtype: torch.dtype) -> Gradients:
    rows = [t if t is None or not t.is_floating_point() else t.to(dtype) for t in p[:-1]]
    e, x, values, indices, W_dec, b_dec = rows
    out = tuple(t.to(dtype, copy=True) for t in into)
    reference.sae_backward(e, x, values, indices, W_dec, W_dec, b_dec, p.scale, *out)
    return out  # type: ignore[return-value]


def close(got: Gradients, p: Problem, into: Gradients) -> None:
    """At most three times the reference's error in fp32, plus one rounding."""
    for mine, own, exact in zip(got, expected(p, into, torch.float32), expected(p, into, torch.float64), strict=True):
        rounding = torch.finfo(torch.float32).eps * exact.abs().max()
        assert (mine - exact).abs().max() <= 3 * (own - exact).abs().max() + rounding


def same(a: Gradients, b: Gradients) -> None:
    assert all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


# Width in bytes, the shape that takes it: both sides of every edge, and the widest single chunk.
WIDTHS = [
    (16, 0), (256, 0), (272, 1), (1024, 1), (1040, 2), (2048, 2), (2064, 3), (4096, 3), (4112, 4), (8192, 4),
    (8208, 5), (16384, 5),
]  # fmt: skip


@pytest.mark.parametrize("d", [4096, 4099, 16384])  # aligned, not aligned, in chunks
def test_rows_behind_2_31_elements(backward: Backward, d: int) -> None:
    """Of e and x only the rows that are read take memory: the rest is address space."""
    p = problem(torch.bfloat16, 7, d, 5, 2)
    into = start_of(p)
    near = backward(p, into, segment=3)
    first = 2**31 // d + 1
    far = [torch.empty(first + len(rows), d, dtype=rows.dtype) for rows in (p.e, p.x)]
    for rows, own in zip(far, (p.e, p.x), strict=True):
        rows[first:] = own
    same(near, backward(p._replace(e=far[0], x=far[1]), into, segment=3, first=first))


@every_dtype
@pytest.mark.parametrize(("width", "shape"), WIDTHS)
def test_equals_the_reference_at_every_width(backward: Backward, dtype: torch.dtype, width: int, shape: int) -> None:
    p = problem(dtype, 19, width // dtype.itemsize, 9, 3)
    into = start_of(p)
    close(backward(p, into, segment=4, shape=shape), p, into)


@every_dtype
@pytest.mark.parametrize(("d", "shape"), [(1, 2), (7, 2), (130, 2), (517, None), (4100, None)])
def test_rows_that_are_not_aligned(backward: Backward, dtype: torch.dtype, d: int, shape: int | None) -> None:
    p = problem(dtype, 13, d, 7, 2)
    into = start_of(p)
    close(backward(p, into, segment=3, shape=shape), p, into)


@every_dtype
def test_tensors_that_are_not_aligned_take_the_slow_path(backward: Backward, dtype: torch.dtype) -> None:
    p = problem(dtype, 13, 128, 7, 2)
    into = start_of(p)
    fast = backward(p, into, segment=5)
    shifted = torch.empty(p.x.numel() + 1, dtype=dtype)[1:].view_as(p.x).copy_(p.x)
    assert shifted.data_ptr() % 16
    slow = backward(p._replace(x=shifted), into, segment=5, shape=2)
    close(slow, p, into)
    close(fast, p, into)


@every_dtype
@pytest.mark.parametrize(("pieces", "odd"), [(1025, False), (2048, False), (2049, False), (1030, True)])
def test_wide_rows_come_in_chunks(backward: Backward, dtype: torch.dtype, pieces: int, odd: bool) -> None:
    """Their dot products in a pass of their own, then 1024 pieces of 16 bytes at a time."""
    p = problem(dtype, 5, pieces * 16 // dtype.itemsize - int(odd), 5, 2)
    into = start_of(p)
    close(backward(p, into, segment=2, shape=5), p, into)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize(("d", "segment"), [(128, 16), (1024, 7), (4096, 256)])
def test_hot_latents_are_split_and_give_the_same_bits_every_time(
    backward: Backward, k: int, d: int, segment: int
) -> None:
    p = problem(torch.bfloat16, 300 if segment == 256 else 90, d, 6, k, hot=0.95)
    counts = torch.bincount(p.indices.flatten(), minlength=6)
    assert counts.max() > segment
    assert (counts == 0).any()
    into = start_of(p)
    first = backward(p, into, segment)
    close(first, p, into)
    same(backward(p, into, segment), first)
    same(backward(p, into, segment, backwards=True), first)


@every_dtype
@pytest.mark.parametrize("d", [64, 96, 520, 1032, 2056, 4120])
def test_either_order_of_the_threads_gives_the_same_bits(backward: Backward, dtype: torch.dtype, d: int) -> None:
    p = problem(dtype, 17, d, 5, 2)
    into = start_of(p)
    same(backward(p, into, 6, backwards=True), backward(p, into, 6))


@pytest.mark.parametrize("d", [48, 4096, 33000, 33001])
def test_gradients_can_be_overwritten(backward: Backward, d: int) -> None:
    """What stood there does not matter, be it NaN; a latent without entries gets zeros."""
    p = problem(torch.float32, 11, d, 6, 2)
    nothing = (torch.zeros(6, d), torch.zeros(6), torch.zeros(6, d))
    nan = tuple(torch.full_like(t, math.nan) for t in nothing)
    got = backward(p, nan, segment=3, accumulate=False)
    close(got, p, nothing)
    assert not got[0][-2:].any()
    assert not got[2][-2:].any()


def test_latents_without_entries_are_not_touched(backward: Backward) -> None:
    p = problem(torch.float32, 11, 64, 6, 2)
    nan = tuple(torch.full_like(t, math.nan) for t in start_of(p))
    got = backward(p, nan, segment=3)
    assert all(t.isnan().all() for t in got)
    empty = p._replace(**{name: getattr(p, name)[:0] for name in ("e", "x", "values", "indices")})
    into = start_of(p)
    same(backward(empty, into), into)


@every_dtype
@pytest.mark.parametrize("d", [64, 130, 4096, 33000])
def test_fillers_count_for_nothing_whatever_their_row_holds(backward: Backward, dtype: torch.dtype, d: int) -> None:
    """Also an infinite decoder row of a latent that has fillers only."""
    p = problem(dtype, 12, d, 6, 2)
    p.values[p.indices == 1] = 0
    p.values[4] = 0
    p.e[4], p.x[4], p.W_dec[1] = math.inf, math.nan, math.inf
    into = start_of(p)
    got = backward(p, into, segment=3)
    assert all(t.isfinite().all() for t in got)
    clean = p._replace(e=p.e.nan_to_num(posinf=1), x=p.x.nan_to_num(nan=1), W_dec=p.W_dec.nan_to_num(posinf=1))
    same(got, backward(clean, into, segment=3))


def test_nan_and_infinity_stay_in_their_latents(backward: Backward) -> None:
    p = problem(torch.float32, 12, 64, 8, 2)
    p.values[p.values == 0] = 1
    p.x[2, 5], p.values[7, 0] = math.inf, math.nan
    into = start_of(p)
    for mine, own in zip(backward(p, into, segment=3), expected(p, into, torch.float32), strict=True):
        assert torch.equal(mine.isfinite(), own.isfinite())


def test_without_b_dec_and_far_from_the_origin(backward: Backward) -> None:
    p = problem(torch.float32, 30, 256, 5, 2)
    into = start_of(p)
    close(backward(p._replace(b_dec=None), into), p._replace(b_dec=None), into)
    assert p.b_dec is not None
    far = p._replace(b_dec=p.b_dec + 1000, x=p.x + p.b_dec + 1000)
    close(backward(far, into), far, into)


@pytest.mark.parametrize("d", [64, 1032])
def test_heads_are_latents_and_rows_in_one_numbering(backward: Backward, d: int) -> None:
    heads = [problem(torch.bfloat16, 9, d, 6, 2, hot) for hot in (0.3, 0.9, 0.0)]
    together = Problem(*(torch.stack(parts) for parts in zip(*(p[:-1] for p in heads), strict=True)))
    into = start_of(together)
    got = backward(together, into, segment=64)
    for h, p in enumerate(heads):
        same(tuple(t[h] for t in got), backward(p, tuple(t[h] for t in into), segment=64))


def test_the_back_end_hands_the_kernel_what_it_reads(
    monkeypatch: pytest.MonkeyPatch, emulated_backward: ctypes.CDLL
) -> None:
    """CudaBackend.sae_backward with the emulation in the operator's place: heads, hot latents, both modes, N = 0."""
    pytest.importorskip("triton")
    backend = CudaBackend()

    def operator(name: str) -> Callable[..., None]:
        assert name == "sae_backward"
        return emulated_operator

    def emulated_operator(
        e: Tensor, x: Tensor, W_dec: Tensor, b_dec: Tensor | None, scale: Tensor, tokens: Tensor, values: Tensor,
        offsets: Tensor, ends: Tensor, segment_latent: Tensor, segment: int, dW_enc: Tensor, db_enc: Tensor,
        dW_dec: Tensor, accumulate: bool,
    ) -> None:  # fmt: skip
        assert (e.dim(), W_dec.dim(), dW_enc.dim(), db_enc.dim()) == (2, 2, 2, 1)
        (latents, d), segments = W_dec.shape, segment_latent.numel()
        parts = [torch.empty(segments, size) for size in (d, 1, d)]
        read = (e, x, W_dec, b_dec, scale, tokens, values, offsets, ends, segment_latent, dW_enc, db_enc, dW_dec)
        pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (*read, *parts, None)]
        heads = 1 if b_dec is None else b_dec.numel() // d
        problem_found = emulated_backward.emulate_sae_backward(
            TYPES[e.dtype], *pointers, ctypes.c_int64(e.shape[0]), latents, segments, segment, latents // heads, d,
            int(accumulate), 0, ctypes.byref(ctypes.c_int32()),
        )  # fmt: skip
        assert problem_found is None, problem_found

    monkeypatch.setattr(backend, "_operator", operator, raising=False)
    monkeypatch.setattr(native, "operator", lambda *_: emulated_operator)
    # Multiples of 1/4, of which sums are exact: what is handed over counts here, not how a sum is rounded.
    heads = [
        Problem(*((t * 4).round() / 4 if isinstance(t, Tensor) and t.is_floating_point() else t for t in p))
        for p in (problem(torch.float16, 300, 64, 6, 2, hot) for hot in (0.3, 0.95, 0.0))
    ]
    together = Problem(*(torch.stack(parts) for parts in zip(*(p[:-1] for p in heads), strict=True)))
    into = start_of(together)
    for accumulate in (True, False):
        out = tuple(t.clone() for t in into)
        e, x, values, indices, W_dec, b_dec, scale = together
        more = {} if accumulate else {"accumulate": False}
        backend.sae_backward(e, x, values, indices.int(), W_dec, W_dec, b_dec, scale, *out, **more)
        for h, p in enumerate(heads):
            start = tuple(t[h] * int(accumulate) for t in into)
            close(tuple(t[h] for t in out), p, start)
    again = tuple(t.clone() for t in into)
    run(backend, "sae_backward", 3, e, x, values, indices, W_dec, W_dec, b_dec, torch.tensor(scale), *again)
    backend.sae_backward(*(t[:, :0] for t in (e, x, values, indices)), W_dec, W_dec, b_dec, scale, *again)
    for h, p in enumerate(heads):
        close(tuple(t[h] for t in again), p, tuple(t[h] for t in into))
    backend.sae_backward(
        *(t[:, :0] for t in (e, x, values, indices)), W_dec, W_dec, b_dec, scale, *again, accumulate=False
    )
    assert not any(t.any() for t in again)


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("width", [*(width for width, _ in WIDTHS), 16400, 40000, 6, 508, 4102, 20004])
@pytest.mark.parametrize("k", [1, 4])
def test_every_shape_on_a_gpu(dtype: torch.dtype, width: int, k: int) -> None:
    """All of the launcher, with hot latents: aligned, in chunks, not aligned; the same bits twice."""
    p = problem(dtype, 400, max(1, width // dtype.itemsize), 9, k, hot=0.95)
    into = start_of(p)
    e, x, values, indices, W_dec, b_dec = (None if t is None else t.cuda() for t in p[:-1])
    runs = []
    for accumulate in (True, True, False):
        out = tuple(t.cuda() for t in into)
        CudaBackend().sae_backward(
            e, x, values, indices, W_dec, W_dec, b_dec, p.scale, *out, accumulate=accumulate, segment=64
        )
        runs.append(tuple(t.cpu() for t in out))
    close(runs[0], p, into)
    same(runs[0], runs[1])
    close(runs[2], p, tuple(torch.zeros_like(t) for t in into))


def test_the_step_of_the_back_end_is_complete() -> None:
    """Whatever sae_step and SAEAdam call is there, where the kernel is."""
    backend = CudaBackend()
    if native.operator("refusal_kernels_cuda", "sae_backward") is None:
        pytest.skip("refusal_kernels._C was built without CUDA")
    for op in ("sae_step", "sae_adam"):
        assert all(backend.primitive(name) is not None for name in OPERATORS[op])
        assert not any("has no kernel" in r for r in backend.not_supported_reasons(op, Request("cuda", torch.float32)))
    assert backend.primitive("sae_backward_adam") is not None


def test_the_emulation_finds_what_it_is_there_for(tmp_path: Path) -> None:
    """A sum without its barrier, threads that part, a copy that nobody waited for, loads out of bounds."""
    source = tmp_path / "wrong.cpp"
    source.write_text("""
#include "sae_backward_team.h"
#include "emulated_team.h"
#include <cstdio>
using Team = EmulatedTeam<64>;
const char* caught(void (*work)()) {
  try {
    Fibers::run(64, work, false);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "nothing";
}
int shared;
alignas(16) float from[8] = {1, 2, 3, 4}, to[4];
int main() {
  int results[2];
  for (int reversed = 0; reversed < 2; ++reversed) {
    shared = 0;
    Fibers::run(64, [&] {
      if (Team::rank() == 0) shared = 1;
      Team::shuffle_xor(0, 1);  // no barrier: does the other warp see it?
      if (Team::rank() == 40) results[reversed] = shared;
    }, reversed != 0);
  }
  std::printf("%d %d; ", results[0], results[1]);
  std::printf("%s; ", caught([] { if (Team::rank() < 32) Team::barrier(); }));
  std::printf("%s; ", caught([] { Team::rank() % 2 ? Team::barrier() : (void)Team::shuffle_xor(0, 1); }));
  Fibers::readable = {{reinterpret_cast<char*>(from), reinterpret_cast<char*>(from + 4)}};
  std::printf("%s; ", caught([] { Team::copy(to, from + 4, true); }));
  std::printf("%s; ", caught([] { Team::copy(to, from + 1, true); }));
  float seen[2];
  Fibers::run(1, [&] {
    EmulatedTeam<1>::copy(to, from, true);
    EmulatedTeam<1>::commit();
    EmulatedTeam<1>::commit();
    EmulatedTeam<1>::wait<2>();
    seen[0] = to[2];
    EmulatedTeam<1>::wait<1>();
    seen[1] = to[2];
  }, false);
  std::printf("%d %g", seen[0] != seen[0], seen[1]);
}
""")
    program = tmp_path / "wrong"
    folders = [f"-I{ROOT / folder}" for folder in ("csrc/cuda", "tests/cuda")]
    subprocess.run(["g++", "-std=c++20", *folders, str(source), "-o", str(program)], check=True)
    found = subprocess.run([str(program)], capture_output=True, text=True).stdout.split("; ")
    assert found == [
        "1 0",
        "threads wait for others that do not come",
        "threads wait for others that do not come",
        "a load from foreign memory",
        "a load that is not aligned",
        "1 3",
    ]
