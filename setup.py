"""Packaging: which folder is which package, and a build_ext that hands the native build to CMake.

Everything a compiler sees is decided in CMakeLists.txt; everything an index shows is in pyproject.toml.

The three source folders stand side by side at the top of the repository, and one import root, refusal_kernels, holds
them all. The mapping is spelled out below, so a wheel is complete even from a checkout without symlinks; the two
committed symlinks in refusal_kernels/ are for editable installs, type checkers and jump-to-definition.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

# Folder at the top of the repository -> dotted name it is imported by.
FOLDERS = {
    "refusal_kernels": "refusal_kernels",
    "triton_kernels": "refusal_kernels.triton_kernels",
    "python_api": "refusal_kernels.python_api",
}

NO_HEADERS = """
refusal-kernels: {python} has no header {header}.
Install Python's headers (on Debian and Ubuntu: `sudo apt install python3-dev`) and try again.
"""

NO_TORCH = """
refusal-kernels: no torch in {python} to build against.
Install it first (`pip install torch`), then `pip install . --no-build-isolation`.
Without --no-build-isolation pip builds in an empty environment, where torch is never found.
"""


def packages() -> tuple[list[str], dict[str, str]]:
    """Every package of the three folders, and where each one lies."""
    names: list[str] = []
    for folder, name in FOLDERS.items():
        # Seen through the symlinks, the two inner folders would be listed twice.
        inner = ["triton_kernels*", "python_api*"] if folder == "refusal_kernels" else []
        names += [name, *(f"{name}.{sub}" for sub in find_packages(str(ROOT / folder), exclude=inner))]
    return names, {name: folder for folder, name in FOLDERS.items()}


class CMakeBuild(build_ext):
    """Configure, build and place refusal_kernels._C; sources and flags are CMakeLists.txt's business."""

    def build_extension(self, ext: Extension) -> None:
        if importlib.util.find_spec("torch") is None:
            raise SystemExit(NO_TORCH.format(python=sys.executable))
        header = Path(sysconfig.get_path("include")) / "Python.h"
        if not header.exists():
            raise SystemExit(NO_HEADERS.format(python=sys.executable, header=header))
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # One persistent folder per interpreter: a rebuild after an edit compiles only what the edit touched.
        folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        options = {
            "CMAKE_BUILD_TYPE": os.environ.get("CMAKE_BUILD_TYPE", "Debug" if self.debug else "Release"),
            "Python_EXECUTABLE": sys.executable,
            "RK_OUTPUT_DIR": str(target.parent),
            "RK_OUTPUT_NAME": target.name,
            # Always passed, so that a value left in the cache by an earlier build never outlives the environment's.
            "RK_CUDA": os.environ.get("RK_CUDA", "AUTO"),
            "RK_CUDA_ARCHS": os.environ.get("TORCH_CUDA_ARCH_LIST", ""),
        }
        target.parent.mkdir(parents=True, exist_ok=True)
        # pip removes an isolated build environment afterwards: never resume a configuration that points into one.
        fresh = ["--fresh"] if (folder / "CMakeCache.txt").exists() and not self._same_tools(folder) else []
        configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *fresh]
        configure += [f"-D{name}={value}" for name, value in options.items()]
        # cmake and ninja as pip installs them, also when the environment is not activated.
        search = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
        for command in (configure, ["cmake", "--build", str(folder)]):
            try:
                program = shutil.which(command[0], path=search) or command[0]
                subprocess.run([program, *command[1:]], check=True, env={**os.environ, "PATH": search})
            except FileNotFoundError:
                raise SystemExit("refusal-kernels: cmake is missing (`pip install cmake ninja pybind11`).") from None
            except subprocess.CalledProcessError as error:
                raise SystemExit(f"refusal-kernels: `{' '.join(command[:2])} …` failed, see above.") from error

    def _same_tools(self, folder: Path) -> bool:
        """Whether the cached configuration was made by this interpreter and its tools still exist."""
        cache = dict(line.split("=", 1) for line in (folder / "CMakeCache.txt").read_text().splitlines() if "=" in line)
        tools = [cache.get(key, "") for key in ("CMAKE_COMMAND:INTERNAL", "CMAKE_MAKE_PROGRAM:FILEPATH")]
        return all(Path(tool).exists() for tool in tools) and sys.executable in cache.values()


PACKAGES, PACKAGE_DIR = packages()

setup(
    packages=PACKAGES,
    package_dir=PACKAGE_DIR,
    ext_modules=[Extension("refusal_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    include_package_data=False,
    package_data={
        "refusal_kernels": ["py.typed", "_C.pyi"],
        "refusal_kernels.python_api": [
            f"{folder}/**/{pattern}"
            for folder in ("builtin_model", "experiment")
            for pattern in ("*.safetensors", "*.json", "*.jsonl", "*.md", "*.txt", "*.model", "*.jinja")
        ],
    },
    zip_safe=False,
)
