"""Six commonsense tasks, scored by lm-eval (EleutherAI/lm-evaluation-harness): what protection must not cost.

lm-eval is no dependency of this package and is imported only when it is asked for; the tasks' data come from the hub.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from torch import nn

from .intervals import Rate

TASKS = ("arc_easy", "arc_challenge", "boolq", "hellaswag", "piqa", "winogrande")


def require_lm_eval() -> None:
    """ImportError, with the command that installs it, where lm-eval is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError("the commonsense tasks are scored by lm-eval, which is not installed: pip install lm-eval")


def commonsense(
    model: nn.Module,
    tokenizer: Any,
    *,
    tasks: Sequence[str] = TASKS,
    limit: int | None = None,
    batch_size: int = 32,
    chat: bool = False,
    task_manager: Any = None,
) -> dict[str, Rate]:
    """Accuracy (lm-eval's "acc", zero-shot) of each task.

    Args:
        limit: questions per task; None takes all.
        chat: put the questions into the tokenizer's chat template. Published figures mostly do not.
        task_manager: of lm-eval, where tasks of your own are to be known.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: a task without an accuracy.
    """
    require_lm_eval()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    training = model.training
    model.eval()
    try:
        report = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            num_fewshot=0,
            limit=limit,
            apply_chat_template=chat,
            bootstrap_iters=0,
            log_samples=False,
            task_manager=task_manager,
        )
    finally:
        model.train(training)
    rates = {}
    for task in tasks:
        figures = report["results"].get(task, {})
        if "acc,none" not in figures:
            raise ValueError(
                f"tasks: expected tasks with an accuracy, got {task} with {', '.join(figures) or 'nothing'}"
            )
        n = int(report["n-samples"][task]["effective"])
        rates[task] = Rate(round(float(figures["acc,none"]) * n), n)
    return rates
