"""`benches.host` times the calls themselves: what they launch on a GPU, and nothing else, is left out."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

import refusal_kernels as rk

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed (Linux only)", allow_module_level=True)

from benches import host


def test_calls_launch_twice_each_and_compute_nothing(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    launched: list[int] = []
    monkeypatch.setattr(host.NoLaunch, "__call__", lambda *arguments, **options: launched.append(len(arguments)))
    with host.without_launches():
        found = host.calls(4)
        for name in ("ProjectionPlan.apply_", "ProjectedAdamW.step"):
            launched.clear()
            found[name]()
            assert len(launched) == 2
    host.main(rank=4, rounds=2)
    assert capsys.readouterr().out.count(" us\n") == 3
    # Outside, everything is as it was.
    w, u = torch.randn(16, 64), rk.orthonormal_basis(torch.randn(64, 4))
    expected = rk.project_out(w, u, 1)
    rk.ProjectionPlan([(w, u, 1)]).apply_()
    assert rk.last_backend("project_out") == "cpu"
    torch.testing.assert_close(w, expected)
