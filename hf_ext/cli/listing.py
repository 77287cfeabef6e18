"""`hf-ext list` and `hf-ext show`: what there is, and what one plugin is and does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_ext import plugins
from hf_ext.cli.output import CliError, escape, print_json, print_table
from hf_ext.plugins import Plugin

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def list_plugins(
    as_json: Json = False,
    kind: Annotated[str | None, typer.Option(help="Only this kind: model, strategy, objective, ...")] = None,
) -> None:
    """List the plugins that are installed."""
    found = plugins.all()
    kinds = sorted({plugin.kind for plugin in found})
    if kind is not None and kind not in kinds:
        raise CliError(f"no plugin of kind {kind!r}; there are {', '.join(kinds)}")
    found = [plugin for plugin in found if kind in (None, plugin.kind)]
    if as_json:
        print_json([as_dict(plugin) for plugin in found])
    else:
        print_table(["name", "kind", "summary"], [(p.name, p.kind, p.summary) for p in found])


def show(
    name: Annotated[str, typer.Argument(help="A plugin, as `hf-ext list` prints it, or a slug it covers.")],
    as_json: Json = False,
) -> None:
    """Show a plugin's paper, options with types and defaults, example and measured claims."""
    plugin = plugins.get(name)
    details = describe(plugin)
    if as_json:
        print_json(details)
        return
    from rich.console import Console

    console = Console()
    console.print(f"[bold]{plugin.name}[/bold] ({plugin.kind})", plugin.summary, sep="\n", highlight=False)
    for label in ("paper", "covers", "target", "card"):
        if details[label]:
            value = details[label]
            console.print(f"{label:8}{escape(', '.join(value) if isinstance(value, list) else value)}", highlight=False)
    if details["options"]:
        console.print()
        options = [(o["name"], o["type"], o["default"], o["help"]) for o in details["options"]]
        print_table(["option", "type", "default", ""], options)
    if plugin.example:
        console.print("\n[bold]Example[/bold]", escape(plugin.example), sep="\n", highlight=False)
    console.print("\n[bold]Measured claims[/bold]")
    record = details["measured"]
    if record is None:
        console.print(f"none on record; `hf-ext verify {plugin.name}` measures them", highlight=False)
        return
    rows = [
        (claim["paper"], claim["measures"], _figure(claim), claim["threshold"] or "", claim["status"])
        for claim in record["claims"]
    ]
    print_table(["claim", "measured", "figure", "expected", "verdict"], rows)
    versions = ", ".join(f"{key} {value}" for key, value in details["measured"]["versions"].items())
    console.print(
        f"{details['measured']['date']}, {details['measured']['hardware']['cpu']}, {versions}", highlight=False
    )


def as_dict(plugin: Plugin) -> dict[str, Any]:
    """Return a plugin as plain JSON values."""
    return {**dataclasses.asdict(plugin), "covers": list(plugin.covers), "auto": dict(plugin.auto)}


def describe(plugin: Plugin) -> dict[str, Any]:
    """Return everything `show` prints, as plain JSON values. Imports the plugin's class."""
    from hf_ext.cli.options import options_of

    cls = plugins.resolve(plugin.auto["AutoConfig"], plugin.name) if plugin.auto else plugin.load()
    card, record = _cards() / f"{plugin.name}.md", _cards() / "results" / f"{plugin.name}.json"
    return {
        **as_dict(plugin),
        "options": [option.as_dict() for option in options_of(cls)],
        "card": str(card) if card.is_file() else None,
        "measured": json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None,
    }


def _cards() -> Path:
    from hf_ext.verify import cards_dir

    return cards_dir()


def _figure(claim: dict[str, Any]) -> str:
    if claim["measurement"] is None:
        return claim["error"]
    return f"{claim['measurement']['value']:.4g} {claim['unit']}".strip()


COMMANDS: list[tuple[str, Any, dict[str, Any]]] = [("list", list_plugins, {}), ("show", show, {})]
