"""Keep the plugin table of README.md equal to what `hf-ext list` prints: `python -m hf_ext.cli.readme`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from hf_ext import plugins
from hf_ext.plugins import Plugin

BEGIN = "<!-- plugins:begin, written by `make readme` from what `hf-ext list` prints; do not edit -->"
END = "<!-- plugins:end -->"
BLOCK = re.compile(rf"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)


def table() -> str:
    """Return the table of this package's plugins, in Markdown, between its markers."""
    own = [plugin for plugin in plugins.all() if plugin.target.startswith("hf_ext.")]
    rows = ["| Plugin | Kind | What it does | Paper | Figures |", "|---|---|---|---|---|", *map(_row, own)]
    return "\n".join([BEGIN, *rows, END])


def _row(plugin: Plugin) -> str:
    found = re.search(r"arXiv:([\w.]+)", plugin.paper)
    paper = f"[{found.group(1)}](https://arxiv.org/abs/{found.group(1)})" if found else plugin.paper
    card = f"[card](model_cards/{plugin.name}.md)" if plugin.claims else ""  # yardsticks have none
    return f"| `{plugin.name}` | {plugin.kind} | {plugin.summary} | {paper} | {card} |"


def renewed(text: str) -> str:
    """Return the README's text with the present table.

    Raises:
        ValueError: it has no markers, or several.
    """
    if len(BLOCK.findall(text)) != 1:
        raise ValueError(f"README.md needs exactly one block {BEGIN!r} ... {END!r}")
    return BLOCK.sub(lambda _: table(), text)


if __name__ == "__main__":
    readme = Path(sys.argv[1] if len(sys.argv) > 1 else "README.md")
    readme.write_text(renewed(readme.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {readme}")
