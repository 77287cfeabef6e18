"""Draft & Verify: the model drafts for itself with some of its attention and feed-forward parts left out."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from hf_ext.generation.run import DecodingRun
from hf_ext.generation.speculative.acceptance import expected_tokens, single_draft
from hf_ext.generation.speculative.context import DraftContext
from hf_ext.generation.speculative.drafter import Drafter, Verified
from hf_ext.generation.speculative.engine import Speculative
from hf_ext.generation.speculative.self_draft import SelfDrafter
from hf_ext.generation.speculative.sublayers import sublayers, weight_share, without
from hf_ext.generation.speculative.verifier import Rule
from hf_ext.generation.speculative_decoding import check_draft_tokens
from hf_ext.generation.strategy import positive, share

#: How fast the measured acceptance rate and the threshold follow, and the threshold's step.
RATE_INERTIA, THRESHOLD_INERTIA, STEP = 0.5, 0.9, 0.01
#: Parts the search tries at a time, and the share of the best one's agreement below which it gives a part up.
AT_A_TIME, NEARLY = 6, 0.9


class SkippingDrafter(SelfDrafter):
    """Drafts a chain with parts of the target left out, and moves its confidence threshold towards an acceptance rate.

    Args:
        skip: names of the parts.
        length: tokens to draft.
        confidence: threshold at first.
        acceptance: acceptance rate to keep to; None for a threshold that stays.
    """

    def __init__(self, skip: tuple[str, ...], length: int, confidence: float, acceptance: float | None) -> None:
        super().__init__(length, confidence)
        self.skip, self.acceptance = skip, acceptance
        self._rate = acceptance or 0.0

    def partly(self, context: DraftContext) -> AbstractContextManager[None]:
        """Leave the parts out."""
        return without(context.run.model, self.skip)

    def observe(self, context: DraftContext, verified: Verified) -> None:
        """Draft less far when too much was rejected, further when hardly anything was."""
        drafted = sum(verified.tree.size(lane) for lane in range(verified.tree.lanes))
        if self.acceptance is None or not drafted:
            return
        accepted = sum(len(outcome.nodes) for outcome in verified.outcomes)
        self._rate = RATE_INERTIA * self._rate + (1 - RATE_INERTIA) * accepted / drafted
        wanted = self.confidence + (STEP if self._rate <= self.acceptance else -STEP)
        moved = THRESHOLD_INERTIA * self.confidence + (1 - THRESHOLD_INERTIA) * wanted
        self.confidence = min(max(moved, 0.0), 1.0)


@dataclass
class DraftAndVerify(Speculative):
    """Self-speculative decoding: drafts come from the model itself, without some of its parts.

    No second model and no training: a draft pass leaves out the attention and feed-forward parts
    named in `skip`, reads the full model's cache and is checked by the full model. Which parts can
    go is found on some text by `DraftAndVerify.search(model, ids)`, once for a model.

    Args:
        skip: parts to leave out while drafting, such as `("attention.3", "mlp.4")`; both parts of every
            second layer if None. Without any (what `search` returns if no part can go at a gain)
            nothing is drafted.
        draft_tokens: tokens drafted a step at most; 0 decodes without drafts.
        confidence: draft no further where the likeliest token has a probability below this, from 0 to 1.
        acceptance: move that threshold from step to step so that about this share of the drafted
            tokens is accepted; None keeps it where it is.

    Raises:
        ValueError: the model has no such parts, or cannot forget rejected tokens.

    Source:
        Draft & Verify: Lossless Large Language Model Acceleration via Self-Speculative Decoding
        (arXiv:2309.08168), sections 3.2 (which parts; the paper searches by Bayesian optimisation, this
        greedily) and 3.3 (the adaptive threshold).

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
        >>> skip = DraftAndVerify.search(model, ids, mask, trials=20)
        >>> ours = model.generate(
        ...     ids, attention_mask=mask, custom_generate=DraftAndVerify(skip), max_new_tokens=10, do_sample=False)
        >>> bool((ours == model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)).all())
        True
    """

    rule: ClassVar[Rule] = staticmethod(single_draft)
    drafts_with_target: ClassVar[bool] = True

    skip: tuple[str, ...] | None = None
    draft_tokens: int = 6
    confidence: float = 0.4
    acceptance: float | None = 0.8

    def check_options(self) -> None:
        """Raise ValueError for options that make no sense."""
        check_draft_tokens(self.draft_tokens)
        share("confidence", self.confidence)
        if self.acceptance is not None:
            share("acceptance", self.acceptance)
        if isinstance(self.skip, str):
            raise ValueError(f"skip must be names of parts, such as ({self.skip!r},), got the text {self.skip!r}")

    def drafter(self, run: DecodingRun) -> Drafter:
        """Return the model without some of its parts."""
        known = sublayers(run.model)
        skip = every_second_layer(run.model) if self.skip is None else tuple(self.skip)
        unknown = [name for name in skip if name not in known]
        if unknown:
            raise ValueError(f"{type(run.model).__name__} has no part {unknown[0]!r}; it has {', '.join(known)}")
        # A draft pass that leaves nothing out costs as much as the model itself.
        length = self.draft_tokens if skip else 0
        return SkippingDrafter(skip, length, self.confidence, self.acceptance)

    @staticmethod
    @torch.no_grad()
    def search(
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        draft_tokens: int = 6,
        trials: int = 200,
        seed: int = 0,
        progress: Any = None,
    ) -> tuple[str, ...]:
        """Find the parts that a model can do without while it drafts.

        Tries all parts, then some at a time; leaves out the one that is missed least, gives up those that
        are missed much more, goes on until none is left, and returns the set on the way with the
        largest predicted speed-up. That is `E(a) / (1 + draft_tokens * c)`: `a` is the share of
        positions at which the smaller model still has the same likeliest token, `E` the tokens a step
        then yields, and `c` the share of weights that a draft pass reads.

        Args:
            model: the model.
            input_ids: `(rows, length)` text of the kind that will be generated; some hundred tokens do.
            attention_mask: its mask, 0 on padding.
            draft_tokens: length of the drafts to expect.
            trials: forward passes to spend at most; twice the number of parts is usually enough.
            seed: of the order in which parts are tried.
            progress: called with (passes done, passes to do), for a progress bar.

        Returns:
            Names of the parts, for `DraftAndVerify(skip=...)`; empty if nothing can be left out at a gain.
        """
        positive("trials", trials)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        counted = mask.bool()
        full = model(input_ids, attention_mask=mask, use_cache=False).logits.argmax(-1)
        rng = random.Random(seed)
        candidates = list(sublayers(model))
        chosen: list[str] = []
        best: tuple[float, list[str]] = (1.0, [])  # drafting nothing neither gains nor loses
        spent = 0
        while candidates and spent < trials:
            gains, agreements = {}, {}
            most = AT_A_TIME if chosen else trials // 2
            for name in rng.sample(candidates, min(most, len(candidates), trials - spent)):
                with without(model, [*chosen, name]):
                    found = model(input_ids, attention_mask=mask, use_cache=False).logits.argmax(-1)
                agreements[name] = float((found == full)[counted].float().mean())
                cost = weight_share(model, [*chosen, name])
                gains[name] = expected_tokens(agreements[name], draft_tokens) / (1 + draft_tokens * cost)
                spent += 1
                if progress is not None:
                    progress(spent, trials)
            name = max(gains, key=lambda candidate: gains[candidate])
            chosen.append(name)
            # One part less seldom pays by itself, several may.
            best = max(best, (gains[name], list(chosen)), key=lambda pair: pair[0])
            # What is missed much more than others now will not become dispensable when still more is gone.
            enough = NEARLY * agreements[name]
            candidates = [c for c in candidates if c != name and agreements.get(c, 1.0) >= enough]
        return tuple(best[1])


def every_second_layer(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the parts of every second layer, the first and, if there are more than two, the last left in.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> every_second_layer(tiny_models.build("llama", num_hidden_layers=5))
        ('attention.1', 'mlp.1', 'attention.3', 'mlp.3')
    """
    names = sublayers(model)
    count = 1 + max(int(name.split(".")[1]) for name in names)
    layers = range(1, max(count - 1, 2), 2)
    return tuple(name for name in names if int(name.split(".")[1]) in layers)
