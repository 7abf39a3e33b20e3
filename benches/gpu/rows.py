"""What a stage prints, a JSON line per row, and what in its rows makes the stage fail once all of them are printed.

A row is a fault where it has an error. Excused are other people's code that runs out of memory, what says beforehand
that it needs more than the device has, and a host too slow for a time without it. What was compared is a fault outside
these bounds:

LEAST_SAME   share of latents that a stable sort selects too. Sums in another order swap the k-th and the next latent
             where they are nearly equal: one in 2 million entries in the runs so far, none of the 16384 that the
             encoder's sample has; a wrong kernel loses whole rows, and of 256 sampled rows one is 4e-3.
VALUE_ERROR  of a value relative to the row's first: two roundings to bf16, 2^-8 each. So far at most 3.9e-3.
LOSS_ERROR   between first losses of one stage, relative: contestants round activations to bf16 (2^-9) in different
             places, and the loss is a square. So far at most 1.3e-3.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from .clock import NOT_AHEAD, attempt

LEAST_SAME = 0.999
VALUE_ERROR = 2.0**-7
LOSS_ERROR = 2.0**-8
# Rows of other people's code: that the device has no memory for them says something about them, not about the package.
PEERS = frozenset({
    "product alone", "encode, torch", "encode, batch top-k, torch", "decode, embedding_bag",
    "step, dense", "step, sparse", "step, compile", "SAE step, dense", "LoRA step",
    "step, dense loop over heads", "step, sparse loop over heads", "step, compile loop over heads",
    "loop", "addmm", "foreach", "floor", "optimizer, AdamW", "optimizer, difference",
})  # fmt: skip
# Their loss has a term that the others' has not; only ours has it, so that there is nothing to compare it with.
MORE_THAN_THE_LOSS = frozenset({"step, ours, a tenth dead"})


def fault(row: dict[str, Any], reference: float | None = None, compared: bool = True) -> str | None:
    """Why a row makes its stage fail, or None; `reference` is the first loss that another column of the stage had."""
    name = row.get("name", "")
    if isinstance(error := row.get("error"), str):
        peer = name.removesuffix(", queue full") in PEERS
        excused = (
            "needs at least" in error or error.startswith(NOT_AHEAD) or (peer and error.startswith("out of memory"))
        )
        return None if excused else error
    if "ms" in row and not (math.isfinite(row["ms"]) and row["ms"] > 0):
        return f"{row['ms']} ms"
    if not compared:
        return None
    if (same := row.get("same_latents")) is not None and not same >= LEAST_SAME:
        return f"same_latents {same:.6g}, at least {LEAST_SAME}"
    if (off := row.get("value_error")) is not None and not off <= VALUE_ERROR:
        return f"value_error {off:.3g}, at most {VALUE_ERROR:.3g}"
    if (loss := row.get("first_loss")) is not None:
        if not math.isfinite(loss):
            return f"first_loss {loss}"
        if reference is not None:
            off = loss / reference - 1
            if off < -LOSS_ERROR or (off > LOSS_ERROR and name not in MORE_THAN_THE_LOSS):
                return f"first_loss {loss:.6g} where another column has {reference:.6g}, at most {LOSS_ERROR:.2g} apart"
    return None


class Rows:
    """Prints a stage's rows as they come; `end` is its exit status.

    `shared` stands in every row. `compared=False` leaves the bounds out, for a trial on a CPU; with `peers` all rows
    are other people's code.
    """

    def __init__(self, compared: bool = True, peers: bool = False, **shared: Any) -> None:
        self.compared, self.peers, self.shared = compared, peers, shared
        self.faults: list[str] = []
        self.first_loss: float | None = None

    def tell(self, row: dict[str, Any]) -> None:
        """Prints one row, with "fault" where it is one. A row that lost the device is the last."""
        row = {**self.shared, **row}
        lost = row.pop("lost", False)
        why = fault(row, self.first_loss, self.compared)
        if why is not None and self.peers and why.startswith("out of memory"):
            why = None
        if why is not None:
            self.faults.append(f"{row.get('name', '')}: {why}")
            row["fault"] = why
        elif row.get("name") not in MORE_THAN_THE_LOSS and row.get("first_loss") is not None:
            self.first_loss = self.first_loss or row["first_loss"]
        print(json.dumps(row), flush=True)
        if lost:
            print(f"{row.get('name', '')} lost the device: no call of this process runs there any more", flush=True)
            self.end()

    def attempt(self, name: str, run: Callable[[], dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Tells what `run` found under this name, or how it failed; returns it."""
        found = attempt(run)
        self.tell({**more, "name": name, **found})
        return found

    def section(self, name: str, run: Callable[[], None]) -> None:
        """`run` tells rows of its own; what it raises outside of them is a row of this name."""

        def call() -> dict[str, Any]:
            run()
            return {}

        if "error" in (found := attempt(call)):
            self.tell({"name": name, **found})

    def end(self) -> None:
        """SystemExit(1) where a row was a fault, after one line for each."""
        if self.faults:
            print("\n".join(f"fault: {line}" for line in self.faults), flush=True)
            raise SystemExit(1)
