"""The CUDA C++ back-end of refusal_kernels._C. It runs by explicit request only.

Its backward takes half of the time of Triton's on an H200; with Adam behind it the step is 4 % ahead (85.6 and 88.9
ms), for more memory (4.7 and 3.0 GB): too little for a kernel whose value tests have not been run on a GPU.

topk_encode is the chunked encoder of the Triton back-end (cuBLAS and, for b_dec, Triton kernels) with the row filter of
csrc/cuda in the place of Triton's. Its gradient is Triton's, as are the pass that decodes and takes the residual and
Adam: so the encoder and the training step, whose latent-major backward is csrc/cuda's, need Triton as well. So does the
projection: a basis of more than 256 columns goes to Triton's kernels, in the same call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import native
from .base import Backend, Request
from .triton import TritonBackend

# Primitive -> the operator of torch.ops.refusal_kernels_cuda that it stands on.
_PRIMITIVES = {
    "sparse_decode": "sparse_decode",
    "sparse_decode_backward": "sparse_decode_backward",
    "topk_encode": "row_filter",
    "topk_encode_backward": "row_filter",
    "decode_residual": "sae_backward",
    "sae_backward": "sae_backward",
    "adam_rows": "sae_backward",
    "adam_compact_rows": "sae_backward",
    "project_out": "project_out_in_place",
    "project_out_grouped": "project_out_by_table",
}
_NEED_TRITON = ("topk_encode", "sae_step", "sae_adam", "project_out", "projected_adam")
# csrc/cuda/row_filter.h: keys of a row's list, and the largest k.
FILTER_CAPACITY, FILTER_MOST_K = 512, 256
# csrc/cuda/projection.h: the padded widths of bases; each is a kernel of its own.
PROJECTION_RANKS = (8, 16, 32, 64, 128, 256)


def _of_triton(name: str) -> Any:
    """A method: the Triton back-end's primitive."""

    def call(self: CudaBackend, *arguments: Any) -> Any:
        return getattr(TritonBackend(), name)(*arguments)

    return call


class CudaBackend(Backend):
    name = "cuda"
    device_types = ("cuda",)
    takes_heads = frozenset({"decode_residual", "sae_backward", "adam_rows", "adam_compact_rows"})

    topk_encode_backward = _of_triton("topk_encode_backward")
    decode_residual = _of_triton("decode_residual")
    adam_rows = _of_triton("adam_rows")
    adam_compact_rows = _of_triton("adam_compact_rows")

    def unavailable_reason(self) -> str | None:
        if (error := native.load_error()) is not None:
            return error
        if native.operator("refusal_kernels_cuda", "sparse_decode") is None:
            return "refusal_kernels._C was built without CUDA; build it again where nvcc is, or with RK_CUDA=ON"
        if not torch.cuda.is_available():
            return "there is no CUDA device"
        return None

    def primitive(self, name: str) -> Any | None:
        if name not in _PRIMITIVES or native.operator("refusal_kernels_cuda", _PRIMITIVES[name]) is None:
            return None
        return self._operator(name) if name == "sparse_decode" else getattr(self, name)

    def not_supported_reasons(self, op: str, request: Request) -> list[str]:
        reasons = super().not_supported_reasons(op, request)
        if op in _NEED_TRITON:
            if (missing := TritonBackend().unavailable_reason()) is not None:
                reasons.append(missing)
            if request.k > FILTER_MOST_K:  # 0 where there is no encoder
                reasons.append(f"its row filter takes k up to {FILTER_MOST_K}, not {request.k}")
        return reasons

    @staticmethod
    def _operator(name: str) -> Any:
        return native.operator("refusal_kernels_cuda", name)

    def topk_encode(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, b_dec: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As in refusal_kernels.reference."""
        encode = importlib.import_module("refusal_kernels.triton_kernels.encode")
        row_filter = encode.RowFilter(FILTER_CAPACITY, self._operator("row_filter"))
        return encode.topk_encode(x, W_enc, b_enc, k, b_dec, row_filter=row_filter)

    def sparse_decode_backward(
        self, grad: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, need_values: bool, need_W: bool
    ) -> tuple[Tensor, Tensor]:
        """As in refusal_kernels.reference; a gradient that is not asked for comes back with no elements.

        Entries are sorted by latent here, not in C++: through the stable ABI of torch 2.11 a call of searchsorted ended
        the process.
        """
        order = offsets = None
        if need_W:
            latents, order = torch.sort(indices.reshape(-1), stable=True)
            boundaries = torch.arange(W_dec.shape[0] + 1, dtype=latents.dtype, device=latents.device)
            offsets = torch.searchsorted(latents, boundaries)
        return self._operator("sparse_decode_backward")(grad, values, indices, W_dec, order, offsets, need_values)

    def sae_backward(
        self,
        e: Tensor,
        x: Tensor,
        values: Tensor,
        indices: Tensor,
        W_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor | None,
        scale: float | Tensor,
        dW_enc: Tensor,
        db_enc: Tensor,
        dW_dec: Tensor,
        *,
        accumulate: bool = True,
        segment: int | None = None,
    ) -> None:
        """As in refusal_kernels.reference, and with the options of triton_kernels.backward.sae_backward."""
        if values.numel() == 0:
            if not accumulate:
                for buffer in (dW_enc, db_enc, dW_dec):
                    buffer.zero_()
            return
        launch = importlib.import_module("refusal_kernels.triton_kernels.launch")
        backward = importlib.import_module("refusal_kernels.triton_kernels.backward")
        n_latents, d = W_dec.shape[-2:]
        csc = backward.csc_from_indices(indices, n_latents, segment or backward.segment_length(indices.numel(), d))
        # Rows and values in the order of the latents: the kernel reads them in one stream, without a dependent load.
        tokens = (csc.order // values.shape[-1]).to(torch.int32)
        self._operator("sae_backward")(
            e.view(-1, d),
            x.view(-1, d),
            W_dec.view(-1, d),
            b_dec,
            launch.device_scalar(scale, e.device),
            tokens,
            values.view(-1).index_select(0, csc.order),
            csc.offsets,
            csc.segment_ends,
            csc.segment_latent,
            csc.segment,
            dW_enc.view(-1, d),
            db_enc.view(-1),
            dW_dec.view(-1, d),
            accumulate,
        )

    def project_out(self, g: Tensor, dim: int, basis: Tensor, strength: float, against: Tensor | None) -> Tensor:
        """As in refusal_kernels.reference; one pass more than in place, for the copy."""
        if basis.shape[1] > PROJECTION_RANKS[-1]:
            return TritonBackend().project_out(g, dim, basis, strength, against)
        out = g.clone(memory_format=torch.contiguous_format)
        if out.numel() > 0 and basis.shape[1] > 0:
            self._operator("project_out_in_place")(out, dim, basis, strength, against)
        return out

    def prepare_projection(self, *arguments: Any) -> Callable[[], None]:
        """One launch a call where all bases are of one padded width, as they are as a rule; else one for each width."""
        tensors, dims, bases, basis_of, against, against_of, strength = arguments
        groups: dict[int, list[int]] = {}  # padded width -> entries; 0: what Triton takes
        for i, (tensor, b) in enumerate(zip(tensors, basis_of, strict=True)):
            if tensor.numel() > 0 and (r := bases[b].shape[1]) > 0:
                groups.setdefault(next((width for width in PROJECTION_RANKS if width >= r), 0), []).append(i)
        launches, rest = [], None
        for width, members in groups.items():
            chosen, of_dims, of_bases, of_against = (
                [each[i] for i in members] for each in (tensors, dims, basis_of, against_of)
            )
            group = chosen, of_dims, bases, of_bases, against, of_against
            if width == 0:
                rest = TritonBackend().prepare_projection(*group, strength)
                continue
            table, items, shape = self._operator("projection_table")(*group)
            launches.append((table.to(chosen[0].device), items.to(chosen[0].device), shape))
        launch = self._operator("project_out_by_table")
        held = (tensors, bases, against)  # the tables have their addresses

        def run(held: Any = held) -> None:
            for table, items, shape in launches:
                launch(table, items, shape, strength)
            if rest is not None:
                rest()

        return run

    def project_out_grouped(self, *arguments: Any) -> None:
        """As in refusal_kernels.reference."""
        self.prepare_projection(*arguments)()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or (bound := self.primitive(name)) is None:
            raise AttributeError(f"the cuda back-end has no primitive {name!r}")
        return bound
