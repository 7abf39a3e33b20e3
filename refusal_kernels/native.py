"""Loading of the compiled extension refusal_kernels._C, once, with the reason kept when it cannot be loaded."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("refusal_kernels._C"), None
    except ModuleNotFoundError:
        return None, "the compiled extension refusal_kernels._C is not built; run: pip install . --no-build-isolation"
    except Exception as error:  # A damaged or foreign binary: every kind of loader error ends here, with its reason.
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return None, f"the compiled extension refusal_kernels._C cannot be loaded ({first_line}); build it again"


def load_error() -> str | None:
    """Why refusal_kernels._C cannot be used, in one line, or None when it is loaded."""
    return _load()[1]


def module() -> ModuleType | None:
    """refusal_kernels._C, or None when it cannot be loaded."""
    return _load()[0]


def operator(namespace: str, name: str) -> Any | None:
    """The default overload of one of the extension's torch operators, e.g. ("refusal_kernels_cpu", "topk_encode"); None
    when the extension is not loaded or was built without it."""
    if load_error() is not None:
        return None
    packet = getattr(getattr(torch.ops, namespace), name, None)
    return None if packet is None else packet.default
