"""All kernels × shipped configurations, so that tests and GPU scripts can be sure that nothing is left uncompiled."""

from __future__ import annotations

from collections.abc import Iterator

from . import adam, backward, decode, encode, grouped_encode, lora_projection, projection, sae_adam
from .launch import Configuration


def configurations() -> Iterator[Configuration]:
    """The configurations of every kernel file."""
    for module in (encode, grouped_encode, decode, backward, adam, sae_adam, projection, lora_projection):
        yield from module.configurations()
