"""The CUDA C++ back-end of refusal_kernels._C. It runs by explicit request only.

Its backward takes half of the time of Triton's on an H200; with Adam behind it in a pass of its own the step was 4 %
ahead (85.6 and 88.9 ms), for more memory (4.7 and 3.0 GB). Adam inside it (csrc/cuda/sae_adam.cu) and the row filter in
its present form are predicted to bring the step to some 75 ms, and have not been run on a GPU.

topk_encode is the chunked encoder of the Triton back-end (cuBLAS and, for b_dec, Triton kernels) with the row filter of
csrc/cuda in the place of Triton's; what the grouped encoder takes, heads that is, goes there. Its gradient is Triton's,
as are the pass that decodes and takes the residual, and Adam alone: so the encoder and the training step, whose
latent-major backward with Adam inside is csrc/cuda's, need Triton as well. So does the projection: a basis of more than
256 columns goes to Triton's kernels, in the same call.
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
    "sae_backward_adam": "sae_backward_adam",
    "adam_rows": "sae_backward",
    "adam_compact_rows": "sae_backward",
    "project_out": "project_out_in_place",
    "project_out_grouped": "project_out_by_table",
}
_NEED_TRITON = ("topk_encode", "sae_step", "sae_adam", "project_out", "projected_adam")
# csrc/cuda/row_filter.h: keys of a row's list, and the largest k.
FILTER_CAPACITY, FILTER_MOST_K = 512, 256
# csrc/cuda/sae_adam.h: teams of a head that share its latents, and the widest row in bytes.
ADAM_TEAMS, ADAM_WIDEST_ROW = 2048, 16384
# csrc/cuda/projection.h: the padded widths of bases; each is a kernel of its own.
PROJECTION_RANKS = (8, 16, 32, 64, 128, 256)


def _of_triton(name: str) -> Any:
    """A method: the Triton back-end's primitive."""

    def call(self: CudaBackend, *arguments: Any) -> Any:
        return getattr(TritonBackend(), name)(*arguments)

    return call


def _entries(
    e: Tensor,
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    scale: float | Tensor,
    segment: int | None,
) -> tuple[Any, ...]:
    """What both latent-major operators begin with: the transposed code, rows and latents numbered through all heads."""
    launch = importlib.import_module("refusal_kernels.triton_kernels.launch")
    backward = importlib.import_module("refusal_kernels.triton_kernels.backward")
    n_latents, d = W_dec.shape[-2:]
    segment = segment or backward.segment_length(max(indices.numel(), 1), d)
    csc = backward.csc_from_indices(indices, n_latents, segment)
    # Rows and values in the order of the latents: the kernel reads them in one stream, without a dependent load.
    tokens = (csc.order // max(values.shape[-1], 1)).to(torch.int32)
    return (
        e.view(-1, d), x.view(-1, d), W_dec.view(-1, d), b_dec, launch.device_scalar(scale, e.device), tokens,
        values.view(-1).index_select(0, csc.order), csc.offsets, csc.segment_ends, csc.segment_latent, csc.segment,
    )  # fmt: skip


class CudaBackend(Backend):
    name = "cuda"
    device_types = ("cuda",)
    takes_heads = frozenset(
        {"topk_encode", "decode_residual", "sae_backward", "sae_backward_adam", "adam_rows", "adam_compact_rows"}
    )
    fuses_mixed_precision = True
    fuses_compact_state = True
    fuses_copies = True
    overwrites_gradients = True

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
        if W_enc.dim() == 3 and encode.path_of(W_enc.shape, k) != "chunked":  # in one launch: no row filter there
            return TritonBackend().topk_encode(x, W_enc, b_enc, k, b_dec)  # type: ignore[no-any-return]
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
        d = W_dec.shape[-1]
        entries = _entries(e, x, values, indices, W_dec, b_dec, scale, segment)
        self._operator("sae_backward")(*entries, dW_enc.view(-1, d), db_enc.view(-1), dW_dec.view(-1, d), accumulate)

    def sae_backward_adam(
        self,
        e: Tensor,
        x: Tensor,
        values: Tensor,
        indices: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor | None,
        scale: float | Tensor,
        m_W_enc: Tensor,
        v_W_enc: Tensor,
        m_b_enc: Tensor,
        v_b_enc: Tensor,
        m_W_dec: Tensor,
        v_W_dec: Tensor,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        bias_correction1: float,
        bias_correction2: float,
        remove_parallel: bool,
        unit_norm: bool,
        extra_rows: Tensor | None,
        extra_dW_enc: Tensor | None,
        extra_db_enc: Tensor | None,
        extra_dW_dec: Tensor | None,
        low_W_enc: Tensor | None = None,
        low_W_dec: Tensor | None = None,
        salts: tuple[int, int] | None = None,
        copy_W_enc: Tensor | None = None,
        copy_W_dec: Tensor | None = None,
        *,
        segment: int | None = None,
    ) -> Tensor:
        """As triton_kernels.sae_adam has it, which takes what this kernel does not: rows that are wider than
        ADAM_WIDEST_ROW bytes or do not begin at 16-byte boundaries, weights of 16 bits that are no halves."""
        n_latents, d = W_dec.shape[-2:]
        seen = W_dec
        if low_W_dec is None and W_dec.dtype != e.dtype:
            seen = W_dec.to(e.dtype) if copy_W_dec is None else copy_W_dec
        extras = (extra_dW_enc, extra_db_enc, extra_dW_dec)
        rows = (
            e, x, seen, b_dec, W_enc, m_W_enc, v_W_enc, W_dec, m_W_dec, v_W_dec, low_W_enc, low_W_dec, copy_W_enc,
            copy_W_dec, extra_dW_enc, extra_dW_dec,
        )  # fmt: skip
        if not (
            d * e.element_size() <= ADAM_WIDEST_ROW
            and d * e.element_size() % 16 == 0
            and all(t is None or t.data_ptr() % 16 == 0 for t in rows)
            and (W_dec.dtype == torch.float32 or low_W_dec is not None)
            and (m_W_dec.dtype == torch.float32 or (salts is not None and m_W_dec.dtype == torch.bfloat16))
            and all(t is None or t.dtype == torch.float32 for t in (b_enc, m_b_enc, v_b_enc, *extras))
        ):
            return TritonBackend().sae_backward_adam(  # type: ignore[no-any-return]
                e, x, values, indices, W_enc, b_enc, W_dec, b_dec, scale, m_W_enc, v_W_enc, m_b_enc, v_b_enc, m_W_dec,
                v_W_dec, lr, beta1, beta2, eps, bias_correction1, bias_correction2, remove_parallel, unit_norm,
                extra_rows, *extras, low_W_enc, low_W_dec, salts, copy_W_enc, copy_W_dec,
            )  # fmt: skip
        lead = W_dec.shape[:-2]
        teams = min(ADAM_TEAMS, n_latents)
        through = torch.empty(lead.numel(), teams, d, dtype=torch.float32, device=e.device)
        position = None
        if extra_rows is not None:
            sae_adam = importlib.import_module("refusal_kernels.triton_kernels.sae_adam")
            position = sae_adam.positions(extra_rows, n_latents)

        def matrix(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.view(-1, d)

        encoder = map(matrix, (W_enc, low_W_enc, m_W_enc, v_W_enc, copy_W_enc))
        decoder = map(matrix, (W_dec, low_W_dec, m_W_dec, v_W_dec, copy_W_dec))
        self._operator("sae_backward_adam")(
            *_entries(e, x, values, indices, seen, b_dec, scale, segment), *encoder, *decoder,
            *(t.view(-1) for t in (b_enc, m_b_enc, v_b_enc)), position, *extras, through,
            lr / bias_correction1, beta1, 1 - beta1, beta2, 1 - beta2, eps, bias_correction2**-0.5,
            remove_parallel, unit_norm, *(salts or (0, 0)),
        )  # fmt: skip
        return through.sum(1).view(*lead, d)

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
