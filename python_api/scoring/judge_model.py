"""A local language model that is asked about answers: what guard and StrongREJECT judges have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..prompts.chat import Chat, by_length, device_of, generate


class _Verbatim(Chat):
    """Prompts that already are in the model's form."""

    def render(self, prompt: str) -> str:
        return prompt


class JudgeModel:
    """A causal language model with its tokenizer, spoken to in texts that are already rendered.

    Args:
        model, tokenizer: of transformers.
        name: what results call it.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, name: str = "") -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.chat = Chat(tokenizer)
        self._verbatim = _Verbatim(tokenizer)

    @classmethod
    def load(
        cls, name: str, *, dtype: str = "float32", device: str = "auto", trust_remote_code: bool = False
    ) -> JudgeModel:
        """As `models.load_model`: a folder, a hub name, an adapter."""
        from ..models import load_model

        return cls(*load_model(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code), name)

    def shortened(self, text: str, tokens: int) -> str:
        """The first `tokens` tokens of `text`; the text itself where it has no more."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return text if len(ids) <= tokens else str(self.tokenizer.decode(ids[:tokens], skip_special_tokens=True))

    def complete(
        self, texts: Sequence[str], *, max_new_tokens: int, batch_size: int = 16, progress: str | None = None
    ) -> list[str]:
        """The greedy continuations of `texts`, without special tokens, in order."""
        return generate(
            self.model,
            self._verbatim,
            texts,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=progress,
        )

    @torch.inference_mode()
    def next_logits(
        self, texts: Sequence[str], tokens: Sequence[int], *, batch_size: int = 16, progress: str | None = None
    ) -> Tensor:
        """The logits of `tokens` after each text, fp32 [texts, tokens] on the CPU."""
        from tqdm.auto import tqdm

        out = torch.zeros(len(texts), len(tokens))
        training = self.model.training
        self.model.eval()
        bar = tqdm(total=len(texts), desc=progress, unit="answer", disable=progress is None, leave=False)
        try:
            for rows in by_length([len(self._verbatim.encode_prompt(text)) for text in texts], batch_size):
                batch = self._verbatim.prompt_batch([texts[i] for i in rows])
                logits = self.model(
                    **{k: v.to(device_of(self.model)) for k, v in batch.items()}, use_cache=False
                ).logits
                out[rows] = logits[:, -1, list(tokens)].float().cpu()
                bar.update(len(rows))
        finally:
            self.model.train(training)
            bar.close()
        return out
