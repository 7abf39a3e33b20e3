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
    "RefusalBasis": "features.basis",
    "FinetuneConfig": "baselines.config",
    "FinetuneResult": "baselines.finetune",
    "finetune": "baselines.finetune",
    "apply_safelora": "baselines.safelora",
    "read_choices": "prompts.readers",
    "read_dialogues": "prompts.readers",
    "read_harmful": "prompts.readers",
    "read_pairs": "prompts.readers",
    "read_poison": "prompts.readers",
    "own_refusals": "prompts.readers",
    "protect": "protection.protect",
    "Protection": "protection.protect",
    "ProtectionWarning": "protection.stepping",
    "audit": "protection.audit",
    "Audit": "protection.audit",
    "HeadScores": "heads.scores",
    "find_heads": "heads.influence",
    "causal_check": "features.causal",
    "find_basis": "features.sources",
    "input_basis": "features.inputs",
    "preflight": "features.preflight",
    "random_like": "features.sources",
    "refusal_features": "features.attribution",
    "SafetyReport": "scoring.report",
    "evaluate_model": "scoring.evaluate_safety",
    "is_refusal": "scoring.keywords",
    "tradeoff": "heads.tradeoff",
}

if TYPE_CHECKING:
    from .baselines.config import FinetuneConfig
    from .baselines.finetune import FinetuneResult, finetune
    from .baselines.safelora import apply_safelora
    from .buffer import ActivationBuffer, InputStatistics, geometric_median
    from .capturing import Capture, capture
    from .edits import ablate_heads, patch_heads, scale_heads, splice
    from .features.attribution import refusal_features
    from .features.basis import RefusalBasis
    from .features.causal import causal_check
    from .features.inputs import input_basis
    from .features.preflight import preflight
    from .features.sources import find_basis, random_like
    from .heads.influence import find_heads
    from .heads.scores import HeadScores
    from .heads.tradeoff import tradeoff
    from .hooks import AttentionGeometry, attention_geometry
    from .prompts.readers import own_refusals, read_choices, read_dialogues, read_harmful, read_pairs, read_poison
    from .protection.audit import Audit, audit
    from .protection.protect import Protection, protect
    from .protection.stepping import ProtectionWarning
    from .runs import train_sae
    from .sae import TopKSAE, TopKSAEConfig
    from .scoring.evaluate_safety import evaluate_model
    from .scoring.keywords import is_refusal
    from .scoring.report import SafetyReport
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
    "Audit",
    "Capture",
    "FinetuneConfig",
    "FinetuneResult",
    "HeadScores",
    "InputStatistics",
    "Protection",
    "ProtectionWarning",
    "RefusalBasis",
    "SAETrainer",
    "SafetyReport",
    "TokenStream",
    "TopKSAE",
    "TopKSAEConfig",
    "TrainConfig",
    "ablate_heads",
    "apply_safelora",
    "attention_geometry",
    "audit",
    "capture",
    "causal_check",
    "evaluate_model",
    "find_basis",
    "find_heads",
    "finetune",
    "geometric_median",
    "input_basis",
    "is_refusal",
    "own_refusals",
    "patch_heads",
    "preflight",
    "protect",
    "random_like",
    "read_choices",
    "read_dialogues",
    "read_harmful",
    "read_pairs",
    "read_poison",
    "refusal_features",
    "scale_heads",
    "splice",
    "tradeoff",
    "train_sae",
]
