"""All kernels × shipped configurations, so that tests and GPU scripts can be sure that nothing is left uncompiled."""

from __future__ import annotations

from collections.abc import Iterator

from . import (
    adam,
    backward,
    backward_csr,
    decode,
    encode,
    encode_csr,
    grouped_encode,
    int8_rounding,
    int8_screen,
    lora_projection,
    lora_projection_lagged,
    projected_adam,
    projection,
    sae_adam,
)
from .launch import Configuration


def configurations() -> Iterator[Configuration]:
    """The configurations of every kernel file."""
    modules = (
        encode, encode_csr, grouped_encode, int8_rounding, int8_screen, decode, backward, backward_csr, adam, sae_adam,
        projection, lora_projection, lora_projection_lagged, projected_adam,
    )  # fmt: skip
    for module in modules:
        yield from module.configurations()
