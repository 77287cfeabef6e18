"""`hf-ext demo`: the main job on real input, with the embedded models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_ext.cli.output import print_json, quiet


def demo(
    report: Annotated[Path | None, typer.Option(metavar="DIR", help="Also write a report with plots there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Decode held-out Python four ways, then convert, fine-tune, save and reload a custom architecture."""
    quiet()
    from hf_ext import demo

    figures = demo.run(report=report, json=as_json)
    if as_json:
        print_json(figures)


COMMANDS: list[tuple[str, Any, dict[str, Any]]] = [("demo", demo, {})]
