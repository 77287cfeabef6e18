"""Structured prompts that need an attention of their own, beyond who sees whom.

decode -- intercept the model's attention ----------------------------------+
  read (the whole prompts)  --> every layer asks --> SegmentAttention        |  until the call ends
  steps of any strategy     --> every layer asks --> SegmentAttention        |
<---------------------------------------------------------------------------+
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from hf_ext.attention import AttentionStructure, masks_for
from hf_ext.attention.intercept import Attended, intercept
from hf_ext.generation.plain import PlainDecoding
from hf_ext.generation.run import DecodingRun
from hf_ext.generation.set_based_prompting import canonical_order
from hf_ext.generation.speculative.probe import tree_problem
from hf_ext.generation.structured.prompting import Prompt, StructuredPrompting
from hf_ext.generation.structured.spans import Members, sets_of


class SegmentAttention(abc.ABC):
    """What every layer does in place of its own attention, knowing where the segments lie.

    Attributes:
        sets: of every row.
        real: `(batch, columns)` bool, the prompts without padding.
        whole: whether the running forward pass reads the prompts, from their first column on.
    """

    def __init__(self) -> None:
        self.sets: list[list[Members]] = []
        self.whole = False

    def begin(self, prompt: Prompt, structure: AttentionStructure) -> None:
        """Learn what the prompts are.

        Args:
            prompt: the prompts.
            structure: of their segments, as `AttentionStructure.segments` makes it.
        """
        self.real, self.sets = prompt.mask.bool(), sets_of(structure, prompt.ids)

    @property
    def several(self) -> bool:
        """Whether a row has a set of more than one segment; otherwise the prompts are plain ones."""
        return any(len(members.spans) > 1 for row in self.sets for members in row)

    def rows_each(self, query: Tensor, key: Tensor) -> int:
        """Return how many rows of a forward pass go on from each prompt, side by side.

        Raises:
            ValueError: the pass does not go on from these prompts.
        """
        if len(query) % len(self.sets) or key.shape[2] < self.real.shape[1]:
            raise ValueError(
                f"a forward pass of {len(query)} rows and {key.shape[2]} columns does not go on from "
                f"{len(self.sets)} prompts of {self.real.shape[1]} columns; leave out guidance_scale, which reads a "
                "text of its own, and caches that drop tokens"
            )
        return len(query) // len(self.sets)

    @abc.abstractmethod
    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, plain: Any, **call: Any
    ) -> Attended:
        """Attend; see `hf_ext.attention.intercept`."""

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Say that the forward pass inside reads the prompts."""
        self.whole = True
        try:
            yield
        finally:
            self.whole = False


@dataclasses.dataclass
class AttendingPrompting(StructuredPrompting):
    """Base of the methods over structured prompts that bring an attention of their own.

    Args:
        canonical: read the segments of every set sorted by their tokens, so that not even rounding
            depends on their order. The ids returned keep the caller's order.
        decode_with: how to go on after the prompt: greedy search or sampling by default; any strategy for a
            single prompt without padding.
    """

    canonical: bool = True
    _attention: SegmentAttention | None = dataclasses.field(default=None, init=False, repr=False, compare=False)

    @abc.abstractmethod
    def attention(self, model: Any) -> contextlib.AbstractContextManager[SegmentAttention]:
        """Return a context that makes the attention for a call and, at its end, cleans up after it."""

    def reads(self, prompt: Prompt) -> Prompt:
        """Return the prompt with the segments of every set in an order of their own."""
        order = canonical_order(prompt) if self.canonical else None
        if order is None:
            return prompt
        return dataclasses.replace(
            prompt,
            ids=prompt.ids.gather(1, order),
            segments=prompt.segments.gather(1, order),
            groups=None if prompt.groups is None else prompt.groups.gather(1, order),
        )

    def decode(self, run: DecodingRun) -> None:
        """Read the prompt and go on, with this attention in every layer."""
        problem = tree_problem(run.model)
        if problem is not None:
            raise ValueError(f"{type(self).__name__} gives tokens positions and masks of their own: {problem}")
        inner = self.decode_with
        single = len(run.input_ids) == 1 and bool(run.attention_mask.all())
        if inner is not None and not isinstance(inner, PlainDecoding) and not single:
            raise ValueError(
                f"{type(self).__name__} follows a batch, or padding, only in plain decoding; with "
                f"decode_with={type(inner).__name__} give one prompt without padding at a time"
            )
        with self._attending(run.model):
            super().decode(run)

    def read(self, run: DecodingRun, structure: AttentionStructure, ids: Tensor, kwargs: dict[str, Any]) -> ModelOutput:
        """Run the prompt through the model; plain prompts as `generate` does, to the last bit."""
        attention = self._attention
        assert attention is not None  # `decode` has set it
        if not attention.several:
            mask = torch.cat([attention.real, torch.ones_like(ids[:, attention.real.shape[1] :])], dim=1)
            kwargs = {**kwargs, "attention_mask": mask.long()}
        with attention.reading():
            return super().read(run, structure, ids, kwargs)

    @torch.no_grad()
    def forward(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        group_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Run prompts through a model without decoding; segments stay in the caller's order.

        Args:
            model: a decoder-only model.
            input_ids: `(batch, length)` int64, left-padded.
            attention_mask: `(batch, length)`, 0 on padding.
            segment_ids: likewise, a number from 1 on for the tokens of each segment.
            group_ids: likewise, a number from 1 on for each set.
            **kwargs: further arguments of the model's forward.

        Returns:
            The model's output.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        segments = torch.zeros_like(input_ids) if segment_ids is None else segment_ids
        with self._attending(model) as attention:
            structure = self.structure(Prompt(input_ids, mask.bool(), segments, group_ids))
            masks = masks_for(model, structure) if attention.several else mask
            positions = structure.queries.position.long()
            with attention.reading():
                return model(input_ids, attention_mask=masks, position_ids=positions, return_dict=True, **kwargs)

    @contextlib.contextmanager
    def _attending(self, model: Any) -> Iterator[SegmentAttention]:
        with self.attention(model) as made, intercept(model.get_decoder(), made):
            self._attention = made
            try:
                yield made
            finally:
                self._attention = None
