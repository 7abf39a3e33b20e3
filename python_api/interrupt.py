"""Ctrl-C and SIGTERM as a flag that is read between steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interruptible:
    """Turns the first SIGINT or SIGTERM into a flag that is read between steps; the second SIGINT acts as ever."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruptible:
        # Python lets only the main thread set handlers; a trainer in another thread is interrupted by its owner.
        if threading.current_thread() is threading.main_thread():
            for which in (signal.SIGINT, signal.SIGTERM):
                self._previous[which] = signal.signal(which, self._request)
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self._previous[signal.SIGINT])

    def __exit__(self, *exception: object) -> None:
        for which, handler in self._previous.items():
            signal.signal(which, handler)
