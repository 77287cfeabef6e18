"""Kangaroo: the target's first layers and a trained adapter draft, and stop as soon as they are unsure."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import Cache

from hf_ext.generation.heads.kangaroo import KangarooHead
from hf_ext.generation.run import DecodingRun
from hf_ext.generation.speculative.acceptance import single_draft
from hf_ext.generation.speculative.context import DraftContext
from hf_ext.generation.speculative.drafter import Drafter, Verified
from hf_ext.generation.speculative.headed import HeadedSpeculative
from hf_ext.generation.speculative.row_cache import Columns, RowLayer
from hf_ext.generation.speculative.self_draft import EarlyExitDrafter
from hf_ext.generation.speculative.tree import DraftTree
from hf_ext.generation.speculative.tree_attention import mask_for, structure_of
from hf_ext.generation.speculative.verifier import Rule
from hf_ext.generation.speculative_decoding import check_draft_tokens
from hf_ext.generation.strategy import share
from hf_ext.layers import edited


class Adapter:
    """The head with what it has read of each lane, in a cache of its own that is addressed by row.

    Args:
        head: the head.
        lanes: number of lanes.
    """

    def __init__(self, head: KangarooHead, lanes: int) -> None:
        self.head = head
        self.columns = Columns(lanes, None)
        self.cache = Cache(layers=[RowLayer(self.columns)])
        self.lengths = [0] * lanes
        self.pending = 0

    @torch.no_grad()
    def read(self, states: torch.Tensor) -> torch.Tensor:
        """Read `(lanes, n, hidden)` exit states behind what is there; nothing is kept before `settle`."""
        lanes, count = states.shape[:2]
        here = states.to(self.head.device, self.head.dtype)
        self.columns.aim(self.lengths, self.pending, count, here.device)
        total = self.pending + count
        lengths = tuple(self.lengths)
        chain = tuple(range(-1, total - 1))
        structure = structure_of(lengths, lengths, [chain] * lanes, queries=count, keys=self.columns.stop)
        mask = mask_for("sdpa", structure, here.dtype, here.device)
        starts = torch.tensor([[length + self.pending] for length in self.lengths], device=here.device)
        self.pending = total
        # A forward pass that a Trainer has put under autocast calls this inside of it, the first time is outside.
        with torch.autocast(here.device.type, enabled=False):
            out = self.head(here, starts + torch.arange(count, device=here.device), mask, self.cache)
        return out.to(states.device, states.dtype)

    def settle(self, counts: list[int]) -> None:
        """Keep so many of the tokens read since the last time, of each lane, and forget the rest."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        self.pending = 0

    def select(self, lanes: list[int]) -> None:
        """Go on with these lanes only."""
        self.columns.select(lanes)
        self.lengths = [self.lengths[lane] for lane in lanes]


class KangarooDrafter(EarlyExitDrafter):
    """Drafts with the first layers, the adapter, and the target's own final norm and LM head.

    The adapter stands where the exit is: it turns the exit state into what the target's end reads. Its
    cache needs no pass of its own. It is filled with the prompts' exit states, which are kept while the
    target reads them (one pass of the adapter, nothing of the target), and then by drafting: what it
    has read of a token depends on the text up to it, so accepted tokens simply stay.

    Args:
        head: the adapter.
        length: tokens to draft.
        confidence: draft no further where the likeliest token has a probability below this.
    """

    def __init__(self, head: KangarooHead, length: int, confidence: float) -> None:
        super().__init__(head.config.exit_layer, length, confidence)
        self.head = head
        self._started = False

    @contextlib.contextmanager
    def reading(self, run: DecodingRun) -> Iterator[None]:
        """Keep the exit states of the prompts. Text that a given cache holds already stays unknown to the adapter."""
        passes: list[torch.Tensor] = []  # a prompt may be read in chunks

        def keep(states: torch.Tensor) -> torch.Tensor:
            passes.append(states)
            return states

        mask = run.model_kwargs.get("attention_mask")
        with edited(run.model, {self.exit_layer: keep}):
            yield
        self._prompt = torch.cat(passes, dim=1)
        columns = self._prompt.shape[1]
        if mask is None:
            self._kept = torch.ones(len(self._prompt), columns, dtype=torch.bool, device=self._prompt.device)
        else:
            self._kept = mask[:, mask.shape[1] - columns :].bool().to(self._prompt.device)

    def start(self, context: DraftContext) -> None:
        """Let the adapter read the prompts."""
        self._adapter = Adapter(self.head, len(self._prompt))
        rows = [states[kept] for states, kept in zip(self._prompt, self._kept, strict=True)]
        self._adapter.read(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))
        self._adapter.settle([len(row) for row in rows])
        del self._prompt, self._kept

    @contextlib.contextmanager
    def partly(self, context: DraftContext) -> Iterator[None]:
        """Run the first layers only, then the adapter in place of all the others."""
        with super().partly(context), edited(context.run.model, {self.exit_layer: self._adapter.read}):
            yield

    @contextlib.contextmanager
    def verifying(self, context: DraftContext, tree: DraftTree) -> Iterator[None]:
        """Go on from the exit states. Where nothing was drafted, the adapter reads the root in passing."""
        self._started = True
        with contextlib.ExitStack() as stack:
            stack.enter_context(super().verifying(context, tree))
            if not self._states:
                stack.enter_context(edited(context.run.model, {self.exit_layer: self._read_in_passing}))
            yield

    def _read_in_passing(self, states: torch.Tensor) -> torch.Tensor:
        self._adapter.read(states)
        return states

    def observe(self, context: DraftContext, verified: Verified) -> None:
        """Keep what the adapter has read of the accepted tokens, a different number in every lane."""
        if self._started:
            self._adapter.settle([1 + len(outcome.nodes) for outcome in verified.outcomes])
        if verified.continues and len(verified.continues) < len(verified.outcomes):
            self._adapter.select(verified.continues)


@dataclass
class Kangaroo(HeadedSpeculative):
    """Self-speculation with two early exits: from the layers, by an adapter, and from drafting, when unsure.

    The first `exit_layer` layers of the target and a trained adapter (one attention and two norms) draft
    with the target's own LM head. Drafting a row stops before a token whose likeliest candidate has a
    probability below `confidence`. The other layers then check the drafts in one pass, starting from the
    exit states, so that the first layers and their part of the cache are shared.

    Besides its drafts the adapter reads the exit states of the prompt once, which the target's own pass
    over the prompt provides: its cost is that of one small layer over the prompt.

    Args:
        head: a `KangarooHead` trained for the target, or the folder of a saved one; it says where to exit.
        draft_tokens: tokens drafted a step at most; 0 decodes without drafts.
        confidence: from 0 to 1; 0 never stops.

    Raises:
        ValueError: the head was made for another target, or the model cannot forget rejected tokens.

    Source:
        Kangaroo: Lossless Self-Speculative Decoding via Double Early Exiting (arXiv:2404.18911), sections 3.1
        and 3.2. The threshold decides before a token is drawn, which keeps sampling exact.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
        >>> strategy = Kangaroo(KangarooHead.for_target(model, exit_layer=1), draft_tokens=3)
        >>> ours = model.generate(
        ...     ids, attention_mask=mask, custom_generate=strategy, max_new_tokens=10, do_sample=False)
        >>> bool((ours == model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)).all())
        True
    """

    rule: ClassVar[Rule] = staticmethod(single_draft)
    drafts_with_target: ClassVar[bool] = True
    head_class: ClassVar[type[KangarooHead]] = KangarooHead

    draft_tokens: int = 6
    confidence: float = 0.6

    def check_options(self) -> None:
        """Raise ValueError for options that make no sense."""
        super().check_options()
        check_draft_tokens(self.draft_tokens)
        share("confidence", self.confidence)

    def drafter(self, run: DecodingRun) -> Drafter:
        """Return the first layers and the adapter as a drafter."""
        return KangarooDrafter(self.head_for(run.model), self.draft_tokens, self.confidence)
