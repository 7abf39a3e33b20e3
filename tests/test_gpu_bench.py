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
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `benches` is not installed: it runs from the repository root

from benches import machine, status, torch_paths  # noqa: E402
from benches.gpu import __main__ as gpu  # noqa: E402
from benches.gpu import end_to_end, model, needs, peers, profile, rows, sae, stages, table, values  # noqa: E402
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
    assert re.fullmatch(r"Makefile:\d+: \*\*\* make gpu: there is no CUDA device\.  Stop\.\n", run.stdout + run.stderr)
    assert not (tmp_path / "venv").exists()


def test_what_a_python_lacks_for_make_gpu_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the build needs as well: without it a run would measure nothing of the back-end cuda."""
    present = set(needs.MODULES)
    monkeypatch.setattr(needs, "find_spec", lambda name: name if name in present else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(needs.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", "")
    for program in needs.PROGRAMS:
        (tmp_path / program).write_text("")
        (tmp_path / program).chmod(0o755)
    (tmp_path / "Python.h").write_text("")
    assert needs.lacking() == []
    present.discard("pybind11")
    (tmp_path / "ninja").unlink()
    (tmp_path / "Python.h").unlink()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert needs.lacking() == ["pybind11", "ninja", "Python.h", f"a CUDA device that torch {torch.__version__} sees"]
    present.clear()
    assert needs.lacking()[: len(needs.MODULES)] == list(needs.MODULES)


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
    status, rest = values.run("triton", "1/3", "sanitizer and not gpu", seen, set())
    assert status == 0
    assert seen
    assert set(seen.values()) == {"PASSED"}
    assert f"{len(seen)} passed" in rest
    said = capfd.readouterr().out
    counts = {"passed": len(seen), "failed": 0, "skipped": 0, "error": 0}
    assert stages.counts(said) == {**counts, "launched": [], "names": []}


def test_processes_side_by_side_have_one_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, str]] = []

    class Ended:
        stdout, returncode = ["tests/a.py::b PASSED\n", "launched decode\n"], 0

        def __init__(self, command: list[str], env: dict[str, str], **more: Any) -> None:
            given.append(env)

        def __enter__(self) -> Ended:
            return self

        def __exit__(self, *why: Any) -> None: ...

    monkeypatch.setattr(values.subprocess, "Popen", Ended)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    launched = set[str]()
    assert values.run("cuda", "0/1", "gpu", {}, launched) == (0, "")
    assert launched == {"decode"}
    assert [environment["OMP_NUM_THREADS"] for environment in given] == ["1"]
    monkeypatch.setattr(stages, "architecture", lambda: "9.0a")
    beside = [stage for stage in stages.stages(quick=False) if stage.slot and stage.name != "build"]
    assert {stage.environment.get("OMP_NUM_THREADS") for stage in beside} == {"1"}


def test_kernels_that_ran_are_told_where_there_is_a_device(
    monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    pytest.importorskip("triton")
    conftest: Any = pytestconfig.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    from refusal_kernels.triton_kernels import adam, decode

    monkeypatch.setattr(decode._decode_kernel, "device_caches", {0: ({"a key": "a kernel"}, {})})
    monkeypatch.setattr(adam._row_kernel, "device_caches", {0: ({}, {})})
    assert conftest.launched() == {"decode"}
    lines: list[str] = []
    reporter = SimpleNamespace(write_line=lines.append)
    conftest.pytest_terminal_summary(reporter)
    assert lines == []
    monkeypatch.setattr(conftest.torch.cuda, "is_available", lambda: True)
    conftest.pytest_terminal_summary(reporter)
    assert lines == ["launched decode"]


def test_counts_of_a_whole_and_of_a_cut_log() -> None:
    single = "tests/a.py::one PASSED\ntests/a.py::two[x] FAILED\nlaunched b\nlaunched a\ntests/a.py::three SKIPPED\n"
    more = {"launched": ["a", "b"], "names": ["tests/a.py::two[x]"]}
    cut = {"passed": 1, "failed": 1, "skipped": 1, "error": 0, **more}
    assert stages.counts(single) == cut
    assert stages.counts(single + "FAILED tests/a.py::two[x] - assert\n7 passed, 1 failed, 2 skipped in 3 s\n") == {
        "passed": 7, "failed": 1, "skipped": 2, "error": 0, **more,
    }  # fmt: skip


def test_a_stage_that_takes_too_long_keeps_what_it_said_and_costs_no_other(tmp_path: Path) -> None:
    endless = "import time; print('{\"ms\": 1}', flush=True); time.sleep(600)"
    found = stages.run(
        stages.Stage("Endless, one", [sys.executable, "-c", endless], 3, 1, stages.json_lines), tmp_path, 60
    )
    assert found["status"] == "stopped after 3 s"
    assert found["result"] == [{"ms": 1}]
    assert (tmp_path / "endless-one.log").read_text() == '{"ms": 1}\n'
    broken = stages.Stage("broken", [sys.executable, "-c", "raise SystemExit(3)"], 30, 1, stages.counts)
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
        ["build"],
        ["check", *(f"{tool}{kind}" for tool in ("memcheck", "racecheck") for kind in ("", " heads, 8 bit", " cuda"))],
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
    assert [name for name in names if name.startswith("profile")] == [
        f"profile {CANONICAL_TEXT}", "profile heads", "profile projection",
    ]  # fmt: skip
    spare = [stage for stage in stages.stages(quick=False) if stage.spare]
    assert [stage.name for stage in spare] == names[-len(spare) :], "what runs in the time that is left runs last"
    assert {stage.share for stage in spare} == {0}
    assert [Shape.parse(text) in {Shape.parse(shape) for shape in stages.COLUMNS} for text in stages.MORE_COLUMNS]


def test_sanitizers_see_every_operator_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test in one process of memcheck; racecheck has the same tests in bf16."""
    monkeypatch.setattr(stages.shutil, "which", lambda tool, path: tool)
    options = {
        stage.name: [*stage.command][[*stage.command].index("gpu and sanitizer") - 1 :] for stage in stages.sanitizers()
    }
    memcheck = {name.removeprefix("memcheck"): given for name, given in options.items() if name.startswith("memcheck")}
    everything, *found = collected(["-m", "gpu and sanitizer", "tests/test_gpu.py"], *memcheck.values())
    assert sorted(test for tests in found for test in tests) == sorted(everything)
    for kind, tests in zip(memcheck, found, strict=True):
        raced = [test for test in tests if "dtype0" not in test and "dtype2" not in test]
        assert options[f"racecheck{kind}"] == [
            *memcheck[kind][:-1],
            memcheck[kind][-1] + " and not dtype0 and not dtype2",
        ]
        assert 0 < len(raced) < 6
        assert {test.partition("[")[0] for test in raced} == {test.partition("[")[0] for test in tests}
    source = (ROOT / "tests/test_gpu.py").read_text()
    small = source.split("@pytest.mark.sanitizer")[1:]
    reached = "".join(part.partition("\n\n\n")[0] for part in small)
    for test in ("everything", "codes_of_any_length", "heads_once", "triton-int8", "ProjectionPlan", "ProjectedAdamW"):
        assert test in reached, f"no sanitized test of {test}"


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
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: str, code: int
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
        assert "not ended well: measured" in capsys.readouterr().out
    else:
        gpu.main(tmp_path / "out", minutes=1)
    kept = json.loads((tmp_path / "out" / "gpu.json").read_text())["stages"]
    assert {name: found["status"] for name, found in kept.items()} == {
        fake.name: "failed: exit 1" if fake.name == broken else "ok" for fake in fakes
    }


def test_a_spare_stage_may_be_cut_short_but_not_fail() -> None:
    spare, plain, helping = (
        stages.Stage("a", [], 1, 0, stages.json_lines, **{flag: True} if flag else {})  # type: ignore[arg-type]
        for flag in ("spare", "", "helps")
    )
    by_status = {
        status: [gpu.fails(stage, status) for stage in (spare, plain, helping)]
        for status in ("ok", "stopped after 9 s", "no time left", "failed: exit 1")
    }
    assert by_status == {
        "ok": [False, False, False],
        "stopped after 9 s": [False, True, False],
        "no time left": [False, True, False],
        "failed: exit 1": [True, True, False],
    }


def test_a_broken_triton_costs_no_other_stage() -> None:
    """Neither the list of stages nor the command that runs them imports it."""
    alone = "import sys; sys.modules['triton'] = None; from benches.gpu import __main__ as gpu, stages; "
    alone += "stages.architecture = lambda: '9.0a'; print(len(stages.stages(False))); print(len(gpu.kernels()))"
    run = subprocess.run([sys.executable, "-c", alone], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    count, why, kernels = run.stdout.splitlines()
    assert int(count) > 20
    assert why.startswith("no fingerprints of Triton's kernels: ")
    assert int(kernels) == len(status.cuda_sources())
    assert {*stages.GROUPED_PATHS, "chunked"} == set(
        importlib.import_module("refusal_kernels.triton_kernels.encode").PATHS
    )


def test_every_column_is_measured_and_its_memory_is_known() -> None:
    """At the first shape all; the largest state is asked for before it is made."""
    first, *_, largest = ((Shape.parse(shape), columns.split()) for shape, (columns, _) in stages.COLUMNS.items())
    assert set(first[1]) == {"parts", *sae.STEPS} - {"copies", "cuda", "cuda-compact"}  # these in the stage "others"
    assert set(model.STATE_BYTES) == set(sae.STEPS)
    assert model.least_step_bytes("dense", first[0]) == 18 * 2 * 2**29 + 4 * 2**32
    weights = 2 * 4096 * 2**20
    assert [model.least_step_bytes(column, largest[0]) for column in largest[1][1:3]] == [8 * weights, 14 * weights]
    assert min(model.least_step_bytes(column, largest[0]) for column in largest[1][3:]) > 154e9, "PyTorch's say so"


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
    kept = json.loads(first.read_text())
    assert kept["stages"]["values"]["attempts"] == [
        {"date": "2026-01-02T10:00:00", "status": "failed: exit 1", "result": None},
    ], "what failed once stays on record"
    for date, ended in (("2026-01-02T10:40:00", "no time left"), ("2026-01-02T10:50:00", "stopped after 9 s")):
        assert keep_result(result(date, "a", "values", ended), tmp_path) == first
    kept = json.loads(first.read_text())
    assert kept["stages"]["values"]["status"] == "stopped after 9 s"
    assert [(a["date"], a["status"]) for a in kept["stages"]["values"]["attempts"]] == [
        ("2026-01-02T10:00:00", "failed: exit 1"), ("2026-01-02T10:30:00", "ok"),
    ]  # fmt: skip
    assert "attempts" not in kept["stages"]["heads"]
    printed = table.table({**kept, "versions": {"torch": "2"}})
    assert "values: before, failed: exit 1, 2026-01-02T10:00:00" in printed
    other = keep_result(result("2026-01-02T11:00:00", "b", "values"), tmp_path)
    assert other != first
    assert table.newest(tmp_path)["commit"] == "b"


class Properties:
    name, major, minor, total_memory, multi_processor_count, L2_cache_size = "A GPU", 9, 0, 141 << 30, 132, 60 << 20


def test_a_result_says_what_it_was_measured_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Driver, capability and memory of the device; versions of PyTorch, of the CUDA it was built with, of Triton."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 580.65.06\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    found = machine.describe_machine("cuda")
    wanted = {
        "gpu": "A GPU", "capability": "9.0", "gpu_memory_gib": 141.0, "gpu_l2_mib": 60.0, "multiprocessors": 132,
        "driver": "580.65.06",
    }  # fmt: skip
    assert {key: found[key] for key in wanted} == wanted
    assert "driver_unknown" not in found
    assert machine.slug(found) == "a-gpu"
    assert not {"gpu", "driver"} & machine.describe_machine("cpu").keys()
    versions = machine.describe_versions()
    assert {"python", "torch", "cuda", "triton", "refusal_kernels"} <= versions.keys()
    assert all(isinstance(version, str) and version for version in versions.values())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27", ("580.65.06", "")),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.1  Release", ("570.1", "")),
        ("something else", (None, "nvidia-smi is not in PATH, and {file} has no version")),
        (None, (None, "nvidia-smi is not in PATH, and there is no {file}")),
    ],
)
def test_a_driver_that_no_tool_names_is_read_from_its_file_or_said_to_be_unknown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None, found: tuple[str | None, str]
) -> None:
    file = tmp_path / "version"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(machine, "DRIVER", file)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine._driver() == (found[0], found[1].format(file=file))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    if found[0] is None:
        told = machine.describe_gpu("cuda")
        assert told["driver"] is None
        assert told["driver_unknown"] == found[1].format(file=file)


def test_checks_that_were_cut_off_are_those_that_had_ended() -> None:
    said = (
        "check import on _C (cpu) 0.0 s: ok\n"
        "check topk_encode on triton (cuda) 12.5 s: FAILED: AssertionError: {'a': 1} off by 2\n"
    )
    found = stages.report(said)
    assert found["checks"] == [
        {"op": "import", "backend": "_C", "device": "cpu", "ok": True, "seconds": 0.0, "error": None},
        {
            "op": "topk_encode", "backend": "triton", "device": "cuda", "ok": False, "seconds": 12.5,
            "error": "AssertionError: {'a': 1} off by 2",
        },
    ]  # fmt: skip
    assert stages.report(said + json.dumps({"versions": {}, "checks": []}, indent=1)) == {"versions": {}, "checks": []}
    assert stages.report("Killed\n") == {"checks": []}
    result: dict[str, Any] = {
        "machine": {"gpu": "A GPU"}, "versions": {"torch": "2"}, "commit": "c",
        "stages": {"check": {"status": "stopped after 50 s", "result": found}},
    }  # fmt: skip
    assert "check: 1 checks passed, 1 failed\n    topk_encode on triton (cuda): AssertionError" in table.table(result)


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
    assert run.returncode == 1, run.stderr  # of the column that is refused
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


def test_the_end_to_end_benchmark_runs_with_small_widths() -> None:
    command = [sys.executable, "-m", "benches.gpu.end_to_end", "--tiny", "--device", "cpu", "--rounds", "1"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    found = {entry["name"]: entry for entry in stages.json_lines(run.stdout)}
    assert [entry for entry in found.values() if "error" in entry] == []
    assert list(found) == [
        "forward and capture, up to layer 2", "SAE step, ours", "SAE step, dense", "LoRA step",
        "projection of its matrices", "LoRA step with projection", "LoRA step, 2 of 4 layers",
        "projection of 28 matrices, queue full", "LoRA step of 2 layers, extrapolated",
    ]  # fmt: skip
    assert found["LoRA step"]["matrices"] == 2 * 7 * 4
    assert 0 < found["projection of its matrices"]["percent_of_step"] < 100
    deep = found["LoRA step of 2 layers, extrapolated"]["ms"]
    assert deep == pytest.approx(found["LoRA step, 2 of 4 layers"]["ms"])
    whole = found["projection of 28 matrices, queue full"]
    assert whole["percent_of_step"] == pytest.approx(100 * whole["ms"] / deep)


def test_a_deeper_model_s_step_is_extrapolated_from_what_layers_cost() -> None:
    """Embedding, head and loss cost 10 at any depth, a layer 3."""
    step, half = {"ms": 10 + 4 * 3.0}, {"ms": 10 + 2 * 3.0}
    assert end_to_end.extrapolated(step, half, 4, 2, 32)["ms"] == pytest.approx(10 + 32 * 3)
    lacking = end_to_end.extrapolated(step, {"error": "out of memory"}, 4, 2, 32)
    assert rows.fault({"name": "LoRA step of 32 layers, extrapolated", **lacking}) is None
    assert end_to_end.share({"ms": 0.5}, {"ms": 100.0}) == {"percent_of_step": 0.5}
    assert end_to_end.share({"ms": 0.5}, lacking) == {}


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
