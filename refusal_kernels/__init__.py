"""refusal_kernels: fused kernels for TopK sparse autoencoders.

    import refusal_kernels as rk
    values, indices = rk.topk_encode(x, W_enc, b_enc, k, b_dec)
    x_hat = rk.sparse_decode(values, indices, W_dec, b_dec)
    values, latents, offsets = rk.batch_topk_encode(x, W_enc, b_enc, k, b_dec)   # or threshold_encode: CSR
    x_hat = rk.sparse_decode_csr(values, latents, offsets, W_dec, b_dec)

Importing this package needs torch alone; Triton and the compiled extension are loaded by the first call that uses
them, and `refusal_kernels.python_api` (SAE, capture, training, command line) by those who import it.
"""

from .backends import BackendError, last_backend, use_backend
from .ops.csr_encode import batch_topk_encode, threshold_encode
from .ops.orthonormal_basis import orthonormal_basis
from .ops.project_out import project_out
from .ops.projection_plan import ProjectionPlan
from .ops.sparse_decode import sparse_decode
from .ops.sparse_decode_csr import sparse_decode_csr
from .ops.topk_encode import topk_encode
from .training.auxk import aux_k_loss
from .training.dead import DeadLatents
from .training.optimizer import SAEAdam
from .training.projected_adam import ProjectedAdamW
from .training.step import SAEStepOutput, sae_step

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "DeadLatents",
    "ProjectedAdamW",
    "ProjectionPlan",
    "SAEAdam",
    "SAEStepOutput",
    "aux_k_loss",
    "batch_topk_encode",
    "last_backend",
    "orthonormal_basis",
    "project_out",
    "sae_step",
    "sparse_decode",
    "sparse_decode_csr",
    "threshold_encode",
    "topk_encode",
    "use_backend",
]
