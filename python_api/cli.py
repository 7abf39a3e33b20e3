"""The command `refusal-kernels`: a thin app that registers command modules and turns every user error into one line.

A command module is a module of this package with a function `register(app)`; its name in `COMMAND_MODULES` adds its
commands. Command modules import what is heavy inside their functions, so that `--help` stays quick.

Exit codes: 0 done; 1 it failed while running; 2 the arguments or the data they name do not fit; 130 interrupted.
REFUSAL_KERNELS_TRACEBACK=1 shows tracebacks in place of the one line.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

import refusal_kernels as rk

COMMAND_MODULES = (
    "cli_train",
    "cli_heads",
    "cli_features",
    "cli_finetune",
    "cli_evaluate",
    "cli_tradeoff",
    "cli_experiment",
    "cli_info",
)

# What a user can cause. Anything else is a bug of ours and keeps its traceback.
_WRONG_INPUT = (ValueError, TypeError, FileNotFoundError, IsADirectoryError, NotADirectoryError)
_FAILED = (OSError, ImportError, MemoryError, rk.BackendError)


# How torch's allocator for the CPU says that there is no memory.
_NO_MEMORY = ("can't allocate memory", "not enough memory")


class CommandFailed(RuntimeError):
    """Raised by commands: the message is all the user sees, the exit code is 1."""


class OneLineErrors(TyperGroup):
    """A command group whose errors are one line on stderr, without usage boxes and without tracebacks."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        rest = (args, prog_name, complete_var)
        if not standalone_mode:
            return super().main(*rest, False, windows_expand_args, **extra)
        try:
            status = super().main(*rest, False, windows_expand_args, **extra)
        except Exception as error:
            if os.environ.get("REFUSAL_KERNELS_TRACEBACK"):
                raise
            line, status = _explain(error)
            typer.echo(line, err=True)
        sys.exit(status if isinstance(status, int) else 0)


def _explain(error: Exception) -> tuple[str, int]:
    """(one line for the user, exit code); raises the error again when it is none of the user's."""
    if isinstance(error, typer.Abort):
        return "aborted", 130
    # Typer's usage errors, by shape: its own copy of click, or click itself, depending on its version.
    format_message = getattr(error, "format_message", None)
    if callable(format_message):
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "refusal-kernels"
        return f"error: {_one_line(format_message())} (see {command} --help)", int(getattr(error, "exit_code", 2))
    if isinstance(error, CommandFailed | _torch_out_of_memory()):
        return f"error: {_one_line(str(error))}", 1
    if (why := _of_the_machine(error)) is not None:
        return f"error: {why}", 1
    if isinstance(error, _WRONG_INPUT):
        return f"error: {_one_line(str(error))}", 2
    if isinstance(error, _FAILED):
        return f"error: {_one_line(str(error)) or type(error).__name__}", 1
    raise error


def _torch_out_of_memory() -> type[BaseException]:
    import torch

    return torch.cuda.OutOfMemoryError


def _of_the_machine(error: Exception) -> str | None:
    """What to say of errors that a full disk and full memory cause and that have no types of Python's for these."""
    from safetensors import SafetensorError

    if isinstance(error, SafetensorError):
        return f"cannot write to or read from a .safetensors file: {_one_line(str(error))}"
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY):
        return f"out of memory: {_one_line(str(error)).rpartition('] ')[2][:300]}"
    return None


def _one_line(text: str) -> str:
    return " ".join(text.split())


app = typer.Typer(
    name="refusal-kernels",
    cls=OneLineErrors,
    help="Sparse autoencoders on attention heads and fine-tuning without losing refusals, on kernels of their own.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True),
) -> None:
    if version:
        typer.echo(f"refusal-kernels {rk.__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for _name in COMMAND_MODULES:
    importlib.import_module(f".{_name}", __package__).register(app)
