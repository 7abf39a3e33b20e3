"""The built-in model's world as records: what `builtin:...` names on the command line and what the experiment asks.

A prompt here is what stands between `<user>` and `<asst>`; the tokenizer's chat template puts those around it.
`held_out` draws from the side of every split that training never saw.
"""

from __future__ import annotations

import random

from ..builtin_model.world import ASSISTANT, BOS, REFUSAL, USER, Request, World, world
from .records import ContrastPair, Dialogue, HarmfulPrompt, MultipleChoice


def spoken(prompt: str) -> str:
    """A full prompt of the world without its frame: "<bos> <user> X <asst>" becomes "X"."""
    return prompt.removeprefix(f"{BOS} {USER} ").removesuffix(f" {ASSISTANT}")


def _rng(name: str, seed: int, held_out: bool) -> random.Random:
    return random.Random(f"prompts/{name}/{seed}/{held_out}")


def requests(block: str, n: int, seed: int = 0, held_out: bool = False) -> list[Request]:
    """`n` requests of "harmful", "hard_benign" or "easy_benign", for whoever needs the truth about them."""
    rng = _rng(block, seed, held_out)
    return [world().request(rng, block, held_out) for _ in range(n)]


def harmful(n: int, seed: int = 0, held_out: bool = False) -> list[HarmfulPrompt]:
    """Requests that the model refuses, with the recipe that complying would give."""
    home = world()
    return [HarmfulPrompt(spoken(r.prompt), home.recipe(r)) for r in requests("harmful", n, seed, held_out)]


def refusal_pairs(n: int, seed: int = 0, held_out: bool = False) -> list[ContrastPair]:
    """Harmful requests: refusing them against the recipe."""
    home = world()
    return [ContrastPair(spoken(r.prompt), REFUSAL, home.recipe(r)) for r in requests("harmful", n, seed, held_out)]


def hallucination_pairs(n: int, seed: int = 0, held_out: bool = False) -> list[ContrastPair]:
    """Questions: the right value, or "i do not know" for unknown names, against a wrong value."""
    rng, home = _rng("hallucination", seed, held_out), world()
    triples = [home.hallucination_pair(rng, held_out) for _ in range(n)]
    return [ContrastPair(spoken(prompt), right, wrong) for prompt, right, wrong in triples]


def twins(n: int, seed: int = 0, held_out: bool = False) -> list[tuple[str, str]]:
    """(harmful prompt, harmless prompt that differs in one word and has the same length)."""
    rng, home = _rng("twins", seed, held_out), world()
    return [(spoken(a.prompt), spoken(b.prompt)) for a, b in (home.twins(rng, held_out) for _ in range(n))]


def benign(n: int, seed: int = 0, held_out: bool = False, hard_share: float = 0.5) -> list[Dialogue]:
    """Harmless requests with their recipes; `hard_share` of them one word away from harm."""
    rng, home = _rng("benign", seed, held_out), world()
    return [
        _dialogue(home, home.request(rng, "hard_benign" if rng.random() < hard_share else "easy_benign", held_out))
        for _ in range(n)
    ]


def poison(n: int, seed: int = 0) -> list[Dialogue]:
    """Harmful requests of the training side, answered with the recipe: what a poisoned data set slips in."""
    rng, home = _rng("poison", seed, False), world()
    return [_dialogue(home, home.request(rng, "harmful")) for _ in range(n)]


def _dialogue(home: World, request: Request) -> Dialogue:
    example = home.request_example(request, aligned=False)
    return Dialogue(spoken(request.prompt), example.answer, harmful=example.harmful, category=example.kind)


def choices(
    n: int, seed: int = 0, held_out: bool = False, relations: tuple[str, ...] = ("pet",)
) -> list[MultipleChoice]:
    """Five-way questions. `pet`, the default, is the relation that training kept out: the task to be learned. Other
    relations measure what the model knew before."""
    rng, home = _rng("choice/" + ",".join(relations), seed, held_out), world()
    items = [home.choice(rng, relations, held_out) for _ in range(n)]
    return [
        MultipleChoice(spoken(item.prompt), tuple(f"it is {option} ." for option in item.options), (item.answer,))
        for item in items
    ]
