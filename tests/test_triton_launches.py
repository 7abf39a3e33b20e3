"""What the public operators launch is what the registry lists, and with it what is compiled ahead of time.

The operators run on small CPU tensors with every combination of what a caller may choose; a launch is recorded and not
carried out. What a kernel would have written is zeros: a valid code, the lowest latents, nothing given up.

A launch is a registered configuration's when these are equal:

* the kernel, `num_warps`, `num_stages` and FMA contraction;
* of every run-time argument its type as Triton's own launcher finds it, that is the dtype pointed to, the width of an
  integer, or that it is None;
* every constexpr, sizes included. Two things are registered by class. Of a basis that is narrower than its padding
  (`RANK` < `PADDED`) it counts whether its rows begin at 16-byte boundaries (`RANK` % 4 == 0). 64-bit entry numbers,
  which a code of 2^31 entries has, are registered at the widest block of each kernel and form: a narrower one is
  covered where the same is registered at the widest, and at its own block, number of stages aside, with 32-bit numbers.

Alignment and integers that are 1 do not count: they are numbers, not choices. What is compiled ahead of time is the
form for 16-byte aligned tensors.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import refusal_kernels as rk

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (Linux only)"
)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FP32, BF16, FP16)
WIDTHS = (64, 200, 600, 2000, 3000, 5000, 9000)  # of rows: one for each block of every kernel
WIDE = WIDTHS[4:]
TOKENS, K = 64, 4  # entries enough for segments of hot latents
FLAGS = (True, False)
HEADS: tuple[tuple[int, ...], ...] = ((), (2,))
INDICES = (torch.int32, torch.int64)


@dataclasses.dataclass(frozen=True)
class Form:
    """What tells two binaries of a kernel apart; see the module's docstring."""

    kernel: str
    types: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, Any], ...]
    options: tuple[int, int, bool]

    @classmethod
    def of(cls, kernel: Any, types: dict[str, str], constexprs: dict[str, Any], *options: Any) -> Form:
        constexprs = dict(constexprs)
        if constexprs.get("RANK", 0) < constexprs.get("PADDED", 0):
            constexprs["RANK"] = "narrower, in whole words" if constexprs["RANK"] % 4 == 0 else "narrower"
        name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.__name__}"
        return cls(name, tuple(sorted(types.items())), tuple(sorted(constexprs.items())), options)

    def with_narrow_entries(self) -> Form:
        """The same with 32-bit entry numbers, in any number of stages."""
        types = tuple((n, "*i32" if n == "order_ptr" else t) for n, t in self.types)
        return dataclasses.replace(self._without("STAGES"), types=types)

    def at_any_block(self) -> Form:
        """The same without its sizes."""
        return dataclasses.replace(self._without("BLOCK_D", "UNROLL", "STAGES"), options=())

    def _without(self, *names: str) -> Form:
        return dataclasses.replace(self, constexprs=tuple(c for c in self.constexprs if c[0] not in names))


@functools.cache
def target() -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    return make_backend(GPUTarget("cuda", 90, 32))


@functools.cache
def binder(kernel: Any) -> Any:
    from triton.runtime.jit import create_function_from_signature

    return create_function_from_signature(kernel.signature, kernel.params, target())


def launched(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Form:
    bound, specialization, given = binder(kernel)(*arguments, **options)
    types: dict[str, str] = {}
    constexprs = {}
    for parameter, (kind, _), value in zip(kernel.params, specialization, bound.values(), strict=True):
        if parameter.is_constexpr:
            constexprs[parameter.name] = value
        else:  # a 1 is folded into the binary
            types[parameter.name] = "i32" if isinstance(value, int) and kind == "constexpr" else kind
    chosen = target().parse_options(given)
    return Form.of(kernel, types, constexprs, chosen.num_warps, chosen.num_stages, chosen.enable_fp_fusion)


@functools.cache
def registered() -> dict[Form, str]:
    """The registry's forms and their labels."""
    from refusal_kernels.triton_kernels.launch import FP_FUSION
    from refusal_kernels.triton_kernels.registry import configurations

    found = {}
    for c in configurations():
        form = Form.of(
            c.kernel, dict(c.signature), dict(c.tiles.constexprs), c.tiles.num_warps, c.tiles.num_stages, FP_FUSION
        )
        assert form not in found, f"{c.label} and {found.get(form)} are the same"
        found[form] = c.label
    return found


# --- what a caller may choose ---------------------------------------------------------------------------------------


def numbers(*shape: int, dtype: torch.dtype = FP32, grad: bool = False) -> Tensor:
    return torch.full(shape, 0.01, dtype=dtype).requires_grad_(grad)


def code(lead: tuple[int, ...], n_latents: int, k: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.arange(k).expand(*lead, k).remainder(n_latents).to(dtype).contiguous()


def encoders(widths: tuple[int, ...] = WIDTHS) -> None:
    backend = "triton"
    for dtype, k, shift, lead in itertools.product(DTYPES, (5, 100, 300, 1100), FLAGS, HEADS):
        n_latents, d = (200 if k <= 100 else 1200), 16
        for need_x, need_W in itertools.product(FLAGS, FLAGS) if k == 5 else ((True, True),):
            x = numbers(*lead, 3, d, dtype=dtype, grad=need_x)
            W = numbers(*lead, n_latents, d, dtype=dtype, grad=need_W)
            b_enc = numbers(*lead, n_latents, grad=True)
            values, _ = rk.topk_encode(x, W, b_enc, k, numbers(*lead, d) if shift else None, backend=backend)
            values.sum().backward()
    for heads, n_latents, k in ((2, 4096, 32), (2, 4097, 32), (2, 200, 33)):  # both sizes of the grouped encoder
        for dtype in DTYPES:
            x, W = numbers(heads, 3, 16, dtype=dtype), numbers(heads, n_latents, 16, dtype=dtype)
            rk.topk_encode(x, W, numbers(heads, n_latents), k, backend=backend)
    for dtype, d, shift in itertools.product(DTYPES, widths, FLAGS):  # gradients at every width
        for need_x, need_W in ((True, True), (False, True)):
            x, W = numbers(TOKENS, d, dtype=dtype, grad=need_x), numbers(30, d, dtype=dtype, grad=need_W)
            b_enc, b_dec = numbers(30, grad=True), numbers(d) if shift else None
            rk.topk_encode(x, W, b_enc, K, b_dec, backend=backend)[0].sum().backward()


def encoders_of_every_path() -> None:
    from refusal_kernels.triton_kernels import encode

    for path, dtype, (n_latents, k) in itertools.product(encode.PATHS, DTYPES, ((200, 5), (200, 40))):
        x, W = numbers(3, 16, dtype=dtype), numbers(n_latents, 16, dtype=dtype)
        encode.topk_encode(x, W, numbers(n_latents), k, None, path=path)


def screened_encoders() -> None:
    for dtype, k, shift, n in itertools.product(DTYPES, (5, 64, 65, 256), FLAGS, (3, 2048)):
        x, W = numbers(n, 16, dtype=dtype), numbers(300, 16, dtype=dtype)
        rk.topk_encode(x, W, numbers(300), k, numbers(16) if shift else None, backend="triton-int8")


def decoders(widths: tuple[int, ...] = WIDTHS) -> None:
    for dtype, d, index, shift, lead in itertools.product(DTYPES, widths, INDICES, FLAGS, HEADS):
        for need_values, need_W in ((True, True), (True, False), (False, True)):
            values = numbers(*lead, TOKENS, K, dtype=dtype, grad=need_values)
            W = numbers(*lead, 30, d, dtype=dtype, grad=need_W)
            indices, b_dec = code((*lead, TOKENS), 30, K, index), numbers(*lead, d) if shift else None
            rk.sparse_decode(values, indices, W, b_dec, backend="triton").sum().backward()


def csr_codes(widths: tuple[int, ...] = WIDTHS) -> None:
    from refusal_kernels.triton_kernels import backward_csr

    offsets = torch.arange(TOKENS + 1) * K
    latents = code((TOKENS,), 30, K).flatten()
    for dtype, shift in itertools.product(DTYPES, FLAGS):
        b_dec = numbers(16) if shift else None
        x, W, b_enc = numbers(3, 16, dtype=dtype), numbers(40, 16, dtype=dtype), numbers(40)
        rk.batch_topk_encode(x, W, b_enc, 2, b_dec, backend="triton")
        rk.threshold_encode(x, W, b_enc, 0.5, b_dec, backend="triton")
    for dtype, d, shift in itertools.product(DTYPES, widths, FLAGS):
        b_dec = numbers(d) if shift else None
        for need_values, need_W in ((True, True), (True, False), (False, True)):
            values = numbers(TOKENS * K, dtype=dtype, grad=need_values)
            W = numbers(30, d, dtype=dtype, grad=need_W)
            rk.sparse_decode_csr(values, latents, offsets, W, b_dec, backend="triton").sum().backward()
        x, W, grad = numbers(TOKENS, d, dtype=dtype), numbers(30, d, dtype=dtype), numbers(TOKENS * K, dtype=dtype)
        for need_x, need_W in itertools.product(FLAGS, FLAGS):
            backward_csr.csr_encode_backward(grad, latents, offsets, x, W, b_dec, need_x, need_W)


def leaves(d: int, weights: torch.dtype, biases: torch.dtype, lead: tuple[int, ...]) -> list[Tensor]:
    W_enc, W_dec = (numbers(*lead, 30, d, dtype=weights, grad=True) for _ in range(2))
    b_enc, b_dec = numbers(*lead, 30, dtype=biases, grad=True), numbers(*lead, d, dtype=biases, grad=True)
    return [W_enc, b_enc, W_dec, b_dec]


def step(of: list[Tensor], x: torch.dtype, autocast: torch.dtype | None, aux: bool, **options: Any) -> None:
    lead, d = of[0].shape[:-2], of[0].shape[-1]
    dead = torch.tensor([[0, 1], [2, -1]]) if lead else torch.tensor([0, 1])
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        rk.sae_step(numbers(*lead, TOKENS, d, dtype=x), *of, K, dead=dead if aux else None, backend="triton", **options)


# (weights, biases, activations, autocast): 16 bits throughout, fp32 biases beside them, fp32, both autocasts.
ACTIVATIONS = (
    (FP32, FP32, FP32, None), (FP32, FP32, FP32, BF16), (FP32, FP32, FP32, FP16), (BF16, BF16, BF16, None),
    (BF16, FP32, BF16, None), (FP16, FP16, FP16, None), (FP16, FP32, FP16, None), (BF16, BF16, FP32, None),
    (BF16, BF16, BF16, FP16), (FP16, FP16, FP16, BF16),
)  # fmt: skip


def states(weights: torch.dtype) -> Iterator[dict[str, Any]]:
    """What SAEAdam can be told to keep beside weights of a dtype."""
    moments: tuple[torch.dtype | None, ...] = (None, FP32, BF16) if weights == FP32 else (None,)
    copies: tuple[torch.dtype | None, ...] = (None, BF16, FP16) if weights == FP32 else (None,)
    for moment, copy in itertools.product(moments, copies):
        yield {"moment_dtype": moment, "copy_dtype": copy}
    if weights == BF16:
        for moment in (None, FP32, BF16):
            yield {"split_master": True, "moment_dtype": moment}


def gradients_of_steps(widths: tuple[int, ...] = WIDTHS) -> None:
    for (weights, biases, x, autocast), d, aux, lead in itertools.product(ACTIVATIONS, widths, FLAGS, HEADS):
        of = leaves(d, weights, biases, lead)
        step(of, x, autocast, aux)
        step(of, x, autocast, aux)  # onto the gradients that are there


def optimizer_steps(widths: tuple[int, ...] = WIDTHS) -> None:
    for (weights, biases, x, autocast), d in itertools.product(ACTIVATIONS, widths):
        for state, parallel, unit, lead in itertools.product(states(weights), FLAGS, FLAGS, HEADS):
            if lead and (parallel, unit) != (True, True):
                continue  # the constraints do not know of heads
            constraints = {"remove_parallel_grad": parallel, "unit_norm_decoder": unit}
            for aux, clip in itertools.product(FLAGS, (None, 1.0)):
                if clip is not None and (aux or state.get("copy_dtype") is not None):
                    continue  # the pass behind clipping sees neither
                of = leaves(d, weights, biases, lead)
                optimizer = rk.SAEAdam(*of, max_grad_norm=clip, **state, **constraints)
                step(of, x, autocast, aux, optimizer=optimizer)


def optimizer_alone() -> None:
    for weights, biases in {form[:2] for form in ACTIVATIONS}:
        for d, parallel, unit in itertools.product(WIDTHS, FLAGS, FLAGS):
            for state in states(weights):
                of = leaves(d, weights, biases, ())
                for p in of:
                    p.grad = torch.zeros_like(p)
                options = {"remove_parallel_grad": parallel, "unit_norm_decoder": unit}
                rk.SAEAdam(*of, backend="triton", **state, **options).step()


def long_vectors() -> None:
    """Adam on 2^31 numbers, which take no memory here."""
    from refusal_kernels.triton_kernels import adam

    def vector(dtype: torch.dtype) -> Tensor:
        return torch.zeros(1, dtype=dtype).expand(2**31)

    scalars = (0.1, 0.9, 0.999, 1e-8, 0.1, 0.1, None, False, False)
    for w, g, m in ((FP32, FP32, FP32), *((t, g, t) for t in (BF16, FP16) for g in (t, FP32)), (BF16, FP32, FP32)):
        adam.adam_rows(vector(w), vector(g), vector(m), vector(m), *scalars)
    for w, m in ((FP32, BF16), (BF16, FP32), (BF16, BF16)):
        low = vector(torch.int16) if w == BF16 else None
        adam.adam_compact_rows(vector(w), low, vector(FP32), vector(m), vector(m), *scalars, 1)


RANKS = (3, 8, 16, 20, 21, 32, 48, 49, 64, 100, 101, 128, 200)


def basis(n: int, r: int) -> Tensor:
    return torch.eye(n, r)


def projections() -> None:
    from refusal_kernels.triton_kernels import lora_projection_lagged as lagged

    for dtype, r, against in itertools.product(DTYPES, RANKS, FLAGS):
        for shape, dim in (((256, 16), 0), ((16, 256), 1), ((256, 100), 0), ((256, 3), 0), ((2, 256, 5), 1)):
            direction = numbers(256) if against else None
            g = numbers(*shape, dtype=dtype)
            rk.project_out(g, basis(256, r), dim, only_against=direction, backend="triton")
            plan = rk.ProjectionPlan([(g, basis(256, r), dim)], only_against=[direction], backend="triton")
            plan.apply_()
            with lagged.using("one launch"):
                rk.ProjectionPlan([(g, basis(256, r), dim)], only_against=[direction], backend="triton").apply_()
        # Two dtypes, two ranks: the table of mixed plans.
        mixed = [(numbers(256, 16, dtype=t), basis(256, q), 0) for t, q in ((dtype, r), (FP32, 8))]
        rk.ProjectionPlan(mixed, backend="triton").apply_()


def projected_optimizers() -> None:
    for r, (shape, dim) in itertools.product(RANKS, (((256, 16), 0), ((16, 256), 1), ((256, 3), 0), ((256,), 0))):
        p, free = numbers(*shape, grad=True), numbers(4, grad=True)
        p.grad, free.grad = torch.zeros_like(p), torch.zeros_like(free)
        rk.ProjectedAdamW([p, free], [(p, basis(256, r), dim)], backend="triton").step()


CASES = (
    encoders, encoders_of_every_path, screened_encoders, decoders, csr_codes, gradients_of_steps, optimizer_steps,
    optimizer_alone, long_vectors, projections, projected_optimizers,
)  # fmt: skip
# Those whose codes may have 2^31 entries.
OF_MANY_ENTRIES = (encoders, decoders, csr_codes, gradients_of_steps, optimizer_steps)


@pytest.fixture(scope="module")
def forms() -> dict[Form, str]:
    """Every form that the cases launch, and the first that did."""
    from triton.runtime.jit import JITFunction

    from refusal_kernels.backends import triton as backend
    from refusal_kernels.triton_kernels import backward, backward_csr, sae_adam

    found: dict[Form, str] = {}
    now = ""

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.setdefault(launched(kernel, arguments, options), now)

    empty, empty_like, csc = torch.empty, torch.empty_like, backward.csc_from_indices

    def many_entries(*arguments: Any) -> Any:
        of = csc(*arguments)
        return of._replace(order=of.order.to(torch.int64))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", record)
        patch.setattr(backend, "interpreted", lambda: True)
        patch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).zero_())
        patch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).zero_())
        for case in CASES:
            now = case.__name__
            case()
        for module in (backward, backward_csr, sae_adam):
            patch.setattr(module, "csc_from_indices", many_entries)
        for case in OF_MANY_ENTRIES:
            now = f"{case.__name__}, 2^31 entries"
            case(WIDE)
    return found


def test_whatever_is_launched_is_registered(forms: dict[Form, str]) -> None:
    known = registered()
    narrow, anywhere = ({getattr(form, how)() for form in known} for how in ("with_narrow_entries", "at_any_block"))
    missing = {}
    for form, case in forms.items():
        many = ("order_ptr", "*i64") in form.types
        if form not in known and not (
            many and form.with_narrow_entries() in narrow and form.at_any_block() in anywhere
        ):
            missing[form] = case
    assert missing == {}


def test_whatever_is_registered_is_launched(forms: dict[Form, str]) -> None:
    """What nobody launches is compiled for nothing, and says that something is covered which is not."""
    assert {label for form, label in registered().items() if form not in forms} == set()
