"""`python -m benches.gpu` as far as no GPU is needed: what it says without one, its stages, its contestants."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `benches` is not installed: it runs from the repository root

from benches import kernels, status, torch_paths  # noqa: E402
from benches.gpu import __main__ as gpu  # noqa: E402
from benches.gpu import model, peers, profile, sae, stages, table, values  # noqa: E402
from benches.gpu.__main__ import keep_result  # noqa: E402
from benches.problem import Problem  # noqa: E402
from benches.shapes import Shape  # noqa: E402

CANONICAL = Shape(32768, 4096, 131072, 64)
CANONICAL_TEXT = ",".join(map(str, CANONICAL))

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


def collected(*runs: list[str]) -> list[list[str]]:
    """The tests that pytest finds with each list of options."""
    command, pipe = [sys.executable, "-m", "pytest", "-q", "--collect-only"], subprocess.PIPE
    running = [subprocess.Popen([*command, *options], cwd=ROOT, stdout=pipe, text=True) for options in runs]
    return [[line for line in each.communicate()[0].splitlines() if "::" in line] for each in running]


def test_kinds_and_parts_hold_every_test_once() -> None:
    """Of one kind each, so that an illegal access costs no other kind; of one length, whatever -m and -k leave."""
    everything, *by_kind = collected(
        ["-m", "gpu", *values.FILES],
        *(["-m", "gpu", *values.FILES, "-k", chosen] for chosen, _ in values.KINDS.values()),
    )
    assert sorted(test for kind in by_kind for test in kind) == sorted(everything)
    bold = re.compile("cuda|int8|8_bit")
    for kind, tests in zip(values.KINDS, by_kind, strict=True):
        assert tests
        found = {word for test in tests for word in bold.findall(test) or ["triton"]}
        assert found - {"8_bit"} == {kind}
    chosen = ["-m", "gpu and sanitizer", "-k", values.KINDS["cuda"][0], values.FILES[0]]
    whole, *parts = collected(chosen, [*chosen, "--part", "0/2"], [*chosen, "--part", "1/2"])
    assert len(whole) > 2
    assert sorted(test for part in parts for test in part) == sorted(whole)
    assert abs(len(parts[0]) - len(parts[1])) <= 1


def test_every_kind_has_its_processes_at_once() -> None:
    assert len(values.parts(16)) == sum(count for _, count in values.KINDS.values()) > 16
    assert values.parts(16)[:2] == [("int8", "0/7"), ("int8", "1/7")]
    assert values.parts(1) == [(kind, "0/1") for kind in values.KINDS]
    assert values.parts(64) == values.parts(16)


def test_a_part_begins_with_what_compiles_longest() -> None:
    [names] = collected(["-m", "gpu", "--part", "0/1", values.FILES[0]])
    heads = ["heads" in name for name in names]
    assert set(heads) == {True, False}
    assert heads == sorted(heads, reverse=True)


def test_a_part_runs_and_says_how_every_test_ended(capfd: pytest.CaptureFixture[str]) -> None:
    seen: dict[str, str] = {}
    status, rest = values.run("triton", "1/3", "sanitizer and not gpu", seen)
    assert status == 0
    assert seen
    assert set(seen.values()) == {"PASSED"}
    assert f"{len(seen)} passed" in rest
    said = capfd.readouterr().out
    assert stages.counts(said) == {"passed": len(seen), "failed": 0, "skipped": 0, "error": 0, "names": []}


def test_processes_side_by_side_have_one_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, str]] = []

    class Ended:
        stdout, returncode = ["tests/a.py::b PASSED\n"], 0

        def __init__(self, command: list[str], env: dict[str, str], **more: Any) -> None:
            given.append(env)

        def __enter__(self) -> Ended:
            return self

        def __exit__(self, *why: Any) -> None: ...

    monkeypatch.setattr(values.subprocess, "Popen", Ended)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert values.run("cuda", "0/1", "gpu", {}) == (0, "")
    assert [environment["OMP_NUM_THREADS"] for environment in given] == ["1"]
    monkeypatch.setattr(stages, "architecture", lambda: "9.0a")
    beside = [stage for stage in stages.stages(quick=False) if stage.slot and stage.name != "build"]
    assert {stage.environment.get("OMP_NUM_THREADS") for stage in beside} == {"1"}


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
        stages.Stage("Endless, one", [sys.executable, "-c", endless], 3, 1, stages.json_lines), tmp_path, 60
    )
    assert found["status"] == "stopped after 3 s"
    assert found["result"] == [{"ms": 1}]
    assert (tmp_path / "endless-one.log").read_text() == '{"ms": 1}\n'
    broken = stages.Stage("broken", [sys.executable, "-c", "raise SystemExit(3)"], 30, 1, stages.last_json)
    assert stages.run(broken, tmp_path, 60) | {"seconds": 0} == {
        "seconds": 0, "status": "failed: exit 3", "result": None,
    }  # fmt: skip


def test_no_stage_takes_the_time_of_a_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "architecture", lambda: "9.0a")
    everything = stages.stages(quick=False)
    by_time = stages.groups(everything)
    assert [stage for group in by_time for stage in group] == everything
    assert sum(max(stage.share for stage in group) for group in by_time) <= 8 * 60 - 15, "what no stage may count on"
    assert [[s.name for s in group if not s.helps] for group in by_time if len(group) > 1] == [
        ["build"], ["check", "memcheck", "racecheck", "racecheck cuda"],
    ]  # fmt: skip
    left = 8 * 60.0  # and every stage takes all it is given
    for i, group in enumerate(by_time):
        seconds = [stages.allowed(stage, by_time[i + 1 :], left) for stage in group]
        assert all(stage.share <= s <= stage.limit for stage, s in zip(group, seconds, strict=True))
        left -= max(seconds)
    assert left >= 0
    first, last = everything[0], everything[-1]
    assert stages.allowed(last, [], 8 * 60) == last.limit
    assert stages.allowed(first, by_time[1:], 5.0) == 5.0


def test_what_is_tested_and_aimed_at_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "architecture", lambda: "9.0a")
    names = [stage.name for stage in stages.stages(quick=False) if not stage.helps]
    assert names[:2] == ["build", "values"]
    targets = [name for name in names if name.startswith(("sae", "others", "projection", "heads", "end to end"))]
    assert len(targets) == len(stages.COLUMNS) + 4
    assert max(map(names.index, targets)) < names.index("profile heads") < names.index("encode")
    assert [name for name in names if name.startswith("profile")] == [f"profile {CANONICAL_TEXT}", "profile heads"]


def test_racecheck_sees_every_operator_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """In two processes: of a test's back-ends each has one."""
    monkeypatch.setattr(stages.shutil, "which", lambda tool, path: tool)
    by_name = {
        stage.name: [*stage.command][[*stage.command].index("gpu and sanitizer") - 1 :] for stage in stages.sanitizers()
    }
    memcheck, triton, cuda = collected(*(by_name[name] for name in ("memcheck", "racecheck", "racecheck cuda")))
    assert set(triton) | set(cuda) < set(memcheck)
    assert not set(triton) & set(cuda)
    functions = [{name.partition("[")[0] for name in names} for names in (memcheck, [*triton, *cuda])]
    assert functions[0] == functions[1]
    assert {re.split("-|\\]", name)[-2] for name in triton if "-" in name} == {"triton"}
    assert 2 < len(triton) < 5
    assert 2 < len(cuda) < 6


def test_options_of_every_stage_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt one would show on a GPU first."""
    monkeypatch.setattr(stages, "architecture", lambda: "9.0a")
    seen = set()
    for stage in stages.stages(quick=False):
        if "-m" not in stage.command or not (module := stage.command[3]).startswith("benches.gpu."):
            continue
        main = importlib.import_module(module).main
        if options := [*stage.command][4:]:
            app = typer.Typer()
            app.command()(main)
            typer.main.get_command(app).make_context(module, options)
            seen.add(module.removeprefix("benches.gpu."))
    assert seen == {"sae", "heads", "profile"}


def test_what_compiles_ahead_has_the_widths_of_what_is_measured() -> None:
    """Tiles follow from d, F and k."""
    ahead = {tuple(Shape.parse(text))[1:] for stage in stages.compilers() for text in shapes_in(stage.command)}
    measured = {tuple(Shape.parse(shape))[1:] for shape in stages.COLUMNS}
    assert ahead < measured
    assert measured - ahead == {
        tuple(Shape.parse([*stages.COLUMNS][-1]))[1:]
    }  # d and k as above, memory for one process
    assert {stage.read for stage in stages.compilers()} == {stages.nothing}


def shapes_in(command: Sequence[str]) -> list[str]:
    return [value for option, value in itertools.pairwise(command) if option == "--shape"]


@pytest.mark.parametrize(("broken", "code"), [("a help", 0), ("measured", 1)])
def test_a_run_fails_by_what_tests_and_measures_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: str, code: int
) -> None:
    def stage(name: str, helps: bool = False, slot: str = "") -> stages.Stage:
        said = "print('{\"ms\": 1}'); raise SystemExit(" + str(int(name == broken)) + ")"
        return stages.Stage(name, stages.python("-c", said), 60, 5, stages.json_lines, slot=slot, helps=helps)

    fakes = [stage("measured", slot="both"), stage("a help", helps=True, slot="both"), stage("more")]
    monkeypatch.setattr(gpu, "stages", lambda quick: fakes)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.machine, "describe_machine", lambda device: {"gpu": "A GPU"})
    if code:
        with pytest.raises(SystemExit) as ended:
            gpu.main(tmp_path / "out", minutes=1)
        assert ended.value.code == code
    else:
        gpu.main(tmp_path / "out", minutes=1)
    kept = json.loads((tmp_path / "out" / "gpu.json").read_text())["stages"]
    assert {name: found["status"] for name, found in kept.items()} == {
        fake.name: "failed: exit 1" if fake.name == broken else "ok" for fake in fakes
    }


def test_every_column_is_measured_and_its_memory_is_known() -> None:
    """At the first shape all; the largest state is asked for before it is made."""
    first, *_, largest = ((Shape.parse(shape), columns.split()) for shape, (columns, _) in stages.COLUMNS.items())
    assert set(first[1]) == {"parts", *sae.STEPS} - {"copies", "cuda", "cuda-compact"}  # these in the stage "others"
    assert set(model.STATE_BYTES) == set(sae.STEPS)
    assert model.least_step_bytes("dense", first[0]) == 18 * 2 * 2**29 + 4 * 2**32
    weights = 2 * 4096 * 2**20
    assert [model.least_step_bytes(column, largest[0]) for column in largest[1][1:]] == [8 * weights, 14 * weights]


def test_a_run_in_two_calls_is_one_result(tmp_path: Path) -> None:
    def result(date: str, commit: str, stage: str, status: str = "ok") -> dict[str, Any]:
        stages = {stage: {"status": status, "result": None}}
        return {"date": date, "machine": {"gpu": "A GPU"}, "commit": commit, "kernels": {"k": "1"}, "stages": stages}

    first = keep_result(result("2026-01-02T10:00:00", "a", "values", "failed: exit 1"), tmp_path)
    assert first.name == "a-gpu-2026-01-02-1000.json"
    assert keep_result(result("2026-01-02T10:20:00", "a", "heads"), tmp_path) == first
    assert keep_result(result("2026-01-02T10:30:00", "a", "values"), tmp_path) == first
    assert {name: s["status"] for name, s in table.newest(tmp_path)["stages"].items()} == {
        "values": "ok",
        "heads": "ok",
    }
    other = keep_result(result("2026-01-02T11:00:00", "b", "values"), tmp_path)
    assert other != first
    assert table.newest(tmp_path)["commit"] == "b"


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


def test_the_model_counts_what_the_formulas_say() -> None:
    """Written out at N 32768, d 4096, F 131072, k 64: 2^21 entries, rows of 2^13 bytes in bf16, 2^29 weights each."""
    rows, entries = 2**13, 2**21
    assert model.product_flops(CANONICAL) == 2 * 2**15 * 2**17 * 2**12
    assert model.filter_bytes(CANONICAL) == 2**34
    assert model.decode_bytes(CANONICAL) == entries * (rows + 10) + 2 * 2**15 * rows
    assert model.transpose_bytes(CANONICAL) == 8 * entries * 12 + 8 * (2**17 + 1)
    gathered = entries * (2 * rows + 10) + 2**17 * rows
    assert model.gradient_gather_bytes(CANONICAL) == gathered
    assert model.backward_bytes(CANONICAL) == gathered + 2 * 2**29 * 4
    assert model.fused_optimizer_bytes(CANONICAL) == gathered + 2 * 2**29 * 26


def test_predictions_follow_from_what_the_device_was_measured_to_do() -> None:
    limits = [
        {"name": "copy", "rate": 4000.0},
        {"name": "bf16 product 8192^3", "rate": 800.0},
        {"name": "out of memory", "error": "out of memory"},
    ]
    device = model.Device.of(limits)
    assert device == model.Device(800.0, 4000.0)
    assert model.Device.of(limits[:1]) is None
    product = 2**45 / 800e12 * 1e3
    assert model.predicted("product alone", CANONICAL, device) == pytest.approx(product)
    encode = product + 2**34 / 5500e9 * 1e3
    assert model.predicted("encode, ours", CANONICAL, device) == pytest.approx(encode)
    moved = sum(f(CANONICAL) for f in (model.decode_bytes, model.transpose_bytes, model.fused_optimizer_bytes))
    assert model.predicted("step, ours", CANONICAL, device) == pytest.approx(encode + moved / 4000e9 * 1e3)
    aux = model.predicted("step, ours, a tenth dead", CANONICAL, device)
    products = 5 * 2 * 2**15 * 13107 * 2**12 / 800e12 * 1e3
    assert aux == pytest.approx(encode + moved / 4000e9 * 1e3 + products)
    saved = 2 * 2**29 * (26 - 16) / 4000e9 * 1e3
    written = 2 * 2**29 * (26 + 4 + 4)
    gradients = model.gradient_gather_bytes(CANONICAL)
    cuda = encode + (model.decode_bytes(CANONICAL) + model.transpose_bytes(CANONICAL) + gradients + written) / 4000e6
    assert model.predicted("step, cuda", CANONICAL, device) == pytest.approx(cuda)
    for form, own in (("", "copies"), (" compact", "compact")):
        inside = model.predicted(f"step, cuda{form}, Adam inside", CANONICAL, device)
        name = "step, ours, copies" if own == "copies" else "step, ours compact"
        assert inside == model.predicted(name, CANONICAL, device), "the same bytes, whatever the language"
    compact = model.predicted("step, ours compact", CANONICAL, device)
    assert compact == pytest.approx(encode + moved / 4000e9 * 1e3 - saved)
    assert model.predicted("step, dense", CANONICAL, device) is None


def test_the_tables_show_the_prediction_beside_the_measurement() -> None:
    entry = {"name": "product alone", "ms": 50.0, "extra_mb": 1.0}
    limits = [
        {"name": "copy", "rate": 4000.0, "unit": "GB/s"},
        {"name": "bf16 product 8192^3", "rate": 800.0, "unit": "TFLOP/s"},
    ]
    result: dict[str, Any] = {
        "machine": {"gpu": "A GPU"}, "versions": {"torch": "2"}, "commit": "c",
        "stages": {
            "sae 32768,4096,131072,64": {"status": "ok", "result": [entry, {"name": "step, dense", "error": "no"}]},
            "limits": {"status": "ok", "result": limits},
        },
    }  # fmt: skip
    assert "50.000 ms         1 MB  predicted 44 ms, 88 %" in table.table(result)
    assert "| 32768, 4096, 131072, 64 | product alone | 44 | 50 | 88 % |" in table.against_roofline(result)
    del result["stages"]["limits"]
    assert "predicted" not in table.table(result)
    assert table.against_roofline(result) == []


def test_the_block_shows_compact_state_and_what_had_no_memory() -> None:
    def stage(*entries: dict[str, Any]) -> dict[str, Any]:
        return {"status": "ok", "result": list(entries)}

    ours = {"name": "step, ours", "ms": 70.0, "extra_mb": 2900.0}
    dense = {"name": "step, dense", "ms": 280.0, "extra_mb": 25000.0}
    compact = {"name": "step, ours compact", "ms": 66.0, "extra_mb": 800.0}
    lacking = {"name": "step, dense", "error": "needs at least 189 GB; the device has 84"}
    plain = table.steps_and_encoders({"stages": {"sae 2,3,4,1": stage(ours, dense)}})
    assert plain[0].count("|") == 10
    assert plain[2] == "| 2, 3, 4, 1 | 70 | 280 | 4.00× | – | – | – | 2.9 GB | 25.0 GB |"
    both = table.steps_and_encoders(
        {"stages": {"sae 2,3,4,1": stage(ours, dense), "sae 5,3,4,1": stage(compact, lacking)}}
    )
    assert both[2] == "| 2, 3, 4, 1 | 70 | – | 280 | 4.00× | – | – | – | 2.9 GB | – | 25.0 GB |"
    assert both[3] == "| 5, 3, 4, 1 | – | 66 | out of memory | – | – | – | – | – | 0.8 GB | – |"


def test_the_block_shows_heads_and_the_language_model() -> None:
    result: dict[str, Any] = {"stages": {
        "heads": {"result": [{"name": "step, all heads", "ms": 12.34, "shape": "2 x 6,16,64,3"}]},
        "end to end": {"result": [
            {"name": "SAE step, ours", "ms": 2.0, "rate": 12345.6, "unit": "tokens/s"},
            {"name": "projection", "ms": 0.5, "percent_of_step": 0.31},
            {"name": "lost", "error": "out of memory"},
        ]},
    }}  # fmt: skip
    shown = "\n".join(table.beside_the_shapes(result))
    assert "| one autoencoder per head, 2 x 6,16,64,3 | ms | |" in shown
    assert "| step, all heads | 12.3 |  |" in shown
    assert "| SAE step, ours | 2 | 12,346 tokens/s |" in shown
    assert "| projection | 0.5 | 0.31 % of the step |" in shown
    assert "lost" not in shown
    assert table.beside_the_shapes({"stages": {}}) == []


PROFILE = [
    {"shape": "2x3x4x1", "column": "ours", "name": "step", "ms": 90.0, "busy_ms": 80.0},
    {"shape": "2x3x4x1", "column": "ours", "name": "_decode_kernel", "ms": 79.5, "launches": 2.0, "percent": 99.4},
    {"shape": "2x3x4x1", "column": "ours", "name": "rest", "ms": 0.5, "launches": 7.0, "percent": 0.6},
    {"shape": "2x3x4x1", "column": "compact", "name": "step", "ms": 60.0, "busy_ms": 50.0},
    {"shape": "2x3x4x1", "column": "compact", "name": "_step_kernel", "ms": 50.0, "launches": 1.0, "percent": 100.0},
    {"shape": "2x3x4x1", "column": "cuda", "name": "step", "error": "no device"},
]


def test_the_tables_show_where_a_step_spends_its_time() -> None:
    result: dict[str, Any] = {
        "machine": {"gpu": "A GPU"}, "versions": {"torch": "2", "python": "3"}, "commit": "c", "date": "2026-01-02T",
        "stages": {"profile 2,3,4,1": {"status": "ok", "result": PROFILE}},
    }  # fmt: skip
    assert table.profiles(result) == [
        "",
        "| a step's kernels, 2x3x4x1: ms / launches | ours | compact |",
        "|---|---:|---:|",
        "| `_decode_kernel` | 79.5 / 2 | – |",
        "| `_step_kernel` | – | 50 / 1 |",
        "| each below 1 % | 0.5 / 7 | – |",
        "| all kernels, ms | 80 | 50 |",
        "| the step, ms | 90 | 60 |",
    ]
    assert "\n".join(table.profiles(result)) in table.block(result)
    printed = table.table(result)
    assert re.search(r"ours: step +90\.000 ms +80\.000 ms in kernels", printed)
    assert re.search(r"ours: _decode_kernel +79\.500 ms +2 launches +99\.4 %", printed)
    assert re.search(r"cuda: step +no device", printed)
    result["stages"] = {"heads": {"status": "ok", "result": []}, "profile heads": {"status": "no", "result": None}}
    assert table.profiles(result) == []


def test_kernels_below_one_percent_are_one_row() -> None:
    found = {"a": (97.5, 2.0), "b": (0.9, 3.0), "c": (0.6, 4.0), "d": (1.0, 1.0)}
    step, *kernels, rest = profile.rows(found, 110.0)
    assert step == {"name": "step", "ms": 110.0, "busy_ms": pytest.approx(100)}
    assert [(row["name"], row["launches"]) for row in kernels] == [("a", 2), ("d", 1)]
    assert rest == {"name": "rest", "ms": 1.5, "launches": 7, "percent": pytest.approx(1.5)}
    assert profile.rows({"a": (1.0, 1.0)}, 1.0)[-1]["name"] == "a"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("_filter_kernel", "_filter_kernel"),
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD (Device -> Device)"),
        (
            "void (anonymous namespace)::latent_gradients<__nv_bfloat16, 8>(float const*, int)",
            "latent_gradients<__nv_bfloat16, 8>",
        ),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, "
            "std::array<char*, 1ul> >(int, at::native::FillFunctor<float>, std::array<char*, 1ul>)",
            "vectorized_elementwise_kernel<4, FillFunctor<float>, array<char*, 1ul> >",
        ),
        (
            "sm90_xmma_gemm_bf16f32_bf16f32_f32_tn_n_tilesize128x256x64_warpgroupsize2x1x1_execute_segment_k_off_"
            "kernel__5x_cublas",
            "sm90_xmma_gemm_bf16f32_bf16f32_f32_tn_n_tilesize128x256x64_warpgroupsize2x1x1_e…",
        ),
    ],
)
def test_kernel_names_are_short_and_still_tell_kernels_apart(name: str, shown: str) -> None:
    assert profile.short(name) == shown
    assert len(shown) <= profile.LONGEST_NAME


@no_gpu
@pytest.mark.parametrize("heads", ["0", "2"])
def test_the_profile_runs_in_the_interpreter(heads: str) -> None:
    command = [sys.executable, "-m", "benches.gpu.profile", "--device", "cpu", "--shape", "2,16,32,2", "--rounds", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    columns = ["--heads", heads, "--columns", "ours cuda"]
    run = subprocess.run([*command, *columns], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    found = stages.json_lines(run.stdout)
    assert {row["shape"] for row in found} == {"2x16x32x2" if heads == "0" else "2 x 2x16x32x2"}
    step, *kernels = [row for row in found if row["column"] == "ours"]
    assert step["name"] == "step"
    assert step["ms"] > 0
    assert sum(row["ms"] for row in kernels) == pytest.approx(step["busy_ms"])
    assert sum(row["percent"] for row in kernels) == pytest.approx(100)
    assert [row["name"] for row in kernels] == list(dict.fromkeys(row["name"] for row in kernels))
    [refused] = [row for row in found if row["column"] == "cuda"]  # a column that cannot run costs no other
    assert "cannot run" in refused["error"]


def test_the_committed_kernel_table_is_of_these_kernels() -> None:
    """Every configuration on every architecture, compiled from what the sources say now, without a stack frame and with
    the matrix instructions that are meant."""
    pytest.importorskip("triton")
    from refusal_kernels.triton_kernels.aot import SHARED_LIMIT, expected_instructions
    from refusal_kernels.triton_kernels.registry import configurations

    written = kernels.TABLE.read_text(encoding="utf-8")
    assert kernels.stale(written) == [], "compile it again: python -m benches kernels"
    cells = kernels.cells(written)
    of = {configuration.label: configuration for configuration in configurations()}
    assert {label for label in cells if ".cu: " not in label} == set(of)
    for label, configuration in of.items():
        assert len(cells[label]) == len(kernels.TRITON)
        for capability, cell in zip(kernels.TRITON, cells[label], strict=True):
            expected = expected_instructions(configuration, capability)
            match = re.fullmatch(rf"\d+ / ([\d.e+-]+){' ' if expected else ''}{re.escape(expected)}", cell)
            assert match, f"{label} on sm_{capability}: {cell}, not {expected or 'no matrix instruction'}"
            assert float(match[1]) * 1024 <= SHARED_LIMIT[capability], f"{label} on sm_{capability}: {cell}"
    assert {label.split(":")[0] for label in cells if ".cu: " in label} == {
        path.name for path in (ROOT / "csrc/cuda").glob("*.cu")
    }
    assert not any("stack" in cell or "–" in cell for row in cells.values() for cell in row)
    known = set(of) | {label.partition("<")[0] for label in cells}
    assert set(kernels.IN_A_STEP) <= known


def test_the_kernel_table_knows_a_changed_kernel_and_a_changed_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from refusal_kernels.triton_kernels import adam, compact, registry

    written = kernels.text_of(
        {name: (own, ["| `k` | 1 / 0 |"]) for name, own in kernels.fingerprints().items()}, "none"
    )
    assert kernels.stale(written) == []
    everything = list(registry.configurations())
    with monkeypatch.context() as patch:
        fewer = [c for c in everything if c.label != "adam.flat[halves]"]
        patch.setattr(registry, "configurations", lambda: iter(fewer))
        assert kernels.stale(written) == ["Triton: adam.flat"]
    with monkeypatch.context() as patch:  # what a kernel calls counts as well
        patch.setattr(adam.adam_update, "_src", adam.adam_update.src.replace("beta1 * m", "beta2 * m"))
        assert set(kernels.stale(written)) == {
            "Triton: adam.flat", "Triton: adam.row", "Triton: adam.wide_row", "Triton: sae_adam.step",
            "Triton: projected_adam.coefficients",
        }  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(compact.store_copy, "_src", compact.store_copy.src + "\n    # said\n")
        assert kernels.stale(written) == []


def test_a_kernel_is_said_to_have_run_only_where_a_kept_run_shows_it(tmp_path: Path) -> None:
    known = ("decode", "adam.row", "projected_adam.update", "sae_adam.step")

    def run(date: str, own: str, stages: dict[str, Any]) -> dict[str, Any]:
        return {"machine": {"gpu": "GPU"}, "date": date, "kernels": dict.fromkeys(known, own), "stages": stages}

    values = {"values": {"status": "ok", "result": {"passed": 9}}}
    failed = {"values": {"status": "failed: exit 1", "result": {"passed": 9, "failed": 1}}}
    measured = {"sae 1,1,1,1": {"status": "ok", "result": [{"name": "decode + residual, ours", "ms": 1.0}]}}
    broken = {"sae 1,1,1,1": {"status": "ok", "result": [{"name": "decode + residual, ours", "error": "OutOfMemory"}]}}
    assert status.on_a_gpu("decode", "a", [run("2026-01-02", "a", values)]) == "run on GPU, 2026-01-02"
    assert status.on_a_gpu("decode", "a", [run("2026-01-02", "a", measured)]) == "run on GPU, 2026-01-02"
    assert status.on_a_gpu("adam.row", "a", [run("2026-01-02", "a", measured)]) == "not yet run on a GPU"
    optimizer = {"projection": {"status": "ok", "result": [{"name": "optimizer, ours", "ms": 1.0}]}}
    assert status.ran("projected_adam.update", run("2026-01-02", "a", optimizer))
    fused = {"others 1,1,1,1": {"status": "ok", "result": [{"name": "step, cuda, Adam inside", "ms": 1.0}]}}
    assert not status.ran("adam_latents", run("2026-01-02", "a", fused)), "a kernel that the run did not know"
    assert not status.ran("sae_adam.step", run("2026-01-02", "a", optimizer))
    for bad in (failed, broken):
        assert status.on_a_gpu("decode", "a", [run("2026-01-02", "a", bad)]) == "not yet run on a GPU"
    changed = status.on_a_gpu("decode", "b", [run("2026-01-03", "c", values), run("2026-01-02", "a", values)])
    assert changed == "not yet run on a GPU in this form; an earlier one on GPU, 2026-01-03"
    both = [run("2026-01-03", "c", values), run("2026-01-02", "b", values)]
    assert status.on_a_gpu("decode", "b", both) == "run on GPU, 2026-01-02"


def test_the_rows_that_show_a_kernel_are_rows_that_are_measured() -> None:
    """A row renamed in a benchmark and not here would leave its kernels "not yet run" after a run."""
    sources = "".join(path.read_text() for path in (ROOT / "benches" / "gpu").glob("*.py"))
    by_pattern = {"encode, all heads, grouped": 'f"encode, all heads, {path}"', "optimizer, ours": '"optimizer, ours"'}
    for row in status.GOES_THROUGH:
        assert by_pattern.get(row, f'"{row}"') in sources, row
    assert {k for kernels in status.GOES_THROUGH.values() for k in kernels} <= {
        *status.triton_sources(), *status.cuda_sources(),
    }  # fmt: skip


def test_fingerprints_see_code_and_nothing_else(tmp_path: Path) -> None:
    for name, code, said, changed in (
        ("a.py", 'x = "# no"\n', '"""Said."""\n# More.\nx =   "# no"  # and\n', 'x = "# yes"\n'),
        ("a.cu", "int x = 1;\n", "// Said.\nint  x /* so */ = 1;  // and\n", "int x = 2;\n"),
    ):
        prints = []
        for text in (code, said, changed):
            (tmp_path / name).write_text(text)
            prints.append(status.fingerprint((tmp_path / name,)))
        assert prints[0] == prints[1] != prints[2]


def test_every_cuda_kernel_is_found() -> None:
    text = "".join(path.read_text() for path in (ROOT / "csrc/cuda").glob("*.cu"))
    assert len(status.cuda_sources()) == text.count("__global__")


def test_the_kernel_table_shows_what_the_compilers_report() -> None:
    report = """ptxas info    : Compiling entry function '_Z3fooIfLi8EEvv' for 'sm_90a'
ptxas info    : Function properties for _Z3fooIfLi8EEvv
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 2048 bytes smem
"""
    [kernel] = kernels.ptxas_report("a.cu", report)
    assert kernel["label"] in ("a.cu: foo<float, 8>", "a.cu: _Z3fooIfLi8EEvv")
    other = {
        "label": "b[x]",
        "capability": 90,
        "registers": 7,
        "shared": 512,
        "stack": 0,
        "matrix_instruction": "HGMMA",
    }
    assert kernels.rows_of([other], kernels.TRITON) == ["| `b[x]` | – | 7 / 0.5 HGMMA | – |"]
    rows = kernels.rows_of([kernel | {"dynamic": 1536}], kernels.CUDA)
    assert rows == [f"| `{kernel['label']}` | – | 40 / 2 + 1.5 **stack 16** | – | – |"]
    shown = kernels.text_of({"CUDA C++: a.cu": ("1f", rows)}, "Triton 0")
    assert kernels.sections(shown) == {"CUDA C++: a.cu": ("1f", rows)}
    assert kernels.cells(shown) == {kernel["label"]: ["–", "40 / 2 + 1.5 **stack 16**", "–", "–"]}


def test_dynamic_shared_memory_is_that_of_a_kernels_shape() -> None:
    sizes = {"project": [10, 20], "latent_gradients": [1, 2, 3]}
    assert kernels.dynamic_of("projection.cu: project_update<1>", sizes) == 20
    assert kernels.dynamic_of("sae_backward.cu: latent_gradients<Float16Row, 2, false, true>", sizes) == 3
    assert kernels.dynamic_of("sae_backward.cu: latent_combine", sizes) == 0
    assert kernels.dynamic_of("sae_backward.cu: latent_dots<Float32Row, true>", sizes) == 0


def test_the_end_to_end_benchmark_runs_with_small_widths() -> None:
    command = [sys.executable, "-m", "benches.gpu.end_to_end", "--tiny", "--device", "cpu", "--rounds", "1"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    found = {entry["name"]: entry for entry in stages.json_lines(run.stdout)}
    assert [entry for entry in found.values() if "error" in entry] == []
    assert list(found) == [
        "forward and capture, up to layer 2", "SAE step, ours", "SAE step, dense", "LoRA step",
        "projection of its matrices", "LoRA step with projection",
    ]  # fmt: skip
    assert found["LoRA step"]["matrices"] == 2 * 7 * 4
    assert 0 < found["projection of its matrices"]["percent_of_step"] < 100


def test_thinned_tests_show_every_value_of_every_parameter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", values.FILES[0]]

    def seen(*options: str) -> tuple[int, set[tuple[str, ...]]]:
        run = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
        names = [line for line in run.stdout.splitlines() if "::" in line]
        # An identifier's parts: backend, dtype and numbers; which test and which back-end they came with.
        parts = [(name.partition("[")[0], re.split(r"[-\[\]]", name)[1:-1]) for name in names]
        backends = ("triton", "cuda", "int8")
        shown = {(test, *(b for b in backends if b in words), word) for test, words in parts for word in words}
        return len(names), shown

    (everything, wanted), (few, shown) = seen(), seen("--thin")
    assert shown == wanted
    assert few < everything / 2
