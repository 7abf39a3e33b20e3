"""The Triton kernels' value tests, in the separate process that Triton's interpreter needs (see
tests/triton/conftest.py).
"""

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed (Linux only)")
def test_kernels_equal_the_reference_in_the_interpreter(tmp_path):
    report = tmp_path / "report.xml"
    tests = Path(__file__).parent / "triton"
    command = [sys.executable, "-m", "pytest", str(tests), "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    run = subprocess.run(
        command,
        cwd=tests.parent.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    assert counts["tests"] >= 60
    assert counts["failures"] == counts["errors"] == counts["skipped"] == 0
