"""What `benches.gpu.paths` concludes from its measurements."""

from __future__ import annotations

import pytest
import typer

from benches.gpu import paths


def row(d: int, name: str, ms: float | None, f: int = 4096, k: int = 32) -> dict[str, object]:
    return {"d": d, "f": f, "k": k, "name": name, **({"error": "out of memory"} if ms is None else {"ms": ms})}


def test_a_path_is_ahead_up_to_the_first_width_where_chunks_are_faster() -> None:
    rows = [
        row(64, "grouped", 1.0), row(64, "chunked", 2.0),
        row(128, "grouped", 3.0), row(128, "grouped, 3 keys", 1.5), row(128, "chunked", 2.0),
        row(256, "grouped", 5.0), row(256, "chunked", 4.0),
        row(512, "grouped", 1.0), row(512, "chunked", 4.0),
        row(64, "grouped", 2.0, k=64), row(64, "chunked", 1.0, k=64),
        row(64, "grouped", 2.0, f=128), row(64, "chunked", None, f=128),
    ]  # fmt: skip
    found = {(r["f"], r["k"]): r["d"] for r in paths.ahead(rows)}  # type: ignore[arg-type]
    assert found == {(4096, 32): 128, (4096, 64): 0, (128, 32): 0}


@pytest.mark.parametrize("text", ["", "a", "0", "3 -1"])
def test_a_list_that_is_none_is_refused(text: str) -> None:
    assert paths.numbers("3 40") == [3, 40]
    with pytest.raises(typer.BadParameter, match="positive integers"):
        paths.numbers(text)
