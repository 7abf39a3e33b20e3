"""`python benches/gpu/needs.py`: whether this Python can run `make gpu` as it is; what it lacks, if not, on stderr.

Run as a file: of this package and of the benchmarks nothing is imported, as what that needs may be what is missing.
nvcc is not asked for: no environment that pip makes would have it, and the build says so itself.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

MODULES = ("torch", "triton", "transformers", "peft", "pytest", "typer", "setuptools", "pybind11")
PROGRAMS = ("cmake", "ninja")  # as setup.py looks for them: beside the interpreter, then in PATH


def lacking() -> list[str]:
    """Names of what is missing, in words."""
    found = [name for name in MODULES if find_spec(name) is None]
    search = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    found += [name for name in PROGRAMS if shutil.which(name, path=search) is None]
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        found.append("Python.h")
    if "torch" not in found:
        import torch

        if not torch.cuda.is_available():
            found.append(f"a CUDA device that torch {torch.__version__} sees")
    return found


if __name__ == "__main__":
    del sys.path[0]  # this folder, whose profile.py would stand for Python's own
    if missing := lacking():
        raise SystemExit(f"make gpu: {sys.executable} lacks {', '.join(missing)}")
