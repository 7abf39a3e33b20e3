"""These tests run Triton's interpreter, which must be chosen before any kernel is decorated: they need a process of
their own.

tests/test_triton.py starts it; by hand: TRITON_INTERPRET=1 python -m pytest tests/triton. A plain pytest run collects
none.
"""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _in_chunks(monkeypatch):
    """One autoencoder by chunks, as most shapes are: tests are small, and the other path has tests of its own."""
    from refusal_kernels.triton_kernels import encode

    monkeypatch.setattr(encode, "_GROUPED_ALONE", ())
