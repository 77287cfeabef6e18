"""The README of an exported repository: the plugin's model card, with what the Hub's readers look for."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hf_ext.plugins import Plugin


def strategy_card(plugin: Plugin, strategy: Any, repo_id: str) -> str:
    """Return the card of a strategy.

    Its model card, where there is one, comes first; the sections that the Hub's custom decoding
    methods have follow, as far as the card lacks them.

    Args:
        plugin: the strategy's plugin.
        strategy: its class, a dataclass.
        repo_id: what the example calls the repository.
    """
    decoder_only = not getattr(strategy, "encoder_decoder", True)
    compatibility = ["Decoder-only transformers models." if decoder_only else "Any transformers model that generates."]
    if getattr(strategy, "needs_cache", False):
        compatibility.append("The model must support a KV cache (`use_cache=True`).")
    if not getattr(strategy, "samples", True):
        compatibility.append("Deterministic: `do_sample=True` is refused.")
    options = [f"{name}={default}," for name, _, default, _ in _options(strategy) if default not in ("", "None")]
    lines = "\n    ".join([*options, *(f"{name}=...," for name, _, default, _ in _options(strategy) if not default)])
    example = f"""\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

checkpoint = "path or id of a causal language model"
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = AutoModelForCausalLM.from_pretrained(checkpoint)
inputs = tokenizer("def read_lines(path):", return_tensors="pt")
outputs = model.generate(
    **inputs,
    custom_generate="{repo_id}",
    trust_remote_code=True,
    {lines}
    max_new_tokens=64,
)
print(tokenizer.decode(outputs[0], skip_special_tokens=True))
```"""
    sections = {
        "Base model": "None: this repository holds decoding code and no weights; it runs on the model it is called on.",
        "Model compatibility": "\n".join(f"- {line}" for line in compatibility),
        "Additional Arguments": _table(strategy),
        "Output Type changes": "None: ids, or the output class that `return_dict_in_generate=True` asks for.",
        "Example usage": example,
    }
    return _compose(plugin, sections, tags=("custom_generate", "transformers"))


def model_card(plugin: Plugin, auto_class: str, repo_id: str, own_weights: bool) -> str:
    """Return the card of an architecture.

    Its metadata has no results, which were measured with other weights. The licence of the plugin's
    card is that of the code.

    Args:
        plugin: the architecture's plugin.
        auto_class: the class that loads it, such as `"AutoModelForCausalLM"`.
        repo_id: what the example calls the repository.
        own_weights: the weights are the user's, whose licence only the user knows.
    """
    example = f"""\
```python
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{repo_id}", trust_remote_code=True)
```"""
    card = ModelCard(_compose(plugin, {"Example usage": example}, tags=("custom_code", "transformers")))
    card.data.eval_results = None
    if own_weights and card.data.license:
        licence, card.data.license = card.data.license, None
        card.text += f"\n## License\n\nThe code is under {licence}; that says nothing about the weights.\n"
    return str(card)


def _compose(plugin: Plugin, sections: dict[str, str], tags: Iterable[str]) -> str:
    """Put `sections` behind the plugin's model card and `tags` into its metadata."""
    path = find_card(plugin)
    if path is not None:
        card = ModelCard(path.read_text(encoding="utf-8"))
    else:
        data = ModelCardData(
            library_name="transformers", pipeline_tag="text-generation", tags=["hf_ext", plugin.name]
        ).to_yaml()
        paper = f"\n\nPaper: {plugin.paper}" if plugin.paper else ""
        card = ModelCard(f"---\n{data}\n---\n\n# {plugin.name}\n\n{plugin.summary}{paper}\n")
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
    present = {heading.strip().lower() for heading in re.findall(r"^#+ (.+)$", card.text, re.MULTILINE)}
    missing = [f"## {title}\n\n{text}" for title, text in sections.items() if title.lower() not in present]
    card.text = "\n\n".join([card.text.rstrip(), *missing]) + "\n"
    return str(card)


def find_card(plugin: Plugin) -> Path | None:
    """Return the model card of a plugin, in `model_cards` of the package that ships it, if there is one."""
    package = plugin.target.split(".")[0].partition(":")[0]
    if package == "hf_ext":
        from hf_ext.verify import cards_dir

        folders = [cards_dir()]
    else:
        spec = importlib.util.find_spec(package)
        folders = [Path(place) / "model_cards" for place in (spec and spec.submodule_search_locations) or []]
    return next((path for folder in folders if (path := folder / f"{plugin.name}.md").is_file()), None)


def _table(strategy: Any) -> str:
    """Return the options as a table."""
    rows = [
        f"| `{name}` | `{kind}` | {f'`{default}`' if default else 'required'} | {meaning} |"
        for name, kind, default, meaning in _options(strategy)
    ]
    if not rows:
        return "None."
    return "\n".join(["| argument | type | default | meaning |", "|---|---|---|---|", *rows])


def _options(strategy: Any) -> list[tuple[str, str, str, str]]:
    """Return name, type, default (empty where there is none) and meaning of every option."""
    meanings = argument_docs(inspect.getdoc(strategy) or "")
    found = []
    for field in dataclasses.fields(strategy):
        if not field.init:
            continue
        default = ""
        if field.default is not dataclasses.MISSING:
            default = repr(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            default = repr(field.default_factory())
        kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
        found.append((field.name, kind.replace("|", "\\|"), default, meanings.get(field.name, "").replace("|", "\\|")))
    return found


def argument_docs(doc: str) -> dict[str, str]:
    """Read the section `Args` of a docstring.

    Example:
        >>> argument_docs("Do it.\\n\\nArgs:\\n    a: one\\n        and more.\\n    b: two.\\n\\nReturns:\\n    c: x")
        {'a': 'one and more.', 'b': 'two.'}
    """
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", doc, re.MULTILINE)
    found: dict[str, str] = {}
    current = ""
    for line in section[1].splitlines() if section else []:
        start = re.match(r" {4}\*{0,2}(\w+)(?: \([^)]*\))?: (.*)", line)
        if start:
            current = start[1]
            found[current] = start[2].strip()
        elif current and line.strip():
            found[current] += f" {line.strip()}"
    return found
