"""Options that several commands share, word for word: where a model runs, whose code it may run, and how loudly."""

from __future__ import annotations

from typing import Annotated

import typer

MACHINE = "Machine"

Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.", rich_help_panel=MACHINE)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.", rich_help_panel=MACHINE)]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1, max=4096, help="CPU threads. (default: PyTorch's)", rich_help_panel=MACHINE, show_default=False
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with a hub model.", rich_help_panel=MACHINE),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.", rich_help_panel=MACHINE)]
