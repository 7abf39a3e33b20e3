"""The grouped encoder against the contract and against the chunked path, in the interpreter: fp32 and fp16, ties, rows
in the worst orders, fewer than k positives, NaN and infinities, and sizes that are multiples of nothing.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import refusal_kernels as rk
from refusal_kernels import reference
from refusal_kernels.triton_kernels import encode, grouped_encode
from refusal_kernels.triton_kernels.launch import Tiles


@pytest.fixture(params=[2, 3], ids=["2 keys", "3 keys"])
def kept(request) -> int:
    """How many keys of a group are stored; of both, on every input."""
    return request.param


@pytest.fixture(autouse=True)
def _small_and_poisoned(monkeypatch, kept):
    """Tiles and lists that tiny shapes fill several times: the shipped ones take seconds in the interpreter."""
    tiles = Tiles({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 16, "GROUP_M": 2, "KEPT": kept}, num_warps=4)
    monkeypatch.setattr(grouped_encode, "group_tiles", lambda dtype, of: tiles)
    monkeypatch.setattr(f"{__name__}.PATH", "grouped" if kept == 2 else "grouped, 3 keys")
    monkeypatch.setattr(grouped_encode, "_SHAPES", ((8, 64, 8, 32), (64, 128, 32, 32)))
    monkeypatch.setattr(encode, "_LISTS", ((8, 32, 16, 1), (64, 128, 64, 1)))
    torch.manual_seed(2)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


PATH = "grouped"


def integers(*shape: int, low: int = -2, high: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(low, high, shape).to(dtype)


def grouped(x: Tensor, W: Tensor, b: Tensor, k: int, b_dec: Tensor | None = None, rows: int = 2):
    return encode.topk_encode(x, W, b, k, b_dec, chunk=(rows, 0), path=PATH)


def check_exact(x: Tensor, W: Tensor, b: Tensor, k: int, b_dec: Tensor | None = None) -> None:
    """Sums of small integers have no rounding: contract, chunked path and grouped path are equal bit for bit."""
    values, indices = grouped(x, W, b, k, b_dec)
    if x.dim() == 2:
        chunked = encode.topk_encode(x, W, b, k, b_dec, path="chunked")
        exact = [reference.topk_encode(x, W, b, k, b_dec)]
    else:
        assert encode.path_of(W.shape, k) == "grouped"
        chunked = encode.topk_encode(x, W, b, k, b_dec, path="chunked")
        exact = [reference.topk_encode(x[h], W[h], b[h], k, None if b_dec is None else b_dec[h]) for h in range(len(x))]
    for v, i in (chunked, [torch.cat(parts).view(values.shape) for parts in zip(*exact, strict=True)]):
        assert torch.equal(indices, i)
        assert torch.equal(torch.nan_to_num(values, nan=-7.0), torch.nan_to_num(v, nan=-7.0))
    assert values.dtype == x.dtype


@pytest.mark.parametrize(
    ("dtype", "lead", "d", "n_latents", "k"),
    [
        (torch.float16, (3, 3), 7, 150, 5),  # heads, and a last group of 22
        (torch.float32, (1, 3), 19, 97, 8),  # a last group of one latent
        (torch.float16, (2,), 5, 61, 61),  # k = F, more than the keys that are kept
        (torch.float32, (2,), 3, 64, 9),  # more than twice the groups
        (torch.float32, (1, 1), 1, 1, 1),
    ],
)
def test_ties(dtype, lead, d, n_latents, k):
    heads = lead[:-1]
    x, W = integers(*lead, d, dtype=dtype), integers(*heads, n_latents, d, dtype=dtype)
    b_dec = integers(*heads, d) if d > 3 else None
    check_exact(x, W, integers(*heads, n_latents), k, b_dec)


@pytest.mark.parametrize(("dtype", "k"), [(torch.float32, 5), (torch.float16, 33)])
def test_sorted_rows_and_winners_in_one_group(dtype, k):
    # Ascending, descending, all equal; the best 31 latents beside each other inside one group and across two.
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 1.0]], dtype=dtype)
    W = torch.stack([torch.arange(150.0), torch.zeros(150)], 1)
    W[40:71, 1] = 100 + torch.arange(31) % 7
    check_exact(x, W.to(dtype), torch.full((150,), 75.0), k)


def test_fewer_than_k_positives_fill_with_the_lowest_unused_latents():
    dtype = torch.float16
    W = torch.zeros(150, 2)
    W[[9, 133], 0] = torch.tensor([2.0, 3.0])
    b = torch.full((150,), -0.0)
    b[::2] = -1.0
    b[140] = -math.inf
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=dtype)
    check_exact(x, W.to(dtype), b, 4)
    values, indices = grouped(x, W.to(dtype), b, 4)
    assert indices.tolist() == [[133, 9, 0, 1], [0, 1, 2, 3]]
    assert not torch.signbit(values).any()
    check_exact(x, W.to(dtype), b - 5, 33)


def test_nan_and_infinities():
    dtype = torch.float16
    b = torch.zeros(150)
    b[[5, 70]] = math.nan
    b[[3, 88, 140]] = math.inf
    b[7] = -math.inf
    x, W = integers(3, 4, dtype=dtype), integers(150, 4, low=1, high=4, dtype=dtype)
    x[1, 2] = math.nan
    x[2, 0] = math.inf
    for k in (1, 6):
        check_exact(x, W, b, k)
    check_exact(x[:1], W, torch.full((150,), math.nan), 4)


def test_equal_latents_take_the_lower_index():
    """Real numbers: that the same row of W gives the same bits is what lets them tie."""
    W, x = torch.randn(30, 33).repeat(5, 1), torch.randn(3, 33)
    values, indices = grouped(x, W, torch.zeros(150), 10)
    assert torch.equal(values[:, 0::5], values[:, 4::5])
    assert torch.equal(indices[:, 1:5], indices[:, :1] + torch.tensor([30, 60, 90, 120]))


@pytest.mark.parametrize(("dtype", "k"), [(torch.float32, 8), (torch.float16, 33)])
def test_real_data_is_the_top_k_of_its_own_preactivations(dtype, k):
    x, W = torch.randn(2, 2, 40).to(dtype), (torch.randn(2, 200, 40) / 6).to(dtype)
    b, b_dec = torch.randn(2, 200) / 4, torch.randn(2, 40)
    values, indices = grouped(x, W, b, k, b_dec)
    exact = ((x.double() - b_dec.double()[:, None]) @ W.double().mT + b.double()[:, None]).relu()
    best = torch.sort(exact, dim=-1, descending=True, stable=True)
    assert torch.equal(indices, best.indices[..., :k])
    own = torch.stack([reference.topk_encode(x[h], W[h], b[h], k, b_dec[h])[0] for h in range(2)])
    error, torch_error = ((v.double() - best.values[..., :k]).abs().max() for v in (values, own))
    assert error <= 2 * torch_error + torch.finfo(dtype).eps * best.values.max()
    again = grouped(x, W, b, k, b_dec)
    assert torch.equal(values, again[0])
    assert torch.equal(indices, again[1])


def test_near_ties_of_the_keys_are_settled_by_whole_sums():
    """40 latents that differ in the last bits of their pre-activations, which keys do not hold, across three groups."""
    W = torch.zeros(150, 1)
    W[20:100:2, 0] = 1 + torch.randperm(40) * 2.0**-23
    x = torch.ones(2, 1)
    x[1] = 3
    check_exact(x, W, torch.zeros(150), 7)


def test_tiny_and_huge_numbers_are_not_lost():
    """Squares of these rows vanish or overflow; their products with W do not."""
    for scale in (1e-30, 1e25):
        x, W = torch.randn(2, 9) * scale, torch.randn(150, 9) / scale
        _, indices = grouped(x, W, torch.zeros(150), 8)
        pre = x.double() @ W.double().T
        assert torch.equal(indices, torch.sort(pre, dim=1, descending=True, stable=True).indices[:, :8])


def test_shapes_that_registers_do_not_hold_take_the_chunked_path(monkeypatch):
    monkeypatch.undo()
    assert encode.path_of((4, 4096, 128), 32) == encode.path_of((4, 16384, 1024), 128) == "grouped"
    for shape, k in (((4, 4096, 1032), 32), ((4, 16385, 128), 32), ((4, 4096, 128), 129)):
        assert encode.path_of(shape, k) == "chunked"


def test_one_autoencoder_takes_the_path_that_was_measured_ahead(monkeypatch):
    monkeypatch.undo()
    assert encode.path_of((4096, 128), 32) == encode.path_of((1, 1), 1) == "grouped"
    for shape, k in (((4097, 128), 32), ((4096, 129), 32), ((4096, 128), 33)):
        assert encode.path_of(shape, k) == "chunked"
    x, W = torch.randn(3, 40), torch.randn(200, 40)
    taken = []

    def encode_rows(*arguments, of=encode.encode_rows, **options):
        taken.append(arguments)
        of(*arguments, **options)

    monkeypatch.setattr(encode, "encode_rows", encode_rows)
    values, indices = rk.topk_encode(x, W, torch.zeros(200), 9, backend="triton")
    assert taken
    chunked = encode.topk_encode(x, W, torch.zeros(200), 9, None, path="chunked")
    assert torch.equal(indices, chunked[1])
    torch.testing.assert_close(values, chunked[0])
