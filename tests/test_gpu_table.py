"""What `python -m benches.gpu` prints in the end, and the README's block of it: benches/gpu/table.py."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `benches` is not installed: it runs from the repository root

from benches.gpu import table  # noqa: E402


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
