"""What people plug in: activation capture, token streams, sparse autoencoders and their training.

Importing this package imports nothing heavy: every public name is fetched from its module on first use, so that
``from refusal_kernels.python_api import TopKSAE`` does not pay for transformers, datasets or typer.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if __name__ != "refusal_kernels.python_api":
    raise ImportError("import refusal_kernels.python_api, not python_api")

# Public name -> module that defines it.
_EXPORTS = {
    "AttentionGeometry": "hooks",
    "attention_geometry": "hooks",
    "ablate_heads": "edits",
    "patch_heads": "edits",
    "scale_heads": "edits",
    "splice": "edits",
    "Capture": "capturing",
    "capture": "capturing",
    "TokenStream": "tokens",
    "ActivationBuffer": "buffer",
    "InputStatistics": "buffer",
    "geometric_median": "buffer",
    "TopKSAE": "sae",
    "TopKSAEConfig": "sae",
    "SAETrainer": "trainer",
    "TrainConfig": "trainer",
    "train_sae": "runs",
}

if TYPE_CHECKING:
    from .buffer import ActivationBuffer, InputStatistics, geometric_median
    from .capturing import Capture, capture
    from .edits import ablate_heads, patch_heads, scale_heads, splice
    from .hooks import AttentionGeometry, attention_geometry
    from .runs import train_sae
    from .sae import TopKSAE, TopKSAEConfig
    from .tokens import TokenStream
    from .trainer import SAETrainer, TrainConfig


def __getattr__(name: str) -> Any:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{module}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})


__all__ = [
    "ActivationBuffer",
    "AttentionGeometry",
    "Capture",
    "InputStatistics",
    "SAETrainer",
    "TokenStream",
    "TopKSAE",
    "TopKSAEConfig",
    "TrainConfig",
    "ablate_heads",
    "attention_geometry",
    "capture",
    "geometric_median",
    "patch_heads",
    "scale_heads",
    "splice",
    "train_sae",
]
