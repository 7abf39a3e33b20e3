"""Triton kernels and their launchers, one file per operator; imported as `refusal_kernels.triton_kernels`.

A launcher takes contiguous 2-D tensors that the caller has checked and returns tensors; it knows nothing of autograd,
registration or the choice of a back-end. Nothing here is imported by `import refusal_kernels`, which must not need
Triton.

Status of every kernel here: compiled ahead of time for sm_80, sm_90 and sm_100 (tests/test_triton_aot.py) and checked
against fp64 PyTorch in Triton's interpreter (tests/triton). What has been run and measured on which GPU is in
benches/results/gpu and the README; a time in a docstring is a prediction unless it says that it was measured.
"""

if __name__ != "refusal_kernels.triton_kernels":
    raise ImportError("import refusal_kernels.triton_kernels, not triton_kernels")
