"""A decoding strategy as a Hub repository: `custom_generate/` with all the code it needs, and a card."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

from hf_ext.hub import cards
from hf_ext.hub.code import check_as_loader_reads, packages_of, requirements, write_code
from hf_ext.hub.errors import ExportError
from hf_ext.plugins import Plugin

#: What transformers runs for `model.generate(custom_generate="user/repo")`. It is handed every argument of
#: `generate`, and the strategy's options among them.
GENERATE = '''\
"""{name}: `model.generate(..., custom_generate="user/repo", trust_remote_code=True)`.

{summary}
"""

from dataclasses import fields
from inspect import signature

from .{module} import {strategy}

OPTIONS = {{field.name for field in fields({strategy}) if field.init}}
BOTH = OPTIONS & signature({strategy}.generate).parameters.keys()


def generate(*args, model=None, **kwargs):
    """Generate with {strategy}.

    Args:
        model: the model that generates.
        **kwargs: the options of {strategy} ({options}), and everything else that
            `generate` takes. A name that both have is the strategy's{both}.

    Returns:
        As `model.generate`.
    """
    # transformers passes the model by keyword, and then prompts come by position where this repository's own
    # model is called; a direct caller gives the model first.
    if model is None:
        model, *args = args
    if args:
        (kwargs["inputs"],) = args
    if kwargs.get("custom_generate") is not None:
        # The strategy's own call, in a model that was loaded from a repository with this file in it.
        return type(model).generate(model, **kwargs)
    options = {{name: kwargs[name] for name in OPTIONS & kwargs.keys()}}
    rest = {{name: value for name, value in kwargs.items() if name in BOTH or name not in OPTIONS}}
    return {strategy}(**options).generate(model, **rest)
'''


def write_strategy(plugin: Plugin, folder: Path, repo_id: str) -> None:
    """Write the repository of a strategy into `folder`.

    Args:
        plugin: a plugin of the kind `"strategy"`.
        folder: an empty folder.
        repo_id: what the card's example calls the repository.

    Raises:
        ExportError: the class is no dataclass with `generate`, or its code cannot be flattened.
    """
    strategy = plugin.load()
    generate = getattr(strategy, "generate", None)
    if not (isinstance(strategy, type) and dataclasses.is_dataclass(strategy) and callable(generate)):
        raise ExportError(
            f"cannot export {plugin.name}: {plugin.target} is no strategy; expected a dataclass that derives from "
            "hf_ext.generation.DecodingStrategy"
        )
    code = folder / "custom_generate"
    code.mkdir()
    module = plugin.target.partition(":")[0]
    names = write_code(plugin, [module], code, reserved=["generate"])
    both = [name for name in option_names(strategy) if name in inspect.signature(generate).parameters]
    text = GENERATE.format(
        both=f", except that {' and '.join(both)} goes to both" if both else "",
        name=plugin.name,
        summary=plugin.summary,
        module=names[module],
        strategy=strategy.__name__,
        options=", ".join(option_names(strategy)),
    )
    (code / "generate.py").write_text(text, encoding="utf-8")
    check_as_loader_reads(code / "generate.py")
    needed = requirements(code, distribution_of=packages_of(plugin)[0])
    (code / "requirements.txt").write_text("".join(f"{line}\n" for line in needed), encoding="utf-8")
    (folder / "README.md").write_text(cards.strategy_card(plugin, strategy, repo_id), encoding="utf-8")


def option_names(strategy: Any) -> list[str]:
    """Return the names of a strategy's options."""
    return [field.name for field in dataclasses.fields(strategy) if field.init]
