"""What stands behind every GPU kernel: benches/status.py and the table of compiled kernels."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `benches` is not installed: it runs from the repository root

from benches import kernels, status  # noqa: E402


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

    values = {"values": {"status": "ok", "result": {"passed": 9, "launched": ["decode"]}}}
    failed = {"values": {"status": "failed: exit 1", "result": {"passed": 9, "failed": 1}}}
    measured = {"sae 1,1,1,1": {"status": "ok", "result": [{"name": "decode + residual, ours", "ms": 1.0}]}}
    broken = {"sae 1,1,1,1": {"status": "ok", "result": [{"name": "decode + residual, ours", "error": "OutOfMemory"}]}}
    assert status.on_a_gpu("decode", "a", [run("2026-01-02", "a", values)]) == "run on GPU, 2026-01-02"
    assert status.on_a_gpu("decode", "a", [run("2026-01-02", "a", measured)]) == "run on GPU, 2026-01-02"
    assert status.on_a_gpu("adam.row", "a", [run("2026-01-02", "a", measured)]) == "not yet run on a GPU"
    assert status.on_a_gpu("adam.row", "a", [run("2026-01-02", "a", values)]) == "not yet run on a GPU"  # not launched
    of_cuda = run("2026-01-02", "a", values)
    of_cuda["kernels"]["filter_rows"] = "a"
    assert status.on_a_gpu("filter_rows", "a", [of_cuda]) == "run on GPU, 2026-01-02"
    optimizer = {"projection": {"status": "ok", "result": [{"name": "optimizer, ours", "ms": 1.0}]}}
    assert status.ran("projected_adam.update", run("2026-01-02", "a", optimizer))
    fused = {"others 1,1,1,1": {"status": "ok", "result": [{"name": "step, cuda, Adam inside", "ms": 1.0}]}}
    assert not status.ran("adam_latents", run("2026-01-02", "a", fused)), "a kernel that the run did not know"
    assert not status.ran("sae_adam.step", run("2026-01-02", "a", optimizer))
    narrow = {"name": "encode, ours", "ms": 1.0, "path": "grouped"}
    encoded = run("2026-01-02", "a", {"sae 1,1,1,1": {"status": "ok", "result": [narrow]}})
    encoded["kernels"] |= {"encode.filter": "a", "encode.settle": "a"}
    assert status.ran("encode.settle", encoded)
    assert not status.ran("encode.filter", encoded)
    narrow["fault"] = "0 ms"
    assert not status.ran("encode.settle", encoded)
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
