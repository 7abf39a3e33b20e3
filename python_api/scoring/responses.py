"""Answers of a model to many prompts, written down as they come and taken up where they ended.

A transcript is a JSON Lines file with one object per answer: key, id, prompt, answer. The key is a hash of everything
that determines the answer: the prompt as the model sees it, the length limit, the model's parameters, and `tag` for
what no parameter shows (heads ablated by a hook). An answer is taken from the file only if its key is the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..prompts.chat import Chat, by_length, generate
from ..prompts.records import content_hash
from .degenerate import DegenerateRule
from .intervals import Rate
from .keywords import is_refusal, keyword_list

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(model: nn.Module) -> str:
    """12 hexadecimal digits of the model's parameters and buffers: a checksum against mix-ups, not against forgery.

    Adapters are parameters and so belong to it; hooks do not.
    """
    digest = hashlib.blake2b(digest_size=6)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        # The bits as integers: their sums are exact, in every order and on every device.
        bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
        sums = bits.reshape(len(bits), -1).sum(0, dtype=torch.int64) if bits.ndim > 1 else bits.reshape(-1)
        digest.update(sums.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def respond(
    model: nn.Module,
    chat: Chat,
    prompts: Sequence[Any],
    *,
    transcript: str | os.PathLike[str] | None = None,
    tag: str = "",
    max_new_tokens: int = 256,
    batch_size: int = 32,
    progress: str | None = None,
) -> list[str]:
    """The greedy answers to `prompts`, in order.

    Args:
        prompts: texts, or records with `prompt` and `id`. One that occurs twice is answered once.
        transcript: the file to write every batch to as it is done, and to take answers from that it already holds.
        tag: names what changes the model's answers besides its parameters.
        progress: title of a progress bar, or None for none.

    Raises:
        ValueError: a transcript with a line that is none of ours.
    """
    from tqdm.auto import tqdm

    texts = [prompt if isinstance(prompt, str) else prompt.prompt for prompt in prompts]
    ids = [content_hash(p) if isinstance(p, str) else p.id for p in prompts]
    who = fingerprint(model) if transcript is not None else ""
    keys = [content_hash(chat.render(text), max_new_tokens, who, tag) for text in texts]
    file = None if transcript is None else Path(transcript)
    answers = {} if file is None else _read(file)
    missing = list({key: i for i, key in reversed(list(enumerate(keys))) if key not in answers}.values())
    bar = tqdm(
        total=len(set(keys)),
        initial=len(set(keys)) - len(missing),
        desc=progress,
        unit="answer",
        disable=progress is None,
        leave=False,
    )
    try:
        for rows in by_length([len(chat.encode_prompt(texts[i])) for i in missing], batch_size):
            batch = [missing[row] for row in rows]
            said = generate(
                model, chat, [texts[i] for i in batch], max_new_tokens=max_new_tokens, batch_size=len(batch)
            )
            answers.update({keys[i]: answer for i, answer in zip(batch, said, strict=True)})
            if file is not None:
                _append(file, [_line(keys[i], ids[i], texts[i], answers[keys[i]]) for i in batch])
            bar.update(len(batch))
    finally:
        bar.close()
    return [answers[key] for key in keys]


def _line(key: str, id: str, prompt: str, answer: str) -> str:
    return json.dumps({"key": key, "id": id, "prompt": prompt, "answer": answer}, ensure_ascii=False) + "\n"


def _append(file: Path, lines: Sequence[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8", errors="surrogatepass") as out:
        out.writelines(lines)


def _read(file: Path) -> dict[str, str]:
    """key -> answer of a transcript; what a killed process left of its last line is cut off."""
    if not file.exists():
        return {}
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(file, len(whole))
    answers = {}
    for number, line in enumerate(whole.decode("utf-8", "surrogatepass").split("\n")[:-1], 1):
        row = None
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("key", "answer")):
            raise ValueError(
                f"transcript: expected a JSON object with key and answer in line {number} of {file}; remove the line, "
                "or name another file"
            )
        answers[row["key"]] = row["answer"]
    return answers


def degenerate_rate(answers: Sequence[str], rule: DegenerateRule | None = None) -> Rate:
    """The share of broken answers, by the definition in `degenerate`."""
    rule = rule or DegenerateRule()
    return Rate.of(rule.reason(answer) is not None for answer in answers)


def refusal_rate(answers: Sequence[str], keywords: str = "refusal-kernels-1") -> Rate:
    """The share of refusals by the named phrase list: over-refusal, where the prompts are harmless."""
    keyword_list(keywords)
    return Rate.of(is_refusal(answer, keywords) for answer in answers)
