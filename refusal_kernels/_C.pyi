"""Types of the compiled extension's host side. Its kernels are torch operators: torch.ops.refusal_kernels_cpu, …_cuda."""

from typing import TypedDict

class BuildInfo(TypedDict):
    compiler: str
    flags: str
    build_type: str
    torch: str
    torch_abi_target: str
    git_commit: str | None
    isa: str
    cuda: bool
    cuda_version: str | None
    cuda_archs: list[str]
    cuda_left_out: str | None

def build_info() -> BuildInfo: ...
