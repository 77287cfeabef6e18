"""What the commands share: errors of one line, JSON, tables, and silence from the libraries below."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

#: An error message longer than this says no more by going on.
LONGEST = 700


class CliError(Exception):
    """A command cannot do what it was asked; the text is what the user reads."""


def one_line(error: BaseException) -> str:
    """Write an exception as one line: its text where hf_ext wrote it, with its type where others did.

    Example:
        >>> one_line(CliError("the prompt is empty")), one_line(KeyError("x"))
        ('the prompt is empty', "KeyError: 'x' (--debug shows where)")
    """
    if hasattr(error, "format_message"):  # what typer raises for a wrong call
        return _squeeze(error.format_message())
    text = _squeeze(str(error))
    module = type(error).__module__.partition(".")[0]
    if module == "hf_ext" or (isinstance(error, ValueError) and _raised_here(error)):
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


def _raised_here(error: BaseException) -> bool:
    """Whether the exception was raised by code of hf_ext itself, whose messages are written for users."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and str(frame.tb_frame.f_globals.get("__name__", "")).startswith("hf_ext.")


def _squeeze(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else text[: LONGEST - 4] + " ..."


def print_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Write a warning as one line on the standard error stream; takes the place of `warnings.showwarning`."""
    print(f"warning: {_squeeze(str(message))}", file=sys.stderr)


def print_json(value: Any) -> None:
    """Write `value` as JSON on the standard output stream."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(json.dumps(value, indent=1, ensure_ascii=not encoding.lower().startswith("utf"), default=str))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """Write a table on the standard output stream, wrapped to the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    Console().print(table)


def escape(text: str) -> str:
    """Keep square brackets in `text` from being read as rich markup."""
    from rich.markup import escape as rich_escape

    return rich_escape(text)


def print_report(text: str) -> None:
    """Write what a command reports beside its result, on the standard error stream."""
    print(text, file=sys.stderr)


def quiet() -> None:
    """Keep transformers' progress bars and log messages below errors off the screen."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
