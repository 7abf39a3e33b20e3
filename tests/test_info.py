"""python -m refusal_kernels.info: complete where all is well, and still an answer where something is broken."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import refusal_kernels as rk
from refusal_kernels import backends, info, native, selfcheck


def run_info(
    *arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "refusal_kernels.info", *arguments]
    return subprocess.run(
        command, env={**os.environ, **(env or {})}, cwd=cwd, capture_output=True, text=True, check=False
    )


def test_every_operator_and_back_end_is_available_or_has_a_reason() -> None:
    report = info.collect()
    assert set(report["operators"]) == set(backends.OPERATORS)
    for row in report["operators"].values():
        assert set(row) == set(backends.BACKENDS)
        assert row["reference"]["available"]
        for cell in row.values():
            assert cell["available"] != all(cell["devices"].values())
    assert report["extension"]["error"] is None, "these tests run on a built extension"
    assert report["extension"]["build"]["torch_abi_target"] == "2.10"
    assert "sparse_decode" in report["extension"]["operators"]["refusal_kernels_cpu"]
    assert ("sparse_decode" in report["extension"]["operators"]["refusal_kernels_cuda"]) == (
        report["extension"]["build"]["cuda"]
    )
    assert report["versions"]["torch"] == torch.__version__
    json.dumps(report)


def test_command_prints_the_table_and_checks_what_is_available() -> None:
    result = run_info("--check")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 failed" in result.stdout
    ended = [line for line in result.stderr.splitlines() if line.startswith("check ")]
    assert f"{len(ended)} checks against the fp64 reference passed" in result.stdout, "each is told as it ends"
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    for op in backends.OPERATORS:
        assert lines[op].count("cpu ok") == 2, lines[op]  # reference and cpu
    if not torch.cuda.is_available():
        assert "[1]" in lines["[1]"]
        assert "there is no CUDA device" in result.stdout or "without CUDA" in result.stdout


def test_json_is_the_same_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"versions", "machine", "gpus", "extension", "triton", "operators"} <= set(report)
    assert "checks" not in report


@pytest.mark.parametrize("op", list(backends.OPERATORS))
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_every_operator_has_a_check_that_passes(op: str, backend: str) -> None:
    assert selfcheck.check(op, backend, "cpu") is None


def test_check_of_an_unknown_operator_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="op must be one of topk_encode"):
        selfcheck.check("encode", "cpu", "cpu")


@pytest.mark.parametrize(
    ("primitive", "op", "named"),
    [
        ("sparse_decode", "sparse_decode", "x_hat"),
        ("sparse_decode_backward", "sparse_decode", "gradient of"),
        ("topk_encode", "topk_encode", "values"),
        ("topk_encode_backward", "topk_encode", "gradient of"),
        ("sparse_decode_csr", "sparse_decode_csr", "x_hat"),
        ("sparse_decode_csr_backward", "sparse_decode_csr", "gradient of W_dec"),
        ("csr_encode_backward", "batch_topk_encode", "gradient of"),
        ("csr_encode_backward", "threshold_encode", "gradient of"),
        ("sae_backward", "sae_step", "gradient of"),
        ("adam_rows", "sae_adam", "W_enc"),
        ("project_out", "project_out", "projection"),
        ("project_out_grouped", "project_out", "plan"),
        ("project_out_grouped", "projected_adam", "dimension 0"),
    ],
)
def test_a_kernel_that_computes_nonsense_is_found(
    monkeypatch: pytest.MonkeyPatch, primitive: str, op: str, named: str
) -> None:
    """The reference stands in for a kernel and comes out wrong by one in the first entry of every tensor it returns."""

    class Wrong(backends.BACKENDS["reference"].__class__):
        name = "cpu"

    right = getattr(backends.BACKENDS["reference"], primitive)

    def wrong(*args):
        out = right(*args)
        if out is None:  # in place: sae_backward changes its last arguments, the others their first (one or a list)
            out_tensors = args[8:] if primitive == "sae_backward" else args[:1]
            out_tensors = out_tensors[0] if isinstance(out_tensors[0], list) else out_tensors
        else:
            out_tensors = out if isinstance(out, tuple) else (out,)
        for tensor in out_tensors:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.dim() == 2:
                tensor[0, 0] += 1
        return out

    stand_in = Wrong()
    monkeypatch.setattr(stand_in, primitive, wrong, raising=False)
    monkeypatch.setitem(backends.BACKENDS, "cpu", stand_in)
    error = selfcheck.check(op, "cpu", "cpu")
    assert error is not None
    assert named in error
    assert "differs from the reference" in error


def copy_of_the_package(to: Path) -> Path:
    """The three folders as one package tree, so that its extension can be damaged."""
    root = Path(rk.__file__).parent
    shutil.copytree(root, to / "refusal_kernels", ignore=shutil.ignore_patterns("__pycache__", "builtin_model"))
    return next((to / "refusal_kernels").glob("_C.*.so"))


@pytest.mark.parametrize("damage", ["garbage", "truncated", "missing"])
def test_survives_a_broken_extension(tmp_path: Path, damage: str) -> None:
    library = copy_of_the_package(tmp_path)
    if damage == "missing":
        library.unlink()
    elif damage == "garbage":
        library.write_bytes(b"not a shared library")
    else:  # mapped but not backed by the file: reading it kills the process
        content = library.read_bytes()
        library.write_bytes(content[: len(content) // 8])
    # An editable install's finder would find the original extension behind the copy's back.
    alone = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f)]; import runpy; "
    alone += "sys.argv[1:] = ['--json', '--check']; runpy.run_module('refusal_kernels.info', run_name='__main__')"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", alone], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    report = json.loads(result.stdout)
    assert report["operators"]["topk_encode"]["reference"]["available"]
    assert not report["operators"]["topk_encode"]["cpu"]["available"]
    checked = {(c["op"], c["backend"]): c["ok"] for c in report["checks"]}
    assert checked["topk_encode", "reference"]
    if damage == "missing":
        assert report["extension"]["path"] is None
        assert "is not built" in report["extension"]["error"]
        assert result.returncode == 0
    else:
        assert report["extension"]["path"] == str(library)
        assert report["extension"]["error"]
        assert not checked["import", "_C"]
        assert result.returncode == 1  # present but unusable is a failure


def test_survives_a_missing_and_a_broken_triton(tmp_path: Path) -> None:
    """An empty folder named triton in front of the real one: importable by name only."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise OSError('libtriton.so: wrong ELF class')\n")
    result = run_info("--json", env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert "wrong ELF class" in report["triton"]["error"]
    assert report["operators"]["topk_encode"]["cpu"]["available"]

    hide = "import sys; sys.modules['triton'] = None; import runpy; sys.argv[1:] = ['--json', '--check']; "
    hide += "runpy.run_module('refusal_kernels.info', run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, check=False)
    report = json.loads(result.stdout)
    assert result.returncode == 0, result.stderr
    assert report["triton"]["error"] == "not installed"
    assert not report["operators"]["topk_encode"]["triton"]["available"]


def test_native_extension_of_this_run_is_the_one_reported() -> None:
    assert native.module() is not None
    assert info.collect()["extension"]["path"] == native.module().__file__
