"""Every tile that ships, in the interpreter: the other files take small ones where many cases would take minutes.

Operands are small integers: sums are exact whatever the tile, and results equal the reference's; Adam's are close to
them. At the end all sizes of all registered configurations have run. Dtypes and flags are the other files' matter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from refusal_kernels import reference
from refusal_kernels.triton_kernels import (
    adam,
    backward,
    backward_csr,
    decode,
    encode,
    encode_csr,
    int8_rounding,
    int8_screen,
    lora_projection,
    lora_projection_lagged,
    projected_adam,
    projection,
    sae_adam,
)
from refusal_kernels.triton_kernels.registry import configurations

Tile = tuple[str, tuple[tuple[str, Any], ...]]
RAN: set[Tile] = set()
NUMBERS = (1e-2, 0.9, 0.999, 1e-8, 1 - 0.9**3, 1 - 0.999**3)  # of Adam's third step


def tile(kernel: Any, constexprs: dict[str, Any]) -> Tile:
    """A kernel and its sizes: the constexprs that are no flags. The interpreter knows no stages."""
    sizes = {n: value for n, value in constexprs.items() if not isinstance(value, bool) and n != "STAGES"}
    return f"{kernel.fn.__module__}.{kernel.fn.__name__}", tuple(sorted(sizes.items()))


@pytest.fixture(autouse=True)
def _recorded_and_poisoned(monkeypatch):
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def record(self: Any, *arguments: Any, **options: Any) -> Any:
        RAN.add(tile(self, {name: value for name, value in options.items() if name in self.arg_names}))
        return run(self, *arguments, **options)

    monkeypatch.setattr(InterpretedFunction, "run", record)
    torch.manual_seed(3)
    torch.use_deterministic_algorithms(True, warn_only=True)  # `empty` is filled with NaN and the largest integers
    yield
    torch.use_deterministic_algorithms(False)


def integers(*shape: int, low: int = -2, high: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(low, high, shape).to(dtype)


def sorted_rows(n_latents: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, W, b: every latent of the first row beats all before it, so that its list overflows again and again; the
    second row is the same in descending order."""
    return (
        torch.tensor([[1.0], [-1.0]], dtype=dtype),
        torch.arange(float(n_latents))[:, None].to(dtype),
        torch.zeros(n_latents),
    )


def check_code(
    code: tuple[Tensor, Tensor], x: Tensor, W: Tensor, b: Tensor, k: int, b_dec: Tensor | None = None
) -> None:
    values, indices = reference.topk_encode(
        x.double(), W.double(), b.double(), k, None if b_dec is None else b_dec.double()
    )
    assert torch.equal(code[1], indices)
    assert torch.equal(code[0].double(), values.to(x.dtype).double())


# Of both directions alone: a reduction of the longest list takes seconds. With k = 1100 chunks are merged.
@pytest.mark.parametrize(("k", "n_latents"), [(5, 450), (65, 800), (257, 2200), (1100, 1200)])
def test_chunked_encoder(k, n_latents):
    x, W, b = sorted_rows(n_latents, torch.float32)
    check_code(encode.topk_encode(x, W, b, k, None, path="chunked"), x, W, b, k)


def test_chunked_encoder_of_16_bits():
    x, W, b, b_dec = integers(2, 3).half(), integers(200, 3).half(), integers(200), integers(3)
    check_code(encode.topk_encode(x, W, b, 5, b_dec, path="chunked"), x, W, b, 5, b_dec)


@pytest.mark.parametrize("path", encode.PATHS[:2])
@pytest.mark.parametrize(("k", "dtype"), [(5, torch.float32), (40, torch.float16)])
def test_grouped_encoder(path, k, dtype):
    x, W, b = sorted_rows(200, dtype)
    check_code(encode.topk_encode(x, W, b, k, None, path=path), x, W, b, k)
    x, W, b = integers(1, 5, dtype=dtype), integers(100, 5, dtype=dtype), integers(100)  # ties
    check_code(encode.topk_encode(x, W, b, k, None, path=path), x, W, b, k)


@pytest.mark.parametrize(("k", "dtype"), [(5, torch.float32), (100, torch.float16)])
def test_screened_encoder(k, dtype):
    x, W, b, b_dec = integers(1, 140, dtype=dtype), integers(130, 140, dtype=dtype), integers(130), integers(140)
    check_code(int8_screen.topk_encode(x, W, b, k, b_dec), x, W, b, k, b_dec)


def test_the_product_of_8_bit_numbers():
    x, W = integers(3, 256, low=-127, high=128, dtype=torch.int8), integers(130, 256, dtype=torch.int8)
    out = torch.empty(3, 130, dtype=torch.int32)
    int8_rounding.product(x, W, out)
    assert torch.equal(out, (x.double() @ W.double().T).to(torch.int32))


def test_encoders_of_csr_codes():
    x, W, b = integers(2, 4), integers(1100, 4), integers(1100)
    for ours, of_reference in (
        (encode_csr.batch_topk_encode(x, W, b, 7, None), reference.batch_topk_encode(x, W, b, 7, None)),
        (encode_csr.threshold_encode(x, W, b, torch.ones(1100), None),
         reference.threshold_encode(x, W, b, torch.ones(1100), None)),
    ):  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(ours, of_reference, strict=True))


def entries(d: int, n: int = 5, k: int = 3, n_latents: int = 6) -> tuple[Tensor, ...]:
    """values, indices, W, rows: a latent with more entries than a segment of 2 among them."""
    indices = torch.rand(n, n_latents).argsort(1)[:, :k].contiguous()
    return integers(n, k, low=1), indices, integers(n_latents, d), integers(n, d)


@pytest.mark.parametrize("d", [100, 300])
def test_decoder(d):
    values, indices, W, _ = entries(d)
    assert torch.equal(
        decode.sparse_decode(values, indices, W, None), reference.sparse_decode(values, indices, W, None)
    )


@pytest.mark.parametrize("d", [100, 500, 1000, 2000, 4000, 5000, 8200])
def test_gradients(d):
    values, indices, W, x = entries(d)
    e, b_dec = integers(*x.shape), integers(d)
    ours, exact = ([torch.zeros(6, d), torch.zeros(6), torch.zeros(6, d)] for _ in range(2))
    backward.sae_backward(e, x, values, indices, W, W, b_dec, 1.0, *ours, segment=2)
    reference.sae_backward(e, x, values, indices, W, W, b_dec, 1.0, *exact)
    assert all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True))


@pytest.mark.parametrize("d", [100, 500, 1000])
def test_gradients_of_known_coefficients(d):
    values, indices, W, x = entries(d)
    arguments = (integers(*values.shape), values, indices, x, W, integers(d), False, True)
    ours, exact = backward.topk_encode_backward(*arguments, segment=2), reference.topk_encode_backward(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(ours[1:], exact[1:], strict=True))


def test_gradients_of_a_csr_code():
    values, indices, W, x = entries(600)
    arguments = (x, values.flatten(), indices.flatten(), torch.arange(6) * 3, W, True, True)
    ours = backward_csr.sparse_decode_csr_backward(*arguments, segment=2)
    assert all(torch.equal(a, b) for a, b in zip(ours, reference.sparse_decode_csr_backward(*arguments), strict=True))


def adam_state(*shape: int) -> list[Tensor]:
    """W, g, m, v."""
    return [torch.randn(shape), torch.randn(shape), torch.randn(shape) / 8, torch.rand(shape)]


@pytest.mark.parametrize("d", [100, 500, 1000, 2000, 4000, 8000, 9000])
@pytest.mark.parametrize("constrained", [True, False])
def test_adam(d, constrained):
    state = adam_state(3, d)
    exact = [t.double() for t in state]
    adam.adam_rows(*state, *NUMBERS, None, constrained, constrained)
    reference.adam_rows(*exact, *NUMBERS, None, constrained, constrained)
    for ours, theirs in zip(state, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("d", "dtype"), [(d, torch.float32) for d in (100, 500, 1000, 2000, 4000)] + [(4000, torch.float16)]
)
def test_fused_step(d, dtype):
    values, indices, _, x = (t.to(dtype) if t.is_floating_point() else t for t in entries(d))
    e, b_dec = integers(*x.shape, dtype=dtype), integers(d)
    (W_enc, _, *enc), (b_enc, _, *bias), (W_dec, _, *dec) = adam_state(6, d), adam_state(6), adam_state(6, d)
    W_dec = W_dec.to(dtype).float()  # as the forward pass saw them
    ours = [t.clone() for t in (W_enc, *enc, b_enc, *bias, W_dec, *dec)]
    exact = [t.double() for t in ours]
    arguments = (e, x, values, indices, ours[0], ours[3], ours[6], b_dec, 0.5, *ours[1:3], *ours[4:6], *ours[7:])
    through = sae_adam.sae_backward_adam(*arguments, *NUMBERS, True, True, None, None, None, None, segment=2)
    gradients = [torch.zeros(*shape, dtype=torch.float64) for shape in ((6, d), (6,), (6, d))]
    rows = [t.double() if t.is_floating_point() else t for t in (e, x, values, indices)]
    reference.sae_backward(*rows, exact[0], exact[6], b_dec.double(), 0.5, *gradients)
    torch.testing.assert_close(through.double(), gradients[1] @ exact[0].to(dtype).double(), rtol=1e-4, atol=1e-3)
    reference.adam_rows(exact[0], gradients[0], *exact[1:3], *NUMBERS, None, False, False)
    reference.adam_rows(
        exact[3][None], gradients[1][None], *(t[None] for t in exact[4:6]), *NUMBERS, None, False, False
    )
    reference.adam_rows(exact[6], gradients[2], *exact[7:], *NUMBERS, None, True, True)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3)


def basis(n: int, r: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, r))[0].contiguous()


@pytest.mark.parametrize("fibres", [16, 64])
@pytest.mark.parametrize("r", [5, 60])
def test_projection(fibres, r):
    g, u = torch.randn(70, fibres), basis(70, r)
    ours = projection.project_out(g, 0, u, 1.0, None)
    torch.testing.assert_close(ours, reference.project_out(g, 0, u, 1.0, None), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("r", lora_projection.RANKS)
def test_projections_of_lora_matrices(r):
    for shape, dim in (((128, 16), 0), ((16, 128), 1)):
        g, u = torch.randn(shape), basis(128, r)
        exact = reference.project_out(g, dim, u, 1.0, None)
        in_one_launch = g.clone()
        projection.project_out_grouped([g], [dim], [u], [0], [], [-1], 1.0)
        torch.testing.assert_close(g, exact, rtol=1e-4, atol=1e-5)
        lora_projection_lagged.prepare([in_one_launch], [dim], [u], [0], [], [-1], 1.0)()
        torch.testing.assert_close(in_one_launch, exact, rtol=1e-4, atol=1e-5)
        p, gradient, m, v = adam_state(*shape)
        moved = [torch.zeros(shape), gradient, m.clone(), v.clone()]
        reference.adam_rows(*moved, *NUMBERS, None, False, False)
        exact = p + reference.project_out(moved[0], dim, u, 1.0, None)
        projected_adam.prepare([p], [m], [v], [dim], [u], [0], 1.0)([gradient], *NUMBERS, 0.0)
        torch.testing.assert_close(p, exact, rtol=1e-4, atol=1e-5)


def test_every_tile_that_ships_has_run():
    """In the tests of this file, which it must be run with."""
    shipped = {tile(c.kernel, dict(c.tiles.constexprs)): c.label for c in configurations()}
    assert {label for ran, label in shipped.items() if ran not in RAN} == set()
