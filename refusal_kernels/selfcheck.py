"""One run of each operator against the fp64 reference: is this installation sound on this machine?

Not the test suite: one small shape per operator, forward and gradients, on inputs that leave no room for excuses. The
operators' inputs are small integers, so that every sum is exact in fp32 in any order, ties are everywhere, and equality
is bit for bit. The training step and Adam divide, so they are compared to 1e-4 of the largest entry.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import (
    ProjectedAdamW,
    ProjectionPlan,
    SAEAdam,
    batch_topk_encode,
    last_backend,
    project_out,
    sae_step,
    sparse_decode,
    sparse_decode_csr,
    threshold_encode,
    topk_encode,
)

N, D, F, K = 24, 40, 96, 7
TOLERANCE = 1e-4

Results = dict[str, Tensor]


def check(op: str, backend: str, device: str) -> str | None:
    """Runs `op` in fp32 on `backend` and `device`, compares it with the fp64 reference; what differs, or None.

    Raises whatever the operator raises; ValueError for an operator that has no check.
    """
    if op not in CHECKS:
        raise ValueError(f"check: op must be one of {', '.join(CHECKS)}; got {op!r}")
    run, exact, recorded = CHECKS[op]
    expected = run("reference", "cpu", torch.float64)
    got = run(backend, device, torch.float32)
    ran = {name: last_backend(name) for name in recorded}
    if wrong := [f"{name} ran on {where}" for name, where in ran.items() if where != backend]:
        return ", ".join(wrong)
    for name, reference in expected.items():
        result = got[name].detach().to("cpu", reference.dtype)
        if result.shape != reference.shape:
            return f"{name} has shape {tuple(result.shape)}, expected {tuple(reference.shape)}"
        error = (result - reference).abs().max().item() if reference.numel() else 0.0
        bound = 0.0 if exact else TOLERANCE * max(1.0, reference.abs().max().item())
        if not error <= bound:  # also true for NaN
            return f"{name} differs from the reference by {error:.3g} (allowed {bound:.3g})"
    return None


def _integers(*shape: int, seed: int, device: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).to(device, dtype)


def _leaf(*shape: int, seed: int, device: str, dtype: torch.dtype) -> Tensor:
    return _integers(*shape, seed=seed, device=device, dtype=dtype).requires_grad_()


def _topk_encode(backend: str, device: str, dtype: torch.dtype) -> Results:
    x = _leaf(N, D, seed=1, device=device, dtype=dtype)
    W_enc = _leaf(F, D, seed=2, device=device, dtype=dtype)
    b_enc = _leaf(F, seed=3, device=device, dtype=dtype)
    b_dec = _leaf(D, seed=4, device=device, dtype=dtype)
    values, indices = topk_encode(x, W_enc, b_enc, K, b_dec, backend=backend)
    values.backward(_integers(N, K, seed=5, device=device, dtype=dtype))
    return {"values": values, "indices": indices.to(dtype), **_gradients(x=x, W_enc=W_enc, b_enc=b_enc, b_dec=b_dec)}


def _sparse_decode(backend: str, device: str, dtype: torch.dtype) -> Results:
    values = _leaf(N, K, seed=6, device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(7)
    indices = torch.randint(0, F, (N, K), generator=generator).to(device)
    W_dec = _leaf(F, D, seed=8, device=device, dtype=dtype)
    b_dec = _leaf(D, seed=9, device=device, dtype=dtype)
    x_hat = sparse_decode(values, indices, W_dec, b_dec, backend=backend)
    x_hat.backward(_integers(N, D, seed=10, device=device, dtype=dtype))
    return {"x_hat": x_hat, **_gradients(values=values, W_dec=W_dec, b_dec=b_dec)}


def _batch_topk_encode(backend: str, device: str, dtype: torch.dtype) -> Results:
    return _csr_encode(batch_topk_encode, K, backend, device, dtype)


def _threshold_encode(backend: str, device: str, dtype: torch.dtype) -> Results:
    threshold = _integers(F, seed=14, device=device, dtype=dtype) * 4
    return _csr_encode(threshold_encode, threshold, backend, device, dtype)


def _csr_encode(
    encode: Callable[..., tuple[Tensor, ...]], choice: int | Tensor, backend: str, device: str, dtype: torch.dtype
) -> Results:
    x = _leaf(N, D, seed=1, device=device, dtype=dtype)
    W_enc = _leaf(F, D, seed=2, device=device, dtype=dtype)
    b_enc = _leaf(F, seed=3, device=device, dtype=dtype)
    b_dec = _leaf(D, seed=4, device=device, dtype=dtype)
    values, latents, offsets = encode(x, W_enc, b_enc, choice, b_dec, backend=backend)
    values.backward(_integers(*values.shape, seed=5, device=device, dtype=dtype))
    results = {"values": values, "latents": latents.to(dtype), "offsets": offsets.to(dtype)}
    return results | _gradients(x=x, W_enc=W_enc, b_enc=b_enc, b_dec=b_dec)


def _sparse_decode_csr(backend: str, device: str, dtype: torch.dtype) -> Results:
    """Rows of 0 to N - 1 entries."""
    nnz = N * (N - 1) // 2
    values = _leaf(nnz, seed=6, device=device, dtype=dtype)
    latents = torch.randint(0, F, (nnz,), generator=torch.Generator().manual_seed(7)).to(device)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.arange(N).cumsum(0)]).to(device)
    W_dec = _leaf(F, D, seed=8, device=device, dtype=dtype)
    b_dec = _leaf(D, seed=9, device=device, dtype=dtype)
    x_hat = sparse_decode_csr(values, latents, offsets, W_dec, b_dec, backend=backend)
    x_hat.backward(_integers(N, D, seed=10, device=device, dtype=dtype))
    return {"x_hat": x_hat, **_gradients(values=values, W_dec=W_dec, b_dec=b_dec)}


def _sae(device: str, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """x [N, D] and the leaf tensors W_enc, b_enc, W_dec, b_dec, the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(11)
    x, W_enc, W_dec = (torch.randn(n, D, generator=generator) for n in (N, F, F))
    b_enc, b_dec = (0.1 * torch.randn(n, generator=generator) for n in (F, D))
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    W_enc, b_enc, W_dec, b_dec = (t.to(device, dtype).requires_grad_() for t in (W_enc, b_enc, W_dec, b_dec))
    return x.to(device, dtype), (W_enc, b_enc, W_dec, b_dec)


def _sae_step(backend: str, device: str, dtype: torch.dtype) -> Results:
    """Gradients into .grad, then a step with the optimiser inside; AuxK in both."""
    x, parameters = _sae(device, dtype)
    dead = torch.arange(0, F, 9, device=device)
    out = sae_step(x, *parameters, K, dead=dead, k_aux=4, backend=backend)
    results = {name: getattr(out, name) for name in ("loss", "mse", "aux_loss", "fvu", "l0", "values")}
    results |= {"indices": out.indices.to(dtype), "fire_counts": out.fire_counts.to(dtype)}
    results |= _gradients(**dict(zip(("W_enc", "b_enc", "W_dec", "b_dec"), parameters, strict=True)))
    optimizer = SAEAdam(*parameters, lr=0.01, backend=backend)
    sae_step(x, *parameters, K, dead=dead, k_aux=4, optimizer=optimizer, backend=backend)
    return results | {f"{name} after Adam": p for name, p in zip(("W_enc", "b_enc", "W_dec"), parameters, strict=False)}


def _sae_adam(backend: str, device: str, dtype: torch.dtype) -> Results:
    _, parameters = _sae(device, dtype)
    optimizer = SAEAdam(*parameters, lr=0.01, max_grad_norm=1.0, backend=backend)
    for seed in (12, 13):
        for parameter in parameters:
            parameter.grad = _integers(*parameter.shape, seed=seed, device=device, dtype=dtype) / 4
        optimizer.step()
    return dict(zip(("W_enc", "b_enc", "W_dec", "b_dec"), parameters, strict=True))


def _project_out(backend: str, device: str, dtype: torch.dtype) -> Results:
    """Both sides, all fibres and opposing ones only, in one call each and as a plan. The basis holds halves (Hadamard
    matrices on the diagonal), so that every sum is exact here as well."""
    hadamard = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    basis = torch.block_diag(*[hadamard] * (D // 4))[:, 1 : D // 2].to(device, dtype).contiguous().requires_grad_()
    direction = _integers(D, seed=14, device=device, dtype=dtype)
    results: Results = {}
    for dim, against in ((0, None), (1, direction)):
        g = _leaf(*((D, N) if dim == 0 else (N, D)), seed=15 + dim, device=device, dtype=dtype)
        projected = project_out(g, basis, dim, 0.5, only_against=against, backend=backend)
        basis.grad = None
        projected.backward(_integers(*g.shape, seed=17, device=device, dtype=dtype))
        results |= {f"projection in dimension {dim}": projected, f"gradient in dimension {dim}": g.grad}  # type: ignore[dict-item]
        results[f"gradient of basis in dimension {dim}"] = basis.grad  # type: ignore[assignment]
        planned, flat = g.detach().clone(), g.detach().select(1 - dim, 3).clone()
        entries = [(planned, basis, dim), (flat, basis, 0)]
        ProjectionPlan(entries, 0.5, only_against=[against, None], backend=backend).apply_()
        results |= {f"plan in dimension {dim}": planned, f"vector in dimension {dim}": flat}
    return results


def _projected_adam(backend: str, device: str, dtype: torch.dtype) -> Results:
    """Both sides in two steps: 16 fibres of 64 numbers, which Triton's fused kernels take, and 12."""
    basis = torch.eye(64, device=device)[:, ::9].contiguous()
    shapes = {"dimension 0": (64, 16), "dimension 1": (16, 64), "12 fibres": (64, 12)}
    weights = [torch.nn.Parameter(_integers(*shape, seed=18, device=device, dtype=dtype)) for shape in shapes.values()]
    held = [(w, basis, w.shape.index(64)) for w in weights]
    optimizer = ProjectedAdamW(weights, held, lr=0.01, strength=0.5, backend=backend)
    for seed in (19, 20):
        for w in weights:
            w.grad = _integers(*w.shape, seed=seed, device=device, dtype=dtype)
        optimizer.step()
    return dict(zip(shapes, weights, strict=True))


def _gradients(**leaves: Tensor) -> Results:
    return {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


# Operator -> its run, whether it is exact, and the operators that must have run on the back-end asked for.
CHECKS: dict[str, tuple[Callable[[str, str, torch.dtype], Results], bool, tuple[str, ...]]] = {
    "topk_encode": (_topk_encode, True, ("topk_encode", "topk_encode_backward")),
    "sparse_decode": (_sparse_decode, True, ("sparse_decode", "sparse_decode_backward")),
    "batch_topk_encode": (_batch_topk_encode, True, ("batch_topk_encode", "batch_topk_encode_backward")),
    "threshold_encode": (_threshold_encode, True, ("threshold_encode", "threshold_encode_backward")),
    "sparse_decode_csr": (_sparse_decode_csr, True, ("sparse_decode_csr", "sparse_decode_csr_backward")),
    "sae_step": (_sae_step, False, ("sae_step",)),
    "sae_adam": (_sae_adam, False, ("sae_adam",)),
    "project_out": (_project_out, True, ("project_out", "project_out_backward")),
    "projected_adam": (_projected_adam, False, ("projected_adam",)),
}
