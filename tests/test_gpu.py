"""The public operators on a GPU, and the same test functions on the CPU back-end: the tests are known to be right.

Every test is parametrised over where it runs: `cpu` (C++ on CPU tensors, part of every run of the suite) and, marked
gpu, `triton`, `cuda` (CUDA tensors; the latter has topk_encode, sparse_decode, the training step and the projection
only) and, for topk_encode, `triton-int8`. Which of them has passed on which GPU is in benches/results/gpu; tests/triton
has the kernels' tests in Triton's interpreter.

    make gpu                                   all of them in several processes, compute-sanitizer, benchmarks
    python -m pytest -m gpu                    these tests alone

Tolerance: error against the fp64 reference at most twice that of plain PyTorch in the same dtype on the same device
(three times for gradients and what follows from them) plus one rounding of the result. Small integers where mathematics
is exact: every sum is, in any order, so there results are equal and ties are everywhere.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import refusal_kernels as rk
from refusal_kernels import reference
from refusal_kernels.backends import int8
from refusal_kernels.backends.cuda import FILTER_MOST_K

CPU, TRITON = pytest.param("cpu", "cpu", id="cpu"), pytest.param("triton", "cuda", id="triton", marks=pytest.mark.gpu)
CUDA = pytest.param("cuda", "cuda", id="cuda", marks=pytest.mark.gpu)
INT8 = pytest.param("triton-int8", "cuda", id="triton-int8", marks=pytest.mark.gpu)
everywhere = pytest.mark.parametrize(("backend", "device"), [CPU, TRITON])
encoders = pytest.mark.parametrize(("backend", "device"), [CPU, TRITON, CUDA, INT8])
decoders = pytest.mark.parametrize(("backend", "device"), [CPU, TRITON, CUDA])
steps = pytest.mark.parametrize(("backend", "device"), [CPU, TRITON, CUDA])
projections = pytest.mark.parametrize(("backend", "device"), [CPU, TRITON, CUDA])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
every_index = pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])


@pytest.fixture(autouse=True)
def _seed_and_poison():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # `empty` is filled with NaN
    yield
    torch.use_deterministic_algorithms(False)


def ran(backend: str, *ops: str) -> None:
    assert {op: rk.last_backend(op) for op in ops} == dict.fromkeys(ops, backend)


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(-2, 3, shape).to(dtype)


def double(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().cpu().double() if t.is_floating_point() else t.cpu() for t in tensors]


def close(actual: Tensor, exact: Tensor, torch_result: Tensor, factor: float) -> None:
    """The tolerance rule; `exact` is fp64 on the CPU, `torch_result` plain PyTorch's in the dtype and on the device."""
    assert (actual.shape, actual.dtype, actual.device) == (exact.shape, torch_result.dtype, torch_result.device)
    if exact.numel() == 0:
        return
    (mine, own), rounding = double(actual, torch_result), torch.finfo(actual.dtype).eps * exact.abs().max()
    error, own_error = (mine - exact).abs(), (own - exact).abs()
    assert error.max() <= factor * own_error.max() + rounding
    assert error.mean() <= factor * own_error.mean() + rounding / 2


# (n, d, F, k): shapes that are multiples of nothing; every list length of the filter, its merging route, k = F, N = 0.
ENCODER_SHAPES = [
    (5, 5, 77, 3),
    (70, 130, 1025, 33),
    (33, 19, 5000, 70),
    (3, 64, 1300, 300),
    (2, 8, 1300, 1100),
    (4, 16, 61, 61),
    (1, 1, 1, 1),
    (0, 8, 64, 4),
]


@encoders
@every_dtype
@pytest.mark.parametrize(("n", "d", "n_latents", "k"), ENCODER_SHAPES)
def test_encode_is_exact_on_ties(backend, device, dtype, n, d, n_latents, k):
    if k > {"cuda": FILTER_MOST_K, "triton-int8": int8.MOST_K}.get(backend, n_latents):
        pytest.skip(f"{backend} does not take such a k")
    x, W, b, b_dec = integers(n, d, dtype=dtype), integers(n_latents, d, dtype=dtype), integers(n_latents), integers(d)
    inputs = [t.to(device) for t in (x, W, b, b_dec)]
    values, indices = rk.topk_encode(*inputs[:3], k, inputs[3], backend=backend)
    ran(backend, "topk_encode")
    want_values, want_indices = reference.topk_encode(*double(x, W, b), k, b_dec.double())
    assert torch.equal(indices.cpu(), want_indices)
    assert torch.equal(values.cpu(), want_values.to(dtype))


@encoders
@every_dtype
def test_encode_special_values(backend, device, dtype):
    """Fewer than k positives, all negative, -0, constant rows, NaN, infinities: the bias is the pre-activation."""
    inf, nan = math.inf, math.nan
    x, W = torch.zeros(1, 6, dtype=dtype, device=device), torch.eye(6, dtype=dtype, device=device)
    for row, indices, values in (
        ([1.0, nan, inf, nan, -1.0, 2.0], [1, 3, 2, 5], [nan, nan, inf, 2.0]),
        ([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0], [0, 1, 2, 3], [0.0] * 4),
        ([0.0, -0.0, 0.0, -0.0, 3.0, -0.0], [4, 0, 1, 2], [3.0, 0.0, 0.0, 0.0]),
        ([2.0] * 6, [0, 1, 2, 3], [2.0] * 4),
        ([-inf, 1.0, -inf, inf, inf, 0.0], [3, 4, 1, 0], [inf, inf, 1.0, 0.0]),
    ):
        got_values, got_indices = rk.topk_encode(x, W, torch.tensor(row, device=device), 4, backend=backend)
        assert got_indices.tolist() == [indices]
        torch.testing.assert_close(got_values.cpu(), torch.tensor([values]).to(dtype), rtol=0, atol=0, equal_nan=True)
    x = torch.randn(3, 6).to(device, dtype)
    x[1, 2] = nan
    zeros = torch.zeros(6, device=device)
    got_values, _ = rk.topk_encode(x, W, zeros, 2, zeros, backend=backend)
    assert got_values.isnan().any(1).tolist() == [False, True, False]


def check_encode(backend: str, x: Tensor, W: Tensor, b: Tensor, k: int, b_dec: Tensor) -> tuple[Tensor, Tensor]:
    """values and indices, after their comparison with fp64: as accurate as plain PyTorch, the best k but for ties."""
    values, indices = rk.topk_encode(x, W, b, k, b_dec, backend=backend)
    exact = reference.topk_encode(*double(x, W, b), k, b_dec.detach().cpu().double())
    close(values.detach(), exact[0], reference.topk_encode(x, W, b, k, b_dec)[0], 2)
    assert (indices.cpu() == exact[1]).double().mean() > 0.99
    return values, indices


@encoders
@every_dtype
@pytest.mark.parametrize(("n", "d", "n_latents", "k"), [(70, 130, 1025, 33), (300, 72, 600, 7), (5, 9000, 40, 4)])
def test_encode_and_its_gradients(backend, device, dtype, n, d, n_latents, k):
    start = torch.randn(n, d), torch.randn(n_latents, d) / d**0.5, torch.randn(n_latents), torch.randn(d)
    start[2][3] = 10  # a latent that every row selects: more entries than one segment of the backward where n > 256
    leaves = [
        t.to(device, u).requires_grad_() for t, u in zip(start, (dtype, dtype, *[torch.float32] * 2), strict=True)
    ]
    x, W, _, b_dec = leaves
    values, indices = check_encode(backend, x, W, leaves[2], k, b_dec)
    grad = torch.randn(n, k).to(device, dtype)
    values.backward(grad)
    ran(backend, "topk_encode", "topk_encode_backward")
    for wanted in (True, False):
        inputs = [t.detach() for t in (grad, values, indices, x, W, b_dec)]
        exact = double(*inputs) if wanted else inputs
        gradients = [*reference.topk_encode_backward(*exact, True, True)]
        gradients.append(-(exact[4].T @ gradients[2].to(exact[4].dtype)).to(exact[5].dtype))
        if wanted:
            fp64 = gradients
    for leaf, exact, own in zip(leaves, fp64, gradients, strict=True):
        close(leaf.grad, exact, own, 3)


@everywhere
@every_dtype
@pytest.mark.parametrize(
    ("n", "d", "n_latents", "k"), [(300, 128, 4096, 32), (70, 8, 1000, 3), (257, 64, 33, 32), (64, 128, 4096, 1)]
)
def test_the_path_of_narrow_rows(backend, device, dtype, n, d, n_latents, k):
    """Ties, accuracy and repeatability of what Triton takes for d <= 128 (`encode.path_of`); its paths agree."""
    x, W, b, b_dec = integers(n, d, dtype=dtype), integers(n_latents, d, dtype=dtype), integers(n_latents), integers(d)
    inputs = [t.to(device) for t in (x, W, b, b_dec)]
    values, indices = rk.topk_encode(*inputs[:3], k, inputs[3], backend=backend)
    ran(backend, "topk_encode")
    want_values, want_indices = reference.topk_encode(*double(x, W, b), k, b_dec.double())
    assert torch.equal(indices.cpu(), want_indices)
    assert torch.equal(values.cpu(), want_values.to(dtype))
    if backend == "triton":
        from refusal_kernels.triton_kernels import encode

        assert encode.path_of(W.shape, k) == "grouped"
        chunked = encode.topk_encode(*inputs[:3], k, inputs[3], path="chunked")
        assert all(torch.equal(a, b) for a, b in zip((values, indices), chunked, strict=True))
    noise = [t.to(device, u) for t, u in ((torch.randn(n, d), dtype), (torch.randn(n_latents, d) / d**0.5, dtype))]
    noise += [torch.randn(n_latents, device=device), torch.randn(d, device=device)]
    first = check_encode(backend, *noise[:3], k, noise[3])
    again = rk.topk_encode(*noise[:3], k, noise[3], backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize(("rows", "columns", "d"), [(70, 130, 33), (256, 512, 64), (1, 1, 1)])
def test_tritons_own_product(dtype, rows, columns, d):
    """What encodes where cuBLAS cannot write fp32 from 16-bit operands, which no operator's test would reach here."""
    from refusal_kernels.triton_kernels import encode

    x, W = integers(rows, d, dtype=dtype).cuda(), integers(columns, d, dtype=dtype).cuda()
    out = torch.empty(rows, columns, device="cuda")
    encode.triton_project(x, W, out)
    assert torch.equal(out.cpu(), (x.double() @ W.double().T).float().cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_step_with_the_8_bit_screen(autocast):
    """Its encoder alone is another: the step on Triton, from the same code."""
    x, parameters, dead = sae("cuda", 300, 64, 900)
    results = []
    for backend in ("triton-int8", "triton"):
        leaves = copies(parameters, "cuda", torch.float32)
        optimizer = rk.SAEAdam(*leaves, lr=0.01, eps=1e-2)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            out = rk.sae_step(x, *leaves, 7, dead=dead, k_aux=4, optimizer=optimizer, backend=backend)
        ran(backend, "sae_step")
        results.append([out.indices, out.loss, *(leaf.detach() for leaf in leaves)])
    assert (results[0][0] == results[1][0]).double().mean() > 0.99
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=0)
    for a, b, start in zip(results[0][2:], results[1][2:], parameters, strict=True):
        assert (a - b).abs().mean() < 0.01 * (b - start.detach()).abs().mean()  # an entry that nearly ties may differ


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize(("n", "n_latents"), [(1100, 20000), (600, 9001)])
def test_the_8_bit_screen_takes_rows_made_of_latents(dtype, n, n_latents):
    """Several chunks, the guess from the first rows, cuBLAS's integer product; the screen settles nearly all rows."""
    from refusal_kernels.triton_kernels import int8_screen

    d, k = 1024, 20
    W = torch.nn.functional.normalize(torch.randn(n_latents, d), dim=1)
    x = (W[torch.randint(0, n_latents, (n, k))] * (1 + torch.rand(n, k, 1))).sum(1) + 0.1 * torch.randn(n, d) / d**0.5
    b, b_dec = torch.randn(n_latents) / 100, torch.randn(d) / 100
    inputs = [t.to("cuda", u) for t, u in ((x + b_dec, dtype), (W, dtype), (b, torch.float32))]
    values, indices = check_encode("triton-int8", *inputs, k, b_dec.cuda())
    again = rk.topk_encode(*inputs, k, b_dec.cuda(), backend="triton-int8")
    assert torch.equal(values, again[0])
    assert torch.equal(indices, again[1])
    computed = int8_screen.screen(*inputs, k, b_dec.cuda(), values, indices)
    assert (computed >= 0).float().mean() > 0.8
    assert computed[(computed >= 0) & (computed < n_latents)].float().mean() < 10 * k


@encoders
@every_dtype
def test_encode_far_from_the_origin(backend, device, dtype):
    """b_dec a thousand times the signal, and latents that do not average out: the product may not cancel."""
    b_dec = 1000 * (1 + torch.rand(2000))
    x, W = (b_dec + torch.randn(40, 2000)).to(device, dtype), torch.rand(500, 2000).to(device, dtype)
    check_encode(backend, x, W, torch.randn(500, device=device), 5, b_dec.to(device))


@decoders
@every_dtype
@every_index
@pytest.mark.parametrize(
    ("n", "k", "n_latents", "d"),
    [
        (5, 3, 7, 1),
        (33, 1, 9, 64),
        (600, 4, 30, 130),
        (9, 65, 64, 1032),
        (4, 6, 9, 5000),
        (3, 5, 9, 9000),
        (0, 4, 5, 8),
    ],
)
def test_decode_and_its_gradients(backend, device, dtype, index_dtype, n, k, n_latents, d):
    indices = torch.randint(0, n_latents, (n, k))  # duplicates within rows, and latents with more than 256 entries
    values, W = torch.randn(n, k).to(dtype), torch.randn(n_latents, d).to(dtype)
    values[::2, -1] = 0
    b_dec, grad = torch.randn(d), torch.randn(n, d).to(dtype)
    values, W, b_dec, grad, indices = (t.to(device) for t in (values, W, b_dec, grad, indices))
    leaves = [t.clone().requires_grad_() for t in (values, W, b_dec)]
    x_hat = rk.sparse_decode(leaves[0], indices.to(index_dtype), *leaves[1:], backend=backend)
    x_hat.backward(grad)
    ran(backend, "sparse_decode", "sparse_decode_backward")
    exact = reference.sparse_decode(*double(values, indices, W, b_dec))
    close(x_hat.detach(), exact, reference.sparse_decode(values, indices, W, b_dec), 2)
    exact = reference.sparse_decode_backward(*double(grad, values, indices, W), True, True)
    own = reference.sparse_decode_backward(grad, values, indices, W, True, True)
    for leaf, a, b in zip(leaves, exact, own, strict=False):
        close(leaf.grad, a, b, 3)
    close(leaves[2].grad, double(grad)[0].sum(0), grad.sum(0, dtype=torch.float32), 3)
    for alone in (0, 1):  # each gradient without the other takes kernels of its own
        single = [t.clone().requires_grad_(i == alone) for i, t in enumerate((values, W))]
        rk.sparse_decode(single[0], indices.to(index_dtype), single[1], backend=backend).backward(grad)
        close(single[alone].grad, exact[alone], own[alone], 3)


# --- the training step ----------------------------------------------------------------------------------------------


def sae(device: str, n: int, d: int, n_latents: int, hot: float = 0.0) -> tuple[Tensor, list[Tensor], Tensor]:
    """x, parameters, dead latents; those are positive at times, hardly ever chosen. With hot = 4, latent 3 always."""
    W_enc, b_enc = torch.randn(n_latents, d) / d**0.5, torch.randn(n_latents) / 10
    dead = torch.arange(5, n_latents, 9)
    b_enc[3], b_enc[dead] = hot, -2
    W_dec = torch.nn.functional.normalize(torch.randn(n_latents, d), dim=1)
    parameters = [t.to(device).requires_grad_() for t in (W_enc, b_enc, W_dec, torch.randn(d) / 10)]
    return torch.randn(n, d).to(device), parameters, dead.to(device)


def compared(backend: str, device: str) -> list[tuple[str, str, torch.dtype]]:
    """What runs: the back-end, plain PyTorch in the same dtype on the same device, the fp64 reference."""
    return [(backend, device, torch.float32), ("reference", device, torch.float32), ("reference", "cpu", torch.float64)]


def copies(parameters: list[Tensor], device: str, dtype: torch.dtype) -> list[Tensor]:
    return [p.detach().to(device, dtype, copy=True).requires_grad_() for p in parameters]


@steps
@pytest.mark.parametrize(("n", "d", "n_latents", "k"), [(70, 40, 300, 7), (150, 24, 90, 5), (20, 5000, 40, 3)])
@pytest.mark.parametrize("with_dead", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_step_gradients(backend, device, n, d, n_latents, k, with_dead, autocast):
    x, parameters, dead = sae(device, n, d, n_latents)
    if autocast is not None:  # what autocast rounds is rounded before, so that fp64 starts from the same numbers
        with torch.no_grad():
            parameters = [p.to(autocast).float().requires_grad_() for p in parameters]
            x = x.to(autocast).float()
    results = []
    for where, on, dtype in compared(backend, device):
        leaves = copies(parameters, on, dtype)
        with torch.autocast(on, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            out = rk.sae_step(
                x.to(on, dtype), *leaves, k, dead=dead.to(on) if with_dead else None, k_aux=4, backend=where
            )
        ran(where, "sae_step")
        results.append((out, [leaf.grad for leaf in leaves]))
    (mine, _), (torch_own, _), (fp64, _) = results
    assert (mine.indices.cpu() == fp64.indices).double().mean() > 0.99
    assert torch.equal(mine.fire_counts, torch_own.fire_counts)
    for name in ("loss", "mse", "aux_loss", "fvu", "l0"):
        rtol = 1e-5 if autocast is None else torch.finfo(autocast).eps
        torch.testing.assert_close(getattr(mine, name).double().cpu(), getattr(fp64, name).double(), rtol=rtol, atol=0)
    for actual, own, exact in zip(*(gradients for _, gradients in results), strict=True):
        close(actual, exact, own, 3)
    if with_dead:
        assert mine.aux_loss > 0
        assert leaves[0].grad[dead.cpu()].any()


@steps
@pytest.mark.parametrize(("n", "d", "n_latents", "k"), [(70, 40, 300, 7), (150, 24, 90, 5), (20, 5000, 40, 3)])
@pytest.mark.parametrize("with_dead", [False, True])
@pytest.mark.parametrize(("max_grad_norm", "autocast"), [(None, None), (0.05, None), (None, torch.bfloat16)])
def test_step_with_optimizer(backend, device, n, d, n_latents, k, with_dead, max_grad_norm, autocast):
    x, parameters, dead = sae(device, n, d, n_latents)
    if autocast is not None:  # as above: what autocast rounds is rounded before
        with torch.no_grad():
            parameters = [p.to(autocast).float().requires_grad_() for p in parameters]
            x = x.to(autocast).float()
    results = []
    for where, on, dtype in compared(backend, device):
        leaves = copies(parameters, on, dtype)
        # A large eps: Adam's first steps are the sign of the gradient otherwise, and the sign of a rounding is a coin.
        optimizer = rk.SAEAdam(*leaves, lr=0.01, eps=1e-2, max_grad_norm=max_grad_norm)
        for _ in range(2 if autocast is None else 1):  # the second would start from weights that autocast rounds
            with torch.autocast(on, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                rk.sae_step(
                    x.to(on, dtype), *leaves, k, dead=dead.to(on) if with_dead else None, k_aux=4, optimizer=optimizer,
                    backend=where,
                )  # fmt: skip
        ran(where, "sae_step")
        if where in ("triton", "cuda") and max_grad_norm is None:
            assert optimizer._gradient_buffers is None  # the step was fused: no gradient of a weight was written
        moments = [optimizer.state[leaf][m] for leaf in leaves for m in ("exp_avg", "exp_avg_sq")]
        results.append([*(leaf.detach() for leaf in leaves), *moments])
    for actual, own, exact in zip(*results, strict=True):
        close(actual, exact, own, 3)


@steps
@pytest.mark.parametrize("d", [40, 5000])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_step_of_heads_with_dead_latents(backend, device, d, moments):
    """Lists of dead latents of different lengths; beside a loop of steps over the heads."""
    made = [sae(device, 70, d, 120, hot=4) for _ in range(3)]
    x, dead = torch.stack([m[0] for m in made]), torch.stack([m[2] for m in made])
    dead[1, 4:], dead[2] = -1, -1
    start = [torch.stack([m[1][i].detach() for m in made]) for i in range(4)]

    def trained(x: Tensor, parameters: list[Tensor], dead: Tensor) -> list[Tensor]:
        leaves = [p.clone().requires_grad_() for p in parameters]
        # eps as above.
        optimizer = rk.SAEAdam(*leaves, lr=0.01, eps=1e-2, moment_dtype=moments)
        for _ in range(2):
            out = rk.sae_step(x, *leaves, 5, dead=dead, k_aux=4, optimizer=optimizer, backend=backend)
        ran(backend, "sae_step")
        return [out.loss, out.aux_loss, *leaves]

    together = trained(x, start, dead)
    apart = [trained(x[h], [p[h] for p in start], dead[h][dead[h] >= 0]) for h in range(3)]
    for mine, theirs in zip(together, zip(*apart, strict=True), strict=True):
        # 2^-7: a moment in bf16 is rounded by its element's number, which is another one in the loop.
        rtol = 1e-3 if moments == torch.float32 else 2**-7
        torch.testing.assert_close(mine, torch.stack(theirs), rtol=rtol, atol=1e-3)
    assert not together[1][2]
    assert (together[1][:2] > 0).all()


@everywhere
@pytest.mark.parametrize("d", [40, 5000, 9000])
@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
@pytest.mark.parametrize("plain", [False, True])
def test_adam(backend, device, d, max_grad_norm, plain):
    _, parameters, _ = sae(device, 1, d, 12)
    gradients = [[torch.randn(p.shape) for p in parameters] for _ in range(2)]
    results = []
    for where, on, dtype in compared(backend, device):
        leaves = copies(parameters, on, dtype)
        # eps as above.
        options = {
            "eps": 1e-2,
            "unit_norm_decoder": not plain,
            "remove_parallel_grad": not plain,
            "max_grad_norm": max_grad_norm,
        }
        optimizer = rk.SAEAdam(*leaves, lr=0.01, backend=where, **options)
        for step in gradients:
            for leaf, gradient in zip(leaves, step, strict=True):
                leaf.grad = gradient.to(on, dtype)
            optimizer.step()
        ran(where, "sae_adam")
        results.append([leaf.detach() for leaf in leaves])
    for actual, own, exact in zip(*results, strict=True):
        close(actual, exact, own, 3)


@steps
@pytest.mark.parametrize("d", [40, 3000, 5000])
@pytest.mark.parametrize("with_dead", [False, True])
def test_state_in_fewer_bytes(backend, device, d, with_dead):
    """Split weights take the steps of fp32 ones under autocast, and bf16 moments lie beside the fp32 ones: the kernels
    that read and write them, fused and not."""
    x, parameters, dead = sae(device, 300, d, 60, hot=4)
    weights = [p.detach().to(torch.bfloat16) if p.dim() == 2 else p.detach() for p in parameters]
    after = []
    for split, moments in (
        (False, torch.float32),
        (True, torch.float32),
        (False, torch.bfloat16),
        (True, torch.bfloat16),
    ):
        leaves = [p.to(p.dtype if split else torch.float32, copy=True).requires_grad_() for p in weights]
        # eps as above: where the gradient is all rounding, its sign is.
        optimizer = rk.SAEAdam(*leaves, lr=0.01, eps=1e-2, split_master=split, moment_dtype=moments, backend=backend)
        for _ in range(2):
            with torch.autocast(device, torch.bfloat16):
                rk.sae_step(
                    x.bfloat16(), *leaves, 5, dead=dead if with_dead else None, k_aux=4, optimizer=optimizer,
                    backend=backend,
                )  # fmt: skip
        for leaf in leaves:
            leaf.grad = leaf.detach() / 16
        optimizer.step()
        ran(backend, "sae_step", "sae_adam")
        after.append(([optimizer.master(p) for p in leaves], [m for p in leaves for m in optimizer.moments(p)]))
    for masters, states in after[1:]:
        for a, b in zip(masters, after[0][0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        for a, b in zip(states, after[0][1], strict=True):
            torch.testing.assert_close(a.float(), b, rtol=2**-5, atol=1e-3)
    assert all(m.dtype == torch.bfloat16 for m in (*after[3][1][:2], *after[3][1][4:6]))


@steps
@pytest.mark.parametrize("d", [40, 1024, 3000])
@pytest.mark.parametrize("with_dead", [False, True])
def test_a_step_with_copies_is_a_step_that_casts(backend, device, d, with_dead):
    """To the bit, over two steps: the second reads the copies that the first has written."""
    x, parameters, dead = sae(device, 300, d, 60, hot=4)
    after = []
    for copy_dtype in (torch.bfloat16, None):
        leaves = copies(parameters, device, torch.float32)
        optimizer = rk.SAEAdam(*leaves, lr=0.01, copy_dtype=copy_dtype, backend=backend)
        for _ in range(2):
            with torch.autocast(device, torch.bfloat16):
                out = rk.sae_step(
                    x.bfloat16(), *leaves, 5, dead=dead if with_dead else None, k_aux=4, optimizer=optimizer,
                    backend=backend,
                )  # fmt: skip
        ran(backend, "sae_step")
        if copy_dtype is not None:
            for weight in leaves[::2]:
                assert torch.equal(optimizer.copy_of(weight), weight.detach().to(torch.bfloat16))
        after.append([out.values, *(leaf.detach() for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*after, strict=True))


# --- codes whose rows have different lengths ------------------------------------------------------------------------


@everywhere
@every_dtype
@pytest.mark.parametrize(
    ("n", "d", "n_latents", "k"), [(5, 5, 77, 3), (300, 64, 9000, 70), (4, 16, 61, 61), (0, 8, 64, 4)]
)
def test_csr_encoders_are_exact_on_ties(backend, device, dtype, n, d, n_latents, k):
    x, W, b, b_dec = integers(n, d, dtype=dtype), integers(n_latents, d, dtype=dtype), integers(n_latents), integers(d)
    inputs = [t.to(device) for t in (x, W, b, b_dec)]
    threshold = integers(n_latents) * 3
    for code, want in (
        (
            rk.batch_topk_encode(*inputs[:3], k, inputs[3], backend=backend),
            reference.batch_topk_encode(*double(x, W, b), k, b_dec.double()),
        ),
        (
            rk.threshold_encode(*inputs[:3], threshold.to(device), inputs[3], backend=backend),
            reference.threshold_encode(*double(x, W, b, threshold), b_dec.double()),
        ),
    ):
        assert torch.equal(code[0].cpu(), want[0].to(dtype))
        assert torch.equal(code[1].cpu(), want[1])
        assert torch.equal(code[2].cpu(), want[2])
    ran(backend, "batch_topk_encode", "threshold_encode")


@everywhere
@every_dtype
@pytest.mark.parametrize(("n", "d", "n_latents"), [(70, 130, 1025), (900, 72, 60), (5, 9000, 40)])
def test_csr_decode_and_gradients(backend, device, dtype, n, d, n_latents):
    """Rows of 0 to 12 entries, one latent in half of them, and the encoder's gradients of the same code."""
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randint(0, 13, (n,)).cumsum(0)])
    latents = torch.randint(0, n_latents, (int(offsets[-1]),))
    latents[::2] = 3
    start = torch.randn(latents.numel()), torch.randn(n_latents, d) / d**0.5, torch.randn(d)
    leaves = [t.to(device, u).requires_grad_() for t, u in zip(start, (dtype, dtype, torch.float32), strict=True)]
    values, W, b_dec = (leaf.detach() for leaf in leaves)
    grad, code = torch.randn(n, d).to(device, dtype), (latents.to(device), offsets.to(device))
    x_hat = rk.sparse_decode_csr(leaves[0], *(t.int() for t in code), *leaves[1:], backend=backend)
    x_hat.backward(grad)
    ran(backend, "sparse_decode_csr", "sparse_decode_csr_backward")
    exact = reference.sparse_decode_csr(*double(values, *code, W, b_dec))
    close(x_hat.detach(), exact, reference.sparse_decode_csr(values, *code, W, b_dec), 2)
    own = reference.sparse_decode_csr_backward(grad, values, *code, W, True, True)
    exacts = reference.sparse_decode_csr_backward(*double(grad, values, *code, W), True, True)
    encoder = rk.backends.BACKENDS[backend].primitive("csr_encode_backward")
    got = [leaves[0].grad, leaves[1].grad, *encoder(values, *code, grad, W, b_dec, True, True)]
    own += reference.csr_encode_backward(values, *code, grad, W, b_dec, True, True)
    exacts += reference.csr_encode_backward(*double(values, *code, grad, W, b_dec), True, True)
    for actual, e, o in zip(got, exacts, own, strict=True):
        close(actual, e, o, 3)


# --- what a value test does not see ---------------------------------------------------------------------------------


def everything(backend: str, device: str, dtype: torch.dtype, n: int, d: int, n_latents: int, k: int) -> list[Tensor]:
    """Each operator and gradient once, with int32 indices, hot latents where n > 256, AuxK and the optimiser."""
    torch.manual_seed(1)
    x, parameters, dead = sae(device, n, d, n_latents, hot=4)
    leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in (x, *parameters)]
    values, indices = rk.topk_encode(*leaves[:3], k, leaves[4], backend=backend)
    x_hat = rk.sparse_decode(values, indices.int(), *leaves[3:], backend=backend)
    x_hat.square().sum().backward()
    ran(backend, "topk_encode", "sparse_decode", "topk_encode_backward", "sparse_decode_backward")
    rk.sae_step(x, *parameters, k, dead=dead, k_aux=4, backend=backend)
    gradients = [p.grad.clone() for p in parameters]
    optimizer = rk.SAEAdam(*parameters, lr=0.01, backend=backend)
    out = rk.sae_step(x, *parameters, k, dead=dead, k_aux=4, optimizer=optimizer, backend=backend)
    optimizer.step()
    ran(backend, "sae_step", "sae_adam")
    return [values, indices, x_hat, *(leaf.grad for leaf in leaves), *gradients, *out, *parameters]


@steps
@every_dtype
def test_same_input_same_bits(backend, device, dtype):
    # A width that Triton encodes in chunks, and one that it does not (test_the_path_of_narrow_rows has more of it).
    for d in (136, 72):
        first, second = (everything(backend, device, dtype, 300, d, 700, 9) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.sanitizer
@steps
@every_dtype
def test_every_operator_once(backend, device, dtype):
    """Small enough for compute-sanitizer, which slows kernels down a hundredfold."""
    results = everything(backend, device, dtype, 5, 137, 90, 5)
    assert all(t.isfinite().all() for t in results if t.is_floating_point())


def codes_of_any_length(backend: str, device: str, dtype: torch.dtype, n: int, d: int, n_latents: int) -> list[Tensor]:
    """Each operator on CSR codes and its gradients once."""
    torch.manual_seed(1)
    start = torch.randn(n, d), torch.randn(n_latents, d) / d**0.5, torch.randn(n_latents), torch.randn(d)
    results = []
    for encoder, argument in ((rk.batch_topk_encode, 3), (rk.threshold_encode, 0.5)):
        leaves = [
            t.to(device, u).requires_grad_() for t, u in zip(start, (dtype, dtype, *[torch.float32] * 2), strict=True)
        ]
        values, latents, offsets = encoder(*leaves[:3], argument, leaves[3], backend=backend)
        W_dec = leaves[1].detach().clone().requires_grad_()
        x_hat = rk.sparse_decode_csr(values, latents, offsets, W_dec, leaves[3], backend=backend)
        x_hat.square().sum().backward()
        results += [values, latents, offsets, x_hat, W_dec.grad, *(leaf.grad for leaf in leaves)]
    ran(backend, "batch_topk_encode", "threshold_encode", "sparse_decode_csr", "sparse_decode_csr_backward")
    return [t.detach() for t in results]


@everywhere
@every_dtype
def test_same_codes_of_any_length(backend, device, dtype):
    first, second = (codes_of_any_length(backend, device, dtype, 300, 72, 700) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.sanitizer
@everywhere
@every_dtype
def test_codes_of_any_length_once(backend, device, dtype):
    assert all(t.isfinite().all() for t in codes_of_any_length(backend, device, dtype, 5, 37, 90))


@pytest.mark.sanitizer
@steps
def test_heads_once(backend, device):
    """The grouped encoder, and the step's kernels along their head axis."""
    made = [sae(device, 5, 37, 90) for _ in range(2)]
    x, dead = (torch.stack([m[i] for m in made]) for i in (0, 2))
    leaves = [torch.stack([m[1][i].detach() for m in made]).requires_grad_() for i in range(4)]
    optimizer = rk.SAEAdam(*leaves, lr=0.01)
    with torch.autocast(device, torch.bfloat16):
        out = rk.sae_step(x, *leaves, 5, dead=dead, k_aux=4, optimizer=optimizer, backend=backend)
    ran(backend, "sae_step")
    assert all(t.isfinite().all() for t in (*out, *leaves) if t.is_floating_point())


@pytest.mark.sanitizer
@pytest.mark.gpu
def test_8_bit_screen_once():
    x, parameters, _ = sae("cuda", 40, 64, 300)
    check_encode("triton-int8", x, *(p.detach() for p in parameters[:2]), 5, parameters[3].detach())
    ran("triton-int8", "topk_encode")


@pytest.mark.sanitizer
@pytest.mark.gpu
@every_dtype
@every_index
def test_cuda_decode_once(dtype, index_dtype):
    values, W = torch.randn(5, 4, device="cuda", dtype=dtype), torch.randn(9, 37, device="cuda", dtype=dtype)
    leaves = [t.requires_grad_() for t in (values, W)]
    indices = torch.randint(0, 9, (5, 4), device="cuda", dtype=index_dtype)
    rk.sparse_decode(leaves[0], indices, leaves[1], backend="cuda").sum().backward()
    ran("cuda", "sparse_decode", "sparse_decode_backward")
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def captured(device: str, call: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """`call` as a CUDA graph, after the warm-up that compiles its kernels; on a CPU the call itself."""
    if device == "cpu":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()

    def replay() -> list[Tensor]:
        graph.replay()
        return outputs

    return replay


@steps
@every_dtype
@pytest.mark.parametrize(
    ("n", "d", "n_latents", "k"), [(70, 130, 1025, 20), (5, 128, 4096, 32), (3, 40, 61, 61), (2, 8, 1300, 200)]
)
def test_heads_of_integers_are_exact_and_can_be_captured(backend, device, dtype, n, d, n_latents, k):
    """Encode and decode of three heads in one call; on a GPU the grouped encoder, and chunks where k is 200."""
    torch.use_deterministic_algorithms(False)
    x, W = (integers(3, size, d, dtype=dtype).to(device) for size in (n, n_latents))
    b_enc, b_dec = integers(3, n_latents).to(device), integers(3, d).to(device)

    def call() -> list[Tensor]:
        values, indices = rk.topk_encode(x, W, b_enc, k, b_dec, backend=backend)
        return [values, indices, rk.sparse_decode(values, indices, W, b_dec, backend=backend)]

    values, indices, x_hat = captured(device, call)()
    ran(backend, "topk_encode", "sparse_decode")
    for h in range(3):
        exact_values, exact_indices = reference.topk_encode(*double(x[h], W[h], b_enc[h]), k, b_dec[h].cpu().double())
        assert torch.equal(indices[h].cpu(), exact_indices)
        assert torch.equal(values[h].cpu(), exact_values.to(dtype))
        alone = rk.sparse_decode(values[h], indices[h], W[h], b_dec[h], backend=backend)
        assert torch.equal(x_hat[h], alone)


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize(("n", "d", "n_latents", "k"), [(70, 130, 1025, 20), (5, 128, 4096, 32), (300, 64, 4096, 64)])
def test_three_keys_of_a_group_give_the_code_of_two(dtype, n, d, n_latents, k):
    """Triton's other path for heads, which nothing chooses yet."""
    from refusal_kernels.triton_kernels import encode

    x, W = (integers(3, size, d, dtype=dtype).cuda() for size in (n, n_latents))
    b_enc, b_dec = integers(3, n_latents).cuda(), integers(3, d).cuda()
    assert encode.path_of(W.shape, k) == "grouped"
    two, three = (encode.topk_encode(x, W, b_enc, k, b_dec, path=path) for path in encode.PATHS[:2])
    assert all(torch.equal(a, b) for a, b in zip(two, three, strict=True))


@steps
@pytest.mark.parametrize("autocast", [False, True])
def test_step_into_gradients_can_be_captured(backend, device, autocast):
    """Not the optimiser's step: Adam's step counter is a number on the host, which a graph would freeze."""
    torch.use_deterministic_algorithms(False)  # the kernels that people run
    x, parameters, dead = sae(device, 70, 40, 300)
    batch = x.clone()
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)

    def step() -> list[Tensor]:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            out = rk.sae_step(batch, *parameters, 7, dead=dead, backend=backend)
            x_hat = rk.sparse_decode(out.values, out.indices, *(p.detach() for p in parameters[2:]), backend=backend)
        return [*out, x_hat]

    replay = captured(device, step)
    for now in (x, x.flip(0) * 2):
        batch.copy_(now)
        results = []
        for call in (replay, step):
            for parameter in parameters:
                parameter.grad.zero_()
            outputs = call()
            results.append([t.clone() for t in (*outputs, *(p.grad for p in parameters))])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@contextlib.contextmanager
def waiting_is_an_error(device: str):
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@steps
@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_step_with_dead_latents_never_waits_for_the_device(backend, device, max_grad_norm):
    torch.use_deterministic_algorithms(False)
    x, parameters, dead = sae(device, 70, 40, 300)
    optimizer = rk.SAEAdam(*parameters, lr=1e-4, max_grad_norm=max_grad_norm)
    tracker = rk.DeadLatents(300, dead_after_tokens=140, refresh_every=10, device=device)
    rk.sae_step(x, *parameters, 7, dead=dead, optimizer=optimizer, backend=backend)  # compiles
    with waiting_is_an_error(device):
        for _ in range(15):
            out = rk.sae_step(x, *parameters, 7, dead=dead, k_aux=4, optimizer=optimizer, backend=backend)
            tracker.update(out.fire_counts, x.shape[0])
            rk.sae_step(x, *parameters, 7, dead=tracker.rows, backend=backend)
    if device == "cuda":
        torch.cuda.synchronize()
        tracker.update(out.fire_counts, x.shape[0])
    ran(backend, "sae_step")
    assert torch.isin(dead, tracker.rows).all()


# --- projection -------------------------------------------------------------------------------------------------------


def a_basis(n: int, r: int, device: str) -> Tensor:
    return torch.linalg.qr(torch.randn(n, r))[0].contiguous().to(device)


PROJECTIONS = [
    ((4096, 16), 0, 8),
    ((16, 14336), 1, 128),
    ((300, 700), 0, 65),
    ((3, 130, 5), 1, 33),
    ((90,), 0, 90),
    ((0, 9), 1, 2),
    ((2048, 35), 0, 64),
    ((20, 1024), 1, 256),
    ((400, 30), 0, 300),
]


@projections
@every_dtype
@pytest.mark.parametrize(("shape", "dim", "r"), PROJECTIONS)
def test_project_out(backend, device, dtype, shape, dim, r):
    g, u, direction = torch.randn(shape).to(dtype), a_basis(shape[dim], r, "cpu"), torch.randn(shape[dim])
    for against in (None, direction @ u):
        want, own = (
            reference.project_out(x, dim, b, 0.7, None if against is None else against.to(b))
            for x, b in ((g.double(), u.double()), (g.to(device), u.to(device)))
        )
        only_against = None if against is None else direction.to(device)
        y = rk.project_out(g.to(device), u.to(device), dim, 0.7, only_against=only_against, backend=backend)
        ran(backend, "project_out")
        if against is None:  # with a direction, a fibre at right angles may go either way
            # 1: what is left of a fibre inside the span is rounding of numbers of that size.
            rounding = 2 * torch.finfo(dtype).eps * want.abs().max().clamp(min=1) if want.numel() else 0
            assert (
                want.numel() == 0
                or (y.double().cpu() - want).abs().max() <= 2 * (own.double().cpu() - want).abs().max() + rounding
            )
        again = rk.project_out(g.to(device), u.to(device), dim, 0.7, only_against=only_against, backend=backend)
        assert torch.equal(y, again)


@pytest.mark.sanitizer
@projections
def test_projection_plan_equals_single_calls_and_never_waits(backend, device):
    u, v = a_basis(48, 5, device), a_basis(2100, 20, device)
    base = torch.randn(48, 64, device=device)
    entries = [
        (torch.randn(48, 16, device=device), u, 0),
        (torch.randn(16, 48, device=device).to(torch.bfloat16), u, 1),
        (torch.randn(3, 48, 5, device=device).to(torch.float16), u, 1),
        (torch.randn(40, 2100, device=device).T, v, 0),
        (base[:, :30], u, 0),
        (base[:, 30:], u, 0),
    ]
    directions = [None, torch.randn(48, device=device), None, None, torch.randn(48, device=device), None]
    expected = [
        rk.project_out(t, b, dim, 0.6, only_against=d, backend=backend)
        for (t, b, dim), d in zip(entries, directions, strict=True)
    ]
    copies = [t.clone() for t, _, _ in entries]
    plan = rk.ProjectionPlan(entries, 0.6, only_against=directions, backend=backend)
    plan.apply_()  # compiles, makes its tables
    for (tensor, _, _), copy in zip(entries, copies, strict=True):
        tensor.copy_(copy)
    with waiting_is_an_error(device):
        plan.apply_()
    ran(backend, "project_out")
    # The same sums in the same order; only how multiply and add are fused may differ between tile sizes.
    for (tensor, _, _), want in zip(entries, expected, strict=True):
        eps = torch.finfo(tensor.dtype).eps
        torch.testing.assert_close(tensor, want, rtol=2 * eps, atol=8 * eps)


@pytest.mark.sanitizer
@projections
def test_projected_adam_is_adamw_and_the_projection_of_its_update_and_never_waits(backend, device):
    """Fused where it fits, at three ranks, and not; gradients lie elsewhere at every step, as after zero_grad."""
    shapes = [((2112, 16), 0, 100), ((32, 1088), 1, 100), ((64, 16), 0, 16), ((16, 192), 1, 5), ((50, 7), 0, 3)]
    weights = [torch.randn(shape) for shape, _, _ in shapes]
    bases = [a_basis(shape[dim], r, "cpu") for shape, dim, r in shapes]
    gradients = [[torch.randn_like(w) for w in weights] for _ in range(3)]

    def stepped(where: str, dtype: torch.dtype, by: str) -> list[Tensor]:
        moved = [torch.nn.Parameter(w.to(where, dtype, copy=True)) for w in weights]
        held = [(p, u.to(where, dtype), dim) for p, u, (_, dim, _) in zip(moved, bases, shapes, strict=True)]
        optimizer = rk.ProjectedAdamW(moved, held, lr=0.02, weight_decay=0.3, strength=0.7, backend=by)
        for i, of_step in enumerate(gradients):
            for p, g in zip(moved, of_step, strict=True):
                p.grad = g.to(where, dtype)
            with waiting_is_an_error(where) if i else contextlib.nullcontext():  # the first compiles, makes its tables
                optimizer.step()
        ran(by, "projected_adam")
        return [p.detach() for p in moved]

    exact, own = stepped("cpu", torch.float64, "reference"), stepped(device, torch.float32, "reference")
    ours, again = (stepped(device, torch.float32, backend) for _ in range(2))
    for p, q, e, o in zip(ours, again, exact, own, strict=True):
        close(p, e, o, 2)
        assert torch.equal(p, q)


@projections
def test_projections_in_a_graph(backend, device):
    g, u = torch.randn(16, 300, device=device), a_basis(300, 9, device)
    inside = g.clone()
    plan = rk.ProjectionPlan([(inside, u, 1)], backend=backend)

    def step() -> list[Tensor]:
        inside.copy_(g)
        plan.apply_()
        return [rk.project_out(g, u, 1, 0.5, backend=backend), inside.clone()]

    replay = captured(device, step)
    for _ in range(2):
        g.copy_(torch.randn(16, 300))
        results = [[t.clone() for t in call()] for call in (replay, step)]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# LoRA matrices, and the side of the projection: slabs that are full and part of one, several blocks of fibres.
LORA = [((4096, 16), 0), ((16, 14336), 1), ((1088, 48), 0), ((32, 1152), 1), ((16, 128), 1)]


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("r", [8, 20, 64, 100])
def test_projection_in_one_launch(dtype, r):
    """Triton's other path for LoRA matrices, which nothing chooses yet."""
    from refusal_kernels.triton_kernels import lora_projection, lora_projection_lagged

    tensors, dims = [torch.randn(shape).to(dtype) for shape, _ in LORA], [dim for _, dim in LORA]
    bases = [a_basis(t.shape[dim], r, "cpu") for t, dim in zip(tensors, dims, strict=True)]
    against, against_of = [torch.randn(r)], [-1, 0, 0, -1, -1]

    def projected(prepare: Callable[..., Callable[[], None]]) -> list[Tensor]:
        inside, moved = ([t.cuda() for t in of] for of in (tensors, bases))
        run = prepare(inside, dims, moved, list(range(len(LORA))), [against[0].cuda()], against_of, 0.7)
        run()
        assert not getattr(run, "counters", torch.zeros(1)).any()
        return inside

    ours, again, two = map(projected, [lora_projection_lagged.prepare] * 2 + [lora_projection.prepare])
    for t, dim, u, a, *results in zip(tensors, dims, bases, against_of, ours, again, two, strict=True):
        exact, own = (
            reference.project_out(t.to(at, of), dim, u.to(at, wide), 0.7, None if a < 0 else against[0].to(at, wide))
            for at, of, wide in (("cpu", torch.float64, torch.float64), ("cuda", dtype, torch.float32))
        )
        for result in results:
            close(result, exact, own, 2)
        assert torch.equal(results[0], results[1])


@pytest.mark.gpu
def test_448_matrices_in_one_launch_by_replays_of_a_graph():
    """Those of an 8B model: fifty times as many programs as run at a time, which wait for one another in their order or
    not at all, and leave the counters as they found them."""
    from refusal_kernels.triton_kernels import lora_projection_lagged

    linears = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)] * 32
    shapes = [shape for inputs, outputs in linears for shape in ((16, inputs), (outputs, 16))]
    dims, sizes = [1, 0] * len(linears), [1024, 4096, 14336]
    bases = [a_basis(n, 64, "cuda") for n in sizes]
    tensors = [torch.randn(shape, device="cuda") for shape in shapes]
    basis_of = [sizes.index(max(shape)) for shape in shapes]
    one = lora_projection_lagged.prepare(tensors, dims, bases, basis_of, [], [-1] * len(tensors), 1.0)

    def step() -> list[Tensor]:
        one()
        return tensors

    replay = captured("cuda", step)
    for _ in range(2):
        for t in tensors:
            t.normal_()
        before = [t.clone() for t in tensors]
        one.sums.fill_(math.nan)
        one.partial.fill_(math.nan)
        replay()
        assert not one.counters.any()
        wrong = []
        for t, old, dim, b in zip(tensors, before, dims, basis_of, strict=True):
            u, g = bases[b].double(), old.double()
            exact = g - (u @ (u.T @ g) if dim == 0 else (g @ u) @ u.T)
            wrong.append((t - exact).abs().max() / exact.abs().max())
        assert torch.stack(wrong).max().item() <= 1e-5
