"""Putting prompts to a model: its chat template, token ids of prompt and answer, batches, log-probabilities, answers.

Prompt and answer are tokenized apart and then joined, so the prompt's tokens are exactly those the model sees when it
generates, and the answer's span is known without searching. A tokenizer without a chat template gets the prompt as it
is, with BOS before it and a line break after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_MARK = "answer-goes-here"


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt with an answer; `ids[start:]` is the answer with what closes it."""

    ids: tuple[int, ...]
    start: int


@dataclass
class AnswerBatch:
    """Right-padded sequences.

    Attributes:
        input_ids, attention_mask: int64 [n, length].
        targets: bool [n, length]; True at the tokens of the answers. Position t is predicted from t - 1.
    """

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    @property
    def predicting(self) -> Tensor:
        """bool [n, length]: the positions whose logits predict an answer token (start - 1 ... end - 1)."""
        return torch.cat([self.targets[:, 1:], torch.zeros_like(self.targets[:, :1])], 1)

    @property
    def labels(self) -> Tensor:
        """input_ids where targets, elsewhere -100: what transformers' loss takes."""
        return self.input_ids.masked_fill(~self.targets, -100)

    def to(self, device: torch.device | str) -> AnswerBatch:
        return AnswerBatch(self.input_ids.to(device), self.attention_mask.to(device), self.targets.to(device))


class Chat:
    """A tokenizer and the form in which its model is spoken to.

    Args:
        tokenizer: of transformers.
        system: a system message before every prompt, or None.

    Raises:
        ValueError: a system message for a tokenizer without a template, or with one that does not take it (Gemma's).
    """

    def __init__(self, tokenizer: Any, system: str | None = None) -> None:
        self.tokenizer, self.system = tokenizer, system
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        if system is not None and not self.has_template:
            raise ValueError("system: expected None, for the tokenizer has no chat template to put it into")
        self._before, self._after = self._frame()

    def _messages(self, prompt: str) -> list[dict[str, str]]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": prompt}]

    def _frame(self) -> tuple[str, str]:
        """What the template puts between prompt and answer and after the answer."""
        eos = getattr(self.tokenizer, "eos_token", None) or ""
        if not self.has_template:
            return "", eos
        whole = self._apply([*self._messages("question"), {"role": "assistant", "content": _MARK}])
        opened = self.render("question")
        if not whole.startswith(opened) or whole.count(_MARK) != 1:
            return "", eos  # a template that treats finished answers otherwise (Qwen3 drops the thinking)
        before, after = whole[len(opened) :].split(_MARK)
        return before, after.rstrip("\n")

    def render(self, prompt: str) -> str:
        """The text that the model continues with its answer."""
        if not self.has_template:
            return f"{getattr(self.tokenizer, 'bos_token', None) or ''}{prompt}\n"
        return self._apply(self._messages(prompt), add_generation_prompt=True)

    def _apply(self, messages: list[dict[str, str]], **options: bool) -> str:
        from jinja2 import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except TemplateError as error:
            what = "prompt" if self.system is None else "system"
            raise ValueError(f"{what}: the tokenizer's chat template does not take it ({error})") from error

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode_prompt(self, prompt: str) -> list[int]:
        """Token ids of the rendered prompt, special tokens as the template spells them."""
        return self._ids(self.render(prompt))

    def encode(self, prompt: str, answer: str, close: bool = True) -> Encoded:
        """Token ids of prompt and answer. `close` adds what ends an answer (EOS, end of turn); without it the answer
        is a beginning. ValueError for an empty answer."""
        if not answer.strip():
            raise ValueError(f"answer: expected a text, got {answer!r} (prompt {prompt[:60]!r})")
        asked = self.encode_prompt(prompt)
        return Encoded((*asked, *self._ids(self._before + answer + (self._after if close else ""))), len(asked))

    @property
    def pad_id(self) -> int:
        """The padding token, or EOS where there is none: padding is masked, so any token serves."""
        for name in ("pad_token_id", "eos_token_id"):
            if (token := getattr(self.tokenizer, name, None)) is not None:
                return int(token)
        return 0

    def stop_ids(self, model: Any) -> list[int]:
        """The tokens that end an answer: those of the model's generation settings, EOS, and the template's end of
        turn, which a folder without generation_config.json does not know."""
        stops = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ids = set(stops if isinstance(stops, list) else [] if stops is None else [stops])
        if (eos := getattr(self.tokenizer, "eos_token_id", None)) is not None:
            ids.add(int(eos))
        if len(closing := self._ids(self._after.strip())) == 1:
            ids.add(closing[0])
        return sorted(ids)

    def batch(self, encoded: Sequence[Encoded]) -> AnswerBatch:
        """Right-padded, on the CPU."""
        length = max(len(e.ids) for e in encoded)
        ids = torch.full((len(encoded), length), self.pad_id)
        mask = torch.zeros((len(encoded), length), dtype=torch.long)
        targets = torch.zeros((len(encoded), length), dtype=torch.bool)
        for row, e in enumerate(encoded):
            ids[row, : len(e.ids)] = torch.tensor(e.ids)
            mask[row, : len(e.ids)] = 1
            targets[row, e.start : len(e.ids)] = True
        return AnswerBatch(ids, mask, targets)

    def prompt_batch(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Left-padded prompts, so that the last position of every row is where the answer begins."""
        rows = [self.encode_prompt(prompt) for prompt in prompts]
        length = max(len(row) for row in rows)
        ids = torch.full((len(rows), length), self.pad_id)
        mask = torch.zeros((len(rows), length), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, length - len(row) :] = torch.tensor(row)
            mask[i, length - len(row) :] = 1
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first: little padding, and what does not fit fails at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def answer_log_probs(logits: Tensor, batch: AnswerBatch) -> Tensor:
    """log P of each row's answer, summed over its tokens, fp32 [n]; differentiable in `logits` [n, length, vocabulary].

    Equivalent to: ``log_softmax(logits[:, :-1]).gather(input_ids[:, 1:])`` summed where ``targets[:, 1:]``.
    """
    at = batch.predicting.to(logits.device)
    chosen = logits[at].float()  # only the answers' positions: a vocabulary of 128k makes the rest expensive
    tokens = batch.input_ids.to(logits.device)[batch.targets.to(logits.device)]
    log_p = chosen.gather(1, tokens[:, None])[:, 0] - chosen.logsumexp(1)
    rows = at.nonzero()[:, 0]
    return torch.zeros(len(logits), device=logits.device).index_add(0, rows, log_p)


@torch.inference_mode()
def score_answers(
    model: nn.Module,
    chat: Chat,
    questions: Sequence[tuple[str, str]],
    *,
    close: bool = True,
    batch_size: int = 32,
    progress: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(log P summed over the answer's tokens fp64 [n], tokens int64 [n]) for (prompt, answer) pairs, in order."""
    from tqdm.auto import tqdm

    encoded = [chat.encode(prompt, answer, close) for prompt, answer in questions]
    total, count = torch.zeros(len(encoded), dtype=torch.float64), torch.zeros(len(encoded), dtype=torch.long)
    bar = tqdm(total=len(encoded), desc=progress, unit="answer", disable=progress is None, leave=False)
    training = model.training
    model.eval()
    try:
        for rows in by_length([len(e.ids) for e in encoded], batch_size):
            batch = chat.batch([encoded[i] for i in rows]).to(device_of(model))
            logits = model(**batch.inputs, use_cache=False).logits
            total[rows] = answer_log_probs(logits, batch).double().cpu()
            count[rows] = batch.targets.sum(1).cpu()
            bar.update(len(rows))
    finally:
        model.train(training)
        bar.close()
    return total, count


@torch.inference_mode()
def generate(
    model: nn.Module,
    chat: Chat,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    progress: str | None = None,
) -> list[str]:
    """Greedy answers to `prompts`, in order, without special tokens. The model is left in the mode it was in."""
    from tqdm.auto import tqdm

    out = [""] * len(prompts)
    lengths = [len(chat.encode_prompt(prompt)) for prompt in prompts]
    bar = tqdm(total=len(prompts), desc=progress, unit="answer", disable=progress is None, leave=False)
    stops = chat.stop_ids(model)
    training = model.training
    model.eval()
    try:
        for rows in by_length(lengths, batch_size):
            batch = {name: t.to(device_of(model)) for name, t in chat.prompt_batch([prompts[i] for i in rows]).items()}
            del batch["position_ids"]  # generate makes its own from the mask
            ids = model.generate(  # type: ignore[operator]
                **batch,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=chat.pad_id,
                eos_token_id=stops or None,
            )
            texts = chat.tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for i, text in zip(rows, texts, strict=True):
                out[i] = text.strip()
            bar.update(len(rows))
    finally:
        model.train(training)
        bar.close()
    return out
