"""`hf-ext bench`: run one of the package's benchmarks."""

from __future__ import annotations

import ast
import importlib.util
import pkgutil
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_ext.cli.output import CliError, print_table

#: Arguments that `bench` does not know go to the benchmark, and so does --help behind its name.
PASS_ON = {"context_settings": {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}}
HELP = ("-h", "--help")


def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="A benchmark; without a name they are listed.")] = None,
) -> None:
    """Run a benchmark; what follows its name is passed on to it, also --help."""
    if name in HELP:
        print(context.get_help())
        return
    found = benchmarks()
    if name is None:
        print_table(["benchmark", "what it measures"], found.items())
        return
    if name not in found:
        raise CliError(f"no benchmark {name!r}; there are {', '.join(found)}")
    try:
        importlib.import_module(f"hf_ext.benchmarks.{name}").main(context.args)
    except SystemExit as error:  # of argparse, which has said what is wrong or printed the help, or with a reason
        if isinstance(error.code, str):
            raise CliError(error.code) from None
        raise typer.Exit(error.code or 0) from None


def benchmarks() -> dict[str, str]:
    """Return the names of the benchmarks, each with the first line of its docstring. Imports none of them."""
    import hf_ext.benchmarks

    found = {}
    for module in pkgutil.iter_modules(hf_ext.benchmarks.__path__):
        spec = importlib.util.find_spec(f"hf_ext.benchmarks.{module.name}")
        if spec is None or spec.origin is None:
            continue
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and _takes_arguments(node) for node in tree.body):
            found[module.name] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def _takes_arguments(function: ast.FunctionDef) -> bool:
    """Tell whether it is the `main(argv)` of a benchmark; scripts that benchmarks start have a `main` of their own."""
    return function.name == "main" and [argument.arg for argument in function.args.args] == ["argv"]


COMMANDS: list[tuple[str, Any, dict[str, Any]]] = [("bench", bench, PASS_ON)]
