"""torch.compile, opcheck and meta tensors: what tracing sees of the operators, and the back-end a graph runs on."""

from __future__ import annotations

import pytest
import torch

import refusal_kernels as rk
from refusal_kernels.python_api.sae import TopKSAE, TopKSAEConfig

BACKENDS = ("reference", "cpu")


@pytest.fixture(autouse=True)
def _seed_poison_and_forget_graphs():
    torch.manual_seed(3)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    torch.use_deterministic_algorithms(False)


def leaves(n: int = 6) -> list[torch.Tensor]:
    """x [n, 5], W_enc [11, 5], b_enc, W_dec, b_dec."""
    return [torch.randn(s).requires_grad_() for s in ((n, 5), (11, 5), (11,), (11, 5), (5,))]


def loss(x, W_enc, b_enc, W_dec, b_dec):
    values, indices = rk.topk_encode(x, W_enc, b_enc, 3, b_dec)
    return (rk.sparse_decode(values, indices, W_dec, b_dec) - x).square().sum()


def compiled(function, **options):
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def assert_same_gradients(function, other, start: list[torch.Tensor]) -> None:
    results = []
    for f in (function, other):
        copies = [t.detach().clone().requires_grad_() for t in start]
        value = f(*copies)
        value.backward()
        results.append([value.detach(), *(t.grad for t in copies)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "strided", "index_dtype"),
    [
        (torch.float32, False, torch.int64),
        (torch.float32, True, torch.int32),
        (torch.bfloat16, True, torch.int64),
        (torch.float16, False, torch.int32),
        (torch.float64, True, torch.int64),
    ],
)
def test_opcheck(backend, dtype, strided, index_dtype):
    ops = torch.ops.refusal_kernels
    x, W, b, b_dec = (torch.randn(s).to(dtype) for s in ((6, 5), (11, 5), (11,), (5,)))
    if strided:
        x, W = x.T.contiguous().T, W.T.contiguous().T
    torch.library.opcheck(ops.topk_encode.default, (x, W, b, 3, b_dec, backend))
    values, indices = ops.topk_encode(x, W, b, 3, b_dec, backend)
    indices = indices.to(index_dtype)
    torch.library.opcheck(ops.sparse_decode.default, (values, indices, W, b_dec, backend))
    for flags in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(ops.topk_encode_backward.default, (values, values, indices, x, W, b_dec, *flags, backend))
        torch.library.opcheck(ops.sparse_decode_backward.default, (x, values, indices, W, *flags, backend))


def test_fullgraph_gives_the_same_gradients():
    assert_same_gradients(loss, compiled(loss), leaves())


def test_one_dynamic_graph_serves_every_batch_size_but_the_empty_one():
    graphs = []

    def counting(module, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(module)
        return aot_eager(module, inputs)

    function = torch.compile(loss, fullgraph=True, dynamic=True, backend=counting)
    for n in (6, 9, 70, 2):
        assert_same_gradients(loss, function, leaves(n))
    assert len(graphs) == 1
    assert_same_gradients(loss, function, leaves(0))
    assert len(graphs) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fullgraph_under_autocast(dtype):
    def autocast_loss(*tensors):
        with torch.autocast("cpu", dtype=dtype):
            values, indices = rk.topk_encode(*tensors[:3], 3, tensors[4])
            x_hat = rk.sparse_decode(values, indices, *tensors[3:])
        assert values.dtype == x_hat.dtype == dtype
        return x_hat.float().square().sum()

    assert_same_gradients(autocast_loss, compiled(autocast_loss), leaves())


def backends_that_ran() -> set[str | None]:
    return {rk.last_backend(f"{op}{part}") for op in ("topk_encode", "sparse_decode") for part in ("", "_backward")}


def test_use_backend_inside_a_compiled_function():
    def on_reference(*tensors):
        with rk.use_backend("reference"):
            return loss(*tensors)

    function = compiled(on_reference)
    function(*leaves()).backward()
    assert backends_that_ran() == {"reference"}
    with rk.use_backend("cpu"):  # the inner block wins, and the outer one is still in force after it
        function(*leaves()).backward()
        assert backends_that_ran() == {"reference"}
        loss(*leaves()).backward()
        assert backends_that_ran() == {"cpu"}


def test_use_backend_around_a_compiled_forward_holds_for_its_backward():
    function = compiled(loss)
    for name in ("reference", "cpu", "reference"):
        with rk.use_backend(name):
            value = function(*leaves())
        value.backward()
        assert backends_that_ran() == {name}
    value = function(*leaves())
    with rk.use_backend("reference"):
        value.backward()
    assert rk.last_backend("topk_encode") == rk.last_backend("topk_encode_backward") == "cpu"


def test_the_environment_is_read_when_a_compiled_graph_runs(monkeypatch):
    function = compiled(loss)
    for name in BACKENDS:
        monkeypatch.setenv("REFUSAL_KERNELS_BACKEND", name)
        function(*leaves()).backward()
        assert backends_that_ran() == {name}


def test_meta_tensors_give_shapes_and_gradients():
    tensors = [t.detach().to("meta").requires_grad_() for t in leaves()]
    with torch.autocast("cpu"):  # which is for CPU tensors: linear leaves meta tensors alone as well
        values, indices = rk.topk_encode(*tensors[:3], 3, tensors[4])
        x_hat = rk.sparse_decode(values, indices, *tensors[3:])
        assert torch.nn.functional.linear(*tensors[:3]).dtype == values.dtype == torch.float32
    assert (x_hat.device.type, x_hat.shape, indices.dtype) == ("meta", (6, 5), torch.int64)
    x_hat.sum().backward()
    assert all(t.grad is not None and t.grad.shape == t.shape for t in tensors)
    sae = TopKSAE(TopKSAEConfig(5, 11, 3), device="meta")
    assert sae(torch.empty(2, 6, 5, device="meta")).shape == (2, 6, 5)


def steps_of_sae(compiled_too: bool, by_step: bool, **options) -> list[torch.Tensor]:
    x, *parameters = leaves()
    optimizer = rk.SAEAdam(*parameters, lr=0.01, **options)
    for i, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, 0.1 * i - 0.1)

    def step(x):
        if by_step:
            return optimizer.step()
        return rk.sae_step(x.detach(), *parameters, 3, optimizer=optimizer).loss

    function = torch.compile(step, backend="eager") if compiled_too else step
    for _ in range(4):
        function(x)
    assert {int(optimizer.state[p]["step"]) for p in parameters} == {4}
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("by_step", [False, True])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.05}])
def test_training_steps_in_a_compiled_function_are_taken_outside_of_its_graph(by_step, options):
    results = []
    for compiled_too in (False, True):
        torch.manual_seed(0)
        results.append(steps_of_sae(compiled_too, by_step, **options))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_projected_steps_in_a_compiled_function_take_every_group():
    U = torch.eye(5)[:, :2]
    results = []
    for compiled_too in (False, True):
        a, b = (torch.nn.Parameter(torch.zeros(6, 5)) for _ in range(2))
        optimizer = rk.ProjectedAdamW([{"params": [a]}, {"params": [b]}], [(a, U, 1), (b, U, 1)], lr=0.01)
        plan = rk.ProjectionPlan([(a, U, 1), (b, U, 1)])

        def step(optimizer=optimizer, plan=plan):
            optimizer.step()
            plan.apply_()

        function = torch.compile(step, backend="eager") if compiled_too else step
        for _ in range(4):
            a.grad, b.grad = torch.ones(6, 5), torch.ones(6, 5)
            function()
        results.append((a.detach(), b.detach()))
    assert torch.equal(*results[0])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))


def test_aux_k_loss_is_one_graph():
    x, W_enc, b_enc, W_dec, b_dec = leaves()
    dead = torch.tensor([1, 4, 7])

    def auxiliary(*tensors):
        return rk.aux_k_loss(tensors[0], tensors[0].detach(), *tensors[1:], dead, 2)

    assert_same_gradients(auxiliary, compiled(auxiliary), [x, W_enc, b_enc, W_dec, b_dec])
