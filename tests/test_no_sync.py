"""The training step never reads a tensor on the host: on a GPU each such read would wait for the whole stream.

Three ways to see that without a GPU. Meta tensors have no values, so on them whatever reads one raises; they take the
branches of a GPU (device type not "cpu"), for the reference and, with its kernels replaced by nothing, for the host
side of the Triton launchers. A dispatch mode on CPU tensors forbids the operators that read values, for the reference
and the C++ back-end. And DeadLatents runs its CUDA branch on tensors that only claim to be there. tests/test_gpu.py
asks CUDA itself, by `torch.cuda.set_sync_debug_mode("error")`.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import refusal_kernels as rk
from refusal_kernels.backends import BACKENDS
from refusal_kernels.training import step

N, D_IN, F, K = 50, 24, 90, 5
READS_VALUES = {
    torch.ops.aten._local_scalar_dense,  # item(), float(), int(), bool(), `if tensor`
    torch.ops.aten.nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten.equal,
    torch.ops.aten.is_nonzero,
    torch.ops.aten._unique2,
    torch.ops.aten.unique_consecutive,
    torch.ops.aten.repeat_interleave,
    torch.ops.aten.bincount,
}


class ForbidReads(TorchDispatchMode):
    """Raises where an operator would need a value on the host; tensors of `allowed` live there by design."""

    def __init__(self, *allowed: torch.Tensor) -> None:
        super().__init__()
        self.allowed = {t.data_ptr() for t in allowed}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in READS_VALUES and args[0].data_ptr() not in self.allowed:
            raise AssertionError(f"{func} reads the values of a tensor of shape {tuple(args[0].shape)}")
        indexing = func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
        if indexing and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            raise AssertionError(f"{func} with a boolean index counts its values")
        return func(*args, **(kwargs or {}))


def problem(device: str, d: int = D_IN):
    torch.manual_seed(0)
    parameters = [torch.randn(*shape, device=device).requires_grad_() for shape in ((F, d), (F,), (F, d), (d,))]
    return torch.randn(N, d, device=device), parameters, torch.tensor([3, 4, 40, 71, 88], device=device)


def steps(x, parameters, dead, backend, max_grad_norm, k_aux) -> None:
    """A step into .grad and one with the optimiser inside."""
    optimizer = rk.SAEAdam(*parameters, lr=0.01, max_grad_norm=max_grad_norm)
    rk.sae_step(x, *parameters, K, dead=dead, k_aux=k_aux, backend=backend)
    rk.sae_step(x, *parameters, K, dead=dead, k_aux=k_aux, optimizer=optimizer, backend=backend)
    assert rk.last_backend("sae_step") == backend


@pytest.fixture
def autocast_is_off(monkeypatch):
    """torch knows no autocast for meta tensors and raises when asked whether it is on."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _device_type: False)


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
@pytest.mark.parametrize("k_aux", [2, None])
def test_step_without_values(autocast_is_off, max_grad_norm, k_aux):
    steps(*problem("meta"), "reference", max_grad_norm, k_aux)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed (Linux only)")
@pytest.mark.parametrize("d", [D_IN, 5000, 9000])  # rows that one program holds, that Adam does not, that none does
def test_triton_launchers_without_values(monkeypatch, autocast_is_off, d):
    class Launched:
        count = 0

        def __getitem__(self, grid):
            return self

        def __call__(self, *args, **kwargs) -> None:
            Launched.count += 1

    for name in ("encode", "grouped_encode", "decode", "rows", "latents", "backward", "adam", "sae_adam"):
        module = importlib.import_module(f"refusal_kernels.triton_kernels.{name}")
        for kernel in [n for n in vars(module) if n.endswith("_kernel")]:
            monkeypatch.setattr(module, kernel, Launched())
    monkeypatch.setattr(BACKENDS["triton"], "device_types", ("meta",))
    for max_grad_norm in (None, 0.05):
        steps(*problem("meta", d), "triton", max_grad_norm, None)
    triton: Any = BACKENDS["triton"]
    for dtype in (torch.float32, torch.bfloat16):
        x, parameters, _ = problem("meta", d)
        x, W = x.to(dtype), parameters[0].detach().to(dtype)
        for k in (K, F):
            values, indices = triton.topk_encode(x, W, parameters[1].detach(), k, parameters[3].detach())
        triton.topk_encode_backward(values, values, indices, x, W, parameters[3].detach(), True, True)
        triton.sparse_decode(values, indices, W, None)
        triton.sparse_decode_backward(x, values, indices, W, True, True)
    assert Launched.count > 50


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
@pytest.mark.parametrize("k_aux", [2, None])
def test_step_of_heads_dispatches_no_operator_that_reads(monkeypatch, backend, max_grad_norm, k_aux):
    monkeypatch.setattr(step, "check_dead", lambda *_: None)
    x, parameters, _ = problem("cpu")
    parameters = [torch.stack([p.detach(), -p.detach()]).requires_grad_() for p in parameters]
    optimizer = rk.SAEAdam(*parameters, lr=0.01, max_grad_norm=max_grad_norm)
    for parameter in parameters:
        optimizer.moments(parameter)
    dead = torch.tensor([[3, 4, 40], [88, -1, -1]])
    with ForbidReads(*(optimizer.state[parameter]["step"] for parameter in parameters)):
        for inside in (None, optimizer):
            batch = torch.stack([x, x])
            rk.sae_step(batch, *parameters, K, dead=dead, k_aux=k_aux, optimizer=inside, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
@pytest.mark.parametrize("k_aux", [2, None])
@pytest.mark.parametrize("autocast", [False, True])
def test_step_dispatches_no_operator_that_reads(monkeypatch, backend, max_grad_norm, k_aux, autocast):
    monkeypatch.setattr(step, "check_dead", lambda *_: None)  # it looks at indices on a CPU, and only there
    x, parameters, dead = problem("cpu")
    optimizer = rk.SAEAdam(*parameters, lr=0.01, max_grad_norm=max_grad_norm)
    tracker = rk.DeadLatents(F, dead_after_tokens=1, refresh_every=1000)
    # torch.optim.Adam's step counters are CPU tensors wherever the parameters are.
    for parameter in parameters:
        optimizer.moments(parameter)
    host = [optimizer.state[parameter]["step"] for parameter in parameters]
    with ForbidReads(*host), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        rk.sae_step(x, *parameters, K, dead=dead, k_aux=k_aux, backend=backend)
        for _ in range(2):
            out = rk.sae_step(x, *parameters, K, dead=dead, k_aux=k_aux, optimizer=optimizer, backend=backend)
            tracker.update(out.fire_counts, N)
            rk.sae_step(x, *parameters, K, dead=tracker.rows, optimizer=optimizer, backend=backend)


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.sum().item(),
        lambda t: bool((t > 0).any()),
        lambda t: t[t > 0],
        lambda t: (t > 0).nonzero(),
        lambda t: torch.equal(t, t + 1),
        lambda t: t.unique(),
    ],
)
def test_reads_are_seen(read):
    """The instruments themselves: each of these would wait for a GPU."""
    with pytest.raises(AssertionError), ForbidReads():
        read(torch.randn(5))
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(torch.randn(5, device="meta"))


@pytest.mark.parametrize("read", [lambda t: t.cpu(), lambda t: t.tolist(), lambda t: t.numpy()])
def test_copies_to_the_host_are_seen(read):
    with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
        read(torch.randn(5, device="meta"))


class ClaimsCuda(torch.Tensor):
    """A CPU tensor that says it is on a GPU, hands that on to what is computed from it, and is never read."""

    device = property(lambda self: torch.device("cuda", 0))

    def to(self, *_args, **_kwargs):
        return self

    def _read(self, *_args, **_kwargs):
        raise AssertionError("read on the host")

    item = tolist = cpu = numpy = nonzero = __bool__ = __int__ = __float__ = __index__ = _read


class Event:
    """torch.cuda.Event of a stream that is busy until `arrived`."""

    arrived = False

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return Event.arrived


@pytest.mark.parametrize("heads", [None, 3])
def test_dead_list_is_refreshed_without_waiting_for_it(monkeypatch, heads):
    """Every tenth update starts the copy of the length; `rows` changes with the first update after it has arrived.
    Nothing is copied from the host: from memory that is not pinned, a GPU's stream may be waited for."""
    empty, arange, to = torch.empty, torch.arange, torch.Tensor.to

    def on_host(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert not any(isinstance(a, torch.device) and a.type == "cuda" for a in args), "copied from the host"
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", on_host)
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "arrived", False)
    monkeypatch.setattr(torch, "arange", lambda *a, device=None, **k: arange(*a, **k))
    tracker = rk.DeadLatents(4, dead_after_tokens=100, refresh_every=10, heads=heads)
    tracker.tokens_since_fired = tracker.tokens_since_fired.as_subclass(ClaimsCuda)
    counts = [1, 0, 0, 3] if heads is None else [[1, 0, 0, 3], [1, 1, 1, 1], [1, 2, 0, 1]]
    fires = torch.tensor(counts).as_subclass(ClaimsCuda)
    for _ in range(25):
        tracker.update(fires, 10)
        assert tracker.rows.numel() == 0
    Event.arrived = True
    assert tracker.rows.numel() == 0
    tracker.update(fires, 10)
    expected, fraction = ([1, 2], 0.5) if heads is None else ([[1, 2], [-1, -1], [2, -1]], 0.25)
    assert tracker.rows.as_subclass(torch.Tensor).tolist() == expected
    assert tracker.fraction == fraction
