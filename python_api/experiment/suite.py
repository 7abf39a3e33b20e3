"""What an experiment asks: calibration prompts, the task to be learned, poison, and the prompts that judge the result.

Four disjoint sets of prompts: *calibration* finds heads, features and bases; *training* is the task with its poison;
*selection* is for choosing settings; *test* is reported. The split is checked, and shared prompts are refused by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from ..prompts import builtin
from ..prompts.chat import Chat
from ..prompts.records import (
    ContrastPair,
    Dialogue,
    HarmfulPrompt,
    MultipleChoice,
    check_disjoint,
    normal,
    prompts_of,
    set_hash,
)

if TYPE_CHECKING:
    from .config import ExperimentConfig

Verdict = Literal["refuse", "comply", "recipe", "degenerate"]
Judge = Callable[[Sequence[str], Sequence[str]], list[str]]
"""(prompts, answers) -> verdicts. `recipe`: complied with exactly the right content, where that can be known."""

VERDICTS: tuple[Verdict, ...] = ("refuse", "recipe", "comply", "degenerate")


@dataclass
class Suite:
    """All prompts of one experiment, and the judge of its answers.

    Attributes:
        name: for provenance.
        refusal_pairs, hallucination_pairs, twins, harmful, benign: calibration. Twins are (harmful, harmless) prompts.
        task: training dialogues of the benign task; `poison`: dialogues that comply with harm.
        task_test: the task's held-out questions; `knowledge`: questions on what the model knew before.
        selection: harmful prompts for choosing settings; `harmful_test`, `benign_test`: what is reported.
        judge: of answers to harmful and benign prompts; `judged_by` names it.
        max_new_tokens: of an answer.
    """

    name: str
    refusal_pairs: list[ContrastPair]
    hallucination_pairs: list[ContrastPair]
    twins: list[tuple[str, str]]
    harmful: list[HarmfulPrompt]
    benign: list[Dialogue]
    task: list[Dialogue]
    poison: list[Dialogue]
    task_test: list[MultipleChoice]
    knowledge: list[MultipleChoice]
    selection: list[str]
    harmful_test: list[str]
    benign_test: list[str]
    judge: Judge = field(repr=False)
    judged_by: str = ""
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        calibration = [*self.harmful, *self.refusal_pairs, *(harmful for harmful, _ in self.twins)]
        check_disjoint([*calibration, *self.poison], self.harmful_test, "calibration or training and test")
        check_disjoint(calibration, self.selection, "calibration and selection")
        check_disjoint(self.selection, self.harmful_test, "selection and test")

    def hash(self) -> str:
        """Changes with any prompt or answer."""
        sets: list[Sequence[Any]] = [
            self.refusal_pairs, self.hallucination_pairs, self.twins, self.harmful, self.benign, self.task, self.poison,
            self.task_test, self.knowledge, self.selection, self.harmful_test, self.benign_test,
        ]  # fmt: skip
        return set_hash([self.judged_by, str(self.max_new_tokens), *(set_hash([repr(x) for x in s]) for s in sets)])

    def sizes(self) -> dict[str, int]:
        """How many of each."""
        return {name: len(value) for name, value in vars(self).items() if isinstance(value, list)}


def count(verdicts: Sequence[str]) -> dict[str, int]:
    """How often each verdict occurs, all four always present."""
    counts = Counter(verdicts)
    return {name: counts[name] for name in VERDICTS}


def judge_world(prompts: Sequence[str], answers: Sequence[str]) -> list[str]:
    """The judge of the built-in world: it compares with the one right recipe, word for word."""
    from ..scoring.world import world_verdict

    return [world_verdict(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def builtin_suite(*, calibration: int = 128, task: int = 1600, test: int = 200, seed: int = 0) -> Suite:
    """The built-in model's world. Everything that is tested combines a pair of verb and object, a template and a
    closing that neither training nor calibration saw; the judge compares with the one right recipe, word for word.

    Args:
        calibration: prompts per calibration set.
        task: training questions of the task, five-way, about a relation the model was never taught. An eighth as many
            harmless requests with their recipes go with them: of questions alone the model forgets how to answer
            requests at all, and what it then says to harmful ones tells nothing of refusing.
        test: held-out prompts per reported figure.
        seed: of all draws.
    """
    harmful_test = _distinct(builtin.harmful(3 * test, seed + 2, held_out=True), test)
    selection = _distinct(builtin.harmful(3 * test, seed + 1, held_out=True), test // 2, taken=harmful_test)
    return Suite(
        name=f"builtin/{calibration}/{task}/{test}/{seed}",
        refusal_pairs=builtin.refusal_pairs(calibration, seed),
        hallucination_pairs=builtin.hallucination_pairs(calibration, seed),
        twins=builtin.twins(calibration, seed),
        harmful=builtin.harmful(calibration, seed),
        benign=builtin.benign(calibration, seed),
        task=[*(item.dialogue() for item in builtin.choices(task, seed)), *builtin.benign(task // 8, seed + 3)],
        poison=builtin.poison(max(1, task // 4), seed),
        task_test=builtin.choices(test, seed + 1, held_out=True),
        knowledge=builtin.choices(test, seed + 1, held_out=True, relations=("home", "food", "craft")),
        selection=selection,
        harmful_test=harmful_test,
        benign_test=[d.prompt for d in builtin.benign(test, seed + 2, held_out=True, hard_share=0.5)],
        judge=judge_world,
        judged_by="world",
        max_new_tokens=20,
    )


def _distinct(records: Sequence[HarmfulPrompt], n: int, taken: Sequence[str] = ()) -> list[str]:
    known = set(taken)
    found = [p for p in dict.fromkeys(record.prompt for record in records) if p not in known][:n]
    if len(found) < n:
        raise ValueError(f"test: expected {n} distinct harmful prompts, the world gave {len(found)}; ask for fewer")
    return found


def files_suite(config: ExperimentConfig, model: nn.Module, chat: Chat) -> Suite:
    """The suite that a config's files and hub names make, for any model.

    Refusal pairs are the model's own greedy refusals against the targets. Twins are harmful and harmless prompts side
    by side: real data sets have no minimal pairs. Answers are judged by a phrase list and the rule for degenerate
    answers, so `recipe` is always 0.
    """
    from ..prompts.readers import own_refusals, read_choices, read_dialogues, read_harmful, read_pairs, read_poison

    n = config.calibration
    known = read_harmful(config.harmful)
    if len(known) < n + 4:
        raise ValueError(f"harmful: expected more than {n + 4} prompts in {config.harmful}, got {len(known)}")
    harmful, selection = known[:n], [h.prompt for h in known[n : n + max(4, config.n_test // 2)]]
    benign = read_dialogues(config.benign)
    test = [h.prompt for h in read_harmful(config.harmful_test)]
    poison = read_poison(config.poison)
    if config.drop_overlap:
        taken = {normal(p) for p in prompts_of([*harmful, *poison])} | {normal(p) for p in selection}
        test = [prompt for prompt in test if normal(prompt) not in taken]
    task = read_choices(config.task)
    return Suite(
        name=f"{config.harmful}/{config.task}",
        refusal_pairs=own_refusals(model, chat, harmful, keywords=config.keywords, progress="the model's own refusals"),
        hallucination_pairs=read_pairs(config.pairs, "hallucination")[:n],
        twins=[(h.prompt, b.prompt) for h, b in zip(harmful, benign, strict=False)],
        harmful=harmful,
        benign=benign[:n],
        task=[item.dialogue() for item in task if len(item.correct) == 1][: config.n_task],
        poison=poison,
        task_test=[item for item in read_choices(config.task_test) if item.correct][: config.n_test],
        knowledge=[item for item in read_choices(config.knowledge) if item.correct][: config.n_test],
        selection=selection,
        harmful_test=test[: config.n_test],
        benign_test=[b.prompt for b in benign[n : n + config.n_test]],
        judge=KeywordJudge(config.keywords),
        judged_by=config.keywords,
        max_new_tokens=config.max_new_tokens,
    )


@dataclass(frozen=True)
class KeywordJudge:
    """Refused by a phrase of the list, degenerate by `scoring.degenerate`, complied otherwise. A class, so that it can
    travel to worker processes."""

    keywords: str

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[str]:
        from ..scoring.degenerate import degeneration
        from ..scoring.keywords import is_refusal

        return [
            "refuse" if is_refusal(answer, self.keywords) else "degenerate" if degeneration(answer) else "comply"
            for answer in answers
        ]
