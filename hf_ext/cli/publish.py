"""`hf-ext export` and `hf-ext push`: a plugin as a Hub repository, on disk or on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_ext.cli.output import print_json, print_report, quiet

Name = Annotated[str, typer.Argument(help="A plugin of the kind model or strategy.")]
Model = Annotated[
    str | None,
    typer.Option(help="For an architecture: the folder of its checkpoint; fresh weights without."),
]
Check = Annotated[bool, typer.Option("--check/--no-check", help="Load the result in a process without hf_ext.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def export(
    name: Name,
    directory: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
    model: Model = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    check: Check = True,
    as_json: Json = False,
) -> None:
    """Write a complete Hub repository for a plugin."""
    quiet()
    from hf_ext import hub

    folder = hub.export(name, directory, model=model, overwrite=overwrite, check=check)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    if as_json:
        print_json({"plugin": name, "directory": str(folder), "files": files})
    else:
        print("\n".join(files))
        print_report(f"wrote {len(files)} files to {folder}")


def push(
    name: Annotated[str, typer.Argument(help="A plugin of the kind model or strategy, or a folder, with a slash.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="user/name on the Hub.")],
    model: Model = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Who sees a new repository; as its owner has set.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    check: Check = True,
    as_json: Json = False,
) -> None:
    """Export a plugin and upload it to the Hub, with the token of `hf auth login` or HF_TOKEN."""
    quiet()
    import huggingface_hub

    from hf_ext import hub

    huggingface_hub.utils.disable_progress_bars()
    url = hub.push(name, repository, model=model, private=private, revision=revision, create_pr=create_pr, check=check)
    if as_json:
        print_json({"plugin": name, "repository": repository, "url": url})
    else:
        print(url)


COMMANDS: list[tuple[str, Any, dict[str, Any]]] = [("export", export, {}), ("push", push, {})]
