"""Bidirectional context: documents that see each other, in the order that attention likes best (arXiv:2505.11754)."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from hf_ext.attention import AttentionStructure, by_hand
from hf_ext.attention.intercept import Attended, intercept, visible
from hf_ext.generation.run import DecodingRun
from hf_ext.generation.strategy import positive
from hf_ext.generation.structured.prompting import Prompt, StructuredPrompting, refuse_moved_columns

#: The documents of one set: for each its columns, in the prompt's order.
Documents = list[list[int]]


@dataclass
class BidirectionalContext(StructuredPrompting):
    """Read the documents of a prompt without the causal mask, and choose the best of several orders of them.

    The documents are the segments of `segment_ids`; those of one set see each other in both directions,
    while instructions and question stay causal. With `orders` above 1 the prompt is read in that many
    orders of its documents, and the text goes on from the one in which attention peaks highest: where the
    last token of the prompt, in the mean over layers and heads, puts most weight on a single token of the
    documents. All orders are read in one call; only the chosen one is decoded. The ids returned keep the
    caller's order.

    `report.details` has the `peaks` of every row's orders, the caller's first, and the `order` of the
    documents, by their numbers in `segment_ids`, that was chosen.

    Args:
        orders: orders that are read, the caller's among them; all of them where there are not so many.
        bidirectional: lift the causal mask among documents; False only chooses among orders.
        seed: of the orders that are drawn.
        decode_with: how to go on after the prompt: any strategy; greedy search or sampling by default.

    Raises:
        ValueError: segments in several pieces, or an attention implementation whose weights cannot be seen.

    Source:
        Huang et al., Masking in Multi-hop QA: An Analysis of How Language Models Perform with Context
        Permutation (ACL 2025).

    Example:
        >>> from hf_ext.generation.structured.set_prompt import SetPrompt
        >>> from hf_ext.testing import tiny_models
        >>> model, tokenizer = tiny_models.shared("llama"), tiny_models.tokenizer()
        >>> inputs = SetPrompt("facts: ", ["a is b. ", "c is d. ", "e is a. "], "e is ").encode(tokenizer)
        >>> strategy = BidirectionalContext(orders=4)
        >>> text = strategy.generate(model, **inputs, max_new_tokens=3, do_sample=False)
        >>> len(strategy.report.details["peaks"][0]), sorted(strategy.report.details["order"][0])
        (4, [1, 2, 3])
    """

    orders: int = 1
    bidirectional: bool = True
    seed: int = 0

    _prompt: Prompt | None = field(default=None, init=False, repr=False, compare=False)  # while a call runs

    def check_options(self) -> None:
        """Raise ValueError for options that make no sense."""
        positive("orders", self.orders)

    def decode(self, run: DecodingRun) -> None:
        """Read the prompt in the best order and go on with `decode_with`."""
        try:
            super().decode(run)
        finally:
            self._prompt = None

    def structure(self, prompt: Prompt) -> AttentionStructure:
        """Return causal attention in which every set of documents is one span; no order changes it."""
        structure = AttentionStructure.causal(prompt.mask)
        structure.segments(prompt.segments, prompt.groups)  # refuses documents in several pieces
        self._prompt = prompt
        return structure.spans(sets_of(prompt)) if self.bidirectional else structure

    def read(self, run: DecodingRun, structure: AttentionStructure, ids: Tensor, kwargs: dict[str, Any]) -> ModelOutput:
        """Read the prompt in several orders and keep the one whose attention peaks highest."""
        prompt = self._prompt
        if self.orders == 1 or prompt is None:
            return super().read(run, structure, ids, kwargs)
        batch, length = prompt.ids.shape
        found = [list(self._orders(documents_of(prompt, row), length)) for row in range(batch)]
        count = max(map(len, found))
        if count > 1:
            refuse_moved_columns(run, type(self).__name__)
        padded = [orders + orders[:1] * (count - len(orders)) for orders in found]
        columns = torch.tensor(padded, device=ids.device).transpose(0, 1)  # orders, batch, length
        more = torch.arange(length, ids.shape[1], device=ids.device).expand(count, batch, -1)  # guesses behind it
        columns = torch.cat([columns, more], dim=-1).flatten(0, 1)
        peak = _Peak((prompt.segments > 0).repeat(count, 1), length - 1)
        given = {name: value if name == "past_key_values" else _repeated(value, batch, count)
                 for name, value in kwargs.items()}  # fmt: skip
        with intercept(run.model.get_decoder(), peak):
            outputs = run.model(ids.repeat(count, 1).gather(1, columns), **given, return_dict=True)
        peaks = peak.highest().view(count, batch).T.tolist()
        peaks = [row[: len(orders)] for row, orders in zip(peaks, found, strict=True)]
        best = [max(range(len(row)), key=row.__getitem__) for row in peaks]
        chosen = [prompt.segments[row, found[row][number]].tolist() for row, number in enumerate(best)]
        run.report.details["peaks"] = peaks
        run.report.details["order"] = [list(dict.fromkeys(number for number in row if number)) for row in chosen]
        run.report.target_positions += (count - 1) * batch * ids.shape[1]
        return _rows(outputs, torch.tensor(best, device=ids.device) * batch + torch.arange(batch, device=ids.device))

    def _orders(self, sets: list[Documents], length: int) -> Iterator[list[int]]:
        """Yield the columns of distinct orders of a prompt's documents, the caller's first."""
        draw = random.Random(self.seed)
        seen: set[tuple[tuple[int, ...], ...]] = set()
        wanted = min(self.orders, math.prod(math.factorial(len(documents)) for documents in sets))
        while len(seen) < wanted:
            picked = tuple(
                tuple(draw.sample(range(len(documents)), len(documents)) if seen else range(len(documents)))
                for documents in sets
            )
            if picked in seen:
                continue
            seen.add(picked)
            columns = list(range(length))
            for order, documents in zip(picked, sets, strict=True):
                moved = [column for number in order for column in documents[number]]
                columns[documents[0][0] : documents[0][0] + len(moved)] = moved
            yield columns


@dataclasses.dataclass
class _Peak:
    """Adds up, over layers, how much a query looks at every key, in the mean over heads.

    Args:
        documents: `(rows, prompt)` bool, the columns among which the peak is looked for.
        query: column of the query.
    """

    documents: Tensor
    query: int
    total: Tensor | None = None
    layers: int = 0

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, plain: Any, **kwargs: Any
    ) -> Attended:
        seen = visible(mask, query, key)[:, :, self.query : self.query + 1]
        last = query[:, :, self.query : self.query + 1]
        weights = by_hand.probabilities(by_hand.scores(last, key, kwargs), seen, kwargs)[..., 0, :].mean(1)
        self.total = weights if self.total is None else self.total + weights
        self.layers += 1
        return plain(module, query, key, value, mask, **kwargs)

    def highest(self) -> Tensor:
        """Return `(rows,)`, the largest mean weight on a token of the documents."""
        if self.total is None:
            raise ValueError("no attention layer was called, so no attention can be compared")
        weights = self.total[:, : self.documents.shape[1]] / self.layers
        return weights.masked_fill(~self.documents, 0).amax(-1)


def _repeated(value: Any, batch: int, count: int) -> Any:
    """Repeat what has a row for each prompt, masks by kind of layer among them."""
    if isinstance(value, dict):
        return {name: _repeated(part, batch, count) for name, part in value.items()}
    if isinstance(value, Tensor) and value.ndim > 1 and len(value) == batch:
        return value.repeat(count, *[1] * (value.ndim - 1))
    return value


def _rows(outputs: ModelOutput, rows: Tensor) -> ModelOutput:
    """Keep some rows of a forward pass and of the cache that it filled."""
    outputs.past_key_values.batch_select_indices(rows)
    outputs.logits = outputs.logits[rows]
    for name in ("hidden_states", "attentions"):
        if outputs.get(name) is not None:
            outputs[name] = tuple(layer[rows] for layer in outputs[name])
    return outputs


def sets_of(prompt: Prompt) -> Tensor:
    """Return `(batch, length)` int64, a number from 1 on for the tokens of each set of segments, 0 outside.

    Example:
        >>> ids = torch.ones(1, 6, dtype=torch.long)
        >>> sets_of(Prompt(ids, ids > 0, torch.tensor([[0, 1, 2, 0, 3, 0]])))
        tensor([[0, 1, 1, 0, 2, 0]])
    """
    if prompt.groups is not None:
        return torch.where(prompt.mask, prompt.groups, 0)
    inside = (prompt.segments > 0) & prompt.mask
    starts = inside.clone()
    starts[:, 1:] &= ~inside[:, :-1]
    return torch.where(inside, starts.long().cumsum(-1), 0)


def documents_of(prompt: Prompt, row: int) -> list[Documents]:
    """Return the documents of a prompt, set by set.

    Example:
        >>> ids = torch.ones(1, 6, dtype=torch.long)
        >>> documents_of(Prompt(ids, ids > 0, torch.tensor([[0, 1, 1, 2, 0, 3]])), 0)
        [[[1, 2], [3]], [[5]]]
    """
    sets: dict[int, dict[int, list[int]]] = {}
    pairs = zip(sets_of(prompt)[row].tolist(), prompt.segments[row].tolist(), strict=True)
    for column, (group, owner) in enumerate(pairs):
        if group:
            sets.setdefault(group, {}).setdefault(owner, []).append(column)
    return [list(documents.values()) for documents in sets.values()]
