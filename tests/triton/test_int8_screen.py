"""The encoder with the 8-bit screen in the interpreter: its bound, the contract, what is left and what is given up.

Small integers where mathematics is exact: values and indices are then equal. Real numbers: the selection of fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import refusal_kernels as rk
from refusal_kernels import reference
from refusal_kernels.backends import int8
from refusal_kernels.triton_kernels import encode, int8_rounding, int8_screen
from refusal_kernels.triton_kernels.launch import Tiles


@pytest.fixture(autouse=True)
def _small_and_poisoned(monkeypatch):
    """Tiles and lists that tiny shapes fill several times: the shipped ones take seconds in the interpreter."""
    product = Tiles({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP_M": 2}, num_warps=4)
    monkeypatch.setattr(int8_rounding, "_PRODUCT", product)
    monkeypatch.setattr(int8_screen, "_CAPACITY", 64)
    monkeypatch.setattr(int8_screen, "_STEP", 32)
    monkeypatch.setattr(int8_screen, "_FOUND", ((8, 64), (64, 128)))
    monkeypatch.setattr(encode, "_LISTS", ((8, 32, 16, 1), (64, 128, 64, 1)))
    torch.manual_seed(5)
    torch.use_deterministic_algorithms(True, warn_only=True)  # `empty` is filled with NaN and the largest integers
    yield
    torch.use_deterministic_algorithms(False)


def integers(*shape: int, low: int = -2, high: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(low, high, shape).to(dtype)


def screened(x: Tensor, W: Tensor, b: Tensor, k: int, b_dec: Tensor | None = None, **options) -> Tensor:
    """How many products were computed for each row, -1 where it was given up; the other rows' results are checked."""
    values = torch.empty(x.shape[0], k, dtype=x.dtype)
    indices = torch.empty(x.shape[0], k, dtype=torch.int64)
    computed = int8_screen.screen(x, W, b, k, b_dec, values, indices, **options)
    kept = computed >= 0
    exact = reference.topk_encode(x.double(), W.double(), b.double(), k, None if b_dec is None else b_dec.double())
    assert torch.equal(indices[kept], exact[1][kept])
    torch.testing.assert_close(values[kept].double(), exact[0][kept], rtol=2e-3 if x.element_size() == 2 else 1e-5,
                               atol=1e-5, equal_nan=True)  # fmt: skip
    return computed


def check_exact(x: Tensor, W: Tensor, b: Tensor, k: int, b_dec: Tensor | None = None, **options) -> None:
    values, indices = int8_screen.topk_encode(x, W, b, k, b_dec, **options)
    want = reference.topk_encode(x, W, b, k, b_dec)
    assert torch.equal(indices, want[1])
    assert torch.equal(torch.nan_to_num(values, nan=-7.0), torch.nan_to_num(want[0], nan=-7.0))
    assert values.dtype == x.dtype


# --- rounding and product ---------------------------------------------------------------------------------------------


def rounded(rows: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
    q = torch.empty(rows.shape[0], int8_rounding.padded(rows.shape[1]), dtype=torch.int8)
    facts = torch.empty(3, rows.shape[0])
    int8_rounding.round_rows(rows, shift, q, facts)
    return q, facts


def rotation(d: int) -> Tensor:
    """[d, padded]: the signs of H D, as they come out for unit rows; v becomes v @ rotation(d)."""
    return rounded(torch.eye(d))[0].sign().double()


def test_the_rotation_is_orthogonal_within_blocks_of_128():
    M = rotation(300)
    assert torch.equal(M @ M.T, 128 * torch.eye(300, dtype=torch.float64))
    assert M[:128, 128:].abs().max() == M[128:, :128].abs().max() == 0
    assert (M[0] != M[1]).any()


@pytest.mark.parametrize("d", [1, 40, 128, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_bound_holds(d, dtype):
    x = torch.randn(12, d) * torch.logspace(-3, 3, 12)[:, None]
    W = torch.randn(24, d)
    x[3, 0], W[5, -1] = 1000, 300  # entries that dwarf the others
    x[7], W[8], W[9] = 0, 0, W[4] * 1e-7
    if dtype == torch.float32:
        x[9], x[10], W[10], W[11] = 1e-30, 3e10, 1e12, 1e-20
    x, W, shift = x.to(dtype), W.to(dtype), torch.randn(d)
    (q_x, f_x), (q_w, f_w) = rounded(x, shift), rounded(W)
    sums = torch.empty(12, 24, dtype=torch.int32)
    int8_rounding.product(q_x, q_w, sums)
    assert torch.equal(sums, torch._int_mm(torch.cat([q_x, q_x]), q_w.T.contiguous())[:12])
    centred = (x.float() - shift).double()
    (s_x, n_x, r_x), (s_w, n_w, r_w) = f_x.double(), f_w.double()
    error = (centred @ W.double().T - sums.double() * s_x[:, None] * s_w / 128).abs()
    bound = r_x[:, None] * n_w + (n_x + r_x)[:, None] * r_w
    assert (error <= bound).all()
    for norm, rows in ((n_x, centred), (n_w, W.double())):
        assert (norm >= rows.norm(dim=1)).all()
        large = rows.abs().amax(1) > 1e-9
        assert (norm[large] <= 1.002 * rows[large].norm(dim=1)).all()
    assert f_w[:, 8].tolist() == [0, 0, 0]
    if d == 128:  # one entry that dwarfs the others costs nothing in the rotated row
        assert max(r_x[3] / n_x[3], r_w[5] / n_w[5]) < 0.01


def test_rows_that_are_not_finite_have_no_bound():
    x = torch.randn(5, 200)
    x[1, 3], x[2, 199], x[3, 0], x[4, 130] = math.nan, -math.inf, 3e38, 1e18
    q, facts = rounded(x)
    assert torch.isinf(facts[1:]).all(0).tolist() == [False, True, True, True, True]
    assert q[1:].abs().max() == 0


def adversary(side: str) -> tuple[Tensor, Tensor]:
    """x [1, 128] and W [40, 128], of which latent 38 wins by all that rounding hides.

    The rest of one of the two is parallel to the other. In rotated coordinates it is 127 and 127 entries of +-0.499,
    which round to 0, and the other has their signs. The remaining latents are multiples of the first unit row, which
    rounding does not touch.
    """
    signs = torch.cat([torch.ones(1), integers(127, low=0, high=2) * 2 - 1]).double()
    rough = 0.499 * signs
    rough[0] = 127
    x, winner = (rough, signs) if side == "row" else (signs, rough)
    W = torch.zeros(40, 128).double()
    W[:, 0] = (189.2 - 1e-2 * torch.arange(40)) / x[0]
    W[38] = winner
    M = rotation(128)
    return (x[None] @ M.T / 128).float(), (W @ M.T).float()


@pytest.mark.parametrize("side", ["row", "latent"])
@pytest.mark.parametrize(("share", "right"), [(1.0, True), (0.95, False), (0.0, False)])
def test_the_whole_bound_is_needed(monkeypatch, side, share, right):
    """With 0.95 of the rests, the adversary's winner is lost: nothing of the bound can be saved."""

    def less(rows: Tensor, shift: Tensor | None, q: Tensor, facts: Tensor) -> None:
        int8_rounding.round_rows(rows, shift, q, facts)
        facts[2] *= share

    monkeypatch.setattr(int8_screen, "round_rows", less)
    x, W = adversary(side)
    assert reference.topk_encode(x, W, torch.zeros(40), 1, None)[1].item() == 38
    assert (int8_screen.topk_encode(x, W, torch.zeros(40), 1, None)[1].item() == 38) == right


# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "n", "d", "n_latents", "k", "chunk"),
    [
        (torch.float32, 7, 19, 150, 5, (3, 64)),
        (torch.float16, 5, 130, 97, 8, (8, 40)),  # a chunk of 17 latents
        (torch.float32, 3, 8, 61, 61, None),  # k = F
        (torch.float16, 4, 7, 64, 1, (4, 64)),
        (torch.bfloat16, 3, 19, 70, 6, None),  # nothing but the integer product multiplies matrices here
        (torch.float32, 1, 1, 1, 1, None),
        (torch.float16, 2, 260, 40, 9, (1, 8)),
    ],
)
def test_ties(dtype, n, d, n_latents, k, chunk):
    x, W, b = integers(n, d, dtype=dtype), integers(n_latents, d, dtype=dtype), integers(n_latents)
    check_exact(x, W, b, k, integers(d) if d > 7 else None, chunk=chunk)


@pytest.mark.parametrize(("dtype", "k"), [(torch.float32, 5), (torch.float16, 33), (torch.float32, 1)])
def test_sorted_rows_and_equal_latents(dtype, k):
    # Ascending, descending, all equal; 31 winners beside each other with many ties.
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 1.0]], dtype=dtype)
    W = torch.stack([torch.arange(150.0), torch.zeros(150)], 1)
    W[40:71, 1] = 100 + torch.arange(31) % 7
    check_exact(x, W.to(dtype), torch.full((150,), 75.0), k, chunk=(4, 48))


def test_fewer_than_k_positives_fill_with_the_lowest_unused_latents():
    dtype = torch.float16
    W = torch.zeros(150, 2)
    W[[2, 133], 0] = torch.tensor([2.0, 3.0])
    b = torch.full((150,), -0.0)
    b[::2] = -1.0
    b[140] = -math.inf
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=dtype)
    assert (screened(x, W.to(dtype), b, 4) >= 0).all()
    values, indices = int8_screen.topk_encode(x, W.to(dtype), b, 4, None)
    assert indices.tolist() == [[133, 2, 0, 1], [0, 1, 2, 3]]
    assert not torch.signbit(values).any()
    assert (screened(x, W.to(dtype), b - 5, 50) >= 0).all()


def test_nan_and_infinities():
    dtype = torch.float16
    b = torch.zeros(150)
    b[[5, 70]] = math.nan
    b[[3, 88, 140]] = math.inf
    b[7] = -math.inf
    x, W = integers(4, 4, dtype=dtype), integers(150, 4, low=1, high=4, dtype=dtype)
    x[1, 2] = math.nan
    x[2, 0] = math.inf
    for k in (1, 6):
        check_exact(x, W, b, k)
    x = integers(3, 4, low=1, high=3, dtype=dtype)
    W[[11, 60], 1], W[[12, 99], 2], W[30] = math.nan, math.inf, -math.inf
    for k in (1, 6):
        check_exact(x, W, torch.zeros(150), k)
        check_exact(x, W, b, k, integers(4))
    check_exact(x[:1], W, torch.full((150,), math.nan), 4)
    # Such latents cost computed products, not rows: they are listed and compared like any other.
    W = torch.eye(4, dtype=dtype).repeat(20, 1)
    W[11, 1], W[30] = math.inf, math.nan
    assert (screened(x, W, torch.arange(80.0), 6) >= 0).all()


DATA: dict[str, Callable[[int, int, int], tuple[Tensor, Tensor]]] = {
    "normal": lambda n, d, f: (torch.randn(n, d), torch.randn(f, d) / d**0.5),
    "outliers": lambda n, d, f: (
        torch.randn(n, d) * torch.where(torch.arange(d) % 25 == 3, 40.0, 1.0),
        torch.randn(f, d) / d**0.5,
    ),
    "correlated": lambda n, d, f: (torch.randn(n, d) + 3, (torch.randn(f, d) + 2) / d**0.5),
    "negative": lambda n, d, f: (torch.rand(n, d), -torch.rand(f, d)),
    "tiny": lambda n, d, f: (torch.randn(n, d) * 1e-3, torch.randn(f, d) * 1e-2),
}


@pytest.mark.parametrize(
    ("data", "dtype", "k"),
    [
        ("normal", torch.float32, 8),
        ("normal", torch.float16, 33),
        ("outliers", torch.float16, 8),
        ("correlated", torch.float32, 8),
        ("negative", torch.float16, 8),
        ("tiny", torch.float32, 8),
    ],
)
def test_real_data_is_the_top_k_of_its_preactivations(data, dtype, k):
    x, W = (t.to(dtype) for t in DATA[data](4, 70, 130))
    b, b_dec = torch.randn(130) / 8, torch.randn(70) / 2
    if data == "negative":
        b -= 2
    values, indices = int8_screen.topk_encode(x, W, b, k, b_dec, chunk=(3, 64))
    exact = reference.topk_encode(x.double(), W.double(), b.double(), k, b_dec.double())
    own = reference.topk_encode(x, W, b, k, b_dec)[0]
    assert torch.equal(indices, exact[1])
    error, torch_error = ((v.double() - exact[0]).abs().max() for v in (values, own))
    assert error <= 2 * torch_error + torch.finfo(dtype).eps * exact[0].max()


def test_the_same_bits_whatever_the_chunks():
    x, W = planted(4, 70, 130, 5)
    results = [int8_screen.topk_encode(x, W, torch.zeros(130), 5, None, chunk=chunk) for chunk in ((3, 64), (4, 130))]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert (screened(x, W, torch.zeros(130), 5) >= 0).all()


def test_equal_latents_take_the_lower_index():
    """Real numbers: that the same row of W gives the same bits is what lets them tie."""
    W, x = torch.randn(30, 33).repeat(2, 1), torch.randn(3, 33)
    values, indices = int8_screen.topk_encode(x, W, torch.zeros(60), 10, None)
    assert torch.equal(values[:, 0::2], values[:, 1::2])
    assert torch.equal(indices[:, 1::2], indices[:, 0::2] + 30)


# --- what is left, what is given up -----------------------------------------------------------------------------------


def planted(n: int, d: int, n_latents: int, active: int) -> tuple[Tensor, Tensor]:
    """Rows that are sums of `active` latents each, and a little noise; latents are unit rows."""
    W = torch.nn.functional.normalize(torch.randn(n_latents, d), dim=1)
    chosen = torch.stack([torch.randperm(n_latents)[:active] for _ in range(n)])
    x = (W[chosen] * (1 + torch.rand(n, active))[:, :, None]).sum(1)
    return x + 0.01 * torch.randn(n, d), W


def test_few_products_are_computed_for_rows_made_of_latents():
    x, W = planted(9, 1024, 900, 8)
    computed = screened(x, W, torch.zeros(900), 8, seeds=5)
    assert computed[:5].tolist() == [900] * 5
    taken = computed[5:][computed[5:] >= 0]
    assert taken.numel() >= 3
    assert taken.max() <= 32  # the first turn's
    # Without the guess, lists overflow before their rows' latents have been seen.
    assert (screened(x[5:], W, torch.zeros(900), 8, seeds=0) == -1).sum() >= 2


def test_rows_whose_list_overflows_are_encoded_the_ordinary_way():
    """Latents that differ by less than the bound: more than a list holds are left."""
    W = torch.ones(300, 40) + 1e-4 * torch.randn(300, 40)
    x = torch.cat([torch.ones(2, 40), torch.zeros(2, 40)]) + 1e-3 * torch.randn(4, 40)
    b = torch.linspace(0, 1e-4, 300)
    computed = screened(x, W, b, 5)
    assert (computed[:2] == -1).all()
    values, indices = int8_screen.topk_encode(x, W, b, 5, None)
    exact = reference.topk_encode(x.double(), W.double(), b.double(), 5, None)
    torch.testing.assert_close(values.double(), exact[0], rtol=1e-5, atol=0)
    assert torch.equal(indices, exact[1])


def test_a_guess_that_is_too_high_costs_time_and_not_results():
    """The seeds' k-th value is far above the other rows'."""
    x, W = planted(10, 60, 90, 4)
    x[4:] = torch.randn(6, 60) / 10
    x[5] = 0
    computed = screened(x, W, torch.zeros(90), 4, seeds=4)
    assert (computed[4:] == -1).any()
    values, indices = int8_screen.topk_encode(x, W, torch.zeros(90), 4, None, seeds=4)
    exact = reference.topk_encode(x.double(), W.double(), torch.zeros(90).double(), 4, None)
    assert torch.equal(indices, exact[1])
    torch.testing.assert_close(values.double(), exact[0], rtol=1e-5, atol=1e-6)


def test_seeds_that_say_nothing_give_no_guess():
    x, W = planted(8, 40, 90, 4)
    x[0], x[1, 3] = 0, math.nan  # a row without a norm, one without numbers
    multiple = int8_screen._multiple_of(torch.tensor([[2.0, 1.0], [4.0, 3.0]]), torch.tensor([0.0, 2.0]))
    assert multiple.item() == pytest.approx(1.5 * 0.97)
    for values, norms in (([[1.0]], [0.0]), ([[math.inf]], [1.0]), ([[math.nan]], [1.0]), ([[1.0]], [math.inf])):
        assert int8_screen._multiple_of(torch.tensor(values), torch.tensor(norms)).item() == 0
    check = int8_screen.topk_encode(x, W, torch.zeros(90), 4, None, seeds=2)
    want = reference.topk_encode(x, W, torch.zeros(90), 4, None)
    assert torch.equal(check[1], want[1])


# --- the back-end -----------------------------------------------------------------------------------------------------


def test_the_back_end_runs_by_request_with_gradients_and_the_step(monkeypatch):
    x, W = planted(6, 20, 40, 3)
    b, b_dec = torch.randn(40) / 10, torch.randn(20) / 10
    gradients = []
    for backend in ("triton-int8", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, W, b, b_dec)]
        values, indices = rk.topk_encode(*leaves[:3], 4, leaves[3], backend=backend)
        values.square().sum().backward()
        assert rk.last_backend("topk_encode") == rk.last_backend("topk_encode_backward") == backend
        gradients.append([values.detach(), indices, *(leaf.grad for leaf in leaves)])
    for mine, want in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-5)
    calls = []
    encoder = int8_screen.topk_encode

    def counted(*arguments):
        calls.append(tuple(arguments[0].shape))
        return encoder(*arguments)

    monkeypatch.setattr(int8_screen, "topk_encode", counted)
    losses = []
    for backend in ("triton-int8", "reference"):
        leaves = [t.clone().requires_grad_() for t in (W, b, W, b_dec)]
        losses.append(rk.sae_step(x, *leaves, 4, backend=backend).loss)
        assert rk.last_backend("sae_step") == backend
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    # With a head axis it runs head by head.
    heads = rk.topk_encode(x.view(2, 3, 20), W.view(2, 20, 20), b.view(2, 20), 4, backend="triton-int8")
    want = rk.topk_encode(x.view(2, 3, 20), W.view(2, 20, 20), b.view(2, 20), 4, backend="reference")
    assert torch.equal(heads[1], want[1])
    assert calls == [(6, 20), (3, 20), (3, 20)]


def test_what_it_does_not_take_is_said():
    assert (int8.MOST_K, int8.MOST_COLUMNS) == (int8_screen.MOST_K, int8_screen.MOST_COLUMNS)
    x, W, b = torch.randn(2, 4), torch.randn(300, 4), torch.zeros(300)
    with pytest.raises(rk.BackendError, match="triton-int8: its 8-bit screen takes k up to 256, not 257"):
        rk.topk_encode(x, W, b, 257, backend="triton-int8")
    values, indices = rk.topk_encode(x[:0], W, b, 4, backend="triton-int8")
    assert values.shape == indices.shape == (0, 4)
