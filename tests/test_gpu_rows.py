"""What the stages of `python -m benches.gpu` print, and which rows make one fail (benches/gpu/rows.py)."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `benches` is not installed: it runs from the repository root

import refusal_kernels as rk  # noqa: E402
from benches.gpu import clock, parts, stages, table  # noqa: E402
from benches.gpu.rows import LEAST_SAME, LOSS_ERROR, PEERS, VALUE_ERROR, Rows, fault  # noqa: E402
from benches.problem import Problem  # noqa: E402
from benches.shapes import Shape  # noqa: E402


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"name": "step, ours", "ms": 1.0, "first_loss": 2.0}, None),
        ({"name": "step, ours", "error": "needs at least 189 GB; the device has 84"}, None),
        ({"name": "step, dense", "error": "out of memory: Tried to allocate 2.00 GiB"}, None),
        ({"name": "step, ours", "error": "out of memory: Tried to allocate 2.00 GiB"}, "out of memory"),
        ({"name": "step, dense", "error": "RuntimeError: shapes"}, "RuntimeError: shapes"),
        ({"name": "step, cuda", "error": "BackendError: cannot run"}, "BackendError"),
        ({"name": "ours", "ms": math.nan}, "nan ms"),
        ({"name": "a", "same_latents": LEAST_SAME, "value_error": VALUE_ERROR}, None),
        ({"name": "a", "same_latents": LEAST_SAME - 1e-6}, "same_latents 0.998999, at least 0.999"),
        ({"name": "a", "same_latents": math.nan}, "same_latents"),
        ({"name": "a", "same_latents": 1.0, "value_error": 0.01}, "value_error 0.01"),
        ({"name": "a", "first_loss": math.inf}, "first_loss inf"),
        ({"name": "a", "first_loss": 2 * (1 + LOSS_ERROR / 2)}, None),
        ({"name": "a", "first_loss": 2 * (1 + LOSS_ERROR * 1.01)}, "first_loss 2.00789 where another column has 2"),
        ({"name": "a", "first_loss": 2 * (1 - LOSS_ERROR * 1.01)}, "first_loss"),
        ({"name": "step, ours, a tenth dead", "first_loss": 6.0}, None),  # with AuxK's term
        ({"name": "step, ours, a tenth dead", "first_loss": 1.9}, "first_loss"),
        ({"name": "ours", "error": 5e-8, "ms": 1.0}, None),  # a deviation, in the rows of the projection
    ],
)
def test_a_row_is_a_fault_by_its_error_or_by_what_was_compared(row: dict[str, Any], why: str | None) -> None:
    found = fault(row, reference=2.0)
    assert (found is None) == (why is None), found
    assert why is None or (found or "").startswith(why)


def test_a_trial_on_a_cpu_compares_nothing() -> None:
    assert fault({"name": "a", "same_latents": 0.0, "first_loss": math.nan}, 2.0, compared=False) is None
    assert fault({"name": "a", "error": "ValueError"}, compared=False) == "ValueError"


def test_the_committed_runs_are_within_the_bounds() -> None:
    """They hold on a GPU: chosen from these runs, and no row of them may be outside."""
    seen = 0
    for path in table.KEPT.glob("*.json"):
        for stage in json.loads(path.read_text())["stages"].values():
            reference = None
            for row in stage["result"] if isinstance(stage["result"], list) else []:
                if not isinstance(row.get("error"), str):
                    assert fault(row, reference) is None
                    reference = reference or row.get("first_loss")
                    seen += bool({"same_latents", "first_loss"} & row.keys())
    assert seen > 30


def test_all_rows_are_printed_and_then_the_stage_fails(capsys: pytest.CaptureFixture[str]) -> None:
    rows = Rows(shape="s")
    rows.attempt("step, ours", lambda: {"ms": 1.0, "first_loss": 2.0})
    rows.attempt("step, cuda", lambda: {"ms": 1.0, "first_loss": 2.1})
    rows.attempt("backward, ours", lambda: {"ms": 1 / 0})
    rows.section("others", lambda: [][0])
    rows.attempt("later", lambda: {"ms": 3.0})
    with pytest.raises(SystemExit) as ended:
        rows.end()
    assert ended.value.code == 1
    said = capsys.readouterr().out
    found = stages.json_lines(said)
    assert [row["name"] for row in found] == ["step, ours", "step, cuda", "backward, ours", "others", "later"]
    assert ["fault" in row for row in found] == [False, True, True, True, False]
    assert {row["shape"] for row in found} == {"s"}
    assert said.splitlines()[-3].startswith("fault: step, cuda: first_loss 2.1 where another column has 2")
    good = Rows()
    good.attempt("later", lambda: {"ms": 3.0})
    good.end()


def test_others_code_may_lack_memory_and_ours_may_not(capsys: pytest.CaptureFixture[str]) -> None:
    def lacking() -> dict[str, Any]:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    limits = Rows(peers=True)
    limits.attempt("copy", lacking)
    limits.end()
    rows = Rows()
    rows.attempt("step, sparse", lacking)
    rows.end()
    rows.attempt("step, ours", lacking)
    with pytest.raises(SystemExit):
        rows.end()
    assert stages.json_lines(capsys.readouterr().out)[0]["error"] == "out of memory: Tried to allocate 2.00 GiB"


def test_after_an_illegal_access_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every later call of the process fails too: none is tried."""

    def broken() -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be")

    monkeypatch.setattr(clock, "device_is_lost", lambda: True)
    rows = Rows()
    rows.attempt("encode, ours", lambda: {"ms": 1.0})
    with pytest.raises(SystemExit) as ended:
        rows.attempt("decode, ours", broken)
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert [row["name"] for row in stages.json_lines(said)] == ["encode, ours", "decode, ours"]
    assert "lost" not in stages.json_lines(said)[1]
    assert said.count("lost the device") == 1


def test_a_device_is_lost_where_it_takes_no_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", refused)
    assert clock.device_is_lost()
    assert clock.attempt(refused)["lost"]  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert not clock.device_is_lost()
    assert "lost" not in clock.attempt(refused)  # type: ignore[arg-type]


class Device:
    """A device by the clock: kernels end when their time has come, the host's clock advances by what `run` takes."""

    def __init__(self, host: float) -> None:
        self.host, self.now, self.free, self.held = host, 0.0, 0.0, list[float]()

    def sleep(self, cycles: int) -> None:
        self.held.append(cycles / 1e6)
        self.free = max(self.free, self.now) + cycles / 1e6

    def run(self) -> None:
        self.now += self.host
        self.free = max(self.free, self.now) + 0.25

    def event(device, enable_timing: bool) -> Any:
        class Event:
            def record(self) -> None:
                self.at = max(device.free, device.now)

            def query(self) -> bool:
                return device.now >= self.at

            def synchronize(self) -> None:
                device.now = max(device.now, self.at)

            def elapsed_time(self, other: Event) -> float:
                return other.at - self.at

        return Event()

    def put_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Clock:
            perf_counter = staticmethod(lambda: self.now / 1e3)

        class Flush:
            def zero_(self) -> None: ...

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: setattr(self, "now", max(self.now, self.free)))
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(torch, "empty", lambda *size, device: Flush())
        monkeypatch.setattr(clock, "time", Clock)


def test_behind_other_work_a_call_takes_what_the_device_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(host=4.0)
    device.put_in(monkeypatch)
    found = clock.behind_other_work(device.run, rounds=3)
    assert found == {"ms": pytest.approx(0.25), "calls": [pytest.approx(0.25)] * 3, "host_ms": pytest.approx(4.0)}
    assert device.held[-1] == pytest.approx(clock.HOLD * 4.0)


def test_a_host_that_is_not_ahead_is_said_and_no_time_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for the device inside the call: holding the device longer does not help."""
    device = Device(host=4.0)
    device.put_in(monkeypatch)

    def waiting() -> None:
        device.run()
        torch.cuda.synchronize()

    found = clock.behind_other_work(waiting, rounds=3)
    assert set(found) == {"error"}
    assert found["error"].startswith(clock.NOT_AHEAD)
    assert max(device.held) <= clock.LONGEST_HOLD
    assert fault({"name": "ours, queue full", **found}) is None


def test_peers_are_rows_that_are_measured() -> None:
    """A row renamed in a benchmark and not here would fail a run on a small device."""
    sources = "".join(path.read_text() for path in (ROOT / "benches").rglob("*.py") if path.name != "rows.py")
    for name in PEERS:
        assert f'"{name.removeprefix("optimizer, ")}"' in sources, name


def test_codes_in_csr_form_are_compared_with_dense_sums(capsys: pytest.CaptureFixture[str]) -> None:
    problem = Problem(Shape(300, 32, 256, 8), distinct=False)
    operands = parts.Operands(problem.x, problem.W_enc, problem.b_enc, problem.W_dec, problem.b_dec, 8)
    rows = Rows()
    with rk.use_backend("reference"):
        parts.measure_csr(operands, 1, rows)
        values, latents, offsets = rk.batch_topk_encode(problem.x, *problem.parameters[:2], 8, problem.b_dec)
    rows.end()
    found = {row["name"]: row for row in stages.json_lines(capsys.readouterr().out)}
    assert set(found) == {
        "encode, batch top-k", "encode, batch top-k, torch", "encode, threshold", "encode, batch top-k, agreement",
        "encode, threshold, agreement", "decode, CSR",
    }  # fmt: skip
    least = values.min()
    good = parts.csr_agreement(operands, (values, latents, offsets), least)
    assert good["same_latents"] == 1
    moved = parts.csr_agreement(operands, (values, (latents + 1) % 256, offsets), least)
    assert moved["same_latents"] < 0.2
    scaled = parts.csr_agreement(operands, (1.05 * values, latents, offsets), least)
    assert scaled["value_error"] == pytest.approx(0.05, rel=0.01)


def test_a_stage_of_rows_with_a_fault_fails(tmp_path: Path) -> None:
    said = "from benches.gpu.rows import Rows; r = Rows(); r.tell({'name': 'a', 'same_latents': 0.5}); "
    said += "r.tell({'name': 'b', 'ms': 1.0}); r.end()"
    found = stages.run(stages.Stage("rows", stages.python("-c", said), 60, 5, stages.json_lines), tmp_path, 60)
    assert found["status"] == "failed: exit 1"
    assert [row["name"] for row in found["result"]] == ["a", "b"]
    assert found["result"][0]["fault"] == "same_latents 0.5, at least 0.999"


def test_the_parts_of_a_step_run_in_the_interpreter() -> None:
    """As far as the host goes, every row; what needs a device is refused, and that is the exit status."""
    command = [sys.executable, "-m", "benches.gpu.sae", "--device", "cpu", "--shape", "2,16,32,2", "--rounds", "1"]
    run = subprocess.run(
        [*command, "--columns", "parts default dense cuda"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    found = stages.json_lines(run.stdout)
    assert [row["name"] for row in found if "fault" in row] == ["step, cuda, Adam inside"], run.stderr
    assert run.returncode == 1
    assert {"encode, agreement", "backward, ours", "step, ours, default options", "step, dense"} <= {
        row["name"] for row in found
    }
