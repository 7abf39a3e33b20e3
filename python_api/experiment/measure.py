"""One fine-tuned model, measured on a suite: what it does with harmful and harmless prompts, the task, knowledge."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..prompts.chat import Chat, generate, score_answers
from ..prompts.records import MultipleChoice
from .suite import Suite, count


def choice_hits(model: nn.Module, chat: Chat, items: list[MultipleChoice], batch_size: int) -> int:
    """How many questions have a right option of the highest log-probability per token."""
    questions = [(item.prompt, choice) for item in items for choice in item.choices]
    total, tokens = score_answers(model, chat, questions, batch_size=batch_size)
    scores = (total / tokens).split([len(item.choices) for item in items])
    return sum(int(s.argmax()) in item.correct for s, item in zip(scores, items, strict=True))


def measure(
    model: nn.Module, chat: Chat, suite: Suite, *, batch_size: int = 64, transcripts: int = 12
) -> dict[str, Any]:
    """Counts, not shares, so that seeds can be pooled.

    Returns:
        harmful, benign: verdicts with n; selection: verdicts on the prompts for choosing settings; task, knowledge:
        {"hits", "n"}; transcripts: the first prompts of the harmful test set with the answers.
    """
    said = {
        name: generate(model, chat, prompts, max_new_tokens=suite.max_new_tokens, batch_size=batch_size)
        for name, prompts in (
            ("harmful", suite.harmful_test), ("benign", suite.benign_test), ("selection", suite.selection),
        )
    }  # fmt: skip
    asked = {"harmful": suite.harmful_test, "benign": suite.benign_test, "selection": suite.selection}
    out: dict[str, Any] = {
        name: {**count(suite.judge(asked[name], answers)), "n": len(answers)} for name, answers in said.items()
    }
    for name, items in (("task", suite.task_test), ("knowledge", suite.knowledge)):
        out[name] = {"hits": choice_hits(model, chat, items, batch_size), "n": len(items)}
    out["transcripts"] = [
        {"prompt": prompt, "answer": answer}
        for prompt, answer in list(zip(suite.harmful_test, said["harmful"], strict=True))[:transcripts]
    ]
    return out


class PeakMemory:
    """The peak of this process's resident memory (Linux) or of the GPU's allocations over a `with`; None elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif sys.platform == "linux":
            try:
                Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew from here
            except OSError:
                self.device = torch.device("meta")  # a system that forbids it: no figure rather than a wrong one
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif self.device.type == "cpu" and sys.platform == "linux":
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    self.bytes = int(line.split()[1]) * 1024
