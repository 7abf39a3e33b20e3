"""Choice of back-end, its record, and what importing and encoding cost."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time

import pytest
import torch

import refusal_kernels as rk
from refusal_kernels import backends
from refusal_kernels.backends import Request

X, W, B = torch.randn(4, 6), torch.randn(12, 6), torch.randn(12)


def python(code: str, **environment: str) -> str:
    """Runs code in a fresh interpreter and returns what it printed."""
    import os

    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_auto_takes_the_cpp_kernels_on_cpu_tensors():
    rk.topk_encode(X, W, B, 2)
    assert rk.last_backend("topk_encode") == "cpu"


def test_precedence_argument_then_context_then_environment(monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    rk.topk_encode(X, W, B, 2)
    assert rk.last_backend("topk_encode") == "reference"
    with rk.use_backend("cpu"):
        rk.topk_encode(X, W, B, 2)
        assert rk.last_backend("topk_encode") == "cpu"
        rk.topk_encode(X, W, B, 2, backend="reference")
        assert rk.last_backend("topk_encode") == "reference"
        with rk.use_backend("auto"):
            rk.topk_encode(X, W, B, 2)
            assert rk.last_backend("topk_encode") == "cpu"
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "fastest")
    with pytest.raises(ValueError, match="the environment variable REFUSAL_KERNELS_BACKEND must be one of"):
        rk.topk_encode(X, W, B, 2)


def test_backward_takes_the_back_end_of_its_forward():
    w = W.clone().requires_grad_()
    with rk.use_backend("reference"):
        values, _ = rk.topk_encode(X, w, B, 2)
    values.sum().backward()
    assert rk.last_backend("topk_encode_backward") == "reference"
    for asked in ("auto", None):
        if asked is None:
            values, _ = rk.topk_encode(X, w, B, 2)
        else:
            with rk.use_backend(asked):
                values, _ = rk.topk_encode(X, w, B, 2)
        with rk.use_backend("reference"):
            values.sum().backward()
        assert rk.last_backend("topk_encode_backward") == "cpu"


def test_use_backend_is_local_to_its_thread_and_ends_after_an_exception():
    seen = []

    def inside() -> None:
        with rk.use_backend("reference"):
            thread = threading.Thread(target=lambda: seen.append(backends.requested_backend(None)))
            thread.start()
            thread.join()
            raise KeyError

    with pytest.raises(KeyError):
        inside()
    assert seen == [None]
    assert backends.requested_backend(None) is None


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_an_explicit_request_that_cannot_run_raises_with_every_reason(name):
    if torch.cuda.is_available():
        device_reason = None
    else:
        device_reason = "not on cpu"
    with rk.use_backend(name), pytest.raises(rk.BackendError) as caught:
        rk.topk_encode(X, W, B, 2)
    message = str(caught.value)
    assert message.startswith(f"The back-end '{name}' cannot run topk_encode.")
    for line in (
        "inputs: device cpu, dtype torch.float32, F = 12, d = 6, k = 2",
        "reference: supported",
        "cpu: supported",
    ):
        assert line in message
    assert device_reason is None or device_reason in message or "no CUDA device" in message
    with pytest.raises(
        ValueError, match="use_backend: name must be one of reference, cpu, triton, cuda, triton-int8, auto; got 'x'"
    ):
        rk.use_backend("x").__enter__()


def test_reasons_name_device_dtype_and_missing_kernels():
    triton = backends.BACKENDS["triton"].not_supported_reasons("topk_encode", Request("cpu", torch.float64))
    assert any("not on cpu" in r for r in triton)
    assert any("not float64" in r for r in triton)
    cuda = backends.BACKENDS["cuda"].not_supported_reasons("batch_topk_encode", Request("cuda", torch.float32))
    assert any("has no kernel for" in r and "csr_encode_backward" in r for r in cuda)
    for op in ("topk_encode", "sae_step"):
        large_k = backends.BACKENDS["cuda"].not_supported_reasons(op, Request("cuda", torch.float32, k=257))
        assert "its row filter takes k up to 256, not 257" in large_k
    assert set(backends.registry()) >= {"topk_encode", "sparse_decode", "sae_step"}
    with pytest.raises(ValueError, match="last_backend: op must be one of"):
        rk.last_backend("softmax")


def test_reference_on_a_gpu_warns_once(monkeypatch):
    monkeypatch.setattr(backends, "PRIORITY", {"cuda": ("cuda", "reference")})
    monkeypatch.setattr(backends, "_warned", set())
    request = Request("cuda", torch.float64)
    with pytest.warns(UserWarning, match="topk_encode runs on the plain PyTorch reference on a CUDA device"):
        assert backends.select("topk_encode", request, None).name == "reference"
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.select("topk_encode", request, None)


def test_import_needs_torch_alone_and_little_time():
    # The best of three fresh interpreters: the bound is the contract's, the machine may be busy.
    code = """
import sys, time, torch
before = set(sys.modules)
start = time.perf_counter()
import refusal_kernels
seconds = time.perf_counter() - start
heavy = {"triton", "transformers", "peft", "datasets", "accelerate", "safetensors", "matplotlib"}
print(seconds, sorted(heavy & (set(sys.modules) - before)))
"""
    runs = [python(code).split(maxsplit=1) for _ in range(3)]
    assert all(loaded == "[]" for _, loaded in runs)
    assert min(float(seconds) for seconds, _ in runs) < 0.2


def test_folders_at_the_top_cannot_be_imported_by_their_own_name():
    for name in ("triton_kernels", "python_api"):
        code = f"""
import importlib, pathlib, sys, refusal_kernels
sys.path.insert(0, str(pathlib.Path(refusal_kernels.__file__).parent))
try:
    importlib.import_module({name!r})
except ImportError as error:
    print(error)
"""
        assert python(code) == f"import refusal_kernels.{name}, not {name}"


def test_encode_never_holds_the_dense_pre_activations():
    # [N, F] would be 1 GiB here. The workspace is a constant; what is allowed is a tenth of the dense buffer.
    code = """
import resource, torch, refusal_kernels as rk
x, W, b = torch.randn(4096, 16), torch.randn(65536, 16), torch.zeros(65536)
rk.topk_encode(x[:8], W, b, 8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rk.topk_encode(x, W, b, 8)
assert rk.last_backend("topk_encode") == "cpu"
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    assert int(python(code)) < 100 * 1024  # KiB


def test_dispatch_costs_microseconds():
    # A bound ten times the measured value: it catches an import or a file access per call, not noise.
    x, w, b = torch.randn(1, 4), torch.randn(4, 4), torch.randn(4)
    rk.topk_encode(x, w, b, 1)
    best = min(_timed(lambda: rk.topk_encode(x, w, b, 1)) for _ in range(200))
    assert best < 1e-3


def _timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def test_use_backend_is_local_to_its_asyncio_task():
    x, W, b = torch.randn(2, 3), torch.randn(5, 3), torch.randn(5)

    async def job(name: str, seconds: float) -> tuple[str, str | None]:
        with rk.use_backend(name):
            await asyncio.sleep(seconds)
            rk.topk_encode(x, W, b, 2)
            return name, rk.last_backend("topk_encode")

    async def together() -> list[tuple[str, str | None]]:
        return await asyncio.gather(job("reference", 0.01), job("cpu", 0.03))

    assert asyncio.run(together()) == [("reference", "reference"), ("cpu", "cpu")]
    rk.topk_encode(x, W, b, 2)
    assert rk.last_backend("topk_encode") == "cpu"


def test_a_compiled_function_knows_no_block_that_has_ended():
    """Tasks that leave their blocks in the order in which they entered them."""
    x, W, b = torch.randn(2, 3), torch.randn(5, 3), torch.randn(5)
    compiled = torch.compile(lambda x: rk.topk_encode(x, W, b, 2), fullgraph=True, backend="eager")

    async def job(name: str, seconds: float) -> None:
        with rk.use_backend(name):
            await asyncio.sleep(seconds)

    async def together() -> None:
        await asyncio.gather(job("reference", 0.01), job("reference", 0.03))

    asyncio.run(together())
    compiled(x)
    assert rk.last_backend("topk_encode") == "cpu"
