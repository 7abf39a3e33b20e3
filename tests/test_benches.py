"""The benchmarks measure what they say: models against counts, columns against fp64, README against results."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import refusal_kernels as rk

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `benches` is not installed: it runs from the repository root

from benches import (  # noqa: E402
    experiment,
    harness,
    memory,
    model,
    premises,
    projected_adam,
    projection,
    results,
    status,
    torch_paths,
)
from benches.columns import TOLERANCE, Case, Column  # noqa: E402
from benches.gpu import block as gpu_block  # noqa: E402
from benches.problem import Problem  # noqa: E402
from benches.shapes import COLUMNS, CROSSOVER_GROUPS, CROSSOVER_SHAPES, GROUPS, SHAPES, Shape  # noqa: E402
from benches.timers import cuda_event  # noqa: E402

SMALL = Shape(96, 24, 160, 6)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem(SMALL)


# --- flop and byte models --------------------------------------------------------------------------------------------


def test_matrix_product_flops_are_what_torch_counts() -> None:
    """The 2 N F d terms, per active latent, are the products that PyTorch really runs for a dense step."""
    n, d, f, k = SMALL
    p = Problem(SMALL, distinct=False)
    leaves = [t.requires_grad_() for t in p.parameters]
    with FlopCounterMode(display=False) as forward:
        loss = torch_paths.dense_loss(p.x, *leaves, k)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    bias_product = n * f + n * d + n * d  # additions of biases, which torch does not count
    assert forward.get_total_flops() == model.encode_flops(SMALL) + model.decode_flops(SMALL, dense=True) - bias_product
    other = n * f + n * d + 2 * f * d  # db_enc, sum of e, db_enc W_enc
    assert backward.get_total_flops() == model.backward_flops(SMALL, dense=True) - other == 6 * n * d * f


def test_sparse_flops_count_active_latents_only() -> None:
    n, d, f, k = SMALL
    dense, sparse = model.decode_flops(SMALL, dense=True), model.decode_flops(SMALL, dense=False)
    assert dense - sparse == 2 * n * d * (f - k)
    all_active = Shape(n, d, f, f)
    for group in GROUPS:
        assert model.flops(group, all_active, dense=False) == model.flops(group, all_active, dense=True)


def test_bytes_are_the_bytes_of_the_tensors(problem: Problem) -> None:
    """With every latent active, what must move is every input and every output of the operators, once."""

    def size(*tensors: torch.Tensor) -> int:
        return sum(t.nbytes for t in tensors)

    p, (values, indices) = problem, problem.codes
    W_enc, b_enc, W_dec, b_dec = p.parameters
    assert SMALL.n * SMALL.k >= SMALL.f
    assert model.bytes_moved("encode", SMALL) == size(p.x, W_enc, b_enc, b_dec, values, indices)
    x_hat = rk.sparse_decode(values, indices, W_dec, b_dec)
    assert model.bytes_moved("decode", SMALL) == size(values, indices, W_dec, b_dec, x_hat)
    inputs = size(p.x, x_hat, values, indices, W_dec, W_enc)
    assert model.bytes_moved("backward", SMALL) == inputs + size(*p.parameters)
    assert model.bytes_moved("step", SMALL) == size(p.x) + 6 * size(*p.parameters)


def test_fewer_tokens_than_latents_touch_fewer_rows() -> None:
    few = Shape(2, 8, 1000, 3)
    assert model.rows_touched(few) == 6
    assert model.bytes_moved("decode", few) == 6 * 12 + 6 * 8 * 4 + 8 * 4 + 2 * 8 * 4
    assert model.dense_code_bytes(few) == 2 * 1000 * 4


@pytest.mark.parametrize("function", [lambda: model.flops("x", SMALL, True), lambda: model.bytes_moved("x", SMALL)])
def test_unknown_group_is_named(function: Any) -> None:
    with pytest.raises(ValueError, match="group must be encode, decode, backward or step; got 'x'"):
        function()


@pytest.mark.parametrize("text", ["1,2,3", "4,4,4,5", "a,1,1,1", "0,1,1,1", ""])
def test_bad_shape_is_one_clear_error(text: str) -> None:
    with pytest.raises(ValueError, match="a shape"):
        Shape.parse(text)


def test_shape_reads_what_it_writes() -> None:
    assert [Shape.parse(str(s)) for s in SHAPES] == list(SHAPES)
    assert Shape.parse("4096,512,16384,32") == SHAPES[0]


# --- columns ---------------------------------------------------------------------------------------------------------

EAGER = ("dense", "sparse", "best", "ours", "autograd")


@pytest.mark.parametrize("group", GROUPS)
def test_columns_equal_fp64_and_ours_ran_on_our_kernels(group: str) -> None:
    case = Case(Problem(SMALL), group)
    for name in (*EAGER, "floor"):
        if case.has(name):
            assert case.verify(case.column(name)) <= TOLERANCE[group]
    assert case.native.name == "cpu"
    operator = {"encode": "topk_encode", "decode": "sparse_decode"}.get(group)
    if operator is not None:
        assert rk.last_backend(operator) == "cpu"
    if group == "step":
        assert rk.last_backend("sae_step") == "cpu"


@pytest.mark.parametrize("form", ["index_add", "bags", "csc", "autograd"])
def test_every_form_of_the_sparse_gradients_is_right(form: str) -> None:
    case = Case(Problem(SMALL), "backward", forms={"backward": form})
    column = case.column("best")
    assert column.form == form
    assert case.verify(column) <= TOLERANCE["backward"]


@pytest.mark.parametrize("form", ["fresh", "reused", "chunked"])
def test_every_form_of_the_sparse_encoder_is_right(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_paths, "CHUNK_BYTES", 4 * SMALL.f * 7)  # seven rows: chunks, and a remainder
    case = Case(Problem(SMALL), "encode", forms={"encode": form})
    assert case.verify(case.column("best")) <= TOLERANCE["encode"]


@pytest.mark.parametrize("form", ["bag", "csr"])
def test_every_form_of_the_sparse_decoder_is_right(form: str) -> None:
    case = Case(Problem(SMALL), "decode", forms={"decode": form})
    assert case.verify(case.column("best")) <= TOLERANCE["decode"]


def test_the_fastest_form_is_chosen_and_all_are_recorded(problem: Problem) -> None:
    case = Case(problem, "encode")
    column = case.column("best")
    assert set(column.forms) == {"fresh", "reused", "chunked"}
    assert column.forms[column.form] == min(column.forms.values())
    assert case.forms == {"encode": column.form}


def test_a_wrong_column_is_not_timed(problem: Problem) -> None:
    """One exchanged latent, one dropped token and one wrong factor each fail the verification."""
    encode = Case(problem, "encode")

    def exchanged() -> Any:
        values, indices = encode.column("dense").run()
        unused = next(i for i in range(SMALL.f) if i not in indices[0].tolist())
        indices[0, -1] = unused
        return values, indices

    backward = Case(problem, "backward")

    def dropped() -> Any:
        values, indices = problem.codes
        values = values.clone()
        values[0] = 0
        return backward.sparse.gradients("bags", values, indices, problem.reference[1].float())

    decode = Case(problem, "decode")
    for case, run in (
        (encode, exchanged),
        (backward, torch.no_grad()(dropped)),
        (decode, lambda: 1.001 * decode.column("dense").run()),
    ):
        with pytest.raises(AssertionError, match="differs from fp64"):
            case.verify(Column("wrong", run))


def test_a_step_without_the_unit_norm_is_not_timed() -> None:
    case = Case(Problem(SMALL), "step")
    column = case.column("dense")

    def without() -> None:
        before = torch_paths.unit_norm_
        torch_paths.unit_norm_ = lambda W: None  # type: ignore[assignment]
        try:
            column.run()
        finally:
            torch_paths.unit_norm_ = before

    with pytest.raises(AssertionError, match="differs from fp64"):
        case.verify(Column("wrong", without))


def test_inputs_have_no_near_ties(problem: Problem) -> None:
    top = problem._pre(problem.x).topk(SMALL.k + 1, dim=1).values
    assert bool((top[:, -2] - top[:, -1] > 1e-5 * top[:, 0]).all())
    assert bool((top[:, -2] > 0).all())


def weights(shape: Shape) -> int:
    """Tensors of a weight's size that are alive, those that share memory once."""
    gc.collect()
    alive = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    alive = [t for t in alive if t.layout == torch.strided]  # other tests leave sparse ones, which have no storage
    alive += [t.grad for t in alive if t.is_leaf and t.grad is not None]
    return len({t.untyped_storage().data_ptr() for t in alive if t.untyped_storage().nbytes() == 4 * shape.f * shape.d})


@pytest.mark.parametrize(("group", "kept"), [("encode", 0), ("decode", 0), ("backward", 2), ("step", 2 + 4 + 2 + 2)])
def test_columns_share_what_they_keep(group: str, kept: int) -> None:
    """Beside the two weights, all columns of a group together keep one pair of gradient buffers; of a step also one set
    of moments, the initial weights and the gradients of the last column."""
    shape = Shape(48, 26, 170, 4)  # of no other test
    case = Case(Problem(shape), group)
    for name in (*EAGER, "floor"):
        if case.has(name):
            case.verify(case.column(name))
            case.column(name).run(*case.column(name).prepare())
    assert weights(shape) <= 2 + kept


def test_a_group_begins_without_the_case_before() -> None:
    options = {"device": "cpu", "backend": None, "columns": "sparse ours"}
    config: Any = SimpleNamespace(getoption=options.__getitem__, stash=pytest.Stash())
    bench = harness.Bench(config)
    case = bench.case(SMALL, "backward")
    for name in ("sparse", "ours"):
        bench.facts(case, case.column(name))
    before = weakref.ref(case)
    del case
    bench.case(SMALL, "step")
    assert before() is None


def test_columns_take_turns() -> None:
    options = {"groups": "encode", "shapes": "8,4,16,2", "columns": "dense ours", "rounds": 2}
    config: Any = SimpleNamespace(getoption=options.__getitem__)
    order = [(turn, column) for _, _, turn, column in harness.turns(config, crossover=False)]
    assert order == [(0, "dense"), (0, "ours"), (1, "dense"), (1, "ours")]


@pytest.mark.skipif(not memory.supported(), reason="needs Linux's resettable VmHWM")
def test_peak_memory_sees_what_torch_does_not_allocate() -> None:
    """64 MB from the C library, freed before the call returns, count as 64 MB."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    size = 64_000_000

    def run() -> None:
        block = libc.malloc(size)
        ctypes.memset(block, 1, size)
        libc.free(block)

    assert memory.peak_of_call(Column("malloc", run)) == pytest.approx(size, rel=0.05)
    assert memory.peak_of_call(Column("nothing", lambda: None)) < 1e6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_timer_measures_the_device() -> None:
    start = cuda_event()
    torch.cuda._sleep(10_000_000)
    assert 1e-3 < cuda_event() - start < 1


# --- the runner and what it writes -----------------------------------------------------------------------------------


def test_the_runner_writes_results_and_a_plot(tmp_path: Path) -> None:
    """The real thing on a small shape, torch.compile left out: pytest, its JSON, memory, table, files."""
    out = tmp_path / "result.json"
    command = [
        sys.executable,
        "-m",
        "benches",
        "--quick",
        "--rounds",
        "2",
        "--shapes",
        "256,64,2048,8",
        "--out",
        str(out),
    ]
    run = subprocess.run(
        [*command, "--groups", "encode step", "--columns", "dense best ours floor"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(out.read_text())
    assert {"machine", "versions", "commit", "date"} <= set(result)
    (setting,) = result["settings"]
    assert [case["group"] for case in setting["cases"]] == ["encode", "step"]
    for case in setting["cases"]:
        columns = case["columns"]
        assert set(columns) == {"dense", "best", "ours", "floor"}
        assert all(len(c["turns"]) == 2 and 0 < c["seconds"] <= c["median"] for c in columns.values())
        assert columns["ours"]["backend"] == "cpu"
        assert columns["ours"]["max_error"] <= TOLERANCE[case["group"]]
        assert columns["floor"]["roofline"] == 1
        if memory.supported():
            assert columns["dense"]["peak_bytes"] >= 0.9 * 256 * 2048 * 4  # the dense code at least
    assert "whole step with Adam" in run.stdout
    assert results.text_table(setting["cases"]) in run.stdout
    assert ElementTree.parse(out.with_suffix(".svg")).getroot().tag.endswith("svg")


def test_merge_takes_the_best_call_of_all_turns() -> None:
    def entry(column: str, turn: int, calls: list[float]) -> dict[str, Any]:
        info = {
            "shape": [4, 2, 8, 1], "group": "encode", "column": column, "turn": turn, "form": "", "forms": {},
            "backend": None, "max_error": 0.0, "peak_bytes": 1e6,
        }  # fmt: skip
        return {"extra_info": info, "stats": {"data": calls}}

    (case,) = results.merge(
        {"benchmarks": [entry("ours", 0, [3.0, 2.0]), entry("floor", 0, [1.0]), entry("ours", 1, [4.0])]}
    )
    ours = case["columns"]["ours"]
    assert (ours["seconds"], ours["median"], ours["roofline"]) == (2.0, 3.0, 0.5)
    assert ours["gflops"] == model.encode_flops(Shape(4, 2, 8, 1)) / 2.0 / 1e9


# --- README and committed results ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", results.BLOCK_NAMES)
def test_readme_shows_the_newest_committed_result(name: str) -> None:
    result = json.loads(results.newest().read_text())
    assert results.readme_block((ROOT / "README.md").read_text(), name) == results.blocks(result)[name], (
        "the README's tables are not those of the newest result: run `python -m benches readme`"
    )


def test_committed_results_are_complete() -> None:
    """Both malloc settings, all shapes, groups and columns, the crossover, a plot, and our kernels in our column."""
    path = results.newest()
    result = json.loads(path.read_text())
    assert path.with_suffix(".svg").exists()
    assert [setting["malloc"] for setting in result["settings"]] == ["default", "tuned"]
    everything = {(group, shape) for group in GROUPS for shape in SHAPES}
    for setting in result["settings"]:
        assert {(c["group"], Shape(*c["shape"])) for c in setting["cases"]} == everything
        for case in setting["cases"]:
            assert set(COLUMNS) <= set(case["columns"])
            assert case["columns"]["ours"]["backend"] == "cpu"
    assert {(c["group"], Shape(*c["shape"])) for c in result["crossover"]} == {
        (group, shape) for group in CROSSOVER_GROUPS for shape in CROSSOVER_SHAPES
    }


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("experiment", lambda: experiment.block(experiment.committed())),
        ("projection", lambda: projection.block(projection.newest())),
        ("gpu", lambda: gpu_block.block(gpu_block.gathered())),
        ("premises", lambda: premises.block(premises.newest())),
        ("kernels", lambda: status.block()),
    ],
)
def test_readme_shows_the_committed_results(name: str, shown: Callable[[], str]) -> None:
    assert results.readme_block((ROOT / "README.md").read_text(), name) == shown(), (
        "the README's table is not that of the committed result: run `python -m benches readme`"
    )


def test_the_committed_projection_is_at_the_floor_or_thrice_the_loop_and_never_slower() -> None:
    """With 8 directions, three times the loop would be asked; where the copy of the bytes alone takes more than a third
    of the loop's time, four fifths of that copy's rate."""
    for result in projection.newest():
        for case in result["cases"]:
            seconds = {name: column["seconds"] for name, column in case["columns"].items()}
            assert case["backend"] == "cpu"
            assert seconds["ours"] < min(seconds[name] for name in ("loop", "addmm", "foreach") if name in seconds)
            if case["r"] == 8:
                assert seconds["ours"] <= max(seconds["loop"] / 3, seconds["floor"] / 0.8)


def test_an_unfinished_experiment_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text("{}")
    with pytest.raises(ValueError, match=r"table\.txt, report\.html is missing"):
        experiment.keep(tmp_path, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_readme_without_markers_is_an_error(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="bench:begin"):
        results.update_readme(readme)


def test_update_touches_nothing_outside_the_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    old = "above\n" + "between\n".join(
        f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->\n" for name in results.BLOCK_NAMES
    )
    readme.write_text(old + "below\n")
    result = json.loads(results.newest().read_text())
    results.update_readme(readme, results.blocks(result))
    text = readme.read_text()
    for name, block in results.blocks(result).items():
        assert results.readme_block(text, name) == block
        text = text.replace(block, "old")
    assert text == old + "below\n"


# --- projection ------------------------------------------------------------------------------------------------------


def test_projection_counts_what_it_moves_and_its_columns_agree() -> None:
    with torch.no_grad():
        entries = projection.problem(layers=1, r=4, device="cpu")
        assert len(entries) == 14
        assert sum(w.numel() for w, _, _ in entries) * 32 == 41_943_040  # LoRA of rank 16 on Llama-3-8B
        inputs, outputs = 3 * 4096 + 14336, 43008  # q, k, v share a basis, gate and up another one
        assert projection.least_bytes(entries) == 8 * 41_943_040 // 32 + 4 * 4 * (inputs + outputs)
        columns = projection.columns(entries, None)
        assert {"loop", "addmm", "ours", "floor"} <= set(columns)
        assert projection.check(entries, columns) <= projection.TOLERANCE
        times = projection.measure(columns, 1, torch.device("cpu"))
    assert all(len(calls) == 1 for calls in times.values())
    case = {"r": 4, "flops": 1, "bytes": 1, "columns": {n: {"seconds": min(c)} for n, c in times.items()}}
    assert len(projection.table([case]).splitlines()) == 2


def test_the_optimizers_that_project_are_compared_before_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = projection.problem(layers=1, r=3, device="cpu")
    columns, error = projected_adam.columns(entries, "cpu")
    assert rk.last_backend("projected_adam") == "cpu"
    assert set(columns) == {"AdamW", "difference", "ours"}
    assert 0 < error <= projected_adam.TOLERANCE
    monkeypatch.setattr(rk.ProjectedAdamW, "step", lambda _: None)
    with pytest.raises(AssertionError, match="ours is off by"):
        projected_adam.columns(entries, "cpu")


def test_projection_refuses_a_column_that_is_wrong() -> None:
    with torch.no_grad():
        entries = projection.problem(layers=1, r=2, device="cpu")
        with pytest.raises(AssertionError, match="lazy is off by"):
            projection.check(entries, {"lazy": lambda: None})
