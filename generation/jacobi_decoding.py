"""Jacobi decoding: guess a block of tokens, and let the model correct all of them at once until nothing changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_ext.generation.run import DecodingRun
from hf_ext.generation.speculative.context import DraftContext
from hf_ext.generation.speculative.drafter import Drafter, Verified
from hf_ext.generation.speculative.engine import Speculative
from hf_ext.generation.speculative.tree import DraftTree
from hf_ext.generation.strategy import positive

#: What the first guess of a block can be.
GUESSES = ("repeat", "prompt", "pad")


@dataclass
class Block:
    """The guesses behind one row, and when each of its tokens was found.

    Args:
        row: the row of the batch.
        open: places of the block whose tokens are not in the text yet.
        guesses: tokens that are taken to follow the row's text, one for each open place at least.
        since: for each guess the iteration in which it took its value.
        fixed: for every new token the iteration that made it part of the text.
        guessed: for every new token the iteration since which it had been guessed without a change.
    """

    row: int
    open: int
    guesses: list[int]
    since: list[int]
    fixed: list[int]
    guessed: list[int]

    def close(self, tokens: list[int], iteration: int) -> None:
        """Take tokens into the text."""
        for place, token in enumerate(tokens):
            foreseen = place < len(self.guesses) and self.guesses[place] == token
            self.guessed.append(self.since[place] if foreseen else iteration)
            self.fixed.append(iteration)
        self.open = max(self.open - len(tokens), 0)
        self.guesses, self.since = self.guesses[len(tokens) :], self.since[len(tokens) :]

    def correct(self, said: list[int], iteration: int) -> None:
        """Replace guesses by what the target expects in their places."""
        for place, token in enumerate(said):
            if place == len(self.guesses):
                self.guesses.append(token)
                self.since.append(iteration)
            elif token != self.guesses[place]:
                self.guesses[place], self.since[place] = token, iteration


class JacobiDrafter(Drafter):
    """Drafts what the target itself said in the last iteration of the places that are still open.

    Args:
        length: tokens of a block.
        initial: first guess, one of `GUESSES`.
        pad: token of the first guess `"pad"`.
        report: receives the iterations of all tokens.
    """

    def __init__(self, length: int, initial: str, pad: int, report: dict[str, Any]) -> None:
        self.length, self.initial, self.pad, self.report = length, initial, pad, report

    def start(self, context: DraftContext) -> None:
        """Begin with the prompt's call as iteration 0, which finds the first token of every row."""
        self.iteration = 0
        self.proposed: DraftTree | None = None
        self.blocks = [Block(row, 0, [], [], fixed=[0], guessed=[0]) for row in context.lanes]
        self.report["fixed_in"] = [block.fixed for block in self.blocks]
        self.report["guessed_in"] = [block.guessed for block in self.blocks]

    def propose(self, context: DraftContext) -> DraftTree:
        """Draft the guesses; open the next block where the last one is complete."""
        depth = context.useful_depth(self.length)
        chains = []
        for block, text in zip(self.blocks, context.texts, strict=True):
            block.open = block.open or self.length
            while len(block.guesses) < block.open:
                block.guesses.append(self._first_guess(text, len(block.guesses)))
                block.since.append(self.iteration)
            chains.append(block.guesses[: min(depth, block.open)])
        self.proposed = DraftTree.from_lists(chains, [list(range(-1, len(row) - 1)) for row in chains], context.device)
        return self.proposed

    def _first_guess(self, text: list[int], place: int) -> int:
        if self.initial == "pad":
            return self.pad
        return text[-1] if self.initial == "repeat" else text[place % len(text)]

    def observe(self, context: DraftContext, verified: Verified) -> None:
        """Take what the target says at the places that stay open as the next guesses."""
        tree, outcomes = verified.tree, verified.outcomes
        if outcomes[0].tokens:
            self.iteration += 1
            # Of the tree of another drafter only the text counts.
            said = verified.logits.argmax(-1).tolist() if tree is self.proposed else None
            for lane, (block, outcome) in enumerate(zip(self.blocks, outcomes, strict=True)):
                block.close(outcome.tokens, self.iteration)
                if said is not None:
                    block.correct(said[lane][len(outcome.tokens) : tree.size(lane) + 1], self.iteration)
        for block in self.blocks:  # an end of the row may have cut what was accepted
            length = context.rows.length(block.row)
            del block.fixed[length:], block.guessed[length:]
        self.blocks = [self.blocks[lane] for lane in verified.continues]


@dataclass
class JacobiDecoding(Speculative):
    """Greedy decoding as a system of equations, solved for a block of tokens at a time by fixed-point iteration.

    All tokens of a block are guessed. One call of the model gives what should stand in every place if
    the places before were right; that is the next guess. The first place that was wrong is right after
    the call, so a block of `block_tokens` is complete after as many calls at the latest, and earlier
    where later tokens hardly depend on earlier ones. Blocks follow one another and a row stops at its
    end token (the paper's hybrid Gauss-Seidel-Jacobi). It needs no draft model, no training and no
    memory, and finds the text of greedy search; with `do_sample=True` the guesses are drafts like
    others, and the text follows the law of sampling.

    `report.details["fixed_in"]` has for every row and token the iteration (the call of the model, the
    prompt's being 0) that made it part of the text, and `["guessed_in"]` the one since which it had
    been guessed: where that is earlier, it did not depend on the tokens fixed in between.

    Args:
        block_tokens: tokens of a block.
        initial: first guess of a block: `"repeat"` the last token, the beginning of the `"prompt"`, or `"pad"`.

    Raises:
        ValueError: the model cannot forget rejected tokens.

    Source:
        Accelerating Transformer Inference for Translation via Parallel Decoding (arXiv:2305.10427),
        algorithms 2 and 3.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts((6,))
        >>> strategy = JacobiDecoding(block_tokens=4)
        >>> ours = strategy.generate(model, ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
        >>> bool((ours == model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)).all())
        True
        >>> strategy.report.target_calls <= 20, len(strategy.report.details["fixed_in"][0])
        (True, 20)
    """

    block_tokens: int = 8
    initial: str = "repeat"

    def check_options(self) -> None:
        """Raise ValueError for options that make no sense."""
        positive("block_tokens", self.block_tokens)
        if self.initial not in GUESSES:
            raise ValueError(f"initial must be one of {', '.join(GUESSES)}, got {self.initial!r}")

    def drafter(self, run: DecodingRun) -> Drafter:
        """Return a drafter that guesses."""
        return JacobiDrafter(self.block_tokens, self.initial, run.pad_token_id or 0, run.report.details)
