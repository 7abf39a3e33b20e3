"""`refusal-kernels info`: the same as `python -m refusal_kernels.info`."""

from __future__ import annotations

import typer


def info(
    as_json: bool = typer.Option(False, "--json", help="Machine-readable."),
    check: bool = typer.Option(False, "--check", help="Run each operator once on each back-end against the reference."),
) -> None:
    """Show versions, devices, and for every operator and back-end whether it runs here or why not."""
    from refusal_kernels.info import main

    arguments = [flag for flag, given in (("--json", as_json), ("--check", check)) if given]
    raise typer.Exit(main(arguments) or 0)


def register(app: typer.Typer) -> None:
    app.command("info")(info)
