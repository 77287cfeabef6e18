"""`hf-ext export` and `hf-ext push`: a plugin as a Hub repository, on disk or on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_ext.cli.output import print_json, print_report, quiet

Name = Annotated[str, typer.Argument(help="A plugin of the kind model or strategy.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def export(
    name: Name,
    directory: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
    as_json: Json = False,
) -> None:
    """Write a complete Hub repository for a plugin."""
    quiet()
    from hf_ext import hub

    hub.export(name, directory)
    files = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    if as_json:
        print_json({"plugin": name, "directory": str(directory), "files": files})
    else:
        print("\n".join(files))
        print_report(f"wrote {len(files)} files to {directory}")


def push(
    name: Name,
    repository: Annotated[str, typer.Argument(metavar="REPO", help="user/name on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    as_json: Json = False,
) -> None:
    """Export a plugin and upload it to the Hub, with the token of `hf auth login` or HF_TOKEN."""
    quiet()
    from hf_ext import hub

    url = str(hub.push(name, repository, private=private))
    if as_json:
        print_json({"plugin": name, "repository": repository, "url": url})
    else:
        print(url)


COMMANDS: list[tuple[str, Any, dict[str, Any]]] = [("export", export, {}), ("push", push, {})]
