"""The engine of speculative decoding: draft, verify, keep, for every row of a batch at its own pace.

    prompt --target--> first token            texts   "A B C" | root
                          |                              |
       +------------------+                              v
       |             Drafter.propose  ----------->  DraftTree under every root
       |                                                 |
       |             TreeState.extend  (one target forward over root and nodes)
       |                                                 |
       |             verify: walk down along accepted tokens, one token more from the target
       |                                                 |
       +---- TreeState.settle, RaggedRows.accept, Drafter.observe

A drafter that needs nothing of the target drafts its first chain ahead, under the last token of the
prompt, and the target checks it in the call that reads the prompt: one call less a text.

A method says which drafter it has, and which acceptance rule fits how its drafts come about.
"""

from __future__ import annotations

import abc
import dataclasses
import time
from typing import Any, ClassVar

import torch

from hf_ext import adapter
from hf_ext.generation.ragged import RaggedRows
from hf_ext.generation.run import DecodingRun
from hf_ext.generation.speculative.acceptance import deterministic
from hf_ext.generation.speculative.context import DraftContext, Outcome
from hf_ext.generation.speculative.drafter import Drafter, Verified
from hf_ext.generation.speculative.ledger import Ledger
from hf_ext.generation.speculative.probe import length_problem, tree_problem
from hf_ext.generation.speculative.row_cache import write_back
from hf_ext.generation.speculative.tree import DraftTree
from hf_ext.generation.speculative.tree_state import TreeState
from hf_ext.generation.speculative.verifier import Rule, verify
from hf_ext.generation.strategy import DecodingStrategy


@dataclasses.dataclass
class Speculative(DecodingStrategy):
    """Base of all speculative methods: the text is that of `generate`, found in fewer calls of the model.

    With `do_sample=False` the tokens are those of greedy search; with `do_sample=True` they follow
    exactly the law of sampling under the same settings. A subclass defines `drafter` and, for drafts
    drawn at random, sets `rule`.

    Attributes:
        rule: the acceptance rule for sampling; drafts that were not drawn at random by default.
        drafts_with_target: whether drafting calls the target itself, how often depending on the rows.
    """

    encoder_decoder: ClassVar[bool] = False
    rule: ClassVar[Rule] = staticmethod(deterministic)
    drafts_with_target: ClassVar[bool] = False

    @abc.abstractmethod
    def drafter(self, run: DecodingRun) -> Drafter:
        """Return what drafts during one call."""

    def law(self, logits: torch.Tensor, tree: DraftTree, context: DraftContext) -> torch.Tensor:
        """Return the `(lanes, nodes + 1, vocabulary)` logits whose law the text follows; the target's by default."""
        return logits

    def decode(self, run: DecodingRun) -> None:
        """Decode by drafting and verifying."""
        name = type(self).__name__
        if run.synced_gpus and self.drafts_with_target:
            raise ValueError(
                f"{name} drafts with the sharded model itself, and processes would call it in different numbers; use "
                "a method with a draft model of its own, or one process"
            )
        problem = tree_problem(run.model) or length_problem(run)
        if problem is not None:
            raise ValueError(f"{name} evaluates draft trees: {problem}")
        _Loop(self, run).run()


class _Loop:
    """One call."""

    def __init__(self, strategy: Speculative, run: DecodingRun) -> None:
        self.strategy, self.decoding = strategy, run
        self.rows = RaggedRows(run)
        self.ledger = Ledger(run.report, len(run.input_ids))
        self.drafter = strategy.drafter(run)
        self.context = DraftContext(run, self.rows)
        self.finished: dict[int, Any] = {}
        self.waits = 0

    def run(self) -> None:
        """Decode until every row is done, here and in synchronised processes."""
        run = self.decoding
        self._read_prompts()
        # Synchronised processes ask each other before every step; one alone has to when its own rows are done.
        while (self.context.lanes and not run.synced_gpus) or run.running:
            if self.context.lanes:
                self._step()
            else:
                self._wait()
        self._close()

    def _read_prompts(self) -> None:
        """Read the prompts, verify what was drafted ahead, and find the first token of every row."""
        run, context, started = self.decoding, self.context, time.perf_counter()
        ahead = self._draft_ahead()
        guesses = ahead.nodes if ahead is not None else 0
        with self.ledger.time("verify"), self.drafter.reading(run):
            target, outputs = TreeState.from_prompt(run, ahead.tokens if ahead is not None and guesses else None)
        context.target, context.outputs = target, outputs
        prompts = [length - guesses for length in target.lengths]
        self.ledger.prompt(prompts)
        self._prompt_columns = target.columns - guesses
        # Tokens in the cache that are not among the ids: those of an earlier call, or embeddings.
        self._unseen = [n - len(text) for n, text in zip(prompts, context.texts, strict=True)]
        tree = ahead
        if tree is None:
            with self.ledger.time("draft"):
                self.drafter.start(context)
                tree = self.drafter.first(context)
        with self.ledger.time("bookkeeping"):
            raw, rows = outputs.logits[:, -(guesses + 1) :], list(context.lanes)
            logits = self.strategy.law(raw, tree, context)
            outcomes = verify(tree, logits, context, type(self.strategy).rule, raw)
            accepted = [len(outcome.nodes) for outcome in outcomes]
            target.forget([prompt + count for prompt, count in zip(prompts, accepted, strict=True)])
            continues = self._accept(outcomes)
            if len(continues) < len(rows):
                self._drop(continues)
        if ahead is not None:
            with self.ledger.time("draft"):
                self.drafter.observe(context, Verified(ahead, raw, outcomes, continues))
            self.ledger.step(
                rows, [ahead.size(lane) for lane in range(ahead.lanes)], accepted, guesses, self.drafter.calls,
                time.perf_counter() - started, with_prompt=True,
            )  # fmt: skip
        elif len(continues) < len(rows):
            # Lanes that ended with their first token never reach the drafter, which must hear of it.
            none = DraftTree.empty(len(rows), context.device)
            nothing = [Outcome([], [], [], []) for _ in rows]
            with self.ledger.time("draft"):
                self.drafter.observe(context, Verified(none, raw, nothing, continues))

    def _draft_ahead(self) -> DraftTree | None:
        """Draft under the last tokens of the prompts, if the drafter can and the target can take it."""
        if not (self.drafter.ahead and TreeState.takes_ahead(self.decoding, self.drafter.ahead)):
            return None
        with self.ledger.time("draft"):
            self.drafter.start(self.context)
            return self.drafter.propose(self.context)

    def _step(self) -> None:
        context, target, started = self.context, self.context.target, time.perf_counter()
        calls = self.drafter.calls
        with self.ledger.time("draft"):
            tree = self.drafter.propose(context)
        rest = time.perf_counter()
        lines = [[text[-1], *row] for text, row in zip(context.texts, tree.listed, strict=True)]
        tokens = torch.tensor(lines, device=context.device)
        parents = [(-1, *(parent + 1 for parent in row)) for row in tree.parents]
        verifying = time.perf_counter()
        with self.drafter.verifying(context, tree):
            outputs = target.extend(tokens, parents)
        if outputs.logits.is_cuda:
            torch.cuda.synchronize(outputs.logits.device)
        verified = time.perf_counter()
        context.outputs = outputs
        logits = self.strategy.law(outputs.logits, tree, context)
        outcomes = verify(tree, logits, context, type(self.strategy).rule, outputs.logits)
        rows, accepted = list(context.lanes), [len(outcome.nodes) for outcome in outcomes]
        target.settle([[0, *(node + 1 for node in outcome.nodes)] for outcome in outcomes])
        continues = self._accept(outcomes)
        if len(continues) < len(rows):
            self._drop(continues)
        self.ledger.seconds["verify"] += verified - verifying
        self.ledger.seconds["bookkeeping"] += verifying - rest + time.perf_counter() - verified
        with self.ledger.time("draft"):
            self.drafter.observe(context, Verified(tree, outputs.logits, outcomes, continues))
        self.ledger.step(
            rows, [tree.size(lane) for lane in range(tree.lanes)], accepted, tokens.shape[1],
            self.drafter.calls - calls, time.perf_counter() - started,
        )  # fmt: skip

    def _accept(self, outcomes: list[Outcome]) -> list[int]:
        """Append what was found to the rows; return the lanes that go on."""
        context, continues = self.context, []
        for lane, outcome in enumerate(outcomes):
            scores = torch.stack(outcome.scores) if outcome.scores else None
            logits = torch.stack(outcome.logits) if outcome.logits else None
            count, done = context.cut(lane, outcome.tokens, scores)
            tokens = outcome.tokens[:count]
            context.texts[lane] += tokens
            self._check_places(lane)
            self.rows.accept(
                context.lanes[lane], tokens, done,
                None if scores is None else scores[:count], None if logits is None else logits[:count],
            )  # fmt: skip
            if not done:
                continues.append(lane)
        return continues

    def _check_places(self, lane: int) -> None:
        """Raise ValueError if the model has read more tokens of a lane than it has positions for."""
        target, row = self.context.target, self.context.lanes[lane]
        read = len(self.context.texts[lane]) - 1 + self._unseen[row]
        if target.context is not None and read > target.context:
            raise ValueError(
                f"row {row} has got longer than the {target.context} positions of {type(target.model).__name__}; "
                "ask for fewer new tokens or shorten the prompt"
            )

    def _drop(self, continues: list[int]) -> None:
        """Take finished rows out of the batch, so that they cost nothing more."""
        context = self.context
        for lane in set(range(len(context.lanes))) - set(continues):
            if self.decoding.cache_outlives_call:
                # All tokens but the last are in the cache, and maybe some that an end of the row has cut.
                row = context.lanes[lane]
                context.target.lengths[lane] = len(context.texts[lane]) - 1 + self._unseen[row]
                self.finished[row] = context.target.copy_lane(lane)
        if continues:
            context.select(continues)
        else:
            context.lanes, context.texts = [], []

    def _wait(self) -> None:
        """Call the model for nothing but the sake of other processes that still have to."""
        run = self.decoding
        run.model(torch.zeros(1, 1, dtype=torch.long, device=adapter.device_of(run.model)), use_cache=False)
        self.waits += 1

    def _close(self) -> None:
        run, target = self.decoding, self.context.target
        self.rows.finish()
        if run.cache_outlives_call:
            rows = range(len(run.input_ids))
            ends = [self._prompt_columns + self.rows.length(row) - 1 for row in rows]
            write_back(run.cache, [self.finished[row] for row in rows], ends)
        self.ledger.close(
            run.report.target_calls + target.calls + self.waits,
            run.report.target_positions + target.positions + self.waits,
            self.drafter.calls,
            self.drafter.positions,
            [self.rows.length(row) for row in range(len(run.input_ids))],
        )
