"""The CUDA sources compile for every architecture that is shipped, without warnings and without spills.

Needs nvcc, no GPU and no torch: the .cu files are free of torch. The values are tested with -m gpu.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import refusal_kernels as rk
from refusal_kernels import native
from refusal_kernels.backends.cuda import ADAM_TEAMS, FILTER_CAPACITY, FILTER_MOST_K

# Kernels of each file: three row types, three splits of a row, two sums and one product; loads of 4 numbers or of one;
# three row types, six aligned shapes, two that are not, two for wide rows and their two products, and one sum of parts;
# three row types, six shapes;
# six widths of a basis, in clusters or in two launches.
KERNELS = {
    "sparse_decode.cu": 27,
    "row_filter.cu": 2,
    "sae_backward.cu": 3 * (6 + 2 + 2 + 2) + 1,
    "sae_adam.cu": 3 * 6,
    "projection.cu": 6 * 3,
}
ARCHITECTURES = ("80", "90a", "100", "120")  # csrc/cuda/CMakeLists.txt, the default


def nvcc() -> str | None:
    """Where the build looks for it, too."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


@pytest.mark.skipif(nvcc() is None, reason="no nvcc on this machine")
def test_compiles_for_every_architecture_without_warnings_and_spills(repository: Path, tmp_path: Path) -> None:
    compiler = nvcc()
    assert compiler is not None
    known = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    targets = [a for a in ARCHITECTURES if f"compute_{a.rstrip('af')}" in known]
    assert targets, f"{compiler} knows none of {ARCHITECTURES}"
    flags = ["-std=c++20", "--threads", "2", "-Werror", "all-warnings"]
    flags += ["-Xptxas", "-v,-warn-spills,-warn-lmem-usage,-Werror"]
    flags += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in targets]
    sources = sorted((repository / "csrc/cuda").glob("*.cu"))
    assert sources
    for source in sources:
        command = [compiler, *flags, "-c", str(source), "-o", str(tmp_path / "object.o")]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        report = result.stdout + result.stderr
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        assert len(frames) == KERNELS[source.name] * len(targets), "every kernel of every architecture is seen"
        assert {number for frame in frames for number in frame} == {"0"}, report


def test_kernel_sources_are_free_of_torch(repository: Path) -> None:
    for source in (*(repository / "csrc/cuda").glob("*.cu"), *(repository / "csrc/cuda").glob("*.h")):
        if source.name == "bindings.h":  # of the files that bind, which are for the host's compiler
            continue
        assert "torch/" not in source.read_text(), source


def extension():
    module = native.module()
    if module is None:
        pytest.fail(f"refusal_kernels._C does not load: {native.load_error()}")
    return module


@pytest.mark.parametrize(("dtype", "bytes_each"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
@pytest.mark.parametrize("d", [1, 7, 8, 64, 128, 130, 512, 1024, 4096, 12288])
def test_plan_covers_every_column_once(d: int, dtype: str, bytes_each: int) -> None:
    n, n_latents, k = 1000, 4096, 33
    plan = extension().plan("sparse_decode", (n, d, n_latents, k), dtype, 90)
    width = plan["vector"] * plan["lanes"]
    assert d % plan["vector"] == 0
    assert plan["vector"] in (1, 16 // bytes_each)
    assert (plan["grid"][1] - 1) * width < d <= plan["grid"][1] * width
    groups = plan["threads"] // plan["lanes"]
    assert (plan["grid"][0] - 1) * groups < n <= plan["grid"][0] * groups
    assert plan["fits"]
    assert plan["workspace_bytes"] == 0


def test_plan_of_the_gradients() -> None:
    module = extension()
    dots = module.plan("sparse_decode_dvalues", (100, 512, 4096, 33), "float32", 80)
    assert dots["grid"] == (-(-100 * 9 // (dots["threads"] // dots["lanes"])), 1)  # 33 entries are 9 groups of 4
    weight = module.plan("sparse_decode_dweight", (100, 512, 4096, 33), "float32", 80)
    assert weight["grid"][0] == 4096 // (weight["threads"] // weight["lanes"])
    assert weight["workspace_bytes"] == 8 * 4097 + 16 * 3300
    assert not module.plan("sparse_decode_dvalues", (2**31 - 1, 512, 4096, 64), "float32", 80)["fits"]
    chunk = module.plan("row_filter", (1000, 64, 4096, FILTER_MOST_K), "bfloat16", 90)
    assert chunk == {
        "vector": 4, "lanes": 32, "threads": 256, "grid": (125, 1), "fits": True,
        "workspace_bytes": 1000 * (8 * FILTER_CAPACITY + 8),
    }  # fmt: skip
    assert module.plan("row_filter", (1, 64, 4095, 1), "float32", 90)["vector"] == 1
    assert not module.plan("row_filter", (1, 64, 4096, FILTER_MOST_K + 1), "float32", 90)["fits"]


@pytest.mark.parametrize(
    ("dtype", "d", "vector", "team", "threads", "chunks"),
    [
        ("bfloat16", 128, 8, 16, 128, 1),
        ("float32", 128, 4, 32, 128, 1),
        ("bfloat16", 1024, 8, 32, 128, 1),
        ("float16", 2048, 8, 128, 128, 1),
        ("bfloat16", 4096, 8, 256, 256, 1),
        ("bfloat16", 8192, 8, 512, 512, 1),
        ("float32", 4100, 4, 512, 512, 2),
    ],
)
def test_plan_of_the_latent_major_backward(d, dtype, vector, team, threads, chunks) -> None:
    plan = extension().plan("sae_backward", (1000, d, 4099, 16), dtype, 90)
    assert plan == {
        "vector": vector, "lanes": team, "threads": threads, "grid": (-(-4099 * team // threads), chunks), "fits": True,
        "workspace_bytes": 4 * 16000 * (chunks > 1),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "d", "latents", "threads", "blocks", "fits"),
    [
        ("bfloat16", 4096, 131072, 256, 2048, True),
        ("bfloat16", 128, 4096, 128, 256, True),
        ("float32", 4096, 100, 512, 100, True),
        ("float32", 4100, 100, 512, 100, False),
        ("bfloat16", 4100, 100, 512, 100, False),
    ],
)
def test_plan_of_the_step(dtype: str, d: int, latents: int, threads: int, blocks: int, fits: bool) -> None:
    plan = extension().plan("sae_backward_adam", (1000, d, latents, 16), dtype, 90)
    assert (plan["threads"], plan["grid"], plan["fits"]) == (threads, (blocks, 1), fits)
    assert plan["workspace_bytes"] == min(latents, ADAM_TEAMS) * d * 4


@pytest.mark.parametrize(
    ("n", "r", "lanes", "team", "width"),
    [(4096, 8, 2, 2, 8), (14336, 16, 4, 8, 16), (4096, 64, 16, 8, 64), (1024, 50, 16, 4, 64), (511, 256, 64, 4, 256)],
)
def test_plan_of_the_projection(n: int, r: int, lanes: int, team: int, width: int) -> None:
    plan = extension().plan("project_out", (n, 40, 7, r), "bfloat16", 90)
    blocks = -(-7 * 3 * team // 8) * 8
    assert plan == {
        "vector": 8, "lanes": lanes, "threads": 256, "grid": (blocks, 1), "fits": True, "workspace_bytes": 0
    }  # fmt: skip
    assert extension().plan("project_out", (n, 40, 7, r), "float32", 80)["workspace_bytes"] == blocks * width * 64
    assert not extension().plan("project_out", (n, 40, 7, 257), "float32", 90)["fits"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("encode", (1, 1, 1, 1), "float32", 90), "op must be"),
        (("sparse_decode", (1, 0, 1, 1), "float32", 90), "shape must be"),
        (("sparse_decode", (1, 1, 1, 1), "float64", 90), "dtype must be"),
        (("sparse_decode", (1, 1, 1, 1), "float32", 0), "sm must be"),
    ],
)
def test_plan_names_a_wrong_argument(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extension().plan(*arguments)


def test_explicit_request_without_a_gpu_is_refused_with_the_reason() -> None:
    values, indices, W_dec = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.int64), torch.ones(5, 4)
    with pytest.raises(rk.BackendError, match="cuda") as refused:
        rk.sparse_decode(values, indices, W_dec, backend="cuda")
    assert "not on cpu" in str(refused.value) or "without CUDA" in str(refused.value)


def decode_inputs(dtype: torch.dtype, index_dtype: torch.dtype, n: int, k: int, n_latents: int, d: int):
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-3, 4, (n, k), generator=generator).to("cuda", dtype)
    indices = torch.randint(0, n_latents, (n, k), generator=generator).to("cuda", index_dtype)
    W_dec = torch.randint(-3, 4, (n_latents, d), generator=generator).to("cuda", dtype)
    b_dec = torch.randint(-3, 4, (d,), generator=generator).to("cuda", torch.float32)
    return values, indices, W_dec, b_dec


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("n", "k", "n_latents", "d"),
    [
        (5, 3, 7, 1),
        (33, 1, 9, 64),
        (17, 40, 300, 130),
        (64, 32, 1000, 128),
        (9, 65, 64, 1032),
        (3, 0, 5, 8),
        (0, 4, 5, 8),
    ],
)
def test_values_and_gradients_on_a_gpu(dtype, index_dtype, n, k, n_latents, d) -> None:
    """Small integers: sums are exact in fp32, so the fp64 reference, rounded once, is the only right answer."""
    values, indices, W_dec, b_dec = decode_inputs(dtype, index_dtype, n, k, n_latents, d)
    got, want = [], []
    for out, backend, to in ((got, "cuda", dtype), (want, "reference", torch.float64)):
        v, w = (t.to(to).requires_grad_() for t in (values, W_dec))
        x_hat = rk.sparse_decode(v, indices, w, b_dec, backend=backend)
        x_hat.backward(torch.ones_like(x_hat))
        assert rk.last_backend("sparse_decode") == rk.last_backend("sparse_decode_backward") == backend
        out += [x_hat, v.grad, w.grad]
    for mine, reference in zip(got, want, strict=True):
        assert torch.equal(mine, reference.to(dtype))


@pytest.mark.gpu
def test_an_index_out_of_range_turns_its_row_into_nan() -> None:
    values, indices, W_dec, b_dec = decode_inputs(torch.float32, torch.int64, 4, 3, 7, 32)
    clean = rk.sparse_decode(values, indices, W_dec, b_dec, backend="cuda")
    indices[1, 2], indices[2, 0] = 7, -1
    x_hat = rk.sparse_decode(values, indices, W_dec, b_dec, backend="cuda")
    assert x_hat[1:3].isnan().all()
    assert torch.equal(x_hat[[0, 3]], clean[[0, 3]])


@pytest.mark.gpu
def test_rows_that_are_not_aligned_take_the_scalar_path() -> None:
    values, indices, W_dec, b_dec = decode_inputs(torch.bfloat16, torch.int64, 6, 4, 11, 64)
    storage = torch.empty(W_dec.numel() + 1, dtype=W_dec.dtype, device="cuda")
    shifted = storage[1:].view_as(W_dec).copy_(W_dec)
    assert shifted.data_ptr() % 16
    got = rk.sparse_decode(values, indices, shifted, b_dec, backend="cuda")
    assert torch.equal(got, rk.sparse_decode(values, indices, W_dec, b_dec, backend="cuda"))
