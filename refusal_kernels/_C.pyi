"""The compiled extension's host side. Its kernels are torch operators: torch.ops.refusal_kernels_cpu, ..._cuda."""

from typing import TypedDict

class BuildInfo(TypedDict):
    compiler: str
    flags: str
    build_type: str
    torch: str  # the torch it was built against; any from torch_abi_target on can load it
    torch_abi_target: str
    git_commit: str | None
    isa: str  # what the CPU kernels run on in this process
    cuda: bool
    cuda_version: str | None
    cuda_archs: list[str]
    cuda_left_out: str | None  # why, when cuda is False

class Plan(TypedDict):
    vector: int  # elements per load
    lanes: int  # threads that share a row
    threads: int  # per block
    grid: tuple[int, int]
    workspace_bytes: int
    fits: bool  # whether the grid is within CUDA's limits, and k within the kernel's

def build_info() -> BuildInfo: ...
def plan(op: str, shape: tuple[int, int, int, int], dtype: str, sm: int) -> Plan:
    """How a CUDA kernel cuts up a problem, from the functions its launcher uses, for 16-byte aligned tensors.

    Args:
        op: "sparse_decode", "sparse_decode_dvalues", "sparse_decode_dweight", "row_filter", "sae_backward" (without
            what hot latents add to its grid and workspace) or "project_out".
        shape: (N, d, F, k); of row_filter's chunk N rows and F columns; F matrices for project_out, each with d vectors
            of N numbers, and a basis of k columns.
        dtype: "float32", "bfloat16" or "float16".
        sm: compute capability, at least 80. Below 90 project_out has no clusters and needs a workspace.

    Raises:
        ValueError: an argument is not one of these.
    """
