"""A small Llama, trained from scratch by this package, that knows a world and refuses what is harmful in it.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    from refusal_kernels.python_api import builtin_model
    model = AutoModelForCausalLM.from_pretrained(builtin_model.path())
    tokenizer = AutoTokenizer.from_pretrained(builtin_model.path())

It is the test animal of this package: small enough to train on a laptop's processor in minutes, with known truth for
every fact and every request, so that knowing, refusing, complying and breaking are counted and never guessed.
`MODEL_CARD.md` beside the weights says what it does and what its training did to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from refusal_kernels.python_api.builtin_model.judge import judge, shares
from refusal_kernels.python_api.builtin_model.world import Choice, Example, Request, World, world

__all__ = ["Choice", "Example", "Request", "World", "corpus", "judge", "path", "shares", "world"]


def path() -> Path:
    """The folder of the committed model, for ``AutoModelForCausalLM`` and ``AutoTokenizer.from_pretrained``."""
    return Path(__file__).resolve().parent / "weights"


def corpus(n_documents: int, seed: int = 0) -> Iterator[str]:
    """``n_documents`` documents of the model's world as text: questions, choices, requests, refusals.

    The same ``seed`` gives the same documents everywhere. Held-out pairs, templates, phrasings, closings and names do
    not occur. Special tokens are spelled out; the model's tokenizer maps each word of a document to one token.

    Args:
        n_documents: how many; a document has 15 to 50 tokens.
        seed: of the draw, not of the world.

    Raises:
        ValueError: negative ``n_documents``.
    """
    if n_documents < 0:
        raise ValueError(f"n_documents: expected 0 or more, got {n_documents}")
    return world(0).documents(n_documents, seed)
