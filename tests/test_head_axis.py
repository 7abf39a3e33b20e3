"""The head axis of the operators, W [H, F, d]: what a loop over the heads gives, and errors that name the axis."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import refusal_kernels as rk

BACKENDS = ("reference", "cpu")
H, D, F, K = 3, 5, 11, 4


@pytest.fixture(autouse=True)
def _seed_and_poison():
    torch.manual_seed(5)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def leaves(lead: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x [H, *lead, d], W_enc, b_enc, W_dec, b_dec."""
    shapes = ((H, *lead, D), (H, F, D), (H, F), (H, F, D), (H, D))
    return [torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes]


def autoencode(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, backend: str) -> list[Tensor]:
    values, indices = rk.topk_encode(x, W_enc, b_enc, K, b_dec, backend=backend)
    return [values, indices, rk.sparse_decode(values, indices, W_dec, b_dec, backend=backend)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (0,)])
def test_results_and_gradients_are_those_of_a_loop_over_heads(backend, dtype, lead):
    start = leaves(lead, dtype)
    if backend == "reference":  # multiples of 1/4, of which sums are exact: its BLAS takes a batch's in another order
        start = [(t * 4).round() / 4 for t in start]
    together = [t.requires_grad_() for t in start]
    apart = [[t[h].detach().clone().requires_grad_() for t in together] for h in range(H)]
    results = autoencode(*together, backend)
    for op in ("topk_encode", "sparse_decode"):
        assert rk.last_backend(op) == backend
    loop = [torch.stack(parts) for parts in zip(*(autoencode(*head, backend) for head in apart), strict=True)]
    for mine, theirs in zip(results, loop, strict=True):
        assert torch.equal(mine, theirs)
    results[2].square().sum().backward()
    loop[2].square().sum().backward()
    assert rk.last_backend("topk_encode_backward") == rk.last_backend("sparse_decode_backward") == backend
    for i, mine in enumerate(together):
        # b_dec's gradient is one batched product for all heads; everything else is the loop's bit for bit.
        tolerance = {"rtol": 0, "atol": 0} if i < 4 else {}
        torch.testing.assert_close(mine.grad, torch.stack([head[i].grad for head in apart]), **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_head_is_the_operator_without_the_axis(backend):
    x, W_enc, b_enc, W_dec, b_dec = (t[:1] for t in leaves((6,)))
    with_axis = autoencode(x, W_enc, b_enc, W_dec, b_dec, backend)
    without = autoencode(x[0], W_enc[0], b_enc[0], W_dec[0], b_dec[0], backend)
    assert all(torch.equal(a[0], b) for a, b in zip(with_axis, without, strict=True))


def test_strides_index_types_and_no_bias():
    x, W_enc, b_enc, W_dec, _ = leaves((6,))
    values, indices = rk.topk_encode(x.transpose(0, 1).contiguous().transpose(0, 1), W_enc, b_enc, K)
    assert all(torch.equal(indices[h], rk.topk_encode(x[h], W_enc[h], b_enc[h], K)[1]) for h in range(H))
    x_hat = rk.sparse_decode(values, indices.to(torch.int32), W_dec.mT.contiguous().mT)
    assert all(torch.equal(x_hat[h], rk.sparse_decode(values[h], indices[h], W_dec[h])) for h in range(H))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_against_finite_differences(backend):
    x, W_enc, b_enc, W_dec, b_dec = (t.requires_grad_() for t in leaves((2,), torch.float64))
    assert torch.autograd.gradcheck(
        lambda *a: rk.topk_encode(*a[:3], K, a[3], backend=backend)[0], (x, W_enc, b_enc, b_dec)
    )
    indices = torch.randint(0, F, (H, 2, K))
    values = torch.randn(H, 2, K, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda v, w, c: rk.sparse_decode(v, indices, w, c, backend=backend), (values, W_dec, b_dec)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    x, W_enc, b_enc, W_dec, b_dec = leaves((6,))
    ops = torch.ops.refusal_kernels
    torch.library.opcheck(ops.topk_encode.default, (x, W_enc, b_enc, K, b_dec, backend))
    values, indices = rk.topk_encode(x, W_enc, b_enc, K, b_dec)
    torch.library.opcheck(ops.sparse_decode.default, (values, indices, W_dec, b_dec, backend))
    for flags in ((True, True), (False, True), (True, False)):
        arguments = (values, values, indices, x, W_enc, b_dec, *flags, backend)
        torch.library.opcheck(ops.topk_encode_backward.default, arguments)
        torch.library.opcheck(ops.sparse_decode_backward.default, (x, values, indices, W_dec, *flags, backend))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(4, 6, D)}, r"x must have shape \[H, \.\.\., d\] with H = W_enc.shape\[0\] = 3.*\(4, 6, 5\)"),
        ({"x": torch.randn(D)}, r"x must have shape \[H, \.\.\., d\]"),
        ({"x": torch.randn(H, 6, 7)}, r"last dimension of x must be d = W_enc.shape\[2\] = 5; got x of shape"),
        ({"W_enc": torch.randn(1, H, F, D)}, r"W_enc must be a non-empty matrix \[F, d\], or \[H, F, d\]"),
        ({"W_enc": torch.randn(0, F, D)}, r"W_enc must be a non-empty matrix"),
        ({"b_enc": torch.randn(F)}, r"b_enc must have shape \[H, F\] = \(3, 11\); got \(11,\)"),
        ({"b_dec": torch.randn(D)}, r"b_dec must have shape \[H, d\] = \(3, 5\); got \(5,\)"),
        ({"k": 12}, r"k must be at most F = W_enc.shape\[1\] = 11; got k = 12"),
    ],
)
def test_encode_names_what_is_wrong(change, message):
    x, W_enc, b_enc, _, b_dec = leaves((6,))
    with pytest.raises(ValueError, match=message):
        rk.topk_encode(**{"x": x, "W_enc": W_enc, "b_enc": b_enc, "k": K, "b_dec": b_dec, **change})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.randn(4, 6, K)}, r"values must have shape \[H, \.\.\., k\] with H = W_dec.shape\[0\] = 3"),
        ({"values": torch.randn(K)}, r"values must have shape \[H, \.\.\., k\]"),
        ({"indices": torch.zeros(H, 6, 2, dtype=torch.int64)}, r"indices must have the shape of values"),
        ({"indices": torch.full((H, 6, K), F)}, r"F = W_dec.shape\[1\] = 11; got values from 11 to 11"),
        ({"b_dec": torch.randn(D)}, r"b_dec must have shape \[H, d\] = \(3, 5\); got \(5,\)"),
    ],
)
def test_decode_names_what_is_wrong(backend, change, message):
    good = {"values": torch.randn(H, 6, K), "indices": torch.zeros(H, 6, K, dtype=torch.int64)}
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        rk.sparse_decode(**{**good, "W_dec": torch.randn(H, F, D), **change}, backend=backend)


def step_of(tensors: list[Tensor], backend: str, **options) -> tuple[rk.SAEStepOutput, list[Tensor], rk.SAEAdam | None]:
    """One `sae_step` on copies of x, W_enc, b_enc, W_dec, b_dec: its output, the parameters, the optimizer."""
    x, *parameters = (t.detach().clone() for t in tensors)
    parameters = [p.requires_grad_() for p in parameters]
    optimizer = None
    if (norm := options.pop("max_grad_norm", 0)) != 0:
        optimizer = rk.SAEAdam(*parameters, lr=1e-2, max_grad_norm=norm)
    for _ in range(2):
        output = rk.sae_step(x, *parameters, K, optimizer=optimizer, backend=backend, **options)
    return output, parameters, optimizer


def assert_step_is_a_loop_of_steps(backend: str, tensors: list[Tensor], fused: bool) -> None:
    options = {"max_grad_norm": None} if fused else {"grad_scale": 0.5}
    output, parameters, optimizer = step_of(tensors, backend, **options)
    assert rk.last_backend("sae_step") == backend
    alone = [step_of([t[h] for t in tensors], backend, **options) for h in range(len(tensors[0]))]
    for name, mine, theirs in zip(output._fields, output, zip(*(a[0] for a in alone), strict=True), strict=True):
        torch.testing.assert_close(mine, torch.stack(theirs), msg=lambda text, name=name: f"{name}: {text}")
    for i, parameter in enumerate(parameters):
        others = [a[1][i] for a in alone]
        torch.testing.assert_close(parameter, torch.stack([p.detach() for p in others]).requires_grad_())
        if optimizer is None:
            torch.testing.assert_close(parameter.grad, torch.stack([p.grad for p in others]))
        else:
            moments = [a[2].moments(p)[1] for a, p in zip(alone, others, strict=True)]
            torch.testing.assert_close(optimizer.moments(parameter)[1], torch.stack(moments))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_is_a_loop_of_steps(backend, fused, dtype):
    assert_step_is_a_loop_of_steps(backend, leaves((2, 7), dtype), fused)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clipping_takes_the_norm_over_all_heads(backend):
    tensors = leaves((7,), torch.float64)
    _, parameters, _ = step_of(tensors, backend, max_grad_norm=0.05)
    plain = [t.clone().requires_grad_() for t in tensors[1:]]
    adam = torch.optim.Adam(plain, lr=1e-2)
    for _ in range(2):
        values, indices = rk.topk_encode(tensors[0], plain[0], plain[1], K, plain[3], backend="reference")
        error = rk.sparse_decode(values, indices, plain[2], plain[3], backend="reference") - tensors[0]
        (error.square().sum() / 7).backward()
        w = plain[2].detach()
        plain[2].grad -= (plain[2].grad * w).sum(-1, keepdim=True) / w.square().sum(-1, keepdim=True) * w
        torch.nn.utils.clip_grad_norm_(plain, 0.05)
        adam.step()
        adam.zero_grad()
        plain[2].data /= plain[2].data.norm(dim=-1, keepdim=True)
    for mine, theirs in zip(parameters, plain, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_step_names_what_is_wrong():
    x, W_enc, b_enc, W_dec, b_dec = (t.requires_grad_() for t in leaves((6,)))
    with pytest.raises(ValueError, match=r"x must have shape \[H, \.\.\., d\] with H = W_enc.shape\[0\] = 3"):
        rk.sae_step(x[0], W_enc, b_enc, W_dec, b_dec, K)
    with pytest.raises(ValueError, match=r"W_dec must have shape \[H, F, d\]"):
        rk.sae_step(x, W_enc, b_enc, W_dec[:, :4].detach().requires_grad_(), b_dec, K)
