"""Flops and bytes of every group, counted from the formulas; benchmarks print them beside what they measured.

`flops(group, shape, dense)` counts multiplications and additions of the algorithm: the sparse one (k latents per
token) or the dense one (all F). `bytes_moved(group, shape)` is the least that any implementation of the group must
move to and from memory when nothing is in a cache at the start: every input that is needed read once, every output
written once. Selection, comparisons and index arithmetic count nothing.

Notation: x [N, d], W_enc and W_dec [F, d], k active latents per token; fp32 is 4 bytes, indices are int64.
"""

from __future__ import annotations

from .shapes import Shape

FLOAT = 4
INDEX = 8
# A latent of dense Adam: read p, m, v, write p, m, v.
ADAM_TRANSFERS = 6
# m and v by two multiply-adds each, v's square, two square roots' worth of a division, the update: about a dozen.
ADAM_FLOPS = 12


def encode_flops(s: Shape) -> int:
    """(x - b_dec) W_enc^T + b_enc: 2 N F d and the two biases; in every column, as the top k are not known before."""
    return 2 * s.n * s.f * s.d + s.n * s.f + s.n * s.d


def decode_flops(s: Shape, dense: bool) -> int:
    """codes W_dec + b_dec: 2 N d per active latent, F of them for a dense code."""
    return 2 * s.n * s.d * (s.f if dense else s.k) + s.n * s.d


def backward_flops(s: Shape, dense: bool) -> int:
    """dvalues, dW_dec, dW_enc: 2 N d each per active latent; db_enc; db_dec = sum of e - db_enc W_enc."""
    active = s.f if dense else s.k
    return 6 * s.n * s.d * active + s.n * active + s.n * s.d + 2 * s.f * s.d


def adam_flops(s: Shape) -> int:
    """Adam on W_enc, W_dec and the biases, and the unit norm of W_dec's rows (3 per element)."""
    parameters = 2 * s.f * s.d + s.f + s.d
    return ADAM_FLOPS * parameters + 3 * s.f * s.d


def flops(group: str, s: Shape, dense: bool) -> int:
    """Flops of one call of a group, by the dense or the sparse algorithm."""
    if group == "encode":
        return encode_flops(s)
    if group == "decode":
        return decode_flops(s, dense)
    if group == "backward":
        return backward_flops(s, dense)
    if group == "step":
        residual = 3 * s.n * s.d
        return encode_flops(s) + decode_flops(s, dense) + residual + backward_flops(s, dense) + adam_flops(s)
    raise ValueError(f"group must be encode, decode, backward or step; got {group!r}")


def rows_touched(s: Shape) -> int:
    """Latents that can be active at all in a batch: at most one per token and slot."""
    return min(s.f, s.n * s.k)


def bytes_moved(group: str, s: Shape) -> int:
    """The least bytes a group has to read and write, cold, in fp32 with int64 indices.

    encode: x, W_enc, b_enc, b_dec in; values, indices out.
    decode: values, indices, the active rows of W_dec, b_dec in; x_hat out.
    backward (from e = x_hat - x): x, e, values, indices, the active rows of W_dec, W_enc (for db_dec) in; the four
    gradients out.
    step: x, and per parameter p, m, v in and out. The gradients need never be written.
    """
    codes = s.n * s.k * (FLOAT + INDEX)
    tokens = s.n * s.d * FLOAT
    weights = s.f * s.d * FLOAT
    biases = (s.f + s.d) * FLOAT
    if group == "encode":
        return tokens + weights + biases + codes
    if group == "decode":
        return codes + rows_touched(s) * s.d * FLOAT + s.d * FLOAT + tokens
    if group == "backward":
        return 2 * tokens + codes + rows_touched(s) * s.d * FLOAT + weights + (2 * weights + biases)
    if group == "step":
        return tokens + ADAM_TRANSFERS * (2 * weights + biases)
    raise ValueError(f"group must be encode, decode, backward or step; got {group!r}")


def dense_code_bytes(s: Shape) -> int:
    """One [N, F] fp32 matrix: what a dense code costs in memory, per copy."""
    return s.n * s.f * FLOAT
