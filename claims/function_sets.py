"""Prompts of several functions and the beginning of another, from held-out modules; for claims on structured prompts.

The functions of a module can stand in almost any order, so they are a set: `SetPrompt(imports, functions, half)`.
How well a model goes on is the negative log-likelihood of the other half.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_ext.attention import masks_for
from hf_ext.claims import held_out
from hf_ext.demo.corpus import sources
from hf_ext.generation.structured.prompting import Prompt, StructuredPrompting
from hf_ext.generation.structured.set_prompt import SetPrompt

DATA = "Functions of held-out Python standard library modules, in sets"
#: Tokens of a function at most, functions in a set, tokens of a reference.
LONGEST, MEMBERS, REFERENCE = 128, 4, 24


@dataclass(frozen=True)
class FunctionSet:
    """Functions of one module, and the two halves of one more.

    Args:
        prefix: what stands before them.
        members: the functions.
        suffix: the first half of the other function.
        reference: how it goes on.
    """

    prefix: str
    members: tuple[str, ...]
    suffix: str
    reference: str

    def prompt(self, order: Sequence[int] | None = None) -> SetPrompt:
        """Return the prompt with the functions in an order."""
        if not self.members:
            return SetPrompt(self.prefix + self.suffix)
        chosen = range(len(self.members)) if order is None else order
        return SetPrompt(self.prefix, [self.members[number] for number in chosen], self.suffix)


@functools.cache
def function_sets(count: int, members: int = MEMBERS) -> tuple[FunctionSet, ...]:
    """Return sets of functions that stand side by side in a held-out module, spread evenly over all there are.

    Args:
        count: how many.
        members: functions in a set.

    Raises:
        ValueError: there are fewer.
    """
    tokenizer, found = held_out.load()[1], []
    for source in sources(held_out=True):
        if "/" in source.name:
            continue
        lines = source.text.splitlines(keepends=True)
        functions = []
        for node in ast.parse(source.text).body:
            for child in [node, *(node.body if isinstance(node, ast.ClassDef) else [])]:
                if isinstance(child, ast.FunctionDef) and child.end_lineno and child.end_lineno - child.lineno >= 3:
                    text = "".join(lines[child.lineno - 1 : child.end_lineno])
                    if len(tokenizer(text, verbose=False)["input_ids"]) <= LONGEST:
                        functions.append(text)
        for chosen in _batched(functions, members + 1):
            rows = chosen[-1].splitlines(keepends=True)
            middle = max(1, len(rows) // 2)
            suffix = "\n" + "".join(rows[:middle]).rstrip()
            reference = "\n" + "".join(rows[middle:])
            if len(chosen) == members + 1:
                found.append(FunctionSet("import sys\n", tuple("\n" + text for text in chosen[:-1]), suffix, reference))
    if len(found) < count:
        raise ValueError(f"{len(found)} sets of functions were found, {count} were asked for")
    return tuple(found[i * len(found) // count] for i in range(count))


def _batched(items: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(items[start : start + size]) for start in range(0, len(items), size)]


#: Returns the logits `(1, length, vocabulary)` of a prompt.
Reads = Callable[[dict[str, torch.Tensor]], torch.Tensor]


@torch.no_grad()
def plainly(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Read a prompt as plain text."""
    return held_out.load()[0](inputs["input_ids"]).logits


@torch.no_grad()
def by_structure(strategy: StructuredPrompting) -> Reads:
    """Return what reads prompts by the structure of a strategy, without an attention of its own."""

    def read(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        model = held_out.load()[0]
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        structure = strategy.structure(Prompt(ids, mask, inputs["segment_ids"], inputs["group_ids"]))
        positions = structure.queries.position.long()
        return model(ids, attention_mask=masks_for(model, structure), position_ids=positions).logits

    return read


def loss(read: Reads, given: FunctionSet, order: Sequence[int] | None = None) -> float:
    """Return the mean negative log-likelihood in nats of the first tokens of a reference.

    Args:
        read: how the prompt is read.
        given: the prompt.
        order: of its functions.
    """
    tokenizer = held_out.load()[1]
    inputs: dict[str, Any] = dict(given.prompt(order).encode(tokenizer))
    reference = torch.tensor([tokenizer(given.reference, add_special_tokens=False)["input_ids"][:REFERENCE]])
    more = {"input_ids": reference, "attention_mask": torch.ones_like(reference)}
    whole = {
        name: torch.cat([value, more.get(name, torch.zeros_like(reference))], dim=1) for name, value in inputs.items()
    }
    with torch.no_grad():
        logits = read(whole)[0, -reference.shape[1] - 1 : -1].float()
    return float(torch.nn.functional.cross_entropy(logits, reference[0]))
