"""Loading models by name: the built-in one, a folder, a hub name, or a PEFT adapter, with one-line errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str) -> torch.device:
    """The device that `device` means on this machine: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1".

    ValueError where torch does not know it or this machine does not have it.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N; got {device!r}") from error
    if found.type == "meta":
        raise ValueError("device 'meta' holds no data; use auto, cpu, cuda or cuda:N")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but this PyTorch sees no GPU; use --device cpu")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} was asked for; this PyTorch sees {torch.cuda.device_count()} GPUs")
    if found.type not in ("cpu", "cuda"):
        try:
            torch.empty(1, device=found)
        except (RuntimeError, AssertionError, ImportError) as error:
            raise ValueError(f"device {device!r} was asked for, and this PyTorch cannot use it: {error}") from None
    return found


def load_model(
    name: str, *, dtype: str = "float32", device: str = "auto", trust_remote_code: bool = False
) -> tuple[nn.Module, Any]:
    """(model in eval mode without gradients, tokenizer).

    Args:
        name: "builtin", a folder, or a hub name of a causal LM; a folder with adapter_config.json is a PEFT adapter and
            is put onto the base model it names.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        ValueError: in one line, when the name cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}; got {dtype!r}")
    where = name
    if name == "builtin":
        from . import builtin_model

        where = str(builtin_model.path())
    try:
        if (Path(where) / "adapter_config.json").is_file():
            from peft import PeftConfig, PeftModel

            base = PeftConfig.from_pretrained(where).base_model_name_or_path
            if not base:
                raise ValueError("its adapter_config.json names no base model")
            model, tokenizer = load_model(base, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
            return PeftModel.from_pretrained(model, where).eval(), tokenizer
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if "trust_remote_code=True" in str(error):
            raise ValueError(
                f"cannot load the model {name!r}: it comes with Python code of its own, which is run only with "
                "trust_remote_code (--trust-remote-code); read that code first"
            ) from error
        hint = "expected 'builtin', a folder with config.json, weights and tokenizer files, or the name of a hub model"
        why = " ".join((str(error).strip() or type(error).__name__).split())
        raise ValueError(f"cannot load the model {name!r}: {hint} ({why})") from error
    model.requires_grad_(False)
    return model.eval().to(resolve_device(device)), tokenizer
