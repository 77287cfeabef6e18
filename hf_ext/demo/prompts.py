"""Prompts from held-out modules: a function's signature, docstring and first lines."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

from hf_ext.demo.corpus import sources


@dataclass(frozen=True)
class Prompt:
    """The beginning of a function that the embedded models never saw.

    Args:
        module: the module's file name.
        function: the function's name.
        text: source up to the middle of the function's body.
        reference: the rest of the function.
    """

    module: str
    function: str
    text: str
    reference: str


def prompts(count: int, tokenizer: Any, *, tokens: int = 160, lines: int = 6) -> list[Prompt]:
    """Cut `count` prompts from the held-out modules, at most one function a module at first.

    Args:
        count: how many.
        tokenizer: measures their length.
        tokens: at most so many tokens, signature, docstring and first lines together.
        lines: at most so many lines of the body (after the docstring) belong to the prompt; as many must follow.

    Returns:
        Prompts, always the same ones for one Python version and tokenizer.

    Raises:
        ValueError: the held-out modules have fewer suitable functions.
    """
    by_module: list[list[Prompt]] = []
    for source in sources(held_out=True):
        if "/" not in source.name:
            found = [p for p in _functions(source.name, source.text, lines) if _fits(p, tokenizer, tokens)]
            by_module.append(found)
    rounds = max(map(len, by_module), default=0)
    ordered = [found[i] for i in range(rounds) for found in by_module if i < len(found)]
    if len(ordered) < count:
        raise ValueError(f"the held-out modules have {len(ordered)} suitable functions, {count} were asked for")
    return ordered[:count]


def _functions(name: str, source: str, lines: int) -> list[Prompt]:
    """Return the documented functions and methods of a module that are long enough."""
    rows = source.splitlines(keepends=True)
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or ast.get_docstring(node) is None or len(node.body) < 3:
            continue
        first = node.body[1].lineno - 1
        # The prompt ends where a statement ends.
        cuts = [n.lineno - 1 for n in node.body[2:] if 2 <= n.lineno - 1 - first <= lines]
        end = node.end_lineno or first
        if cuts and end - cuts[-1] >= lines:
            cut = cuts[-1]
            start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
            # One token opens a line together with its indentation, so the line break belongs to the continuation.
            text = "".join(rows[start:cut]).rstrip("\n")
            found.append(Prompt(name, node.name, text, "".join(rows[cut:end])))
    return found


def _fits(prompt: Prompt, tokenizer: Any, tokens: int) -> bool:
    return len(tokenizer(prompt.text, verbose=False)["input_ids"]) <= tokens
