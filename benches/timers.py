"""Timers for pytest-benchmark: anything callable whose results can be subtracted into seconds."""

from __future__ import annotations

import torch


class CudaTimestamp:
    """A recorded CUDA event; the difference of two is the seconds the device spent between them."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: CudaTimestamp) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def cuda_event() -> CudaTimestamp:
    """pytest-benchmark's `--benchmark-timer=benches.timers.cuda_event`."""
    return CudaTimestamp()
