"""Model cards: writing measured figures into them, and finding what is wrong with one."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

import hf_ext
from hf_ext import plugins
from hf_ext.plugins import Plugin
from hf_ext.verify import render, stamp
from hf_ext.verify.claim import Measurement, Result
from hf_ext.verify.runner import claims_of

#: Headings every card has, in this order.
SECTIONS = ("Use", "Options", "Measured claims", "Limitations", "Citation")
#: Metadata every card has; strategies also carry the tag that the Hub lists custom decoding by.
METADATA = ("license", "library_name", "tags", "pipeline_tag")


class CardError(Exception):
    """A card cannot be written."""


def cards_dir() -> Path:
    """Return the folder of the cards: the checkout's, or the one inside an installed package."""
    package = Path(hf_ext.__file__).resolve().parent
    checkout = package.parent / "model_cards"
    return checkout if (package.parent / "pyproject.toml").is_file() else package / "model_cards"


def record_of(results: Sequence[Result], command: str) -> dict[str, Any]:
    """Build the machine-readable record of one plugin's results, stamped with this machine."""
    return {
        "plugin": results[0].plugin,
        "date": datetime.now(UTC).date().isoformat(),
        "command": command,
        "hardware": stamp.hardware(),
        "versions": stamp.versions(),
        "embedded_weights": stamp.weights(),
        "claims": [result.to_dict() for result in results],
    }


def write(results: Sequence[Result], root: str | Path | None = None) -> list[Path]:
    """Write the figures of `results` into the model cards, and the records that the figures come from.

    A card that does not exist yet is started from what the plugin says of itself; its
    limitations and citation are for its author to write. Claims that were not reproduced and
    checks that ended in an error are written as such.

    Args:
        results: from `run`, all claims of each plugin.
        root: folder of the cards; by default that of the checkout hf_ext is used from.

    Returns:
        The files that were written.

    Raises:
        CardError: hf_ext is not used from a checkout, the folder cannot be written, or results
            are missing for some of a plugin's claims. Nothing is written then.
    """
    folder = Path(root) if root is not None else _writable_checkout()
    texts: dict[Path, str] = {}
    for name, group in groupby(results, key=lambda result: result.plugin):
        mine = list(group)
        missing = {claim.name for claim in claims_of(name)} - {result.claim.name for result in mine}
        if missing:
            raise CardError(f"no results for the claims {', '.join(sorted(missing))} of {name}; run all of its claims")
        record = record_of(mine, command=f"hf-ext verify {name} --write")
        path = folder / f"{name}.md"
        texts[folder / "results" / f"{name}.json"] = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        card = path.read_text(encoding="utf-8") if path.exists() else first_card(plugins.get(name))
        texts[path] = with_generated(card, record)
    try:
        for path, text in texts.items():
            _replace(path, text)
    except OSError as error:
        raise CardError(f"cannot write the model cards in {folder}: {error}") from error
    return list(texts)


def with_generated(card: str, record: Mapping[str, Any]) -> str:
    """Return the text of `card` with all that is generated: figures, `model-index`, table of options.

    Args:
        card: the card as it is.
        record: what was measured.

    Raises:
        CardError: the card has no claims block or no readable metadata.
    """
    from hf_ext.cli.options import options_of

    plugin = plugins.get(record["plugin"])
    cls = plugins.resolve(plugin.auto["AutoConfig"], plugin.name) if plugin.auto else plugin.load()
    options = render.options_block([option.as_dict() for option in options_of(cls)])

    parsed = _parse(card, plugin.name)
    for pattern, begin in ((render.BLOCK, render.BEGIN), (render.OPTIONS_BLOCK, render.OPTIONS_BEGIN)):
        if (count := len(pattern.findall(card))) != 1:
            raise CardError(
                f"the card of {record['plugin']} needs exactly one block that starts {begin!r}, has {count}"
            )
    parsed.text = render.BLOCK.sub(lambda _: render.block(record), parsed.text)
    parsed.text = render.OPTIONS_BLOCK.sub(lambda _: options, parsed.text)
    parsed.data.model_name = record["plugin"]
    parsed.data.eval_results = render.eval_results(record)
    return str(parsed).rstrip() + "\n"


def first_card(plugin: Plugin) -> str:
    """Start a card from what the plugin says of itself; options and claims are filled in, the prose is not."""
    tags = ["hf_ext", plugin.kind, plugin.name, *(["custom_generate"] if plugin.kind == "strategy" else [])]
    data = ModelCardData(
        license="apache-2.0", library_name="transformers", pipeline_tag="text-generation", tags=tags
    ).to_yaml()
    lines = [
        f"# {plugin.name}", plugin.summary, f"Paper: {plugin.paper}",
        "## Use", f"```python\n{plugin.example}\n```",
        "## Options", f"{render.OPTIONS_BEGIN}\n{render.OPTIONS_END}",
        "## Measured claims", f"{render.BEGIN}\n{render.END}",
    ]  # fmt: skip
    return str(ModelCard(f"---\n{data}\n---\n\n" + "\n\n".join(lines)))


def snippets(card: str) -> list[str]:
    """Return the Python code blocks of a card's section "Use".

    Example:
        >>> snippets("## Use\\n```python\\nprint(1)\\n```\\n## Options")
        ['print(1)\\n']
    """
    section = re.search(r"^## Use\n(.*?)(?=^## |\Z)", card, re.DOTALL | re.MULTILINE)
    return re.findall(r"^```python\n(.*?)^```", section.group(1), re.DOTALL | re.MULTILINE) if section else []


def problems(name: str, root: str | Path | None = None) -> list[str]:
    """Say what is wrong with the card of the plugin called `name`; an empty list means nothing is.

    Checked are its metadata, its sections, and that every figure on it comes from a record
    which covers exactly the plugin's present claims.

    Args:
        name: of the plugin.
        root: folder of the cards, `cards_dir()` by default.
    """
    plugin, folder = plugins.get(name), Path(root) if root is not None else cards_dir()
    path, record_path = folder / f"{plugin.name}.md", folder / "results" / f"{plugin.name}.json"
    if absent := [p.name for p in (path, record_path) if not p.is_file()]:
        return [f"{' and '.join(absent)} missing; run `hf-ext verify {plugin.name} --write`"]
    try:
        claims = claims_of(plugin.name)
    except plugins.PluginError as error:
        return [str(error)]
    card, record = path.read_text(encoding="utf-8"), json.loads(record_path.read_text(encoding="utf-8"))
    try:
        return [*_record_problems(record, claims), *_figure_problems(card, record), *_form_problems(card, plugin)]
    except CardError as error:
        return [str(error)]


def _record_problems(record: Mapping[str, Any], claims: Sequence[Any]) -> list[str]:
    recorded = {item["claim"]: item for item in record["claims"]}
    found = []
    if record["embedded_weights"] != stamp.weights():
        found.append("the figures were measured with other embedded models than those installed")
    for claim in claims:
        item = recorded.pop(claim.name, None)
        if item is None:
            found.append(f"the record lacks the claim {claim.name!r}")
            continue
        condition = str(claim.threshold) if claim.threshold is not None else None
        now = (claim.paper, claim.measures, condition, claim.unit, claim.data)
        if now != (item["paper"], item["measures"], item["threshold"], item["unit"], item["data"]):
            found.append(f"the claim {claim.name!r} has changed since it was measured")
        if item["measurement"] is None:
            found.append(f"the check of {claim.name!r} ended in an error: {item['error']}")
        elif item["passed"] != claim.judge(Measurement.from_dict(item["measurement"])):
            found.append(f"the record's verdict on {claim.name!r} contradicts its figure")
    return found + [f"the record holds the claim {name!r}, which the plugin does not make" for name in recorded]


def _figure_problems(card: str, record: Mapping[str, Any]) -> list[str]:
    found = (
        []
        if with_generated(card, record) == card
        else ["the card's generated parts are not those its record and its class give"]
    )
    body = card.split("\n---\n", 1)[1]
    if strays := render.stray_figures(body, record):
        found.append(f"the prose quotes figures that no claim check produced: {', '.join(strays)}")
    return found


def _form_problems(card: str, plugin: Plugin) -> list[str]:
    data = _parse(card, plugin.name).data
    found = [f"metadata lacks {key}" for key in METADATA if not data.get(key)]
    if not data.eval_results:
        found.append("metadata has no evaluation results in model-index")
    for tag in ("hf_ext", plugin.name, *(["custom_generate"] if plugin.kind == "strategy" else [])):
        if tag not in (data.tags or []):
            found.append(f"metadata lacks the tag {tag}")
    headings = re.findall(r"^## (.+)$", card, re.MULTILINE)
    if missing := [section for section in SECTIONS if section not in headings]:
        found.append(f"sections missing: {', '.join(missing)}")
    if not snippets(card):
        found.append("the section Use has no Python snippet")
    return found


def _parse(card: str, name: str) -> ModelCard:
    try:
        return ModelCard(card)
    except (ValueError, YAMLError) as error:
        raise CardError(f"the card of {name} has no readable YAML metadata: {error}") from error


def _writable_checkout() -> Path:
    folder = cards_dir()
    if not (folder.parent / "pyproject.toml").is_file():
        raise CardError(
            "writing model cards needs a checkout of hf_ext, and this one is an installed package; "
            "clone the repository, `pip install -e .` in it and run the command there"
        )
    if not os.access(folder, os.W_OK):
        raise CardError(f"the folder of the model cards cannot be written: {folder}")
    return folder


def _replace(path: Path, text: str) -> None:
    """Write `path` in one step, so that an interrupted run leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
