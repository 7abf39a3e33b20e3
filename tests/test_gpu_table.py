"""What `python -m benches.gpu` prints in the end, and the README's block of it: benches/gpu/table.py, block.py."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `benches` is not installed: it runs from the repository root

from benches.gpu import block, table  # noqa: E402


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
    assert "| 32768, 4096, 131072, 64 | product alone | 44 | 50 | 88 % |" in block.against_roofline(result)
    del result["stages"]["limits"]
    assert "predicted" not in table.table(result)
    assert block.against_roofline(result) == []


def test_the_block_shows_compact_state_and_what_had_no_memory() -> None:
    def stage(*entries: dict[str, Any]) -> dict[str, Any]:
        return {"status": "ok", "result": list(entries)}

    ours = {"name": "step, ours", "ms": 70.0, "extra_mb": 2900.0}
    dense = {"name": "step, dense", "ms": 280.0, "extra_mb": 25000.0}
    compact = {"name": "step, ours compact", "ms": 66.0, "extra_mb": 800.0}
    lacking = {"name": "step, dense", "error": "needs at least 189 GB; the device has 84"}
    plain = block.steps_and_encoders({"stages": {"sae 2,3,4,1": stage(ours, dense)}})
    assert plain[0].count("|") == 10
    assert plain[2] == "| 2, 3, 4, 1 | 70 | 280 | 4.00× | – | – | – | 2.9 GB | 25.0 GB |"
    both = block.steps_and_encoders(
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
    shown = "\n".join(block.beside_the_shapes(result))
    assert "| one autoencoder per head, 2 x 6,16,64,3 | ms | |" in shown
    assert "| step, all heads | 12.3 |  |" in shown
    assert "| SAE step, ours | 2 | 12,346 tokens/s |" in shown
    assert "| projection | 0.5 | 0.31 % of the step |" in shown
    assert "lost" not in shown
    assert block.beside_the_shapes({"stages": {}}) == []


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
    assert block.profiles(result) == [
        "",
        "| a step's kernels, 2x3x4x1: ms / launches | ours | compact |",
        "|---|---:|---:|",
        "| `_decode_kernel` | 79.5 / 2 | – |",
        "| `_step_kernel` | – | 50 / 1 |",
        "| each below 1 % | 0.5 / 7 | – |",
        "| all kernels, ms | 80 | 50 |",
        "| the step, ms | 90 | 60 |",
    ]
    assert "\n".join(block.profiles(result)) in block.block(result)
    printed = table.table(result)
    assert re.search(r"ours: step +90\.000 ms +80\.000 ms in kernels", printed)
    assert re.search(r"ours: _decode_kernel +79\.500 ms +2 launches +99\.4 %", printed)
    assert re.search(r"cuda: step +no device", printed)
    result["stages"] = {"heads": {"status": "ok", "result": []}, "profile heads": {"status": "no", "result": None}}
    assert block.profiles(result) == []


def run(date: str, stages: dict[str, Any]) -> dict[str, Any]:
    return {
        "machine": {"gpu": "A GPU"}, "versions": {"torch": "2", "python": "3"}, "commit": f"of {date}",
        "date": f"{date}T10:20:30+00:00", "stages": stages,
    }  # fmt: skip


def stage(ended: str, *rows: dict[str, Any]) -> dict[str, Any]:
    return {"status": ended, "result": list(rows)}


def kept(folder: Path, *runs: dict[str, Any]) -> dict[str, Any]:
    for i, each in enumerate(runs):
        (folder / f"{i}.json").write_text(json.dumps(each))
    return block.gathered(folder)


def test_what_the_newest_run_lacks_is_of_the_newest_that_has_it_and_marked(tmp_path: Path) -> None:
    ours, dense = (
        {"name": f"step, {name}", "ms": ms, "extra_mb": 1e3} for name, ms in (("ours", 5.0), ("dense", 20.0))
    )
    result = kept(
        tmp_path,
        run("2026-01-01", {
            "sae 2,3,4,1": stage("ok", {**ours, "ms": 9.0}, {**dense, "ms": 30.0}, {"name": "step, sparse", "ms": 8.0}),
            "heads": stage("ok", {"name": "step, all heads", "ms": 1.0, "shape": "2 x 6x5x4x3"}),
        }),
        run("2026-01-02", {
            "sae 2,3,4,1": stage("ok", {**ours, "ms": 7.0}, dense),
            "encode": stage("ok", {"name": "a variant that is gone", "ms": 1.0}),
        }),
        run("2026-01-03", {
            "sae 2,3,4,1": stage("stopped after 9 s", ours),
            "sae 5,3,4,1": stage("ok", ours),
            "encode": stage("no time left"),
        }),
    )  # fmt: skip
    assert [(row["name"], row["ms"], row.get("mark")) for row in block.rows_of(result, "sae 2,3,4,1")] == [
        ("step, ours", 5.0, None), ("step, dense", 20.0, "†"),
    ], "the second run's stage ended well: what it has not is no row any more"  # fmt: skip
    assert block.rows_of(result, "encode") == []
    assert result["marks"] == {
        "†": "2026-01-02 10:20, commit of 2026-01-02",
        "‡": "2026-01-01 10:20, commit of 2026-01-01",
    }
    text = block.block(result)
    assert "| 2, 3, 4, 1 | 5 | 20† | 4.00×† | – | – | – | 1.0 GB | 1.0 GB† |" in text
    assert "| step, all heads | 1‡ |  |" in text
    assert "of the newest that has them: † 2026-01-02 10:20, commit of 2026-01-02; ‡ 2026-01-01" in text
    assert "did not end well: sae 2,3,4,1 (stopped after 9 s); encode (no time left)." in text


def test_a_row_that_failed_in_the_newest_run_is_not_covered_by_an_older_one(tmp_path: Path) -> None:
    result = kept(
        tmp_path,
        run("2026-01-01", {"sae 2,3,4,1": stage("ok", {"name": "step, ours", "ms": 9.0, "extra_mb": 1.0})}),
        run("2026-01-02", {"sae 2,3,4,1": stage("failed: exit 1", {"name": "step, ours", "error": "AssertionError"})}),
    )
    assert "| 2, 3, 4, 1 | – |" in block.block(result)
    assert result["marks"] == {}


def test_without_runs_there_is_no_block(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no results in"):
        block.gathered(tmp_path)


def test_a_run_of_today_says_more_of_its_device_and_of_attempts() -> None:
    result = run("2026-01-01", {"values": {"status": "ok", "result": {}, "attempts": [{"status": "failed: exit 1"}]}})
    result["machine"]["driver"] = "580.1"
    result["versions"]["triton"] = "3.6"
    text = block.block(result)
    assert text.startswith("A GPU, driver 580.1, torch 2, Triton 3.6, Python 3; commit of 2026-01-01, 2026-01-01;")
    assert "did not end well: values (failed: exit 1, then ok)." in text


def test_the_block_shows_peers_and_the_default_options() -> None:
    names = ("step, ours", "step, ours, default options", "step, dense", "step, compile", "step, sparse")
    rows = [{"name": name, "ms": float(i), "extra_mb": 1.0} for i, name in enumerate(names, 1)]
    result: dict[str, Any] = {"stages": {
        "sae 2,3,4,1": stage("ok", *rows[:3], rows[4]), "more 2,3,4,1": stage("ok", rows[3]), "more heads": stage("ok"),
    }}  # fmt: skip
    head, _, row = block.steps_and_encoders(result)
    assert head.startswith("| N, d, F, k | step, ours | default options | step, PyTorch | compiled | sparse | ratio |")
    assert row.startswith("| 2, 3, 4, 1 | 1 | 2 | 3 | 4 | 5 | 3.00× |")
    assert "which has a column of its own" in block.options(result)[1]
    assert "which no run has timed yet" in block.options({"stages": {"sae 2,3,4,1": stage("ok", rows[0])}})[1]


def test_the_block_shows_the_projection_and_the_optimizers_with_a_full_queue() -> None:
    names = ("loop", "floor", "ours", "ours, queue full", "ours, of another kind", "optimizer, AdamW")
    rows = [{"name": name, "r": r, "ms": i / 8} for r in (8, 64) for i, name in enumerate(names, r)]
    rows.append({"name": "optimizer, AdamW, queue full", "r": 8, "error": "the host was not ahead"})
    lines = block.plans({"stages": {"projection": stage("ok", *rows)}})
    assert (
        lines[1]
        == "| basis of 448 LoRA matrices | loop | ours | ours, queue full | ours, of another kind | copy of the bytes |"
    )
    assert lines[3] == "| 8 | 1.00 | 1.25 | 1.38 | 1.50 | 1.12 |"
    assert lines[6] == "| AdamW on them, by the basis | AdamW | AdamW, queue full |"
    assert lines[8:10] == ["| 8 | 1.62 | – |", "| 64 | 8.62 | – |"]
    assert lines[-1].startswith("Queue full: enqueued behind other work")
    assert block.plans({"stages": {}}) == []


def test_the_roofline_has_heads_and_the_projection_on_the_device() -> None:
    limits = [{"name": "copy", "rate": 4000.0}, {"name": "bf16 product 8192^3", "rate": 800.0}]
    heads = {"name": "step, all heads", "shape": "32 x 65536x128x4096x32", "ms": 50.0}
    result: dict[str, Any] = {"stages": {
        "limits": stage("ok", *limits),
        "heads": stage("ok", heads, {**heads, "name": "encode, one head, grouped", "ms": 1.0}),
        "projection": stage("ok", *({"name": name, "r": 64, "ms": 1.0} for name in ("ours", "ours, graph", "loop"))),
    }}  # fmt: skip
    rows = block.against_roofline(result)[5:]
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| 32 × 65536, 128, 4096, 32", "step, all heads"],
        ["| 65536, 128, 4096, 32", "encode, one head, grouped"],
        ["| 448 LoRA, r = 64", "ours, graph"],
    ]
