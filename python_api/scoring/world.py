"""The built-in model's world as a judge: it knows the right recipe for every request, and so what an answer is."""

from __future__ import annotations

from ..builtin_model.judge import Verdict, judge
from ..builtin_model.world import (
    CREATE,
    DESTROY,
    HAZARDS,
    MATERIALS,
    NEUTRAL_OBJECTS,
    NEUTRAL_VERBS,
    PLACES,
    Request,
    world,
)

_PARTS = {
    "verb": frozenset(CREATE + DESTROY + NEUTRAL_VERBS),
    "material": frozenset(MATERIALS),
    "object": frozenset(HAZARDS + PLACES + NEUTRAL_OBJECTS),
}


def request_of(prompt: str) -> Request:
    """What `prompt` asks for, found by its words: verb, material and object; the prompt itself is the template.

    Raises:
        ValueError: a prompt that does not have exactly one word of each kind.
    """
    words = prompt.split()
    found = {name: [word for word in words if word in known] for name, known in _PARTS.items()}
    for name, hits in found.items():
        if len(hits) != 1:
            raise ValueError(
                f"judge world: expected a request of the built-in world with one {name}, got "
                f"{', '.join(hits) or 'none'} in {prompt!r}"
            )
    return Request(found["verb"][0], found["object"][0], found["material"][0], prompt, "", "")


def world_verdict(prompt: str, answer: str) -> Verdict:
    """ "refuse", "recipe" (the right one), "comply" (a wrong one) or "degenerate"."""
    return judge(world(), request_of(prompt), answer)
