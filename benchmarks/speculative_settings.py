"""What the speculative benchmark runs on: targets, their drafts, and held-out prompts with and without tables."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_ext import demo
from hf_ext.benchmarks import damped
from hf_ext.cli.output import CliError
from hf_ext.demo.corpus import sources
from hf_ext.demo.prompts import prompts as function_prompts

#: The targets, by name.
TARGETS = ("embedded", "memory-bound")
_QUOTED = re.compile(r"""[rbuf]*("[^"\n]*"|'[^'\n]*')""", re.IGNORECASE)
_CONSTANT = re.compile(r"\b(\d[\w.]*|None|True|False)\b")
_BETWEEN = re.compile(r"[\s,:()\[\]{}+-]*")


@dataclass(frozen=True)
class Prompt:
    """A prompt as ids.

    Args:
        name: module and function.
        ids: `(1, length)` int64.
        table: whether it is mostly a table of literals, which flatters whoever copies from the prompt.
    """

    name: str
    ids: torch.Tensor
    table: bool


@dataclass
class Setting:
    """A target with the drafts that suit it.

    Args:
        name: one of `TARGETS`.
        target: the model that generates.
        drafts: draft models by name, of the target's vocabulary.
        tokenizer: of all of them.
        prompts: what is continued.
        notes: what else belongs into the record.
    """

    name: str
    target: PreTrainedModel
    drafts: dict[str, PreTrainedModel]
    tokenizer: Any
    prompts: list[Prompt] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)


def load(name: str, prompts: int, damping: float = damped.DAMPING) -> Setting:
    """Return the setting called `name`.

    Args:
        name: `"embedded"`: the embedded target with the embedded draft. `"memory-bound"`: the damped target with
            the same draft, and with the embedded target as a draft that agrees more.
        prompts: how many.
        damping: of the memory-bound target.

    Raises:
        CliError: there is no such setting, or there are not so many prompts.
    """
    if name not in TARGETS:
        raise CliError(f"no target {name!r}; there are {', '.join(TARGETS)}, and 'all'")
    tokenizer = AutoTokenizer.from_pretrained(demo.path("target"))
    target, draft = (_model(which) for which in ("target", "draft"))
    if name == "embedded":
        setting = Setting(name, target, {"draft": draft}, tokenizer)
    else:
        wide = endless(damped.build(damping, source=target))
        setting = Setting(name, wide, {"draft": draft, "target": target}, tokenizer, notes={"damping": damping})
    setting.notes["parameters"] = {
        "target": setting.target.num_parameters(),
        **{f"draft {which!r}": model.num_parameters() for which, model in setting.drafts.items()},
    }
    setting.prompts = choose_prompts(prompts, tokenizer)
    return setting


def _model(which: str) -> PreTrainedModel:
    return endless(AutoModelForCausalLM.from_pretrained(demo.path(which), dtype=torch.float32).eval())


def endless(model: PreTrainedModel) -> PreTrainedModel:
    """Take the end token from a model's settings, so that every text gets its full length without a processor."""
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    return model


def choose_prompts(count: int, tokenizer: Any) -> list[Prompt]:
    """Return `count` prompts from held-out modules: three quarters are functions, the others tables.

    Raises:
        CliError: there are not so many.
    """
    tables = count // 4
    try:
        functions = [(f"{p.module}:{p.function}", p.text) for p in function_prompts(count - tables, tokenizer)]
    except ValueError as error:
        raise CliError(f"--prompts {count}: {error}") from error
    found = list(_tables(tokenizer))
    if len(found) < tables:
        raise CliError(f"--prompts {count}: the held-out modules have {len(found)} tables, {tables} are needed")
    texts = functions + [found[i * len(found) // tables] for i in range(tables)]
    return [
        Prompt(name, torch.tensor([tokenizer(text, verbose=False)["input_ids"]]), mostly_table(text))
        for name, text in texts
    ]


def _tables(tokenizer: Any, rows: int = 16, tokens: int = 160) -> Iterator[tuple[str, str]]:
    """Yield the beginnings of long literal tables of the held-out modules, at most two a module."""
    for source in sources(held_out=True):
        lines, found = source.text.splitlines(keepends=True), 0
        for node in ast.walk(ast.parse(source.text)):
            if not isinstance(node, ast.Assign) or not isinstance(node.value, (ast.List, ast.Tuple, ast.Dict, ast.Set)):
                continue
            first, last = node.lineno - 1, node.end_lineno or node.lineno
            text = "".join(lines[first : first + rows // 2]).rstrip("\n")
            fits = last - first >= rows and len(tokenizer(text, verbose=False)["input_ids"]) <= tokens
            if fits and mostly_table(text) and found < 2:
                found += 1
                yield f"{source.name}:{node.lineno}", text


def mostly_table(text: str) -> bool:
    """Return whether more than half of the lines hold nothing but literals.

    Example:
        >>> mostly_table("X = [\\n  ('a', 1),\\n  ('b', 2),\\n"), mostly_table("def f(x):\\n  return [1, x]\\n")
        (True, False)
    """
    lines = [line for line in text.splitlines() if line.strip()]
    return sum(map(_is_row, lines)) > len(lines) / 2


def _is_row(line: str) -> bool:
    rest = _CONSTANT.sub("", _QUOTED.sub("", line))
    return rest != line and _BETWEEN.fullmatch(rest) is not None
