"""The 8-bit screen of the C++ encoder: what it lets through must be all that matters, bit for bit.

The oracle computes every pre-activation with the same fp32 dot product as the encoder does behind its screen (that of
`sparse_decode_backward`) and sorts stably. A bound that is ever too low loses a latent, and the two differ.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refusal_kernels import native

if native.load_error() is not None:
    pytest.skip(f"the CPU kernels are not there: {native.load_error()}", allow_module_level=True)

ops = torch.ops.refusal_kernels_cpu


@pytest.fixture(autouse=True)
def _screening():
    try:
        ops.set_isa("avx512_vnni")
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    ops.set_isa("auto")


def problem(N, d, F, dtype=torch.float32):
    x, W = torch.randn(N, d).to(dtype), torch.nn.functional.normalize(torch.randn(F, d), dim=1).to(dtype)
    return x, W, 0.1 * torch.randn(F), 0.1 * torch.randn(d)


def oracle(x, W, b_enc, k, b_dec):
    """(values, indices) of all pre-activations; x and W in fp32."""
    centred = x if b_dec is None else x - b_dec
    every = torch.arange(len(W)).expand(len(x), -1).contiguous()
    pre, _ = ops.sparse_decode_backward(centred, torch.ones(every.shape), every, W, True, False)
    pre = torch.where((pre + b_enc).isnan(), math.inf, (pre + b_enc).relu())  # NaN first; no infinities beside it here
    values, indices = torch.sort(pre, dim=1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


def assert_exact(x, W, b_enc, k, b_dec, screened=None):
    """Encodes and compares; `screened` is how many rows the screen must have taken, all of them by default."""
    values, indices = ops.topk_encode(x, W, b_enc, k, b_dec)
    rows, computed, repeated = ops.last_screen()
    assert rows == (len(x) if screened is None else screened)
    assert computed <= rows * len(W) + repeated * len(W)
    expected = oracle(x.float(), W.float(), b_enc, k, b_dec)
    assert torch.equal(indices, expected[1])
    assert torch.equal(values, expected[0].to(x.dtype))
    return computed / max(rows * len(W), 1), repeated


SHAPES = (
    (64, 64, 2048, 8),  # one panel and a third
    (300, 33, 1500, 3),  # ragged columns, latents that fill no tile
    (97, 700, 1000, 16),  # two segments of columns
    (1000, 128, 4096, 32),  # seeds, two row parts on two threads
    (70, 2100, 600, 1),
)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_exact(shape, threads):
    torch.set_num_threads(threads)
    N, d, F, k = shape
    x, W, b_enc, b_dec = problem(N, d, F)
    for shift in (b_dec, None):
        share, _ = assert_exact(x, W, b_enc, k, shift)
        assert share < 0.5  # it screens: most pairs are never computed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exact_in_16_bits(dtype):
    x, W, b_enc, b_dec = problem(300, 100, 2000, dtype)
    assert_exact(x, W, b_enc, 9, b_dec)


def test_unscreened_agrees():
    """The fp32 path selects the same latents but where rounding decides, and the values differ by rounding."""
    x, W, b_enc, b_dec = problem(500, 256, 4096)
    values, indices = ops.topk_encode(x, W, b_enc, 32, b_dec)
    assert ops.last_screen()[0] == 500
    ops.set_isa("avx512")
    plain = ops.topk_encode(x, W, b_enc, 32, b_dec)
    assert ops.last_screen() == (0, 0, 0)
    assert (indices == plain[1]).float().mean() > 0.999
    torch.testing.assert_close(values, plain[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [1, 7, 60])
def test_ties_go_to_the_lower_index(k):
    """Small integers: every sum is exact, thousands of pre-activations are equal."""
    x, W = (torch.randint(-2, 3, s).float() for s in ((200, 40), (3000, 40)))
    b_enc = torch.randint(-2, 3, (3000,)).float()
    assert_exact(x, W, b_enc, k, None)


def test_equal_latents_and_equal_rows():
    x, W, b_enc, b_dec = problem(150, 64, 2000)
    W, b_enc = W[torch.arange(2000) % 50].contiguous(), b_enc[torch.arange(2000) % 50].contiguous()
    assert_exact(x, W, b_enc, 10, b_dec)
    x[75:] = x[:75]
    values, indices = ops.topk_encode(x, W, b_enc, 10, b_dec)
    assert torch.equal(values[:75], values[75:])
    assert torch.equal(indices[:75], indices[75:])


@pytest.mark.parametrize("descending", [False, True])
def test_sorted_latents(descending):
    """Ascending pre-activations: every latent passes the threshold of those before it."""
    x = torch.rand(100, 64) + 0.5
    W = torch.linspace(0.1, 1, 3000)[:, None].expand(-1, 64)
    W = (W.flip(0) if descending else W).contiguous()
    assert_exact(x, W, torch.zeros(3000), 20, None)


def test_fewer_than_k_positives():
    x, W, b_enc, b_dec = problem(300, 64, 2000)
    bias = torch.full_like(b_enc, -100.0)
    assert_exact(x, W, bias, 12, b_dec)
    bias[[5, 700, 1999]] = 100.0
    values, indices = ops.topk_encode(x, W, bias, 6, b_dec)
    assert (values[:, 3:] == 0).all()
    assert (indices[:, 3:] == torch.tensor([0, 1, 2])).all()
    assert_exact(x, W, bias, 6, b_dec)


def test_a_guess_that_is_too_high_is_repeated():
    """Rows whose k-th best is a far smaller multiple of their norm than the seeds': they point where no latent does."""
    x, W, b_enc, _ = problem(2000, 64, 2000)
    W[:, 32:] *= 1e-3
    x[300:310, :32] *= 1e-2
    _, repeated = assert_exact(x, W, 0 * b_enc, 8, None)
    assert repeated >= 10


def test_outlier_rows_take_the_fp32_path():
    x, W, b_enc, b_dec = problem(400, 2048, 1000)
    x[::4, 3] = 300.0  # 8 bits leave nothing of the other columns, which together weigh as much
    values, indices = ops.topk_encode(x, W, b_enc, 8, b_dec)
    assert ops.last_screen()[0] == 300
    exact = (x - b_dec).double() @ W.double().T + b_enc.double()
    torch.testing.assert_close(values.double(), torch.gather(exact, 1, indices).relu(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(values.double(), exact.relu().topk(8).values, rtol=1e-5, atol=1e-4)
    calm = torch.arange(400) % 4 != 0
    assert_exact(x[calm].contiguous(), W, b_enc, 8, b_dec)
    assert torch.equal(indices[calm], ops.topk_encode(x[calm].contiguous(), W, b_enc, 8, b_dec)[1])


def test_outlier_columns_of_the_latents_are_not_screened():
    x, W, b_enc, b_dec = problem(200, 2048, 1000)
    W[:, 3] = 6.0
    values, indices = ops.topk_encode(x, W, b_enc, 8, b_dec)
    assert ops.last_screen() == (0, 0, 0)
    exact = (x - b_dec).double() @ W.double().T + b_enc.double()
    torch.testing.assert_close(values.double(), torch.gather(exact, 1, indices).relu(), rtol=1e-5, atol=1e-4)


def test_a_batch_that_the_screen_does_not_thin_out_is_not_screened():
    """All latents and rows share a direction: pre-activations lie close together, and bounds are as wide as ever."""
    for n in (300, 1200):  # one row part and two
        x, W, b_enc, b_dec = problem(n, 512, 4000)
        shared = torch.nn.functional.normalize(torch.randn(512), dim=0)
        x, W = x * 0.01 + 100 * shared, W * 0.01 + shared
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(ops.topk_encode(x, W, b_enc * 0, 8, b_dec))
            assert ops.last_screen()[0] == 48  # the first rows, which showed it
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])
        exact = (x - b_dec).double() @ W.double().T
        torch.testing.assert_close(results[0][0].double(), exact.topk(8).values, rtol=1e-6, atol=0)


def test_single_odd_latents():
    """Zero, tiny, huge, infinite and NaN latents among ordinary ones."""
    x, W, b_enc, b_dec = problem(200, 64, 2000)
    W[10] = 0
    W[20] *= 1e-20
    W[30] *= 1e17
    W[40, 5] = 1e6
    b_enc[[10, 20]] = 50.0
    assert_exact(x, W, b_enc, 8, b_dec)
    W[50, 1] = math.nan
    values, indices = ops.topk_encode(x, W, b_enc, 8, b_dec)
    assert ops.last_screen()[0] == 200
    assert values[:, 0].isnan().all()
    assert (indices[:, 0] == 50).all()
    W[60, 2] = math.inf
    values, indices = ops.topk_encode(x, W, b_enc, 8, b_dec)
    positive = (x - b_dec)[:, 2] > 0
    assert (values[positive, 1] == math.inf).all()
    assert (indices[positive, 1] == 60).all()


def test_special_biases():
    x, W, b_enc, b_dec = problem(200, 64, 2000)
    b_enc[[3, 9, 4, 1900]] = torch.tensor([math.inf, -math.inf, math.nan, math.inf])
    values, indices = ops.topk_encode(x, W, b_enc, 5, b_dec)
    assert ops.last_screen()[0] == 200
    assert (indices[:, :3] == torch.tensor([4, 3, 1900])).all()
    assert values[:, 0].isnan().all()
    assert not (indices == 9).any()
    assert (ops.topk_encode(x, W, b_enc, 1, b_dec)[1] == 4).all()


def test_special_rows():
    """NaN, infinite, zero, tiny and huge rows are left to fp32; the ordinary rows beside them are still screened."""
    x, W, b_enc, _ = problem(200, 64, 2000)
    x[0, 0], x[1, 1], x[2], x[3], x[4] = math.nan, math.inf, 0.0, x[3] * 1e-20, x[4] * 1e18
    values, indices = ops.topk_encode(x, W, b_enc, 8, None)
    assert ops.last_screen()[0] == 195
    assert values[0].isnan().all()
    assert torch.equal(indices[0], torch.arange(8))
    assert (values[1] == math.inf).all()
    for row in (2, 3):
        assert torch.equal(indices[row], torch.sort(b_enc.relu(), descending=True, stable=True).indices[:8])
    exact = x[4].double() @ W.double().T
    torch.testing.assert_close(values[4].double(), exact.topk(8).values, rtol=1e-5, atol=0)
    assert torch.equal(indices[5:], oracle(x[5:].contiguous(), W, b_enc, 8, None)[1])


def test_shapes_that_cannot_gain_are_not_screened():
    for shape in ((63, 64, 2000, 8), (200, 64, 2000, 900), (200, 8, 2000, 64)):
        N, d, F, k = shape
        x, W, b_enc, b_dec = problem(N, d, F)
        ops.topk_encode(x, W, b_enc, k, b_dec)
        assert ops.last_screen() == (0, 0, 0)


def test_workspace_does_not_grow_with_the_batch():
    W, b_enc = torch.randn(4096, 64), torch.zeros(4096)
    sizes = []
    for n in (65536, 131072):
        ops.topk_encode(torch.randn(n, 64), W, b_enc, 16, None)
        assert ops.last_screen()[0] == n
        sizes.append(ops.workspace_bytes())
    assert sizes[1] < 1.01 * sizes[0]  # threads may take turns differently


def lost_in_rounding(v):
    """v minus its 8-bit rounding, as the screen rounds: the part of a vector that the screen does not see."""
    scale = v.abs().max() / 127
    return v - scale * torch.round(v / scale)


@pytest.mark.parametrize("of", ["row", "latent"])
def test_a_latent_that_wins_by_what_rounding_loses(of):
    """Where Cauchy-Schwarz is nearly an equation, and only for one of the two: the lost part times its own signs, which
    round exactly, is 0.87 of the bound. Rivals are only a little smaller: a bound 20 % too low loses the winner."""
    d, F = 256, 2000
    whole = torch.randn(d)
    signs = lost_in_rounding(whole).sign()
    x, w = (whole, signs) if of == "row" else (signs, whole)
    product = 50 + x @ w
    rivals = x / (x @ x) * (x @ w - torch.linspace(0.01, 0.05, F - 1)[:, None])
    W = torch.cat((rivals, w[None]))
    values, indices = ops.topk_encode(x.expand(70, -1).contiguous(), W, torch.full((F,), 50.0), 1, None)
    assert ops.last_screen()[0] == 70
    assert (indices == F - 1).all()
    torch.testing.assert_close(values, product.expand(70, 1))


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    N=st.integers(64, 300),
    d=st.integers(17, 300),
    F=st.integers(256, 1500),
    k=st.integers(1, 12),
    scales=st.tuples(*[st.integers(-9, 9)] * 3),
    heavy=st.sampled_from([0.0, 0.5, 1.0]),
    low_rank=st.booleans(),
    bits=st.sampled_from([None, 1, 3, 8]),
    threads=st.integers(1, 3),
)
def test_exact_whatever_the_data(seed, N, d, F, k, scales, heavy, low_rank, bits, threads):
    """Heavy tails, correlated columns, coarse grids with masses of near-ties, all magnitudes."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    x, W, b_enc, b_dec = problem(N, d, F)
    if low_rank:
        x = x[:, :5] @ torch.randn(5, d) + 0.1 * x
    x, W = x * torch.exp(heavy * torch.randn(N, d)), W * torch.exp(heavy * torch.randn(F, d))
    if bits is not None:
        x, W = (torch.round(t * 2**bits / t.abs().max()) for t in (x, W))
    x, W, b_enc = (t * 10.0**s for t, s in zip((x, W, b_enc), scales, strict=True))
    values, indices = ops.topk_encode(x, W, b_enc, k, b_dec)
    rows = ops.last_screen()[0]
    if rows == N:
        expected = oracle(x, W, b_enc, k, b_dec)
        assert torch.equal(indices, expected[1])
        assert torch.equal(values, expected[0])
    else:  # rows of the fp32 path add in another order
        exact = ((x - b_dec).double() @ W.double().T + b_enc.double()).relu()
        tolerance = 1e-5 * ((x - b_dec).norm(dim=1) * W.norm(dim=1).max() + b_enc.abs().max()).double()[:, None]
        assert ((values - torch.gather(exact, 1, indices)).abs() <= tolerance).all()
        assert ((values - exact.topk(k).values).abs() <= tolerance).all()
