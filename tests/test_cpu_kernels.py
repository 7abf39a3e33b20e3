"""The C++ kernels through torch.ops.refusal_kernels_cpu, each instruction set in turn, against plain PyTorch in fp64.

The operators' contract is tested elsewhere on every back-end; here are the raw primitives, the paths inside them
(tiles, panels, chunks, splits over latents, compaction of candidates) and what only this back-end promises: the same
bits for any number of threads, a bounded workspace, nothing written outside the outputs.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

from refusal_kernels import native

if native.load_error() is not None:
    pytest.skip(f"the CPU kernels are not there: {native.load_error()}", allow_module_level=True)

ops = torch.ops.refusal_kernels_cpu
ISAS = ("default", "avx2", "avx512")
ENCODE_ISAS = (*ISAS, "avx512_vnni")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Relative to the largest entry: one rounding to the row dtype, plus the sums' own error.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-13, torch.bfloat16: 5e-3, torch.float16: 7e-4}


@pytest.fixture(autouse=True)
def _seed_and_poison():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    # Fresh outputs are filled with NaN and the largest integer: an element nobody writes is seen.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    ops.set_isa("auto")


def use_isa(name):
    try:
        ops.set_isa(name)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    assert ops.isa() == name
    return name


@pytest.fixture(params=ISAS)
def isa(request):
    return use_isa(request.param)


@pytest.fixture(params=ENCODE_ISAS)
def encode_isa(request):
    """Only the encoder has a kernel of its own for the last one (tests/test_screen.py tests its screen)."""
    return use_isa(request.param)


def compute(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def problem(N, d, F, dtype):
    ct = compute(dtype)
    x, W = torch.randn(N, d).to(dtype), (torch.randn(F, d) / max(d, 1) ** 0.5).to(dtype)
    return x, W, (0.1 * torch.randn(F)).to(ct), (0.1 * torch.randn(d)).to(ct)


def pre_activations(x, W, b_enc, b_dec):
    """In fp64, from the operands as they are stored."""
    centred = x.to(compute(x.dtype)) - (0 if b_dec is None else b_dec)
    return centred.double() @ W.double().T + b_enc.double()


def best(pre, k):
    values, indices = torch.sort(pre.relu(), dim=1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


def dense(values, indices, F):
    return torch.zeros(len(values), F, dtype=torch.float64).scatter_add_(1, indices.long(), values.double())


def assert_close(got, expected, dtype):
    assert got.shape == expected.shape
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=TOLERANCE[dtype] * scale + 1e-12)


# ---- encode --------------------------------------------------------------------------------------

# One row and one number; ragged everything; more rows than a panel; k = F; d beyond one depth block; many tiles.
ENCODE_SHAPES = ((1, 1, 1, 1), (5, 7, 13, 3), (101, 65, 301, 17), (49, 33, 130, 130), (3, 1500, 71, 9), (0, 4, 9, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ENCODE_SHAPES)
def test_encode(encode_isa, shape, dtype):
    N, d, F, k = shape
    x, W, b_enc, b_dec = problem(N, d, F, dtype)
    for shift in (b_dec, None):
        pre = pre_activations(x, W, b_enc, shift)
        values, indices = ops.topk_encode(x, W, b_enc, k, shift)
        assert values.dtype == dtype
        assert indices.dtype == torch.int64
        assert_close(values, best(pre, k)[0], dtype)
        # Rounding may swap near-equal latents, so the chosen ones are judged by their own exact pre-activation.
        assert_close(values, torch.gather(pre.relu(), 1, indices), dtype)
        assert all(len(set(row)) == k for row in indices.tolist())


def integers(*shape, dtype):
    """Small integers: every product and sum is exact, so indices must be exactly those of a stable sort."""
    return torch.randint(-2, 3, shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(97, 5, 613, 40), (700, 3, 64, 64), (9, 17, 2000, 1)])
def test_encode_ties_go_to_the_lower_index(encode_isa, shape, dtype):
    N, d, F, k = shape
    x, W = integers(N, d, dtype=dtype), integers(F, d, dtype=dtype)
    b_enc, b_dec = integers(F, dtype=compute(dtype)), integers(d, dtype=compute(dtype))
    values, indices = ops.topk_encode(x, W, b_enc, k, b_dec)
    expected = best(pre_activations(x, W, b_enc, b_dec), k)
    assert torch.equal(indices, expected[1])
    assert torch.equal(values.double(), expected[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_encode_special_values(encode_isa, dtype):
    """With W = identity and x = 0 the bias is the pre-activation."""
    inf, nan = math.inf, math.nan
    bias = torch.tensor([-1.0, -0.0, 0.0, 2.0, inf, nan, 2.0, -inf, -nan, 0.5, inf], dtype=compute(dtype))
    F = len(bias)
    x, W = torch.zeros(3, F, dtype=dtype), torch.eye(F, dtype=dtype)
    values, indices = ops.topk_encode(x, W, bias, F, None)
    assert indices[1].tolist() == [5, 8, 4, 10, 3, 6, 9, 0, 1, 2, 7]
    assert values[1, :2].isnan().all()
    assert values[1, 2:].tolist() == [inf, inf, 2.0, 2.0, 0.5, 0.0, 0.0, 0.0, 0.0]
    assert not values[1, 7:].signbit().any()
    assert ops.topk_encode(x, W, bias, 1, None)[1].tolist() == [[5]] * 3  # a second NaN does not displace the first


def test_encode_all_negative_and_all_nan(encode_isa):
    x, W, b_enc, _ = problem(50, 8, 200, torch.float32)
    values, indices = ops.topk_encode(x, W, torch.full_like(b_enc, -100.0), 7, None)
    assert torch.equal(values, torch.zeros(50, 7))
    assert torch.equal(indices, torch.arange(7).expand(50, 7))
    values, indices = ops.topk_encode(x, W, torch.full_like(b_enc, math.nan), 7, None)
    assert values.isnan().all()
    assert torch.equal(indices, torch.arange(7).expand(50, 7))


@pytest.mark.parametrize("k", [1, 32, 500])
@pytest.mark.parametrize("descending", [False, True])
def test_encode_sorted_rows(encode_isa, k, descending):
    """Ascending pre-activations are the filter's worst order: every latent passes and every compaction is wasted."""
    F = 6000
    W = torch.arange(1.0, F + 1)[:, None]
    W = W.flip(0) if descending else W
    values, indices = ops.topk_encode(torch.ones(60, 1), W, torch.zeros(F), k, None)
    best_first = torch.arange(k) if descending else torch.arange(F - 1, F - 1 - k, -1)
    assert torch.equal(indices, best_first.expand(60, k))
    assert torch.equal(values, torch.arange(float(F), F - k, -1).expand(60, k))


@pytest.mark.parametrize("d", [128, 512, 4096])
def test_encode_rounds_no_worse_than_matmul(encode_isa, d):
    """Error of the pre-activations against fp64, at most twice torch's own, in the mean and at worst."""
    x, W, b_enc, _ = problem(33, d, 96, torch.float32)
    exact = pre_activations(x, W, b_enc * 0, None)
    values, indices = ops.topk_encode(x, W, b_enc * 0, 96, None)
    positive = values > 0
    ours = (values.double() - torch.gather(exact, 1, indices)).abs()[positive]
    torchs = (torch.gather(x @ W.T, 1, indices).double() - torch.gather(exact, 1, indices)).abs()[positive]
    assert ours.max() <= 2 * torchs.max()
    assert ours.mean() <= 2 * torchs.mean()


def test_encode_workspace_does_not_grow_with_the_batch():
    """Run alone in a fresh process: the workspace is what the largest call so far needed."""
    code = """
import torch, refusal_kernels.native as native
assert native.load_error() is None
ops = torch.ops.refusal_kernels_cpu
torch.set_num_threads(2)
W = torch.randn(4096, 64)
sizes = []
for n in (65536, 131072):
    ops.topk_encode(torch.zeros(n, 64), W, torch.zeros(4096), 16, None)
    sizes.append(ops.workspace_bytes())
print(*sizes)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert result.returncode == 0, result.stderr
    first, second = map(int, result.stdout.split())
    assert second == first < 64 * 2**20  # a dense [65536, 4096] would take 1 GiB


# ---- decode and its gradients --------------------------------------------------------------------

DECODE_SHAPES = ((1, 1, 1, 1), (7, 5, 11, 3), (40, 67, 90, 6), (33, 300, 50, 9), (5, 1040, 30, 2), (0, 3, 4, 2))


def codes_problem(N, d, F, k, dtype, index_dtype=torch.int64):
    """Codes with repeated tokens on few latents, a fifth of the values exactly 0."""
    x, W, _, b_dec = problem(N, d, F, dtype)
    values = torch.rand(N, k).add(0.1).mul(torch.rand(N, k) > 0.2).to(dtype)
    indices = torch.stack([torch.randperm(F)[:k] for _ in range(N)]) if N else torch.zeros(0, k, dtype=torch.int64)
    return x, W, b_dec, values, indices.to(index_dtype)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", DECODE_SHAPES)
def test_decode_and_residual(isa, shape, dtype, index_dtype):
    N, d, F, k = shape
    x, W, b_dec, values, indices = codes_problem(N, d, F, k, dtype, index_dtype)
    expected = dense(values, indices, F) @ W.double()
    assert_close(ops.sparse_decode(values, indices, W, None), expected, dtype)
    assert_close(ops.sparse_decode(values, indices, W, b_dec), expected + b_dec.double(), dtype)
    e, sq = ops.decode_residual(x, values, indices, W, b_dec)
    residual = expected + b_dec.double() - x.double()
    assert e.dtype == dtype
    assert sq.dtype == compute(dtype)
    assert_close(e, residual, dtype)
    assert_close(sq, residual.square().sum(1), torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", DECODE_SHAPES)
def test_gradients(isa, shape, dtype, index_dtype):
    N, d, F, k = shape
    x, W, b_dec, values, indices = codes_problem(N, d, F, k, dtype, index_dtype)
    grad, grad_values = torch.randn(N, d).to(dtype), torch.randn(N, k).to(dtype)

    dvalues, dW = ops.sparse_decode_backward(grad, values, indices, W, True, True)
    assert_close(dvalues, torch.gather(grad.double() @ W.double().T, 1, indices.long()), dtype)
    assert_close(dW, dense(values, indices, F).T @ grad.double(), dtype)
    alone, nothing = ops.sparse_decode_backward(grad, values, indices, W, True, False)
    assert nothing is None
    assert torch.equal(alone, dvalues)
    nothing, alone = ops.sparse_decode_backward(grad, values, indices, W, False, True)
    assert nothing is None
    assert torch.equal(alone, dW)

    codes = dense(torch.where(values != 0, grad_values, 0), indices, F)
    dx, dW, db = ops.topk_encode_backward(grad_values, values, indices, x, W, b_dec, True, True)
    assert_close(dx, codes @ W.double(), dtype)
    assert_close(dW, codes.T @ (x.double() - b_dec.double()), dtype)
    assert db.dtype == compute(dtype)
    assert_close(db, codes.sum(0), torch.float64 if dtype == torch.float64 else torch.float32)
    assert ops.topk_encode_backward(grad_values, values, indices, x, W, b_dec, False, False)[:2] == (None, None)


def gradients(e, x, values, indices, W_dec, b_dec, scale):
    """dW_enc, db_enc, dW_dec of scale / 2 * sum ||e||^2 in fp64, written out."""
    F = len(W_dec)
    g = scale * e.double()
    dv = torch.where(values != 0, torch.gather(g @ W_dec.double().T, 1, indices.long()), 0)
    codes = dense(dv, indices, F)
    return codes.T @ (x.double() - b_dec.double()), codes.sum(0), dense(values, indices, F).T @ g


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", DECODE_SHAPES)
def test_sae_backward_accumulates(isa, shape, dtype):
    N, d, F, k = shape
    x, W_dec, b_dec, values, indices = codes_problem(N, d, F, k, dtype)
    e, W_enc = torch.randn(N, d).to(dtype), torch.randn(F, d).to(dtype)
    buffers = [torch.randn(s, dtype=compute(dtype)) for s in ((F, d), (F,), (F, d))]
    expected = [
        b.double() + g for b, g in zip(buffers, gradients(e, x, values, indices, W_dec, b_dec, 0.3), strict=True)
    ]
    ops.sae_backward(e, x, values, indices, W_enc, W_dec, b_dec, 0.3, *buffers)
    for got, want in zip(buffers, expected, strict=True):
        assert_close(got, want, torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_latent_of_every_token_is_no_serial_sum(isa):
    """At most a fifth of the error, against fp64, of adding its thousands of rows one after another; on both routes."""
    N, d, F, k = 16384, 64, 40, 4
    x, W, _, _ = problem(N, d, F, torch.float32)
    e = torch.randn(N, d) + 1
    values = torch.rand(N, k).add(0.1)
    indices = torch.stack([torch.randperm(F - 1)[:k] for _ in range(N)])
    indices[:, 2] = F - 1
    hot = values[:, 2].contiguous()
    exact = hot.double() @ e.double()
    serial = torch.zeros(d)
    for row in hot[:, None] * e:
        serial += row
    bound = (serial - exact).norm() / 5
    buffers = torch.zeros(F, d), torch.zeros(F), torch.zeros(F, d)
    ops.sae_backward(e, x, values, indices, W, W, None, 1.0, *buffers)
    assert (buffers[2][F - 1] - exact).norm() <= bound
    _, dW = ops.sparse_decode_backward(e, values, indices, W, False, True)
    assert (dW[F - 1] - exact).norm() <= bound


# ---- Adam ----------------------------------------------------------------------------------------

ADAM = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8}


def adam_arguments(step):
    return ADAM["lr"], *ADAM["betas"], ADAM["eps"], 1 - ADAM["betas"][0] ** step, 1 - ADAM["betas"][1] ** step


def remove_parallel(g, w):
    squared = w.square().sum(1, keepdim=True)
    return g - torch.where(squared > 0, (g * w).sum(1, keepdim=True) / squared, 0) * w


def unit_rows(w):
    norm = w.norm(dim=1, keepdim=True)
    return w / torch.where(norm > 0, norm, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (9, 5), (70, 67), (3, 1030), (6000, 1)])
def test_adam_rows_is_torch_adam(isa, shape, with_norm, dtype):
    """Three steps against torch.optim.Adam in fp64; 16-bit state is rounded at each step, hence one step there."""
    W = torch.randn(shape).to(dtype)
    W[0] = 0  # no direction: nothing removed, nothing scaled
    oracle = W.to(torch.float64, copy=True).requires_grad_()
    adam = torch.optim.Adam([oracle], **ADAM)
    m, v = torch.zeros_like(W), torch.zeros_like(W)
    factor = torch.tensor(0.7)
    for step in range(1, 4 if dtype in (torch.float32, torch.float64) else 2):
        g = torch.randn(shape).to(dtype)
        g[0] *= 0 if with_norm else 1  # Adam at 0 is a sign: without a norm to keep it 0, rounding would decide
        exact = g.double() * factor.double()
        oracle.grad = remove_parallel(exact, oracle.detach()) if with_norm else exact
        if with_norm and shape[1] == 1:
            oracle.grad.zero_()  # in one dimension everything is parallel; what is left is rounding
            g.zero_()
        adam.step()
        if with_norm:
            oracle.data = unit_rows(oracle.data)
        ops.adam_rows(W, g, m, v, *adam_arguments(step), factor, with_norm, with_norm)
    state = adam.state[oracle]
    assert_close(W, oracle.detach(), dtype)
    assert_close(m, state["exp_avg"], dtype)
    assert_close(v, state["exp_avg_sq"], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("extra", [False, True])
def test_sae_backward_adam(isa, dtype, extra):
    """Three fused steps equal gradient, parallel removal, torch.optim.Adam and renormalisation one after the other."""
    N, d, F, k = 50, 37, 80, 4
    ct = compute(dtype)
    parameters = [torch.randn(s).to(dtype) for s in ((F, d), (F,), (F, d))]
    parameters[2] = unit_rows(parameters[2].double()).to(dtype)
    state = [torch.zeros_like(p) for p in parameters for _ in range(2)]
    oracle = [p.to(torch.float64, copy=True).requires_grad_() for p in parameters]
    adam = torch.optim.Adam(oracle, **ADAM)
    rows = torch.tensor([3, 79, 40, 0])
    for step in range(1, 4 if dtype != torch.bfloat16 else 2):
        x, _, b_dec, values, indices = codes_problem(N, d, F, k, dtype)
        indices %= 60  # latents 60 and up have no hits, some rows name one twice
        e = torch.randn(N, d).to(dtype)
        more = [torch.randn(s, dtype=ct) for s in ((4, d), (4,), (4, d))]
        expected = list(gradients(e, x, values, indices, oracle[2].detach(), b_dec, 0.2))
        if extra:
            for gradient, rest in zip(expected, more, strict=True):
                gradient.index_add_(0, rows, rest.double())
        through_encoder = expected[1] @ oracle[0].detach()
        for parameter, gradient in zip(oracle, expected, strict=True):
            parameter.grad = gradient
        oracle[2].grad = remove_parallel(expected[2], oracle[2].detach())
        adam.step()
        oracle[2].data = unit_rows(oracle[2].data)
        got = ops.sae_backward_adam(
            e, x, values, indices, *parameters, b_dec, 0.2, *state, *adam_arguments(step), True, True,
            *((rows, *more) if extra else (None, None, None, None)),
        )  # fmt: skip
        loose = 10 if dtype == torch.float32 else 1
        scale = through_encoder.abs().max() * loose * TOLERANCE[dtype]
        assert got.dtype == ct
        assert (got.double() - through_encoder).abs().max() <= scale
    # Adam divides by sqrt(v): a gradient element near 0 turns its rounding error into a part of a step of lr.
    atol = {torch.float32: 2e-4, torch.float64: 1e-10, torch.bfloat16: 2e-2}[dtype]
    for got, want in zip(parameters, oracle, strict=True):
        torch.testing.assert_close(got.double(), want.detach(), rtol=0, atol=atol)
    untouched = [f for f in range(60, F) if not extra or f not in rows.tolist()]
    assert torch.equal(parameters[1][untouched].double(), oracle[1].detach()[untouched])


def test_rows_without_hits_still_move_by_their_momentum(isa):
    N, d, F = 4, 19, 40
    W_enc, W_dec = torch.randn(F, d), unit_rows(torch.randn(F, d))
    state = [torch.rand(s) for s in ((F, d), (F, d), (F,), (F,), (F, d), (F, d))]
    parameters = [W_enc, torch.zeros(F), W_dec]
    expected = [p.double() for p in parameters]
    moments = [s.double() for s in state]
    lr, beta1, beta2, eps, c1, c2 = adam_arguments(5)
    for i, p in enumerate(expected):
        m, v = beta1 * moments[2 * i], beta2 * moments[2 * i + 1]
        p -= lr / c1 * m / ((v / c2).sqrt() + eps)
    expected[2] = unit_rows(expected[2])
    zeros = torch.zeros(N, 2)  # codes that are all 0 carry no gradient
    indices = torch.tensor([[0, 1]]).expand(N, 2).contiguous()
    through = ops.sae_backward_adam(
        torch.randn(N, d), torch.randn(N, d), zeros, indices, *parameters, torch.zeros(d), 1.0, *state,
        *adam_arguments(5), True, True, None, None, None, None,
    )  # fmt: skip
    assert torch.equal(through, torch.zeros(d))
    for got, want in zip(parameters, expected, strict=True):
        assert_close(got, want, torch.float32)


# ---- what holds for all of them ------------------------------------------------------------------


def everything(threads, N=600, d=40, F=1500, k=8, dtype=torch.float32):
    """Every primitive once on one input; all results as a flat list."""
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    x, W_enc, b_enc, b_dec = problem(N, d, F, dtype)
    W_dec = torch.randn(F, d).to(dtype)
    results = []
    values, indices = ops.topk_encode(x, W_enc, b_enc, k, b_dec)
    values[:, 0], indices[:, 0] = 1.0, 7  # a hot latent; where 7 was chosen before, its duplicate is as good a hit
    e, sq = ops.decode_residual(x, values, indices, W_dec, b_dec)
    results += [values, indices, e, sq]
    results += ops.sparse_decode_backward(e, values, indices, W_dec, True, True)
    results += ops.topk_encode_backward(values, values, indices, x, W_enc, b_dec, True, True)
    buffers = [torch.zeros(s, dtype=compute(dtype)) for s in ((F, d), (F,), (F, d))]
    ops.sae_backward(e, x, values, indices, W_enc, W_dec, b_dec, 0.5, *buffers)
    parameters = [W_enc, b_enc.to(dtype), W_dec]
    state = [torch.zeros_like(p) for p in parameters for _ in range(2)]
    through = ops.sae_backward_adam(
        e, x, values, indices, *parameters, b_dec, 0.5, *state, *adam_arguments(1), True, True, None, None, None, None
    )
    return [*results, *buffers, *parameters, *state, through]


@pytest.mark.parametrize("N", [3, 600, 1100])  # split over latents, one block, split over rows
def test_same_bits_for_any_number_of_threads(isa, N):
    once, again, parallel, many = (everything(threads, N) for threads in (1, 1, 2, 5))
    for a, b, c, e in zip(once, again, parallel, many, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert torch.equal(a, e)


def test_nothing_is_written_outside_the_outputs(isa):
    """Buffers in the middle of larger ones; a store of one lane too many would land in the rim."""
    N, d, F, k = 30, 13, 21, 3
    x, W_dec, b_dec, values, indices = codes_problem(N, d, F, k, torch.float32)

    def rimmed(*shape):
        count = math.prod(shape)
        whole = torch.full((count + 128,), 7.0)
        inner = whole[64 : 64 + count].view(shape)
        inner.normal_()
        return whole, inner

    wholes, inners = zip(*(rimmed(*s) for s in ((F, d), (F,), (F, d)) * 3), strict=True)
    ops.sae_backward(x, x, values, indices, W_dec, W_dec, b_dec, 1.0, *inners[:3])
    for inner in inners[3:]:
        inner.abs_()
    m_and_v = [inners[i] for i in (3, 6, 4, 7, 5, 8)]
    ops.sae_backward_adam(
        x, x, values, indices, *inners[:3], b_dec, 1.0, *m_and_v, *adam_arguments(1), True, True,
        None, None, None, None,
    )  # fmt: skip
    ops.adam_rows(inners[0], inners[2], inners[3], inners[6], *adam_arguments(1), None, True, True)
    for whole in wholes:
        assert (whole[:64] == 7).all()
        assert (whole[-64:] == 7).all()


@pytest.mark.parametrize("bad", [-1, 9])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_index_out_of_range_is_an_error_before_anything_is_written(bad, index_dtype):
    N, d, F, k = 4, 3, 9, 2
    x, W, b_dec, values, indices = codes_problem(N, d, F, k, torch.float32, index_dtype)
    indices[2, 1] = bad
    buffers = [torch.zeros(F, d), torch.zeros(F), torch.zeros(F, d)]
    parameters, state = [W.clone(), torch.zeros(F), W.clone()], [torch.zeros_like(b) for b in buffers for _ in range(2)]
    calls = (
        lambda: ops.sparse_decode(values, indices, W, None),
        lambda: ops.sparse_decode_backward(x, values, indices, W, True, True),
        lambda: ops.topk_encode_backward(values, values, indices, x, W, None, True, True),
        lambda: ops.decode_residual(x, values, indices, W, b_dec),
        lambda: ops.sae_backward(x, x, values, indices, W, W, b_dec, 1.0, *buffers),
        lambda: ops.sae_backward_adam(
            x, x, values, indices, *parameters, b_dec, 1.0, *state, *adam_arguments(1), True, True,
            None, None, None, None,
        ),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(RuntimeError, match=rf"indices must lie in \[0, 9\).*got {bad}"):
            call()
    assert not any(t.any() for t in (*buffers, *state))
    assert torch.equal(parameters[0], W)
    assert torch.equal(parameters[2], W)


def test_bad_arguments_are_named():
    x, W, b_enc, b_dec = problem(3, 4, 6, torch.float32)
    for arguments, message in (
        ((x, W, b_enc, 7, None), "k must lie in"),
        ((x, W, b_enc, 0, None), "k must lie in"),
        ((x, W[:, :3].contiguous(), b_enc, 2, None), "W_enc must have shape"),
        ((x, W, b_enc.double(), 2, None), "b_enc has dtype"),
        ((x.T.contiguous().T, W, b_enc, 2, None), "x must be contiguous"),
        ((x, W, b_enc, 2, b_dec[:2]), "b_dec must have shape"),
        ((x.long(), W.long(), b_enc, 2, None), "rows in float32, float64, bfloat16 or float16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.topk_encode(*arguments)
    rows = torch.tensor([1, 1])
    parameters, state = [W, b_enc, W], [torch.zeros_like(t) for t in (W, W, b_enc, b_enc, W, W)]
    values, indices = torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="extra_rows must be distinct"):
        ops.sae_backward_adam(
            x, x, values, indices, *parameters, b_dec, 1.0, *state, *adam_arguments(1), True, True,
            rows, W[:2].clone(), b_enc[:2].clone(), W[:2].clone(),
        )  # fmt: skip


def test_isa_is_chosen_by_the_environment_and_refused_by_name():
    with pytest.raises(RuntimeError, match="expected one of auto, default, avx2, avx512, avx512_vnni; got 'mmx'"):
        ops.set_isa("mmx")
    code = "import torch, refusal_kernels.native as n; n.load_error(); print(torch.ops.refusal_kernels_cpu.isa())"
    env = {**os.environ, "REFUSAL_KERNELS_CPU_ISA": "default"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert result.stdout.strip() == "default", result.stderr
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**env, "REFUSAL_KERNELS_CPU_ISA": "mmx"}
    )
    assert "REFUSAL_KERNELS_CPU_ISA: expected one of" in result.stderr
