"""Argument checks shared by every operator: one clear error that names the argument, the expectation and what came.

They run on the host, look at shapes, dtypes and devices only (never at values, which would synchronise a GPU), and
cost a few microseconds. Wrong values in a tensor are the business of the operator that reads them.
"""

from __future__ import annotations

import itertools
import math
import numbers
import operator
from collections.abc import Callable
from typing import Any

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (torch.int64, torch.int32)


def describe(value: Any) -> str:
    """How an argument is named in an error: shape, dtype and device of a tensor, the type of anything else and its repr
    on one line, cut off where it is long."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}, dtype {value.dtype}, device {value.device}"
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 200 else text[:197] + '...'}"


def check_tensor(op: str, name: str, value: Any, dtypes: tuple[torch.dtype, ...], min_dim: int = 0) -> None:
    """`value` is a strided tensor of one of `dtypes` with at least `min_dim` dimensions."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor; got {describe(value)}")
    if value.dtype not in dtypes:
        expected = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{op}: {name} must have one of the dtypes {expected}; got {describe(value)}")
    if value.layout != torch.strided:
        raise ValueError(f"{op}: {name} must be a dense (strided) tensor; got layout {value.layout}")
    if value.dim() < min_dim:
        raise ValueError(f"{op}: {name} must have at least {min_dim} dimension(s); got {describe(value)}")


def check_shape(op: str, name: str, value: torch.Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """`value.shape == expected`; `meaning` says in words where the expectation comes from, e.g. "[F, d]"."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{op}: {name} must have shape {meaning} = {tuple(expected)}; got {tuple(value.shape)}")


def check_same_device(op: str, **tensors: torch.Tensor | None) -> None:
    """All tensors lie on one device; the first named one sets it."""
    first: tuple[str, torch.device] | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first = (name, tensor.device)
        elif tensor.device != first[1]:
            raise ValueError(
                f"{op}: all tensors must be on one device; {first[0]} is on {first[1]}, {name} is on {tensor.device}"
            )


def check_k(op: str, k: Any, n_latents: int, name: str = "k", meaning: str = "F = W_enc.shape[0]") -> int:
    """`k` as a plain int with 1 <= k <= F."""
    if isinstance(k, (bool, float, torch.Tensor)):
        raise TypeError(f"{op}: {name} must be an integer; got {describe(k)}")
    try:
        k = operator.index(k)
    except TypeError:
        raise TypeError(f"{op}: {name} must be an integer; got {describe(k)}") from None
    if k < 1:
        raise ValueError(f"{op}: {name} must be at least 1; got {name} = {k}")
    if k > n_latents:
        raise ValueError(f"{op}: {name} must be at most {meaning} = {n_latents}; got {name} = {k}")
    return k


def check_number(op: str, name: str, value: Any, expected: str, holds: Callable[[float], bool]) -> float:
    """`value` as a float, for which `holds`; `expected` says so in words, e.g. "a finite number of at least 0"."""
    is_number = isinstance(value, torch.Tensor) and value.dim() == 0 and value.dtype != torch.bool
    is_number = is_number or (isinstance(value, numbers.Real) and not isinstance(value, bool))
    if not is_number:
        raise TypeError(f"{op}: {name} must be {expected}; got {describe(value)}")
    try:
        number = float(value.detach() if isinstance(value, torch.Tensor) else value)
    except OverflowError:  # an int of hundreds of digits
        raise ValueError(f"{op}: {name} must be {expected}; got {describe(value)}") from None
    if not holds(number):
        raise ValueError(f"{op}: {name} must be {expected}; got {value!r}")
    return number


def check_not_negative(op: str, name: str, value: Any) -> float:
    """`value` as a float of at least 0, not infinite and not NaN."""
    return check_number(op, name, value, "a finite number of at least 0", lambda v: 0 <= v < math.inf)


def check_flag(op: str, name: str, value: Any) -> bool:
    """`value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False; got {describe(value)}")
    return value


def check_in_memory(op: str, name: str, value: torch.Tensor) -> None:
    """The numbers of `value` stand in memory, so that a kernel can update them there: it is no meta tensor, and none of
    torch's tensors whose numbers are only known to be negated or zero."""
    if value.device.type == "meta":
        raise ValueError(f"{op}: {name} must hold data, because it is updated in place; got {describe(value)}")
    if value.is_neg() or value._is_zerotensor():
        how = "lazily negated (resolve_neg() makes a tensor of it)" if value.is_neg() else "a tensor of implicit zeros"
        raise ValueError(f"{op}: {name} must stand in memory as it is, because it is updated in place; got one {how}")


def check_separate_memory(op: str, **tensors: torch.Tensor) -> None:
    """No two of these tensors, of one dtype and device, share an element: each can be updated in place on its own."""
    spans = {name: _span(tensor) for name, tensor in tensors.items()}
    for (name, a), (other, b) in itertools.combinations(tensors.items(), 2):
        (a_start, a_end), (b_start, b_end) = spans[name], spans[other]
        if a is b or (a_start < b_end and b_start < a_end and _share_an_element(a, b)):
            raise ValueError(
                f"{op}: {name} and {other} must not share memory, because each is updated in place; "
                "got overlapping tensors (tied weights or views)"
            )


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses from the first to past the last element, in elements; meta tensors have none."""
    if tensor.device.type == "meta":
        return 0, 0
    start = tensor.data_ptr() // tensor.element_size()
    return start, start + 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _share_an_element(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether one address belongs to both. Spans may meet without that: W[:, :d] and W[:, d:] interleave."""
    (a_start, a_end), (b_start, b_end) = _span(a), _span(b)
    start = min(a_start, b_start)
    of_a = torch.zeros(max(a_end, b_end) - start, dtype=torch.bool, device="cpu")
    of_a.as_strided(a.shape, a.stride(), a_start - start).fill_(True)
    return bool(of_a.as_strided(b.shape, b.stride(), b_start - start).any())


def check_weights(op: str, name: str, weights: torch.Tensor, heads: bool) -> tuple[int, ...]:
    """`weights` is [F, d], or where `heads` are allowed [H, F, d]; returns () or (H,). The head axis is there if and
    only if the weights have three dimensions, so no other shape is needed to tell."""
    if weights.dim() not in ((2, 3) if heads else (2,)) or 0 in weights.shape:
        axis = ", or [H, F, d] for one autoencoder per head" if heads else ""
        raise ValueError(f"{op}: {name} must be a non-empty matrix [F, d]{axis}; got {describe(weights)}")
    return tuple(weights.shape[:-2])


def check_head_axis(op: str, name: str, value: torch.Tensor, meaning: str, lead: tuple[int, ...], weights: str) -> None:
    """`value` begins with the heads that `weights` has, if it has any, and has one dimension more."""
    if lead and (value.dim() < 2 or value.shape[0] != lead[0]):
        raise ValueError(
            f"{op}: {name} must have shape {meaning} with H = {weights}.shape[0] = {lead[0]}, "
            f"because {weights} has a head axis; got {tuple(value.shape)}"
        )


def check_encoder(
    op: str, x: Any, W_enc: Any, b_enc: Any, b_dec: Any, *, x_name: str = "x", heads: bool = False
) -> tuple[int, int]:
    """Checks x [..., d], W_enc [F, d], b_enc [F] and b_dec [d] or None, or where `heads` are allowed x [H, ..., d],
    W_enc [H, F, d], b_enc [H, F], b_dec [H, d]; returns (F, d)."""
    check_tensor(op, x_name, x, FLOAT_DTYPES, min_dim=1)
    check_tensor(op, "W_enc", W_enc, FLOAT_DTYPES)
    check_tensor(op, "b_enc", b_enc, FLOAT_DTYPES)
    lead = check_weights(op, "W_enc", W_enc, heads)
    n_latents, d = W_enc.shape[-2:]
    check_head_axis(op, x_name, x, "[H, ..., d]", lead, "W_enc")
    if x.shape[-1] != d:
        raise ValueError(
            f"{op}: the last dimension of {x_name} must be d = W_enc.shape[{len(lead) + 1}] = {d}; "
            f"got {x_name} of shape {tuple(x.shape)}"
        )
    check_shape(op, "b_enc", b_enc, (*lead, n_latents), "[H, F]" if lead else "[F]")
    if b_dec is not None:
        check_tensor(op, "b_dec", b_dec, FLOAT_DTYPES)
        check_shape(op, "b_dec", b_dec, (*lead, d), "[H, d]" if lead else "[d]")
    check_same_device(op, **{x_name: x, "W_enc": W_enc, "b_enc": b_enc, "b_dec": b_dec})
    return n_latents, d


def check_decoder(op: str, values: Any, indices: Any, W_dec: Any, b_dec: Any) -> tuple[int, int]:
    """Checks values [..., k], indices [..., k], W_dec [F, d] and b_dec [d] or None, or with heads values and indices
    [H, ..., k], W_dec [H, F, d], b_dec [H, d]; returns (F, d)."""
    check_tensor(op, "values", values, FLOAT_DTYPES, min_dim=1)
    check_tensor(op, "indices", indices, INDEX_DTYPES, min_dim=1)
    check_tensor(op, "W_dec", W_dec, FLOAT_DTYPES)
    lead = check_weights(op, "W_dec", W_dec, heads=True)
    check_head_axis(op, "values", values, "[H, ..., k]", lead, "W_dec")
    if tuple(indices.shape) != tuple(values.shape):
        raise ValueError(
            f"{op}: indices must have the shape of values = {tuple(values.shape)}; got {tuple(indices.shape)}"
        )
    n_latents, d = W_dec.shape[-2:]
    if b_dec is not None:
        check_tensor(op, "b_dec", b_dec, FLOAT_DTYPES)
        check_shape(op, "b_dec", b_dec, (*lead, d), "[H, d]" if lead else "[d]")
    check_same_device(op, values=values, indices=indices, W_dec=W_dec, b_dec=b_dec)
    return n_latents, d


def check_csr_decoder(op: str, values: Any, latents: Any, offsets: Any, W_dec: Any, b_dec: Any) -> None:
    """Checks values [nnz], latents [nnz], offsets [N + 1], W_dec [F, d] and b_dec [d] or None; shapes alone."""
    check_tensor(op, "values", values, FLOAT_DTYPES)
    check_tensor(op, "latents", latents, INDEX_DTYPES)
    check_tensor(op, "offsets", offsets, INDEX_DTYPES)
    check_tensor(op, "W_dec", W_dec, FLOAT_DTYPES)
    for name, tensor, length in (("values", values, "nnz"), ("latents", latents, "nnz"), ("offsets", offsets, "N + 1")):
        if tensor.dim() != 1:
            raise ValueError(f"{op}: {name} must have shape [{length}], one dimension; got {describe(tensor)}")
    if offsets.shape[0] == 0:
        raise ValueError(f"{op}: offsets must have shape [N + 1], one more than there are rows; got shape (0,)")
    if W_dec.dim() != 2 or 0 in W_dec.shape:
        raise ValueError(f"{op}: W_dec must be a non-empty matrix [F, d]; got {describe(W_dec)}")
    if latents.shape[0] != values.shape[0]:
        raise ValueError(
            f"{op}: latents must have the shape of values = {tuple(values.shape)}; got {tuple(latents.shape)}"
        )
    if b_dec is not None:
        check_tensor(op, "b_dec", b_dec, FLOAT_DTYPES)
        check_shape(op, "b_dec", b_dec, (W_dec.shape[1],), "[d]")
    check_same_device(op, values=values, latents=latents, offsets=offsets, W_dec=W_dec, b_dec=b_dec)


def check_threshold(op: str, threshold: Any, n_latents: int, x: torch.Tensor) -> torch.Tensor:
    """`threshold` as a tensor [F] in the dtype that sums over x are accumulated in, on x's device; from a number that
    is not NaN, a tensor [] or a tensor [F]. No gradient leads back to it."""
    expected = f"a number that is not NaN, or a float tensor of shape [] or [F] = ({n_latents},)"
    dtype = compute_dtype(x.dtype)
    if isinstance(threshold, torch.Tensor):
        check_tensor(op, "threshold", threshold, FLOAT_DTYPES)
        if threshold.dim() != 0:
            check_same_device(op, x=x, threshold=threshold)
            if tuple(threshold.shape) != (n_latents,):
                raise ValueError(f"{op}: threshold must be {expected}; got {describe(threshold)}")
        elif threshold.device != x.device and threshold.device.type != "cpu":  # torch adds CPU scalars to anything, too
            raise ValueError(f"{op}: threshold must be on the device of x, {x.device}; got {describe(threshold)}")
        return threshold.detach().to(x.device, dtype).expand(n_latents)
    number = check_number(op, "threshold", threshold, expected, lambda v: not math.isnan(v))
    return torch.full((n_latents,), number, dtype=dtype, device=x.device)


def check_index_range(op: str, indices: torch.Tensor, W_dec: torch.Tensor, name: str = "indices") -> None:
    """Every index is in [0, F). Reads the values, so it runs on the CPU only: a GPU would have to be waited for."""
    if indices.device.type != "cpu" or indices.numel() == 0:
        return
    n_latents = W_dec.shape[-2]
    low, high = (int(v) for v in torch.aminmax(indices))
    if low < 0 or high >= n_latents:
        raise ValueError(
            f"{op}: {name} must lie in [0, F) with F = W_dec.shape[{W_dec.dim() - 2}] = {n_latents}; "
            f"got values from {low} to {high}"
        )


def check_offsets(op: str, offsets: torch.Tensor, entries: int) -> None:
    """`offsets` [N + 1] begins with 0, never falls and ends with nnz. Reads the values: on the CPU only, as above."""
    if offsets.device.type != "cpu":
        return
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != entries:
        raise ValueError(
            f"{op}: offsets must begin with 0 and end with nnz = values.shape[0] = {entries}; "
            f"got {first} at the beginning and {last} at the end"
        )
    falls = offsets[1:] < offsets[:-1]
    if falls.any():
        n = int(falls.nonzero()[0])
        raise ValueError(
            f"{op}: offsets must not decrease; got offsets[{n}] = {int(offsets[n])} before "
            f"offsets[{n + 1}] = {int(offsets[n + 1])}"
        )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are accumulated in: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def matmul_dtype(device_type: str, *dtypes: torch.dtype) -> torch.dtype:
    """The dtype of a matrix product's operands: the promoted dtype, or (never for fp64) the autocast dtype.

    The rule of torch.nn.functional.linear under `torch.autocast`, plus promotion where linear would refuse mixed
    dtypes.
    """
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    # Autocast knows no meta tensors: torch raises when asked about them, and linear does not cast them.
    if dtype != torch.float64 and device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return dtype
