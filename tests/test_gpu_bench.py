"""`python -m benches.gpu` as far as no GPU is needed: what it says without one, its stages, its contestants."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `benches` is not installed: it runs from the repository root

from benches import torch_paths  # noqa: E402
from benches.gpu import peers, stages, values  # noqa: E402
from benches.problem import Problem  # noqa: E402
from benches.shapes import Shape  # noqa: E402

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@no_gpu
def test_without_a_device_there_is_one_line_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benches.gpu", "--out", str(tmp_path / "out")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr == "benches.gpu: there is no CUDA device (torch.cuda.is_available() is false)\n"
    assert not (tmp_path / "out").exists()


@no_gpu
def test_make_gpu_asks_for_the_device_before_it_builds_anything(tmp_path: Path) -> None:
    command = ["make", "--no-print-directory", "gpu", f"VENV={tmp_path / 'venv'}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0
    assert run.stdout == ""
    assert run.stderr.splitlines()[0] == "make gpu: there is no CUDA device"
    assert not (tmp_path / "venv").exists()


def test_parts_hold_every_test_once() -> None:
    def collected(*arguments: str) -> list[str]:
        command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "sanitizer", *arguments]
        run = subprocess.run([*command, values.FILES[0]], cwd=ROOT, capture_output=True, text=True)
        return [line for line in run.stdout.splitlines() if "::" in line]

    everything = collected()
    parts = [collected("--part", f"{part}/3") for part in range(3)]
    assert sorted(test for part in parts for test in part) == sorted(everything)
    assert len({len(part) for part in parts}) <= 2, "parts of one length, whatever -m leaves"


def test_a_part_runs_and_says_how_every_test_ended(capfd: pytest.CaptureFixture[str]) -> None:
    seen: dict[str, str] = {}
    status, rest = values.run(1, 3, "sanitizer and not gpu", seen)
    assert status == 0
    assert seen
    assert set(seen.values()) == {"PASSED"}
    assert f"{len(seen)} passed" in rest
    said = capfd.readouterr().out
    assert stages.counts(said) == {"passed": len(seen), "failed": 0, "skipped": 0, "error": 0, "names": []}


def test_counts_of_a_whole_and_of_a_cut_log() -> None:
    single = "tests/a.py::one PASSED\ntests/a.py::two[x] FAILED\ntests/a.py::three SKIPPED\n"
    cut = {"passed": 1, "failed": 1, "skipped": 1, "error": 0, "names": ["tests/a.py::two[x]"]}
    assert stages.counts(single) == cut
    assert stages.counts(single + "FAILED tests/a.py::two[x] - assert\n7 passed, 1 failed, 2 skipped in 3 s\n") == {
        "passed": 7, "failed": 1, "skipped": 2, "error": 0, "names": ["tests/a.py::two[x]"],
    }  # fmt: skip


def test_a_stage_that_takes_too_long_keeps_what_it_said_and_costs_no_other(tmp_path: Path) -> None:
    endless = "import time; print('{\"ms\": 1}', flush=True); time.sleep(600)"
    found = stages.run(
        stages.Stage("Endless, one", [sys.executable, "-c", endless], 3, stages.json_lines), tmp_path, 60
    )
    assert found["status"] == "stopped after 3 s"
    assert found["result"] == [{"ms": 1}]
    assert (tmp_path / "endless-one.log").read_text() == '{"ms": 1}\n'
    broken = stages.Stage("broken", [sys.executable, "-c", "raise SystemExit(3)"], 30, stages.last_json)
    assert stages.run(broken, tmp_path, 60) | {"seconds": 0} == {
        "seconds": 0, "status": "failed: exit 3", "result": None,
    }  # fmt: skip


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_sparse_contestant_takes_the_dense_ones_step(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, and the gradients of all parameters, against autograd of the dense code."""
    shape = Shape(24, 16, 64, 4)
    problem = Problem(shape)
    dense = [p.clone().requires_grad_() for p in problem.parameters]
    loss = torch_paths.dense_loss(problem.x, *dense, shape.k)
    loss.backward()
    monkeypatch.setattr(peers, "PRODUCT_BYTES", 4 * shape.k * shape.d * shape.n // blocks)
    leaves = [p.clone().requires_grad_() for p in problem.parameters]
    step = peers.sparse_step(problem.x, leaves, shape.k)
    torch.testing.assert_close(step(), loss.detach())
    for leaf, other in zip(leaves, dense, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-5)
