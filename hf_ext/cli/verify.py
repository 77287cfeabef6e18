"""`hf-ext verify`: run the claim checks and set the papers' claims against what was measured."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from hf_ext.cli.output import print_json, print_report, print_table, quiet


def verify(
    names: Annotated[list[str] | None, typer.Argument(help="Plugins; all of them if none is named.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Put the figures into the model cards.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Measure what the papers of the plugins claim; the exit status is 1 if a claim is not reproduced."""
    from hf_ext import verify

    quiet()
    if write:
        verify.write([])  # refuses a place that cannot be written before anything is measured
    results = verify.run(names or None, progress=not as_json and sys.stderr.isatty())
    if as_json:
        print_json([result.to_dict() for result in results])
    else:
        rows = [(r.plugin, r.claim.paper, r.claim.measures, _figure(r), r.claim.threshold or "", r.status)
                for r in results]  # fmt: skip
        print_table(["plugin", "claim", "measured", "figure", "expected", "verdict"], rows)
    if write:
        for path in verify.write(results):
            print_report(f"wrote {path}")
    if any(result.status not in ("reproduced", "measured") for result in results):
        raise typer.Exit(1)


def _figure(result: Any) -> str:
    if result.measurement is None:
        return result.error
    spread = result.measurement.spread
    interval = f" [{spread[0]:.4g}, {spread[1]:.4g}]" if spread is not None else ""
    return f"{result.measurement.value:.4g} {result.claim.unit}".strip() + interval


COMMANDS: list[tuple[str, Any, dict[str, Any]]] = [("verify", verify, {})]
