"""What a drafter and a verifier see of a speculative decoding call."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

from hf_ext import adapter
from hf_ext.generation.ragged import RaggedRows
from hf_ext.generation.run import DecodingRun
from hf_ext.generation.speculative.tree_state import TreeState

#: Stands for "any number" where lengths are compared.
MANY = 1 << 30


class DraftContext:
    """The rows of a batch that still go on, as lanes, and how scores are made of logits.

    Args:
        run: the decoding call.
        rows: its rows, finished ones included.

    Attributes:
        lanes: for every lane the row of the batch it continues.
        texts: for every lane its tokens so far, padding left out; the last one is the root of the
            next tree, the only one that the target has not read.
        greedy: whether the likeliest token is taken, rather than one drawn.
        device: where tokens and scores live.
        outputs: the target's output for the last tree, or for the prompt.
    """

    outputs: Any

    def __init__(self, run: DecodingRun, rows: RaggedRows) -> None:
        self.run, self.rows = run, rows
        self._target: TreeState | None = None
        self.lanes = list(range(len(run.input_ids)))
        self.greedy = not run.config.do_sample
        self.device = run.input_ids.device
        mask, columns = run.model_kwargs.get("attention_mask"), run.input_ids.shape[1]
        keep = torch.ones_like(run.input_ids) if mask is None else mask[:, mask.shape[1] - columns :]
        self.texts: list[list[int]] = [ids[here.bool()].tolist() for ids, here in zip(run.input_ids, keep, strict=True)]
        self._blind = all(adapter.ignores_ids(processor) for processor in run.logits_processor)
        self._plain = self._blind and not len(run.logits_processor)
        self._eos: set[int] = set()
        self._max_length = MANY
        self._other_criteria = False
        for criterion in run.stopping_criteria:
            if type(criterion) is EosTokenCriteria:
                self._eos |= set(criterion.eos_token_id.flatten().tolist())
            elif type(criterion) is MaxLengthCriteria:
                self._max_length = min(self._max_length, int(criterion.max_length))
            else:
                self._other_criteria = True
        self._most_new = self._max_length - run.prompt_length

    @property
    def target(self) -> TreeState:
        """The target's state, which there is once it has read the prompts."""
        assert self._target is not None, "the target has not read the prompts yet"
        return self._target

    @target.setter
    def target(self, state: TreeState) -> None:
        self._target = state

    @property
    def plain(self) -> bool:
        """Whether no logits processor applies."""
        return self._plain

    def room(self, lane: int) -> int:
        """Return how many tokens the lane's row may still get."""
        return self._most_new - self.rows.length(self.lanes[lane])

    def useful_depth(self, wanted: int) -> int:
        """Return how deep a tree is worth drafting: the last token of a step is not drafted."""
        deepest = max((self.room(lane) - 1 for lane in range(len(self.lanes))), default=0)
        free = None if self._target is None else self._target.room()
        return max(min(wanted, deepest, wanted if free is None else free - 1), 0)

    def useful_nodes(self, wanted: int) -> int:
        """Return how many nodes of `wanted` fit into the cache beside the root."""
        free = self.target.room()
        return wanted if free is None else max(min(wanted, free - 1), 0)

    def process(self, lanes: list[int], prefixes: list[list[int]], logits: torch.Tensor) -> torch.Tensor:
        """Turn logits into scores as `generate` does, in float32.

        Args:
            lanes: the lane of each line of logits.
            prefixes: for each line, tokens that follow the lane's text.
            logits: `(lines, vocabulary)`.

        Returns:
            `(lines, vocabulary)` float32.
        """
        logits = logits.to(device=self.device)
        if self._plain:
            return logits.float()
        if self._blind:
            scores = logits.to(copy=True, dtype=torch.float32)
            ids = self.run.input_ids[:1]
            for processor in self.run.logits_processor:
                scores = processor(ids, scores)
            return scores
        found = []
        # Lines of one lane side by side go through the processors together where they are equally long.
        together = itertools.groupby(range(len(lanes)), lambda line: (lanes[line], len(prefixes[line])))
        for (lane, _), group in together:
            lines = list(group)
            tokens = torch.tensor([prefixes[line] for line in lines], dtype=torch.long, device=self.device)
            found.append(self.rows.process(self.lanes[lane], tokens, logits[lines[0] : lines[-1] + 1]))
        return torch.cat(found)

    def cut(self, lane: int, tokens: list[int], scores: torch.Tensor | None) -> tuple[int, bool]:
        """Find the end of a row in tokens that have been accepted.

        Args:
            lane: the lane.
            tokens: new tokens, at least one.
            scores: `(tokens, vocabulary)` their scores, where the caller wants scores.

        Returns:
            How many of the tokens belong to the row, and whether it is done with them.
        """
        room = self.room(lane)
        for count, token in enumerate(tokens, start=1):
            if token in self._eos or count >= room:
                last = count
                break
        else:
            last = 0
        if self._other_criteria:
            row = self.lanes[lane]
            for count in range(1, (last or len(tokens)) + 1):
                so_far = torch.tensor([tokens[:count]], device=self.device)
                history = None if scores is None else scores[None, :count]
                if bool(self.rows.done(row, so_far, history)):
                    return count, True
        return (last, True) if last else (len(tokens), False)

    def select(self, lanes: list[int]) -> None:
        """Go on with these lanes only."""
        self.lanes = [self.lanes[lane] for lane in lanes]
        self.texts = [self.texts[lane] for lane in lanes]
        self.target.select(lanes)


@dataclass
class Outcome:
    """What became of the tree of one lane.

    Args:
        nodes: accepted nodes, from the top down.
        tokens: accepted tokens and the one that follows them.
        scores: the scores each of the tokens was chosen from, `(vocabulary,)` each; empty if unwanted.
        logits: likewise the raw logits.
    """

    nodes: list[int]
    tokens: list[int]
    scores: list[torch.Tensor]
    logits: list[torch.Tensor]
