"""`hf-ext demo`: the main job on real input, with the embedded models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_ext.cli.output import quiet


def demo(
    report: Annotated[Path | None, typer.Option(metavar="DIR", help="Also write a report with plots there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Decode held-out Python four ways, then convert, fine-tune, save and reload a custom architecture."""
    quiet()
    from hf_ext.demo import run

    run.run(report=report, json=as_json)


COMMANDS: list[tuple[str, Any, dict[str, Any]]] = [("demo", demo, {})]
