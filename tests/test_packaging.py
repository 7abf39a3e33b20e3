"""What a stranger installs: sdist, wheel, editable install, the build's messages, and make's second call.

One native build serves the whole file: unoptimised and without CUDA (the sources are the same), made from an unpacked
sdist, which is also a checkout without symlinks. Environments borrow the dependencies of the running one through a path
file; the package itself comes only from the wheel under test.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FOLDERS = {
    "refusal_kernels": "refusal_kernels",
    "triton_kernels": "refusal_kernels/triton_kernels",
    "python_api": "refusal_kernels/python_api",
}
DATA = {".py", ".pyi", ".typed", ".json", ".jsonl", ".safetensors", ".md", ".txt", ".model", ".jinja"}


def run(*command: object, cwd: Path, env: dict[str, str] | None = None, ok: bool = True) -> subprocess.CompletedProcess:
    """Runs a command without the surroundings of this process: no PYTHONPATH, no activated environment."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RK_CUDA", "TORCH_CUDA_ARCH_LIST")}
    arguments = [str(c) for c in command]
    result = subprocess.run(
        arguments, cwd=cwd, env={**clean, **(env or {})}, capture_output=True, text=True, check=False
    )
    if ok:
        assert result.returncode == 0, f"{' '.join(arguments)}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result


def pip(*arguments: object, cwd: Path, env: dict[str, str] | None = None) -> None:
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments, cwd=cwd, env=env)


PATH = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"  # cmake and ninja, where make puts them
BUILD = {"RK_CUDA": "OFF", "CMAKE_BUILD_TYPE": "Debug", "PATH": PATH}


def expected_files(root: Path) -> set[str]:
    """Every module and data file of the three folders, by its name in a wheel."""
    names = set()
    for folder, inside in FOLDERS.items():
        for path in (root / folder).rglob("*"):
            relative = path.relative_to(root / folder)
            through_symlink = folder == "refusal_kernels" and relative.parts[0] in ("triton_kernels", "python_api")
            hidden = any(part == "__pycache__" or part.startswith(".") for part in relative.parts)
            if path.is_file() and path.suffix in DATA and not through_symlink and not hidden:
                names.add(f"{inside}/{relative.as_posix()}")
    return names


@pytest.fixture(scope="session")
def sdist(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, repository, cwd=out)
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="session")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist as a source tree: three folders, no symlinks."""
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        if hasattr(tarfile, "data_filter"):  # from Python 3.10.12 and 3.11.4 on
            archive.extractall(folder, filter="data")
        else:
            archive.extractall(folder)
    (root,) = folder.iterdir()
    return root


@pytest.fixture(scope="session")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of the environment that builds: one for wheel and editable install, so that they share a build folder."""
    return environment(tmp_path_factory.mktemp("builder") / "env")


@pytest.fixture(scope="session")
def wheel(unpacked: Path, builder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip(
        "--python",
        builder,
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--wheel-dir",
        out,
        unpacked,
        cwd=out,
        env=BUILD,
    )
    return next(out.glob("*.whl"))


def environment(at: Path) -> Path:
    """A new virtual environment with the dependencies of this one and without this package; returns its Python."""
    run(sys.executable, "-m", "venv", "--without-pip", at, cwd=at.parent)
    python = at / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=at).stdout.strip()
    # A plain path line: path files found there, an editable install of this very package among them, stay unread.
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(site, "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n")
    return python


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment into which the wheel is installed."""
    folder = tmp_path_factory.mktemp("installed")
    python = environment(folder / "env")
    pip("--python", python, "install", "--no-deps", "--ignore-installed", wheel, cwd=folder)
    return python


# -- sdist and wheel ---------------------------------------------------------------------------------------------------


def test_sdist_holds_what_builds_and_tests_it(repository: Path, sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    names = {"/".join(m.name.split("/")[1:]) for m in members if m.isfile()}
    assert not [m.name for m in members if m.issym() or m.islnk()]
    wanted = {"CMakeLists.txt", "setup.py", "pyproject.toml", "Makefile", "constraints.txt", "LICENSE", "README.md"}
    wanted |= {f"tests/{p.name}" for p in (repository / "tests").glob("*.py")}
    wanted |= {p.relative_to(repository).as_posix() for p in (repository / "csrc").rglob("*") if p.is_file()}
    back = {inside: folder for folder, inside in FOLDERS.items()}
    for name in expected_files(repository):
        inside = max((i for i in back if name.startswith(f"{i}/")), key=len)
        wanted.add(back[inside] + name.removeprefix(inside))
    assert wanted - names == set()
    assert not {n for n in names if n.endswith((".so", ".pyc")) or n.startswith(("build/", ".venv/"))}


def test_wheel_is_complete_and_holds_nothing_else(repository: Path, wheel: Path) -> None:
    """Made from a tree without symlinks; the list comes from this checkout."""
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    extension = {n for n in names if re.fullmatch(r"refusal_kernels/_C\..*\.so", n)}
    assert len(extension) == 1
    assert names - extension == expected_files(repository)
    assert any(n.endswith("model.safetensors") for n in names)
    assert {n.split("/")[0] for n in names} == {"refusal_kernels"}  # no triton_kernels, no python_api at the top


def test_metadata(repository: Path, wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    fields = importlib.metadata.PathDistribution(zipfile.Path(archive, metadata.split("/")[0] + "/")).metadata
    assert fields["Name"] == "refusal-kernels"
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Requires-Python"] == ">=3.10"
    requirements = {canonicalize_name(r.name): r for r in map(Requirement, fields.get_all("Requires-Dist") or ())}
    assert str(requirements["torch"].specifier) == ">=2.10"
    assert str(requirements["triton"].specifier) == ">=3.4"
    assert requirements["triton"].marker is not None
    assert "Linux" in str(requirements["triton"].marker)
    assert str(requirements["transformers"].specifier) == ">=5"
    pinned = [s for r in requirements.values() for s in r.specifier if s.operator in ("==", "===", "~=", "<", "<=")]
    assert not pinned, "the metadata holds ranges, constraints.txt the versions"
    scripts = archive.read(metadata.replace("METADATA", "entry_points.txt")).decode()
    assert "refusal-kernels = refusal_kernels.python_api.cli:app" in scripts

    constraints = [line.split("#")[0].strip() for line in (repository / "constraints.txt").read_text().splitlines()]
    constrained = {canonicalize_name(Requirement(line).name): Requirement(line) for line in constraints if line}
    assert requirements.keys() - constrained.keys() - {"wandb"} == set()
    assert str(constrained["torch"].specifier) == "==2.13.0"
    for name, requirement in constrained.items():
        for pin in requirement.specifier if name in requirements else ():
            assert requirements[name].specifier.contains(pin.version, prereleases=True), name


def test_installed_wheel_works_from_another_folder(installed: Path, tmp_path: Path) -> None:
    script = """if True:
        import json, sys
        import refusal_kernels as rk
        heavy = [m for m in ("triton", "transformers", "datasets", "refusal_kernels._C") if m in sys.modules]
        import refusal_kernels.python_api, refusal_kernels.triton_kernels, refusal_kernels._C as C, torch
        rk.sparse_decode(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.int64), torch.ones(4, 5))
        modules = [rk, refusal_kernels.python_api, refusal_kernels.triton_kernels, C]
        print(json.dumps({"files": [m.__file__ for m in modules], "heavy": heavy, "build": C.build_info(),
                          "ran": rk.last_backend("sparse_decode")}))
    """
    answer = json.loads(run(installed, "-c", script, cwd=tmp_path).stdout)
    assert all(Path(f).is_relative_to(installed.parent.parent) for f in answer["files"]), answer["files"]
    assert answer["heavy"] == []
    assert answer["ran"] == "cpu"
    assert answer["build"]["cuda"] is False
    assert answer["build"]["cuda_left_out"] == "RK_CUDA=OFF"
    assert answer["build"]["build_type"] == "Debug"
    command = installed.parent / "refusal-kernels"
    assert "train-sae" in run(command, "--help", cwd=tmp_path).stdout
    assert run(installed, "-c", "import triton_kernels", cwd=tmp_path, ok=False).returncode == 1


def test_installed_wheel_trains_an_sae_from_another_folder(installed: Path, tmp_path: Path) -> None:
    """The whole way through the command: package data, native kernels, evaluation, files."""
    size = ("--tokens", 512, "--batch-tokens", 256, "--eval-tokens", 256, "--k", 8, "--expansion", 2, "--layers", 1)
    command = installed.parent / "refusal-kernels"
    result = run(
        command,
        "train-sae",
        "--model",
        "builtin",
        "--data",
        "builtin",
        *size,
        "--out",
        "run",
        cwd=tmp_path,
        env={"OMP_NUM_THREADS": "1"},
    )
    assert "kernels: cpu" in result.stdout + result.stderr
    reload = (
        "from refusal_kernels.python_api import TopKSAE; print(TopKSAE.from_pretrained('run/layer_01').W_dec.shape)"
    )
    assert "torch.Size([512, 256])" in run(installed, "-c", reload, cwd=tmp_path).stdout
    assert (tmp_path / "run/training.png").stat().st_size > 1000


def test_extension_uses_the_stable_abi_alone(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch_abi_audit", reason="torch-abi-audit needs Python 3.11")
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith(".so"))
    library = archive.extract(name, tmp_path)
    audit = run(sys.executable, "-m", "torch_abi_audit.cli", library, "--json", "--check", "torch", cwd=tmp_path)
    assert '"2.10.0"' in audit.stdout, audit.stdout  # the oldest torch that has every function it calls
    assert b"RUNPATH" not in Path(library).read_bytes()


# -- editable ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("wheel")  # whose build folder, in the same tree, leaves only a link to do
def test_editable_install_reads_the_checkout(repository: Path, builder: Path, unpacked: Path, tmp_path: Path) -> None:
    for name in ("triton_kernels", "python_api"):
        link = repository / "refusal_kernels" / name
        assert link.is_symlink()
        assert os.readlink(link) == f"../{name}"
        if not (unpacked / "refusal_kernels" / name).exists():
            (unpacked / "refusal_kernels" / name).symlink_to(f"../{name}")
    pip("--python", builder, "install", "--no-deps", "--no-build-isolation", "-e", unpacked, cwd=tmp_path, env=BUILD)
    script = """if True:
        import refusal_kernels, refusal_kernels._C, refusal_kernels.python_api, refusal_kernels.triton_kernels
        import refusal_kernels.python_api.builtin_model
        for m in (refusal_kernels, refusal_kernels._C, refusal_kernels.python_api, refusal_kernels.triton_kernels):
            print(m.__file__)
    """
    files = [Path(f) for f in run(builder, "-c", script, cwd=tmp_path).stdout.split()]
    assert len(files) == 4
    assert all(f.is_relative_to(unpacked) for f in files), files
    (unpacked / "python_api" / "just_written.py").write_text("answer = 42\n")
    edited = "from refusal_kernels.python_api.just_written import answer; print(answer)"
    assert run(builder, "-c", edited, cwd=tmp_path).stdout.strip() == "42"


@pytest.mark.parametrize("folder", ["triton_kernels", "python_api"])
def test_the_inner_folders_refuse_to_be_top_level_packages(repository: Path, folder: str) -> None:
    result = run(sys.executable, "-c", f"import {folder}", cwd=repository, ok=False)
    assert result.returncode == 1
    assert f"ImportError: import refusal_kernels.{folder}, not {folder}" in result.stderr


# -- the build's messages ----------------------------------------------------------------------------------------------


def test_missing_torch_is_three_lines(repository: Path, tmp_path: Path) -> None:
    """An environment that holds setuptools and nothing else."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env/bin/python"
    site = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).stdout.strip()
    )
    for package in ("setuptools", "_distutils_hack"):
        site.joinpath(package).symlink_to(Path(sysconfig.get_path("purelib"), package))
    command = [python, "setup.py", "-q", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path]
    result = run(*command, cwd=repository, ok=False)
    assert result.returncode == 1
    lines = result.stderr.strip().splitlines()[-3:]
    assert lines[0].startswith("refusal-kernels: no torch in ")
    assert "pip install . --no-build-isolation" in lines[1]
    assert "Traceback" not in result.stderr


def configure(repository: Path, folder: Path, mode: str, env: dict[str, str]) -> subprocess.CompletedProcess:
    options = [f"-DRK_CUDA={mode}", f"-DPython_EXECUTABLE={sys.executable}", f"-DRK_OUTPUT_DIR={folder}"]
    options += [f"-DRK_CUDA_ARCHS={env.get('TORCH_CUDA_ARCH_LIST', '')}"]
    cmake = shutil.which("cmake", path=PATH)
    return run(
        cmake, "-S", repository, "-B", folder, "-G", "Ninja", *options, cwd=folder, env={"PATH": PATH} | env, ok=False
    )


def test_a_compiler_that_fails_leaves_cuda_out_and_says_why(repository: Path, tmp_path: Path) -> None:
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\necho 'nvcc fatal: no licence today' >&2\nexit 3\n")
    broken.chmod(0o755)
    result = configure(repository, tmp_path, "AUTO", {"CUDACXX": str(broken)})
    assert result.returncode == 0, result.stderr
    said = re.search(r"CUDA kernels LEFT OUT: (.*)", result.stdout)
    assert said is not None, result.stdout
    assert "cannot compile an empty kernel: nvcc fatal: no licence today (3)" in said[1]
    # The same folder again, now asked for by name: an error instead of a build without it.
    insisted = configure(repository, tmp_path, "ON", {"CUDACXX": str(broken)})
    assert insisted.returncode != 0
    assert "RK_CUDA=ON, but" in insisted.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc in PATH")
def test_auto_takes_cuda_along_for_the_architectures_asked_for(repository: Path, tmp_path: Path) -> None:
    result = configure(repository, tmp_path, "AUTO", {"TORCH_CUDA_ARCH_LIST": "8.0 9.0a+PTX"})
    assert result.returncode == 0, result.stderr
    assert "for 80-real;90a-real;90a-virtual" in result.stdout
    assert "sparse_decode.cu" in (tmp_path / "build.ninja").read_text()
    wrong = configure(repository, tmp_path, "AUTO", {"TORCH_CUDA_ARCH_LIST": "Hopper"})
    assert wrong.returncode != 0
    assert "'Hopper' is not of the form" in wrong.stderr


# -- make --------------------------------------------------------------------------------------------------------------


def test_make_installs_once_and_again_after_a_change(repository: Path, tmp_path: Path) -> None:
    """Looked at with `make -n` in a copy whose stamps are set by hand: nothing is downloaded."""
    for name in ("Makefile", "constraints.txt", "CMakeLists.txt", "setup.py", "pyproject.toml"):
        shutil.copy(repository / name, tmp_path)
    shutil.copytree(repository / "csrc", tmp_path / "csrc")
    stamps = tmp_path / ".venv" / "stamps"
    stamps.mkdir(parents=True)
    (tmp_path / ".venv/bin").mkdir()
    (tmp_path / ".venv/bin/python").touch()

    def steps() -> list[str]:
        planned = run("make", "-n", "test", cwd=tmp_path).stdout
        return [
            name
            for name, sign in (("torch", " torch numpy"), ("tools", " cmake ninja"), ("package", " -e '.["))
            if sign in planned
        ]

    assert steps() == ["torch", "tools", "package"]
    for name in ("torch", "tools", "package"):
        (stamps / name).touch()
    assert steps() == []
    later = (stamps / "package").stat().st_mtime + 10
    os.utime(tmp_path / "csrc/module.cpp", (later, later))
    assert steps() == ["package"]
    os.utime(tmp_path / "constraints.txt", (later, later))
    assert steps() == ["torch", "tools", "package"]


def test_make_names_what_is_missing(repository: Path, tmp_path: Path) -> None:
    """A Python without headers and venv, and no compiler: one message, with the packages to install."""
    python = tmp_path / "python3"
    cases = f'*ensurepip*) exit 1;; *get_path*) echo /nowhere;; *) exec {sys.executable} "$@";;'
    python.write_text(f'#!/bin/sh\ncase "$2" in {cases} esac\n')
    python.chmod(0o755)
    result = run(
        "make", "install", f"PYTHON={python}", f"VENV={tmp_path}/env", cwd=repository, env={"CXX": "nothing"}, ok=False
    )
    assert result.returncode != 0
    assert "sudo apt install g++ python3-dev python3-venv" in result.stderr
    assert not (tmp_path / "env").exists()
