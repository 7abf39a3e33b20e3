"""RefusalBasis: the directions to protect, one orthonormal basis per layer or per module, with where they came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class RefusalBasis:
    """Orthonormal directions that carry refusal.

    Attributes:
        z: layer -> U [n_heads * head_dim, r] fp32 with orthonormal columns, in the space of o_proj's input.
        inputs: module path in the untouched base model ("model.layers.3.mlp.up_proj") -> U [in_features, r]: the site
            "all", an own basis of the input activations of every linear that is to be adapted.
        twins: (harmful prompt, harmless prompt) pairs for the pre-flight check; may be empty.
        provenance: source, model, SAE, hash of the prompts, heads, settings; anything JSON can hold.
    """

    z: dict[int, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    twins: list[tuple[str, str]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
