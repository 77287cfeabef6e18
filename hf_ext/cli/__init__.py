"""The command line `hf-ext`: one file a family of commands; heavy imports happen inside them.

Errors are one line on the standard error stream and a non-zero exit status: 1 when a command
failed, 2 when it was called wrongly. `--debug`, anywhere on the line, or `HF_EXT_DEBUG=1` shows
the traceback instead.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

import hf_ext
from hf_ext.cli import bench, demo, generate, listing, publish, train, verify
from hf_ext.cli.output import one_line, print_warning

app = typer.Typer(
    name="hf-ext",
    help="Methods of the language-modelling literature as plugins for Hugging Face code.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (listing, generate, train, demo, verify, bench, publish):
    for name, command, settings in module.COMMANDS:
        app.command(name, **settings)(command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf-ext {hf_ext.__version__}")
        raise typer.Exit


@app.callback()
def _global(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and all warnings.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Take the options that stand before a command; `main` has dealt with them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        The exit status.

    Example:
        >>> main(["--version"])
        hf-ext 0.1.0
        0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:end] or os.environ.get("HF_EXT_DEBUG", "") not in ("", "0")
    arguments = [argument for place, argument in enumerate(arguments) if place >= end or argument != "--debug"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a model's text may hold what the terminal's encoding has not
            stream.reconfigure(errors="replace")
    with warnings.catch_warnings():
        if not debug:
            for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
                warnings.simplefilter("ignore", category)
            warnings.showwarning = print_warning
        try:
            return app(arguments or ["--help"], standalone_mode=False) or 0
        except (KeyboardInterrupt, typer.Abort):
            print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:  # the reader of our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except Exception as error:
            if debug:
                raise
            print(f"error: {one_line(error)}", file=sys.stderr)
            # What typer itself raises (unknown command, missing argument) carries its status.
            return getattr(error, "exit_code", 1)
